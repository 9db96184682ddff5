"""Compares checkpoints with copies of the same arrays and with plain Orbax.

python benchmarks/checkpoint.py [--parameters 1e8] [--moments float32]
  [--rounds 3] [--directory D]

The state is random float32 parameters and two moments in 12 layers. Prints
medians over alternating rounds:
(a) the time for which `save` blocks the caller, compared with a copy of the
    arrays to new host memory, and with a train step of configs/150m.py
    (1.5e8 parameters) on 512 tokens;
(b) the time of the fingerprints, as a share of a save until it is durable; the
    time that they add to a save, as the median difference between saves with
    and without them; and a save compared with plain Orbax;
(c) restoring with verification, compared with restoring by plain Orbax.
The restored state must equal the saved state. Needs memory and disk space for
2.5 times the state.
"""

import argparse
import contextlib
import functools
import gc
import pathlib
import runpy
import shutil
import statistics
import tempfile
import time
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from maskdiff.checkpoints import checkpoint
from maskdiff.checkpoints.fingerprint import fingerprints
from maskdiff.checkpoints.manifest import Meta
from maskdiff.data.rows import Rows
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.model import transformer
from maskdiff.training import optimizer, train_state
from maskdiff.training import step as step_lib

LAYERS = 12


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--parameters', type=float, default=1e8)
  parser.add_argument(
    '--moments', default='float32', choices=['float32', 'bfloat16']
  )
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--directory', help='directory on the disk to measure')
  args = parser.parse_args()
  logging.set_verbosity(logging.ERROR)
  step_s = train_step_s(args.rounds)
  make = functools.partial(random_state, int(args.parameters), args.moments)
  leaves = jax.tree.leaves(jax.eval_shape(make))
  size = sum(x.size * x.dtype.itemsize for x in leaves)
  with tempfile.TemporaryDirectory(dir=args.directory) as folder:
    free = shutil.disk_usage(folder).free
    if free < 2.5 * size:
      parser.error(
        f'{folder} has {free / 1e9:.1f} GB free, but the benchmark needs '
        f'{2.5 * size / 1e9:.1f} GB'
      )
    kind = jax.devices()[0].device_kind
    print(f'{kind}, {len(leaves)} arrays, {size / 1e9:.2f} GB', flush=True)
    report(measure(make, pathlib.Path(folder), args.rounds), step_s)


def train_step_s(rounds, rows=2, length=256):
  """Returns the median seconds of a train step."""
  path = pathlib.Path(__file__).parents[1] / 'configs' / '150m.py'
  config = runpy.run_path(str(path))['get_config']()
  config.data.length = length
  c = step_lib.step_config(config)
  tx = optimizer.make_optimizer(
    optimizer.OptimizerConfig(**config.optimizer),
    config.train.steps,
    transformer.axes(c.model),
  )
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  batch = Rows(np.full((rows, length), 9, np.int32))
  key, times = jax.random.key(0), []
  with jax.set_mesh(mesh):
    state = jax.jit(functools.partial(train_state.init, c.model, tx))(key)
    update = step_lib.compile_train_step(c, tx, mesh)
    for _ in range(rounds + 1):
      began = time.perf_counter()
      state, _ = jax.block_until_ready(update(state, batch, key))
      times.append(time.perf_counter() - began)
  return statistics.median(times[1:])


def random_state(parameters, moments):
  """Returns random arrays: parameters of a transformer, and two moments."""
  width = max(int((parameters / LAYERS / 12) ** 0.5), 1)
  shapes = {
    **{name: (LAYERS, width, width) for name in 'qkvo'},
    **{name: (LAYERS, width, 4 * width) for name in ('gate', 'up')},
  }

  @functools.partial(jax.jit, static_argnums=1)
  def tree(seed, dtype):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
      name: jax.random.normal(key, shape).astype(dtype)
      for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

  optimizer = {'mu': tree(1, moments), 'nu': tree(2, moments)}
  return {'params': tree(0, 'float32'), 'opt_state': optimizer}


def measure(make, folder, rounds):
  """Measures saving and restoring.

  Args:
    make: function that makes the state. It is called before each save, because
      the memory of restored arrays is slower to read.
    folder: on the disk to measure.
    rounds: int.

  Returns:
    Dict from a name to a list of seconds, one per round.
  """
  state = make()
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  before = jax.device_get(fingerprints(state))
  del state
  seconds = {}

  @contextlib.contextmanager
  def timed(name, count):
    began = time.perf_counter()
    yield
    if count:
      seconds.setdefault(name, []).append(time.perf_counter() - began)

  for number in range(1, rounds + 2):
    # The first round fills caches and compiles.
    time_it = functools.partial(timed, count=number > 1)
    state = jax.block_until_ready(make())
    with time_it('copy'):
      for x in jax.tree.leaves(state):
        np.array(x, copy=True)
    with time_it('fingerprints'):
      jax.device_get(fingerprints(state))

    # Alternate the order of saves with and without fingerprints.
    if number % 2:
      save_without(state, folder, number, time_it)
    checkpointer = checkpoint.Checkpointer(folder / 'maskdiff', keep=1)
    with time_it('save'):
      with time_it('save: blocked'):
        checkpointer.save(number, state, Meta())
      checkpointer.finish()
    del state
    meta = checkpointer.read_meta(number)
    with time_it('restore'):
      trees = jax.block_until_ready(
        checkpointer.restore(number, meta, **abstract)
      )
    restored = dict(zip(abstract, trees, strict=True))
    assert jax.device_get(fingerprints(restored)) == before
    del trees, restored
    checkpointer.close()
    shutil.rmtree(folder / 'maskdiff')
    gc.collect()  # free states in reference cycles: memory is scarce
    state = jax.block_until_ready(make())
    if not number % 2:
      save_without(state, folder, number, time_it)

    with ocp.CheckpointManager(folder / 'bare', options=keep_one()) as bare:
      save = ocp.args.Composite(
        **{k: ocp.args.StandardSave(v) for k, v in state.items()}
      )
      with time_it('bare save'):
        with time_it('bare save: blocked'):
          bare.save(number, args=save)
        bare.wait_until_finished()
      del save, state
      restore = ocp.args.Composite(
        **{k: ocp.args.StandardRestore(v) for k, v in abstract.items()}
      )
      with time_it('bare restore'):
        restored = bare.restore(number, args=restore)
        jax.block_until_ready([restored[k] for k in abstract])
      del restored
    shutil.rmtree(folder / 'bare')
    gc.collect()
  return seconds


def save_without(state, folder, number, time_it):
  """Saves with the constant 0 in place of computed fingerprints."""
  zeros = lambda tree: jax.tree.map(lambda x: np.uint32(0), tree)
  with mock.patch.object(checkpoint, 'fingerprints', zeros):
    checkpointer = checkpoint.Checkpointer(folder / 'without', keep=1)
    with time_it('save without'):
      checkpointer.save(number, state, Meta())
      checkpointer.finish()
    checkpointer.close()
  shutil.rmtree(folder / 'without')


def keep_one():
  return ocp.CheckpointManagerOptions(max_to_keep=1)


def report(seconds, step_s):
  """Prints the medians."""
  s = {name: statistics.median(times) for name, times in seconds.items()}
  pairs = zip(seconds['save'], seconds['save without'], strict=True)
  differences = [a - b for a, b in pairs]
  added = statistics.median(differences)
  quartiles = statistics.quantiles([*differences, added])
  print(
    f'save blocks the caller for {s["save: blocked"]:.3f} s, '
    f'{s["save: blocked"] / s["copy"]:.2f} times a copy to the host '
    f'({s["copy"]:.3f} s) and {s["save: blocked"] / step_s:.1%} of a step '
    f'({step_s:.2f} s); plain Orbax {s["bare save: blocked"]:.3f} s\n'
    f'fingerprints take {s["fingerprints"]:.3f} s, '
    f'{s["fingerprints"] / s["save"]:.1%} of a save ({s["save"]:.2f} s); they '
    f'add {added:+.3f} s to a save, {added / s["save"]:+.1%} (quartiles '
    f'{quartiles[0]:+.3f}, {quartiles[2]:+.3f}); a save '
    f'takes {s["save"] / s["bare save"]:.2f} times as long as plain Orbax '
    f'({s["bare save"]:.2f} s)\n'
    f'restore takes {s["restore"]:.2f} s, '
    f'{s["restore"] / s["bare restore"]:.2f} times as long as plain Orbax '
    f'({s["bare restore"]:.2f} s)'
  )


if __name__ == '__main__':
  main()
