"""Policy optimization, a stage of the training loop.

A round draws prompts of a task, samples a group of answers to each with the
live parameters, computes their rewards and advantages, and trains on all of
them for `config.policy.inner_steps` steps. The position of the stage is

    {'round': r, 'inner': i, 'rollout': {...}}

with the answers of the round, their advantages, and the log-probabilities that
do not change during the round. They are stored because they cannot be computed
again: after the first inner step, the parameters that sampled the answers are
gone. At the start of a round the position has no rollout.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from maskdiff.interop import load
from maskdiff.model import lora
from maskdiff.monitoring import terminal
from maskdiff.posttraining import finetuning
from maskdiff.rl import advantages as advantages_lib
from maskdiff.rl import (
  policy_step,
  programs,
  reference,
  rollouts,
  round_metrics,
  scoring,
  stage_config,
  table,
  trace,
)
from maskdiff.sampling.settings import sampler_config
from maskdiff.training import inputs
from maskdiff.training import step as step_lib
from maskdiff.training.run_setup import RunSetup
from maskdiff.training.stage import Evaluation, Stage, compile_step


class _Opened(NamedTuple):
  """Objects that are constant during a run."""

  config: ConfigDict
  setup: RunSetup
  c: policy_step.PolicyConfig
  questions: scoring.Questions
  programs: programs.Programs
  reference: dict | None  # parameters; None: not needed, or the base


def make_stage(config, setup):
  """Opens task, reward, reference and tokenizer; returns the Stage.

  Args:
    config: ConfigDict, such as one from `stage_config.complete`.
    setup: RunSetup.

  Raises:
    UserError: the config has no model to start from; or task, reward, method,
      sampler, tokenizer or reference do not fit it.
  """
  tokenizer = inputs.open_tokenizer(config)
  stage_config.check(config, tokenizer)
  c = stage_config.policy_config(config)
  questions = scoring.open_questions(config, tokenizer)
  o = _Opened(
    config=config,
    setup=setup,
    c=c,
    questions=questions,
    programs=programs.make(config, setup, c),
    reference=reference.load_reference(config, setup.mesh)
    if c.reference
    else None,
  )
  measured = {}  # round -> metrics of its rollouts, until they are written

  def next_batch(position, params):
    number, inner = position['round'], position['inner']
    if 'rollout' not in position:
      with setup.ledger.span('rollout'):
        rollout, measured[number] = _round(o, number, params)
      position = position | {'rollout': rollout}
    step = np.array([number, inner], np.int32)
    batch = o.programs.choose(position['rollout'], step)
    following = position | {'inner': inner + 1}
    if inner + 1 == c.inner_steps:
      following = {'round': number + 1, 'inner': 0}
    return batch, following, {'round': number, 'inner': inner}

  def compile(state, batch, key):
    jitted = step_lib.compile_train_step(
      step_lib.step_config(config),
      setup.optimizer,
      setup.mesh,
      functools.partial(policy_step.gradients, c),
      policy_step.shardings(c, setup.mesh)[0],
    )
    return compile_step(jitted, state, batch, key)

  # Several microbatches take a pass without gradients first.
  passes = o.programs.copies * (1 + (c.microbatches > 1))

  def row(metrics, facts, step_s):
    numbers = sorted({f['round'] for f in facts})
    of_rounds = [measured.pop(n) for n in numbers if n in measured]
    return round_metrics.row(metrics, of_rounds, passes * config.train.batch)

  identity = stage_config.identity(config, questions, tokenizer)
  if o.reference is not None:
    identity['reference'] = reference.digest(o.reference)
  files = {}
  if questions.template is not None:
    files = finetuning.template_files(questions.template, tokenizer)
  return Stage(
    name='policy optimization',
    identity=identity,
    header=stage_config.header(config, questions, o.programs.copies),
    tokenizer=tokenizer,
    start={'round': 0, 'inner': 0},
    next_batch=next_batch,
    compile=compile,
    evaluate=functools.partial(_evaluate, o),
    row=row,
    line=round_metrics.line,
    loss_name='loss_policy',
    first_row=lambda batch: tokenizer.decode(
      inputs.first_row(batch, setup.mesh)
    ),
    panels=round_metrics.PANELS,
    files=files,
  )


def _round(o, number, params):
  """Samples the answers of a round and computes their rewards.

  Args:
    o: _Opened.
    number: of the round.
    params: parameter tree of the policy.

  Returns:
    The rollout, a dict of arrays; and its metrics, a dict of floats.

  Raises:
    UserError: the reward failed on all answers, or logits were not finite.
  """
  config, p, group = o.config, o.config.policy, o.config.policy.group
  questions, prompts = o.questions.draw(f'{config.seed}-{number}', p.prompts)
  answers, texts = _answer(o, params, number, prompts, group)
  asked = [question for question in questions for _ in range(group)]
  rewards = o.questions.score(asked, texts)
  scoring.require_rewards(o.questions.reward.name, rewards)
  arrays = rollouts.arrays(answers.recordings, config.data.length)
  arrays['advantages'] = _advantages(p, rewards.total)
  rollout = programs.place(o.setup.mesh, arrays)
  _check_copies(o, rollout)
  o.setup.between()
  fixed = _fixed_log_probs(o, params, rollout, number)
  if fixed is not None:
    rollout['log_probs'] = jax.block_until_ready(fixed)
  measured = round_metrics.of_round(config, answers, rewards, group)
  if measured['train/empty_groups'] == 1 and jax.process_index() == 0:
    terminal.warn(
      f'warning: all {len(texts)} answers of round {number} are empty; if this '
      'continues, set --config.sample.logits_eos_inf=True, or start from a '
      'model that answers'
    )
  passes = len(o.c.fixed_steps) * len(o.c.fixed_networks) * o.programs.copies
  measured['fixed_forwards'] = passes * len(texts)
  return rollout, measured


def _answer(o, params, number, prompts, group, **changes):
  """Samples answers.

  Args:
    o: _Opened.
    params: parameter tree of the policy.
    number: of the round, or 'heldout'.
    prompts: list of token lists.
    group: answers per prompt.
    **changes: settings of the sampler that differ from config.sample.

  Returns:
    rollouts.Answers, and a list of texts.
  """
  config = o.config
  c, settings = sampler_config(config)
  requests = rollouts.requests(
    config.seed,
    number,
    prompts,
    group,
    config.sample.gen_length,
    settings._replace(**changes),
  )
  found = rollouts.sample(
    load.network(config, o.programs.copy(params)),
    c,
    requests,
    config.policy.sampling_rows or config.train.batch,
    config.data.length,
    o.setup.between,
  )
  ends = o.questions.end_ids
  tokens = [rollouts.answer_tokens(r, ends) for r in found.recordings]
  return found, [o.questions.decode(ids) for ids in tokens]


def _advantages(p, rewards):
  """Returns the advantages of all answers of a round, [N] float32."""
  method = table.find(p.method)
  found = advantages_lib.advantages(
    rewards.astype(np.float32),
    p.group,
    method.baseline if p.baseline == 'published' else p.baseline,
    method.deviation if p.deviation == 'published' else p.deviation,
  )
  return np.asarray(found)


def _fixed_log_probs(o, params, rollout, number):
  """Returns `policy_step.fixed_log_probs`; None if none are needed."""
  if not (o.c.fixed_steps and o.c.fixed_networks):
    return None
  base = lora.base(params) if o.reference is None else o.reference
  of = {'old': params, 'reference': base}
  trees = [of[name] for name in o.c.fixed_networks]
  return o.programs.fixed(trees, rollout, np.int32(number))


def _check_copies(o, rollout):
  """Raises UserError if the setting `copies` leaves tokens without a copy."""
  method, s = table.find(o.c.method), o.c.settings
  in_order = method.draw is trace.left_to_right
  if s.copies and (in_order or method.needs_steps):
    rows = o.programs.to_rows(rollout)
    rows = trace.in_order(rows) if in_order else rows
    trace.check_copies(o.c.network, s, rows)


def _evaluate(o, step, params, average):
  """Answers held-out questions; returns an Evaluation."""
  config, number = o.config, o.config.eval.answers
  if not number:
    text = 'no held-out questions: config.eval.answers=0'
    return Evaluation({}, [], text, text)
  questions, prompts = o.questions.draw(
    f'{config.seed}-heldout', number, heldout=True
  )
  temperature = config.policy.eval_temperature
  changes = {'temperature': temperature}
  if not temperature:  # nothing is drawn
    changes |= {'top_k': 0, 'top_p': 1.0}
  row, texts = {}, []
  for name, tree in (('', params), ('ema_', average)):
    if tree is None:
      continue
    _, answers = _answer(o, tree, 'heldout', prompts, 1, **changes)
    rewards = o.questions.score(questions, answers)
    row |= round_metrics.of_rewards(rewards, f'eval/{name}')
    texts = texts or [
      f'{question["prompt"]}{answer}'
      for question, answer in zip(questions, answers, strict=True)
    ]
  line = f'held-out reward {row["eval/reward"]:.3f}'
  if 'eval/correct' in row:
    line += f', correct {row["eval/correct"]:.1%}'
  line += f' of {number}'
  return Evaluation(row, texts[: round_metrics.SHOWN], line, line)
