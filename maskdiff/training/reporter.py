"""Writes the metrics, progress, samples and skipped updates of a run."""

import collections
import contextlib
import time

import jax
import numpy as np

from maskdiff.errors import UserError
from maskdiff.monitoring import metrics, skipped, terminal
from maskdiff.objectives import table
from maskdiff.training import evaluation, inputs
from maskdiff.training.optimizer import OptimizerConfig, learning_rate


class Reporter:
  """Writes a run's metrics to disk, TensorBoard, wandb and the terminal.

  The window holds the metrics of all steps since the last call of `write`. They
  stay on the device until `write` fetches them.
  """

  def __init__(self, config, setup, workdir, start, ledger):
    """Opens the files and the progress bar.

    Args:
      config: ConfigDict of the run.
      setup: RunSetup.
      workdir: work directory.
      start: resume.Start.
      ledger: Ledger.
    """
    c, steps = setup.c, config.train.steps
    self._config, self._setup, self._workdir = config, setup, workdir
    self._start, self._ledger = start, ledger
    self._main_process = jax.process_index() == 0
    self._finished = start.step >= steps  # metrics.jsonl is complete already
    self._flops = table.flops_per_token(c.objective.name, c.model, c.length)
    # On the host, so that reading a rate does not wait for a step.
    rates = jax.vmap(learning_rate(OptimizerConfig(**config.optimizer), steps))
    self._learning_rates = np.asarray(rates(np.arange(steps)))
    self._window = collections.deque()
    self._skipped = collections.deque(maxlen=config.guard.max_in_a_row)
    self._clock = time.monotonic()
    self._writer = metrics.Writer(
      workdir,
      start.step,
      self._main_process,
      '' if self._finished else config.train.wandb_project,
      config.to_dict(),
    )
    self._progress = terminal.Progress(start.step, steps, self._main_process)

  def say(self, text):
    """Prints a message on standard error, in process 0 only."""
    self._progress.say(text)

  def write_first_row(self, text):
    """Prints the text of the first row of the first batch."""
    self.say(f'first row of the first batch:\n{text}\n')
    if self._start.step == 0:
      self._writer.text(0, 'first_row', text)

  def start_clock(self):
    """Starts to measure the step time."""
    self._clock = time.monotonic()

  @contextlib.contextmanager
  def clock_stopped(self):
    """Context manager that excludes its time from the step time."""
    began = time.monotonic()
    yield
    self._clock += time.monotonic() - began

  def add(self, step_metrics):
    """Adds the StepMetrics of a step, on the device, to the window."""
    self._window.append(step_metrics)

  def wait(self):
    """Waits until the last step of the window has ended on the device.

    The loop dispatches one step ahead. If more steps were queued, a checkpoint
    after SIGTERM would have to wait for all of them.
    """
    if self._window:
      with self._ledger.span('step'):
        jax.block_until_ready(self._window[-1])

  def write(self, step):
    """Fetches and writes the metrics of the window; `step` is its last step.

    Raises:
      UserError: config.guard.max_in_a_row consecutive updates were skipped.
    """
    if not self._window:
      return
    with self._ledger.span('step'):
      fetched = [
        jax.device_get(self._window.popleft()) for _ in range(len(self._window))
      ]
    now = time.monotonic()
    step_s, self._clock = (now - self._clock) / len(fetched), now
    tokens_per_s = self._config.train.batch * self._setup.c.length / step_s
    mfu = metrics.utilization(
      tokens_per_s, self._flops, self._setup.mesh.devices.flatten()
    )
    num_updates = step - 1 - int(fetched[-1].skipped_before)
    row = train_row(fetched, self._learning_rates[num_updates], step_s)
    row |= {'train/tokens_per_s': tokens_per_s}
    row |= {} if mfu is None else {'train/mfu': mfu}
    self._writer.scalars(step, row)
    self._ledger.write(step)
    loss = row.get('train/loss_nats_per_token', float('nan'))
    self._progress.update(
      step,
      step_s,
      f'loss {loss:.3f} nats/token  '
      f'lr {row["train/learning_rate"]:.2e}  '
      f'{tokens_per_s:,.0f} tokens/s' + (f'  mfu {mfu:.1%}' if mfu else ''),
    )
    self._write_skipped(step, fetched)

  def _write_skipped(self, step, fetched):
    """Writes the skipped updates; raises UserError after too many in a row."""
    samples_after = lambda s: inputs.samples_after(self._config, self._start, s)
    limit = self._config.guard.max_in_a_row
    for update in skipped.find(step, fetched, samples_after):
      self._ledger.event('skipped', **update)
      self.say(skipped.describe(update))
      self._skipped.append(update)
      if update['in_a_row'] >= limit:
        last = list(self._skipped)[-update['in_a_row'] :]
        read_texts = self._main_process and self._read_texts
        raise UserError(skipped.give_up(self._workdir, last, read_texts))

  def _read_texts(self, first, end):
    """Returns the texts of training samples first, ..., end - 1."""
    rows = inputs.read_samples(self._config, self._setup.datasets, first, end)
    return [self._setup.tokenizer.decode(row) for row in rows]

  def write_evaluation(self, step, result):
    """Writes and prints an evaluation.

    Args:
      step: int.
      result: evaluation.Evaluation.
    """
    if not self._finished:
      self._writer.scalars(step, result.row)
    self.say(f'step {step}: {result.line}')
    for i, text in enumerate(result.texts):
      if not self._finished:
        self._writer.text(step, f'sample/{i}', text)
      self.say(f'--- sample ---\n{text}\n--------------')

  def write_preempted(self, step):
    """Records that the run is preempted and that `step` is saved."""
    self._ledger.event('preempted')
    self.say(f'preempted: step {step} is saved')

  def close(self):
    """Closes the progress bar and the files."""
    self._progress.close()
    self._writer.close()


def train_row(fetched, learning_rate, step_s):
  """Returns the metrics of a window of steps by name, a dict of floats.

  The loss is the mean over the applied updates, the gradient norm their
  maximum. Skipped updates are only counted.

  Args:
    fetched: list of StepMetrics on the host.
    learning_rate: learning rate of the last step.
    step_s: seconds per step.
  """
  applied = [f for f in fetched if not f.skipped]
  row = {
    'train/param_norm': float(fetched[-1].param_norm),
    'train/learning_rate': float(learning_rate),
    'train/step_s': step_s,
    'train/skipped_updates': len(fetched) - len(applied),
  }
  if not applied:
    return row
  total = jax.tree.map(lambda *x: np.sum(x, axis=0), *[f.sums for f in applied])
  ratios = evaluation.nll_by_mask_ratio(total)
  return row | {
    'train/loss_nats_per_token': float(total.loss),
    'train/grad_norm': float(max(f.grad_norm for f in applied)),
    'train/masked_share': float(total.num_predicted / total.num_tokens),
    **evaluation.ratio_metrics('train', ratios),
  }
