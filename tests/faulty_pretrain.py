"""Runs launch/pretrain.py with faults.

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

from maskdiff.checkpoints import checkpoint
from maskdiff.training import evaluation, inputs, step

faults = json.loads(sys.argv.pop(1))
if faults.get('process') not in (
  None,
  int(os.environ.get('JAX_PROCESS_ID', 0)),
):
  faults = {'step_s': faults.get('step_s', 0)}
last_step = 0


def replace(owner, name):
  def put(function):
    real = getattr(owner, name)
    setattr(owner, name, lambda *args, **kw: function(real, *args, **kw))

  return put


def terminate(now, phase):
  if faults.get('term') == [now, phase]:
    os.kill(os.getpid(), signal.SIGTERM)


@replace(inputs, 'train_batches')
def late(real, *args):
  stalled, stall_s = faults.get('stall', (0, 0))
  for number, batch in enumerate(real(*args), 1):
    time.sleep(faults.get('step_s', 0))
    if number == stalled:
      time.sleep(stall_s)
    yield batch


@replace(step, 'train_step')
def poisoned(real, c, optimizer, state, tokens, key):
  now = state.step + 1
  gradients = step.batch_gradients

  def with_poison(*args):
    tree, sums = gradients(*args)
    during = lambda steps: jnp.isin(now, jnp.array(faults.get(steps, [-1])))
    scale = jnp.where(during('spike_steps'), 1000.0, 1.0)
    sums = sums._replace(weighted_nll=sums.weighted_nll * scale)
    scale = jnp.where(during('nan_steps'), jnp.nan, scale)
    return jax.tree.map(lambda g: g * scale, tree), sums

  step.batch_gradients = with_poison
  try:
    return real(c, optimizer, state, tokens, key)
  finally:
    step.batch_gradients = gradients


@replace(step, 'compile_train_step')
def watched(real, *args):
  compiled = real(*args)

  class Lowered:
    def __init__(self, lowered):
      self.lowered = lowered

    def compile(self):
      terminate(0, 'compile')
      return stepping(self.lowered.compile())

  class Jitted:
    def lower(self, *args):
      return Lowered(compiled.lower(*args))

  return Jitted()


def stepping(executable):
  class Counted:
    memory_analysis = staticmethod(executable.memory_analysis)

    def __call__(self, state, *args):
      global last_step
      last_step = int(state.step) + 1
      terminate(last_step, 'step')
      return executable(state, *args)

  return Counted()


@replace(evaluation, 'evaluate')
def interrupted(real, *args, **kw):
  terminate(last_step, 'eval')
  return real(*args, **kw)


@replace(checkpoint.Checkpointer, 'save')
def killed(real, self, number, *args):
  terminate(number, 'save')
  if 'kill_s' in faults and number >= faults['kill_at']:
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    threading.Timer(faults['kill_s'], kill).start()
  return real(self, number, *args)


sys.argv[0] = str(pathlib.Path(__file__).parents[1] / 'launch' / 'pretrain.py')
runpy.run_path(sys.argv[0], run_name='__main__')
