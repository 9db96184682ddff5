"""Writes the metrics, progress, samples and skipped updates of a run."""

import collections
import contextlib
import time
from typing import NamedTuple

import jax
import numpy as np

from maskdiff.errors import UserError
from maskdiff.monitoring import metrics, skipped, terminal
from maskdiff.training.optimizer import OptimizerConfig, learning_rate


class _Done(NamedTuple):
  """A dispatched step: its number, StepMetrics, and the facts of its batch."""

  step: int
  metrics: object
  facts: dict


class Reporter:
  """Writes a run's metrics to disk, TensorBoard, wandb and the terminal.

  Pending steps are the steps since the last call of `write`. Their metrics stay
  on the device until `write` fetches them. The stage decides which metrics a
  row holds, and formats the line of progress.
  """

  def __init__(self, config, stage, workdir, start, ledger):
    """Opens the files and the progress bar.

    Args:
      config: ConfigDict of the run.
      stage: Stage.
      workdir: work directory.
      start: resume.Start.
      ledger: Ledger.
    """
    steps = config.train.steps
    self._stage, self._workdir = stage, workdir
    self._start, self._ledger = start, ledger
    self._max_in_a_row = config.guard.max_in_a_row
    self._main_process = jax.process_index() == 0
    self._finished = start.step >= steps  # metrics.jsonl is complete already
    # On the host, so that reading a rate does not wait for a step.
    rates = jax.vmap(learning_rate(OptimizerConfig(**config.optimizer), steps))
    self._learning_rates = np.asarray(rates(np.arange(steps)))
    self._pending = collections.deque()
    self._skipped = collections.deque(maxlen=self._max_in_a_row)
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
    if not text:
      return
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

  def add(self, step, step_metrics, facts):
    """Adds a dispatched step to the pending steps.

    Args:
      step: int.
      step_metrics: StepMetrics on the device.
      facts: facts of the batch, see `Stage.next_batch`.
    """
    self._pending.append(_Done(step, step_metrics, facts))

  def wait(self, step):
    """Waits until a pending step has ended on the device.

    The loop dispatches one step ahead. If more steps were queued, a checkpoint
    after SIGTERM would have to wait for all of them.
    """
    for done in self._pending:
      if done.step == step:
        with self._ledger.span('step'):
          jax.block_until_ready(done.metrics)

  def write(self, step):
    """Fetches and writes the metrics of the pending steps up to a step.

    Raises:
      UserError: config.guard.max_in_a_row consecutive updates were skipped.
    """
    done = []
    with self._ledger.span('step'):
      while self._pending and self._pending[0].step <= step:
        first = self._pending.popleft()
        done.append(first._replace(metrics=jax.device_get(first.metrics)))
    if not done:
      return
    steps, fetched, facts = (list(x) for x in zip(*done, strict=True))
    now = time.monotonic()
    step_s, self._clock = (now - self._clock) / len(done), now
    num_updates = step - 1 - int(fetched[-1].skipped_before)
    row = update_row(fetched, self._learning_rates[num_updates], step_s)
    row |= self._stage.row(fetched, facts, step_s)
    self._writer.scalars(step, row)
    self._ledger.write(step)
    if self._main_process:
      self._progress.update(step, step_s, self._stage.line(row))
    self._write_skipped(steps, fetched, facts)

  def _write_skipped(self, steps, fetched, facts):
    """Writes the skipped updates; raises UserError after too many in a row."""
    stage = self._stage
    for update in skipped.find(steps, fetched, facts, stage.loss_name):
      self._ledger.event('skipped', **update)
      self.say(skipped.describe(update))
      self._skipped.append(update)
      if update['in_a_row'] >= self._max_in_a_row:
        last = list(self._skipped)[-update['in_a_row'] :]
        read_texts = self._main_process and stage.read_texts
        raise UserError(
          skipped.give_up(self._workdir, last, read_texts, stage.remedy)
        )

  def write_evaluation(self, step, result):
    """Writes and prints an evaluation.

    Args:
      step: int.
      result: stage.Evaluation.
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


def update_row(fetched, learning_rate, step_s):
  """Returns the metrics of the updates of some steps, a dict of floats.

  The gradient norm is the maximum over the applied updates. Skipped updates are
  only counted.

  Args:
    fetched: list of StepMetrics on the host.
    learning_rate: learning rate of the last step.
    step_s: seconds per step.
  """
  norms = [f.grad_norm for f in fetched if not f.skipped]
  row = {
    'train/param_norm': float(fetched[-1].param_norm),
    'train/learning_rate': float(learning_rate),
    'train/step_s': step_s,
    'train/skipped_updates': len(fetched) - len(norms),
  }
  return row | ({'train/grad_norm': float(max(norms))} if norms else {})
