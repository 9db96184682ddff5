"""The interface between the training loop and a stage, such as pretraining.

`loop.run(config, workdir, make_stage)` owns devices, train state, checkpoints,
preemption, ledger and metrics. It knows no stage. The stage owns the rest:
where batches come from, what is compiled, what is evaluated, and what a row of
metrics holds. `pretraining.py` is the first stage. To write another one, write
a function

    make_stage(config, setup) -> Stage

where `config` is the ConfigDict of the run and `setup` the RunSetup
(`run_setup.py`) with the mesh, the optimizer and the ledger. A stage that
differs in a few places can replace fields of another: `dataclasses.replace(
pretraining.make_stage(config, setup), name=..., next_batch=...)`.

All functions of a stage are called in every process, at the same places and
under `jax.set_mesh(setup.mesh)`, unless their description says otherwise.
During long work, `next_batch` and `evaluate` call `setup.between()` from time
to time, equally often in every process. The call resets the timer of stalls. It
raises an exception if the run has received SIGTERM; the stage must not catch
this exception.
"""

import dataclasses
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Stage:
  """Data, loss, evaluation and metrics of a training, for the training loop.

  Attributes:
    name: such as 'pretraining'. A run resumes only with the stage of its
      checkpoint.
    identity: dict of JSON values that determine the batches, such as a hash of
      the data. All processes must agree on it, and a run resumes only with the
      same identity, unless config.data.allow_change is set.
    header: text about the data; the last lines of header.txt.
    tokenizer: data.tokenizer.Tokenizer; copied to the work directory.
    start: position of the stage in a new run. The position of a stage says how
      far the stage has come, unlike a position in a row. It is saved in
      checkpoints, so it is a number, or a dict from names to numbers, strings,
      jax.Arrays on the mesh and nested dicts (`checkpoints/position.py`).
      Restored arrays are replicated on the mesh.
    next_batch: (position, params) -> (batch, next position, facts).
      position: position of the stage. A checkpoint may still be saved with it,
        so its arrays must not be donated.
      params: parameters after the step before the batch. They may still be
        computed on the device, and are donated to the next step, so the stage
        must not keep them.
      batch: tree of arrays on the mesh, the same shapes at every step.
      facts: dict from names to Python numbers or ranges (first, end), such as
        {'samples': (64, 128)}. Passed to `row`; written to the ledger and
        printed if the guard skips the update. A name does not begin with 'loss'
        and is not step, grad_norm, in_a_row, name, event, time or seconds.
      The same position and parameters must give the same batch: this makes a
      resumed run exact. The loop calls `next_batch` while the device computes
      the previous step. Its time counts as `data`; use `setup.ledger.span` for
      another kind of time, such as 'rollout'.
    compile: (state, batch, key) -> (train step, line). The train step maps
      (state, batch, key) to the next TrainState and a step.StepMetrics, whose
      `sums` may be another NamedTuple with a property `loss`. It donates the
      state and nothing else. Its method `as_text()` returns the HLO text of the
      program that the next call runs. The line is printed; see `compile_step`.
    evaluate: (step, params, average) -> Evaluation. `average` is the moving
      average of the parameters, a tree like `params`; None if the run keeps
      none. Called at the first step, every config.eval.every_steps and at the
      last step; calls `setup.between`.
    row: (metrics, facts, step_s) -> row of metrics of several consecutive
      steps, a dict of floats by name. `metrics` is a list of step.StepMetrics
      on the host, `facts` a list with the facts of the same steps, and `step_s`
      the seconds per step. The loop adds learning rate, step time, norms and
      the number of skipped updates. Called without a mesh.
    line: row of metrics -> text for the line of progress. Process 0 only.
    first_row: batch -> text of its first row, printed at the start; '' for
      none.
    loss_name: name of `sums.loss` in reports of skipped updates; begins with
      'loss' and ends with the unit.
    read_texts: facts -> list of the texts of the batch, for the file about
      skipped updates. Process 0 only.
    remedy: (facts of the first, facts of the last skipped update) -> advice on
      how to leave these batches out: a sentence, or ''.
    saving: step -> None. Called when the save of a checkpoint begins, for
      files that the stage writes itself. Called without a mesh.
    panels: panels of the report, drawn before the panels that every run has;
      each is a Curve of monitoring/stage_file.py, or a name of FIGURES in
      monitoring/curves.py.
    files: bytes of small files of the work directory, by name.
  """

  name: str
  identity: dict
  header: str
  tokenizer: object
  start: object
  next_batch: Callable
  compile: Callable
  evaluate: Callable
  row: Callable
  line: Callable = lambda row: ''
  first_row: Callable = lambda batch: ''
  loss_name: str = 'loss_nats_per_token'
  read_texts: Callable = lambda facts: []
  remedy: Callable = lambda first, last: ''
  saving: Callable = lambda step: None
  panels: tuple = ()
  files: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Result of one evaluation during a run.

  Attributes:
    row: dict of floats by name of metric.
    texts: list of samples.
    line: summary, one line for the terminal.
    conclusion: lines to print if this is the last evaluation.
  """

  row: dict
  texts: list
  line: str
  conclusion: str


def compile_step(jitted, *args):
  """Compiles a jitted train step for given arguments.

  Args:
    jitted: jitted train step.
    *args: its arguments: arrays, or their shapes with shardings.

  Returns:
    The compiled function; and a line with the seconds of compilation and the
    memory that a device needs.
  """
  began = time.monotonic()
  compiled = jitted.lower(*args).compile()
  memory = compiled.memory_analysis()
  return compiled, (
    f'compiled the train step in {time.monotonic() - began:.0f} s; a device '
    f'holds {memory.argument_size_in_bytes / 2**30:.2f} GiB of arguments and '
    f'{memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries'
  )
