"""Preference learning, a stage of the training loop.

A batch has `config.train.batch` pairs of a chosen and a rejected answer to a
prompt, the rows of launch/prepare.py --layout=pairs. The loss of a pair
compares both answers with a reference (VRPO, which is DPO with bounds instead
of log-likelihoods). The log-probabilities of the reference are computed for
each batch, with the masks of the policy.

Masks are keyed by (seed of the run, pairs consumed before the batch, row), and
on held-out pairs by the number of the batch. The position of the stage is the
number of pairs consumed, as in pretraining.

Letters in shapes: P pairs; N = 2 P rows; L positions of a row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.data import pipeline, rows
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.model import lora
from maskdiff.posttraining import finetuning
from maskdiff.rl import (
  pair_metrics,
  policy_step,
  programs,
  reference,
  stage_config,
  table,
)
from maskdiff.rl.batch import Batch
from maskdiff.training import evaluation, inputs, pretraining
from maskdiff.training.run_setup import RunSetup
from maskdiff.training.stage import Evaluation, Stage

NAME = 'preference learning'


class _Opened(NamedTuple):
  """Objects that are constant during a run."""

  setup: RunSetup
  reference: dict | None  # parameters; None: the base of the adapters
  # (parameters of the reference, Rows, [2] int32) -> PolicyRows.
  to_batch: Callable
  to_heldout_batch: Callable  # the same, with masks for held-out pairs
  measure: Callable  # (parameters, PolicyRows) -> PolicySums
  heldout: list  # evaluation.Heldout


def complete(config, given=()):
  """Returns a config with the model of config.init_from, see finetuning.

  `data.length` becomes half of the tokens of the prepared rows, since each has
  two answers.

  Args:
    config: ConfigDict of --config with its flags.
    given: dotted keys that flags have set; they keep their values.

  Raises:
    UserError: the method is not for pairs; config.init_from or config.data.path
      is missing or cannot be read; or a flag sets another length.
  """
  finetuning.require_inputs(config, NAME, ' --layout=pairs')
  if not table.find(config.policy.method).pairs:
    pairs = [name for name, m in table.METHODS.items() if m.pairs]
    raise UserError(
      f'--config.policy.method={config.policy.method} learns from rewards: use '
      f'launch/rl.py, or set --config.policy.method to {" or ".join(pairs)}'
    )
  length = config.data.length
  rest = [key for key in given if key != 'data.length']
  config = finetuning.complete(config, rest)
  config.data.length //= 2
  if 'data.length' in given and length != config.data.length:
    raise UserError(
      f'--config.data.length={length}: the rows of {config.data.path} have '
      f'{config.data.length} tokens for each answer; remove the flag'
    )
  return config


def make_stage(config, setup):
  """Opens tokenizer, pairs and reference; returns the Stage.

  Args:
    config: ConfigDict, such as one from `complete`.
    setup: RunSetup.

  Raises:
    UserError: config.data.path has no pairs; or tokenizer, method or reference
      do not fit the model.
  """
  finetuning.require_inputs(config, NAME, ' --layout=pairs')
  tokenizer = inputs.open_tokenizer(config)
  stage_config.check_model(config, tokenizer)
  c = dataclasses.replace(stage_config.policy_config(config), inner_steps=1)
  of_pairs = _with_rows_of_pairs(config)
  datasets = _open_data(of_pairs, tokenizer)
  eval_datasets = datasets
  if config.eval.path:
    eval_datasets = _open_data(of_pairs, tokenizer, config.eval.path)
  o = _open(config, setup, c, of_pairs, eval_datasets)
  next_rows = pretraining.in_order(
    functools.partial(inputs.train_batches, of_pairs, datasets, setup.mesh),
    config.train.batch,
    config.data.skip_samples,
  )

  def next_batch(position, params):
    pairs, end, facts = next_rows(position, params)
    step = np.array([position % 2**31, 0], np.int32)
    return o.to_batch(_reference(o, params), pairs, step), end, facts

  def read_texts(facts):
    tokens = inputs.read_samples(of_pairs, datasets, *facts['samples'])
    return [tokenizer.decode(row) for row in tokens]

  length = of_pairs.data.length
  p, digest = config.policy, ''
  if o.reference is not None:
    digest = reference.digest(o.reference)
  copies = len(
    jax.eval_shape(functools.partial(_masks, c), o.heldout[0].batches[0])
  )
  return Stage(
    name=NAME,
    identity={
      **pipeline.fingerprint(datasets, seed=config.seed, length=length),
      'policy.method': p.method,
      'policy.settings': p.settings,
      'reference': digest,
    },
    header=f'{pretraining.header(of_pairs, datasets)}\n{NAME}: '
    f'{stage_config.described(config, copies)}',
    tokenizer=tokenizer,
    start=0,
    next_batch=next_batch,
    compile=functools.partial(programs.compile_train_step, config, setup, c),
    evaluate=functools.partial(_evaluate, o),
    row=functools.partial(pair_metrics.row, config.train.batch),
    line=pair_metrics.line,
    loss_name='loss_policy',
    first_row=lambda batch: tokenizer.decode(
      inputs.first_row(batch, setup.mesh)
    ),
    read_texts=read_texts,
    remedy=pretraining.remedy,
    panels=pair_metrics.PANELS,
    files=finetuning.chat_files(config, tokenizer),
  )


def _with_rows_of_pairs(config):
  """Returns the config whose rows are pairs, of twice the length."""
  changed = config.copy_and_resolve_references()
  changed.data.length *= 2
  return changed


def _open_data(of_pairs, tokenizer, path=None):
  """Returns the datasets of a path; raises UserError if they do not fit."""
  found = inputs.open_data(of_pairs, tokenizer, path, rows.COLUMNS, pairs=True)
  for dataset in found:
    if dataset.manifest.row_length != of_pairs.data.length:
      raise UserError(
        f'the rows of {dataset.directory} have '
        f'{dataset.manifest.row_length // 2} tokens for each answer, but '
        f'config.data.length={of_pairs.data.length // 2}: prepare all pairs '
        f'with --row_length={of_pairs.data.length}'
      )
  return found


def _open(config, setup, c, of_pairs, datasets):
  """Returns _Opened; the held-out pairs are those of the datasets."""
  of_heldout = dataclasses.replace(c, seed=pipeline.HELDOUT_SEED)
  sharding = policy_step.shardings(c, setup.mesh)[0]
  compiled = lambda c: jax.jit(
    functools.partial(_to_batch, c), out_shardings=sharding
  )
  return _Opened(
    setup=setup,
    reference=reference.load_reference(config, setup.mesh),
    to_batch=compiled(c),
    to_heldout_batch=compiled(of_heldout),
    measure=jax.jit(
      functools.partial(policy_step.measure, of_heldout),
      out_shardings=mesh_lib.replicated(setup.mesh),
    ),
    heldout=evaluation.open_heldout(of_pairs, datasets, setup.mesh),
  )


def answers(pairs):
  """Returns the Batch of the answers of pairs, chosen, rejected, chosen, ...

  Args:
    pairs: Rows of [P, 2 L]; each half has a prompt and an answer.

  Returns:
    Batch of [2 P, L].
  """
  cut = lambda x: x.reshape(2 * len(x), -1)
  answer = cut(pairs.answer)
  return Batch(cut(pairs.tokens), cut(pairs.doc) >= 0, answer, answer)


def _to_batch(c, params, pairs, step):
  """Returns PolicyRows; params are those of the reference."""
  batch = answers(pairs)
  fixed = policy_step.fixed_log_probs(c, [params], batch, step[0])
  none = jnp.zeros(len(batch.tokens))
  return policy_step.choose(c, batch, none, fixed, step)


def _masks(c, pairs):
  """Returns the masks of a batch, [n, N, L]."""
  return policy_step.draw(c, answers(pairs), jnp.zeros(2, jnp.int32)).masked


def _reference(o, params):
  return lora.base(params) if o.reference is None else o.reference


def _evaluate(o, step, params, average):
  """Computes the metrics of held-out pairs; returns an Evaluation."""
  row = {}
  for name, tree in (('', params), ('ema_', average)):
    if tree is not None:
      found = _measure(o, tree)
      row |= {f'eval/{name}{key}': value for key, value in found.items()}
  text = pair_metrics.conclusion(row)
  return Evaluation(row, [], text, text)


def _measure(o, params):
  """Returns the means of metrics over held-out batches, a dict of floats."""
  total = {}
  for heldout in o.heldout:
    for i, pairs in enumerate(heldout.batches):
      o.setup.between()
      step = np.array([i, 0], np.int32)
      batch = o.to_heldout_batch(_reference(o, params), pairs, step)
      share = heldout.share / len(heldout.batches)
      for name, value in o.measure(params, batch).metrics.items():
        total[name] = total.get(name, 0.0) + share * float(value)
  return total
