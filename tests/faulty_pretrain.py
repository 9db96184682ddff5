"""Runs launch/pretrain.py with faults, a stage around the stage of pretraining.

python faulty_pretrain.py FAULTS FLAGS...

FAULTS is a JSON object. All keys are optional:
  step_s: delay of every batch, in seconds.
  process: index of the process to which all keys except step_s apply; default:
    all processes.
  stall: [n, seconds]: extra delay of batch n.
  nan_steps: steps with a gradient of NaN.
  spike_steps: steps with loss and gradient 1000 times too large.
  kill_s: seconds from the start of a save until the process kills itself.
  kill_at: first step whose save starts this timer.
  term: [step, phase]: the process sends itself SIGTERM in this phase of this
    step; a phase is compile, step, eval or save.
"""

import dataclasses
import functools
import json
import os
import pathlib
import runpy
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp

from maskdiff import config as config_lib
from maskdiff.training import pretraining, step

PRETRAIN = pathlib.Path(__file__).parents[1] / 'launch' / 'pretrain.py'


def faulty(faults, config, setup):
  """Returns the Stage of pretraining with faults.

  Args:
    faults: dict, see the module.
    config, setup: see `pretraining.make_stage`.
  """
  gradients = functools.partial(poisoned, faults)
  stage = pretraining.make_stage(config, setup, gradients)
  batches = 0

  def terminate(step, phase):
    if faults.get('term') == [step, phase]:
      os.kill(os.getpid(), signal.SIGTERM)

  def late(position, params):
    nonlocal batches
    batches += 1
    time.sleep(faults.get('step_s', 0))
    stalled, stall_s = faults.get('stall', (0, 0))
    if batches == stalled:
      time.sleep(stall_s)
    return stage.next_batch(position, params)

  def compile(state, batch, key):
    terminate(0, 'compile')
    train_step, line = stage.compile(state, batch, key)

    def watched(state, batch, key):
      terminate(int(state.step) + 1, 'step')
      return train_step(state, batch, key)

    return watched, line

  def evaluate(step, params, average):
    terminate(step, 'eval')
    return stage.evaluate(step, params, average)

  def saving(step):
    stage.saving(step)
    terminate(step, 'save')
    if 'kill_s' in faults and step >= faults['kill_at']:
      kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
      threading.Timer(faults['kill_s'], kill).start()

  return dataclasses.replace(
    stage, next_batch=late, compile=compile, evaluate=evaluate, saving=saving
  )


def poisoned(faults, c, state, batch, key):
  """Returns gradients and sums, too large or NaN at the steps of the faults."""
  tree, sums = step.batch_gradients(c, state.params, batch, key)
  now = state.step + 1
  during = lambda steps: jnp.isin(now, jnp.array(faults.get(steps, [-1])))
  scale = jnp.where(during('spike_steps'), 1000.0, 1.0)
  sums = sums._replace(weighted_nll=sums.weighted_nll * scale)
  scale = jnp.where(during('nan_steps'), jnp.nan, scale)
  return jax.tree.map(lambda g: g * scale, tree), sums


def main():
  faults = json.loads(sys.argv.pop(1))
  process = int(os.environ.get('JAX_PROCESS_ID', 0))
  if faults.get('process', process) != process:
    faults = {'step_s': faults.get('step_s', 0)}
  script = runpy.run_path(str(PRETRAIN))
  make_stage = functools.partial(faulty, faults)
  config_lib.run_script(
    functools.partial(script['main'], make_stage=make_stage)
  )


if __name__ == '__main__':
  main()
