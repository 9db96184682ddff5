"""Pretraining, the first stage: batches of prepared rows, the held-out bound.

Its position is the number of training samples consumed, and its identity the
fingerprint of the data.
"""

import collections
import functools

import jax
import numpy as np

from maskdiff.data import pipeline
from maskdiff.errors import UserError
from maskdiff.monitoring import history, stage_file
from maskdiff.monitoring import metrics as metrics_lib
from maskdiff.objectives import table
from maskdiff.training import evaluation, inputs
from maskdiff.training import phases as phases_lib
from maskdiff.training import step as step_lib
from maskdiff.training.stage import Stage

OTHER_LOSS_PANEL = stage_file.Curve(
  id='objective',
  title='Training objective',
  note='Not the bound: config.objective has other times or weights. Compare '
  'runs by their held-out loss.',
  key=history.OTHER_LOSS,
  smooth=True,
  reduce='mean',
  from_zero=False,
)


OPEN_PAIRS_PANEL = stage_file.Curve(
  id='open_pairs',
  title='Open pairs',
  note='Share of pairs of a query and a later key that are open in training '
  '(config.objective.anneal_steps). The held-out bound always has all.',
  key='train/open_pairs',
)
BLOCK_LENGTH_PANEL = stage_file.Curve(
  id='block_length',
  title='Block length of the training',
  note='Tokens per block (config.objective.block_plan). The training loss of '
  'longer blocks is larger; the held-out bound always has the last length.',
  key='train/block_length',
)


def make_stage(config, setup, gradients=None, columns=()):
  """Opens tokenizer and data of a config; returns the Stage of pretraining.

  Args:
    config: ConfigDict.
    setup: RunSetup.
    gradients: see `step.train_step`.
    columns: names of columns that the rows must have; see `inputs.open_data`.

  Raises:
    UserError: the tokenizer or the data do not fit the config, or the config
      counts epochs.
  """
  if config.train.epochs:
    raise UserError(
      f'config.train.epochs={config.train.epochs} is for launch/finetune.py; '
      'set --config.train.epochs=0 and --config.train.steps'
    )
  c, mesh = step_lib.step_config(config), setup.mesh
  phases = phases_lib.phases(config)
  first = phases_lib.with_phase(c, phases[0])
  tokenizer = inputs.open_tokenizer(config)
  datasets = inputs.open_data(config, tokenizer, columns=columns)
  identity = pipeline.fingerprint(datasets, seed=config.seed, length=c.length)
  eval_datasets = datasets
  if config.eval.path:
    eval_datasets = inputs.open_data(
      config, tokenizer, config.eval.path, columns
    )
  heldout = evaluation.open_heldout(config, eval_datasets, mesh)

  done = collections.deque()  # numbers of steps without a row of metrics

  def compile(state, batch, key):
    number = int(state.step)  # of the next step
    step_of, line = phases_lib.compile_steps(
      config, c, setup.optimizer, mesh, gradients, state, batch, key
    )

    def train_step(state, batch, key):
      nonlocal number
      done.append(number)
      number += 1
      return step_of(done[-1])(state, batch, key)

    train_step.as_text = lambda: step_of(number).as_text()
    return train_step, line

  def row_of(metrics, facts, step_s):
    steps = [done.popleft() for _ in metrics[: len(done)]]
    return row(config, c, mesh, metrics, facts, step_s, steps)

  def evaluate(step, params, average):
    return evaluation.evaluate_and_sample(
      config, c, params, tokenizer, heldout, setup.between, average
    )

  def read_texts(facts):
    rows = inputs.read_samples(config, datasets, *facts['samples'])
    return [tokenizer.decode(row) for row in rows]

  return Stage(
    name='pretraining',
    identity=identity,
    header=header(config, datasets),
    tokenizer=tokenizer,
    start=0,
    next_batch=in_order(
      functools.partial(inputs.train_batches, config, datasets, mesh),
      config.train.batch,
      config.data.skip_samples,
    ),
    compile=compile,
    evaluate=evaluate,
    row=row_of,
    line=line,
    loss_name='loss_nats_per_row'
    if c.objective.denominator == 'batch'
    else 'loss_nats_per_token',
    first_row=lambda batch: tokenizer.decode(inputs.first_row(batch, mesh)),
    read_texts=read_texts,
    remedy=remedy,
    panels=(
      *(
        OTHER_LOSS_PANEL
        if p == 'training' and loss_name(first) == history.OTHER_LOSS
        else p
        for p in stage_file.PRETRAINING
      ),
      *([BLOCK_LENGTH_PANEL] if config.objective.block_plan else []),
      *([OPEN_PAIRS_PANEL] if config.objective.anneal_steps else []),
    ),
  )


def loss_name(c):
  """Returns the name of the metric of the training loss.

  A loss that is not the bound during the whole training has another name.

  Args:
    c: StepConfig of the first phase.
  """
  objective = table.OBJECTIVES[c.objective.name]
  if objective.drafts:
    return history.OTHER_LOSS
  exact = objective.likelihood == 'exact'
  return (
    history.BOUND if exact or c.objective.is_bound(0) else history.OTHER_LOSS
  )


def in_order(open_batches, batch, skip):
  """Returns `Stage.next_batch` over an endless iterator that reads ahead.

  The position is the number of samples consumed. The iterator stays open while
  each call continues where the previous call ended. A call with another
  position closes it and opens a new iterator at that position.

  Args:
    open_batches: (number of samples consumed) -> iterator of batches.
    batch: samples per batch.
    skip: (first, end) ranges of sample numbers to skip.
  """
  batches, end = None, None  # the open iterator, and its position

  def next_batch(position, params):
    nonlocal batches, end
    if position != end:
      # Ends the threads that read ahead, if the iterator has any.
      getattr(batches, 'close', lambda: None)()
      batches = open_batches(position)
    rows = next(batches)
    end = int(pipeline.sample_number(position, batch, skip))
    return rows, end, {'samples': (position, end)}

  return next_batch


def row(config, c, mesh, metrics, facts, step_s, steps=()):
  """Returns the row of metrics of some steps; see `Stage.row`.

  The loss is the mean over the applied updates.

  Args:
    config: ConfigDict.
    c: its StepConfig.
    mesh: device mesh.
    metrics: see `Stage.row`.
    facts: see `Stage.row`.
    step_s: see `Stage.row`.
    steps: numbers of the steps, from 0; by default they are of the last phase.
  """
  plan, values = phases_lib.phases(config), {}
  first = phases_lib.with_phase(c, plan[0])
  applied = [m.sums for m in metrics if not m.skipped]
  if applied:
    total = jax.tree.map(lambda *x: np.sum(x, axis=0), *applied)
    values = {
      loss_name(first): float(total.nats_per_token),
      **loss_parts(c, total),
    }
    # Drafts are counted by their weights.
    if not table.OBJECTIVES[c.objective.name].drafts:
      share = total.num_predicted / total.num_tokens
      values['train/masked_share'] = float(share)
    for part, nll in evaluation.nll_of_parts(total).items():
      values[f'train/{part}'] = nll
  tokens_per_s = config.train.batch * c.length / step_s
  values['train/tokens_per_s'] = tokens_per_s
  of_steps = [
    phases_lib.with_phase(c, phases_lib.at(plan, step)).objective
    for step in steps
  ] or [c.objective]
  flops = np.mean(
    [table.flops_per_token(o, c.model, c.length) for o in of_steps]
  )
  if config.objective.block_plan:
    values['train/block_length'] = float(of_steps[-1].block_length)
  if config.objective.anneal_steps and steps:
    share = (steps[-1] + 1) / config.objective.anneal_steps
    values['train/open_pairs'] = min(share, 1.0)
  mfu = metrics_lib.utilization(tokens_per_s, flops, mesh.devices.flatten())
  return values if mfu is None else values | {'train/mfu': mfu}


def loss_parts(c, sums):
  """Returns the metrics of the parts of a loss with an autoregressive part.

  Args:
    c: StepConfig.
    sums: step.LossSums on the host.

  Returns:
    dict: the loss of the noisy copy, which is the bound if its weights are, or
    of the drafts; and the negative log-likelihood per token that the clean copy
    predicts, or the network. {} if the loss has one part.
  """
  if sums.next_nll is None:
    return {}
  objective = table.OBJECTIVES[c.objective.name]
  next_part = objective.next_weight(c.objective, c.length) * sums.next_nll
  diffusion = (sums.weighted_nll - next_part) / sums.num_tokens
  name = 'draft' if objective.drafts else 'diffusion'
  return {
    f'train/{name}_nats_per_token': float(diffusion),
    'train/autoregressive_nats_per_token': float(
      sums.next_nll / sums.next_count
    ),
  }


def line(row):
  """Returns loss, learning rate and throughput of a row of metrics."""
  name = history.OTHER_LOSS if history.OTHER_LOSS in row else history.BOUND
  label, loss = 'loss' if name == history.BOUND else 'objective', row.get(name)
  mfu = row.get('train/mfu')
  return (
    'no update applied  '
    if loss is None
    else f'{label} {loss:.3f} nats/token  '
  ) + (
    f'lr {row["train/learning_rate"]:.2e}  '
    f'{row["train/tokens_per_s"]:,.0f} tokens/s'
    + (f'  mfu {mfu:.1%}' if mfu else '')
  )


def remedy(first, last):
  """Returns the flag that leaves out the samples of skipped updates."""
  return (
    'To leave these samples out: --config.data.skip_samples="(('
    f'{first["samples"][0]}, {last["samples"][1]}),)"'
  )


def header(config, datasets):
  """Returns a line for each dataset: its size, and the epochs of the run.

  Args:
    config: ConfigDict.
    datasets: from `inputs.open_data`.
  """
  weights = sum(d.weight for d in datasets)
  lines = []
  for d in datasets:
    train, share = d.manifest.splits['train'], d.weight / weights
    read = config.train.steps * config.train.batch * config.data.length * share
    epochs = read / (train.rows * d.manifest.row_length)
    lines.append(
      f'data: {d.manifest.source}, {d.directory}: an epoch has '
      f'{train.tokens:,} tokens of {train.text_bytes / train.tokens:.2f} bytes '
      f'in {len(train.shards)} shards; this run reads '
      f'{epochs:.2f} epochs'
      + (f', {share:.2%} of its tokens' if len(datasets) > 1 else '')
    )
  return '\n'.join(lines)
