"""Checkpoints against copying the same arrays, and against bare Orbax.

python benchmarks/checkpoint.py [--parameters 1e8] [--rounds 3] [--directory D]

Random float32 parameters and two moments, 12 bytes a parameter, in 12 layers.
Prints, as medians of rounds in turn:
(a) how long `save` keeps the caller, against copying the arrays to new memory
    of the host;
(b) the fingerprints alone, as a share of a save until it is on the disk, and
    a save against one by bare Orbax;
(c) restoring and comparing, against restoring by bare Orbax.
What was restored must be what was saved. Needs memory for four times the
state and twice its room in the directory.
"""

import argparse
import contextlib
import pathlib
import shutil
import statistics
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from maskdiff import checkpoint
from maskdiff.fingerprint import fingerprints

LAYERS = 12


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--parameters', type=float, default=1e8)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--directory', help='on the disk to measure')
  args = parser.parse_args()
  logging.set_verbosity(logging.ERROR)
  items = random_state(int(args.parameters))
  leaves = jax.tree.leaves(items)
  size = sum(x.nbytes for x in leaves)
  with tempfile.TemporaryDirectory(dir=args.directory) as folder:
    free = shutil.disk_usage(folder).free
    if free < 2.5 * size:
      parser.error(f'{folder} has {free / 1e9:.1f} GB left of {2.5 * size:.1e}')
    print(
      f'{len(leaves[0].devices())} x {jax.devices()[0].device_kind}, '
      f'{len(leaves)} arrays, {size / 1e9:.2f} GB',
      flush=True,
    )
    report(measure(items, pathlib.Path(folder), args.rounds))


def random_state(parameters):
  """Trees of weights like those of a transformer, with moments."""
  width = max(int((parameters / LAYERS / 12) ** 0.5), 1)
  shapes = {
    **{name: (LAYERS, width, width) for name in 'qkvo'},
    **{name: (LAYERS, width, 4 * width) for name in ('gate', 'up')},
  }
  shapes = {
    name: jax.ShapeDtypeStruct(shape, 'float32')
    for name, shape in shapes.items()
  }

  def tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
      name: jax.random.normal(key, x.shape)
      for key, (name, x) in zip(keys, shapes.items(), strict=True)
    }

  params, mu, nu = map(jax.jit(tree), range(3))
  return jax.block_until_ready(
    {'params': params, 'opt_state': {'mu': mu, 'nu': nu}}
  )


def measure(items, folder, rounds):
  """Seconds of everything by name, a list of one value for each round."""
  wanted = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items
  )
  before = jax.device_get(fingerprints(items))
  jax.device_get(fingerprints(jax.device_put(items, jax.devices()[0])))
  seconds = {}

  @contextlib.contextmanager
  def timed(name, count=True):
    began = time.perf_counter()
    yield
    if count:
      seconds.setdefault(name, []).append(time.perf_counter() - began)

  for number in range(1, rounds + 2):
    counts = number > 1  # the first fills caches and compiles
    time_it = lambda name, counts=counts: timed(name, counts)
    with time_it('copy'):
      copied = jax.tree.map(lambda x: np.array(x, copy=True), items)
    del copied
    with time_it('fingerprints'):
      jax.device_get(fingerprints(items))

    ours = checkpoint.Checkpointer(folder / 'ours', keep=1)
    with time_it('save'):
      with time_it('save: blocked'):
        ours.save(number, items, {})
      ours.finish()
    with ocp.CheckpointManager(folder / 'bare', options=keep_one()) as bare:
      save = ocp.args.Composite(
        **{k: ocp.args.StandardSave(v) for k, v in items.items()}
      )
      with time_it('bare save'):
        with time_it('bare save: blocked'):
          bare.save(number, args=save)
        bare.wait_until_finished()
      restore = ocp.args.Composite(
        **{k: ocp.args.StandardRestore(v) for k, v in wanted.items()}
      )
      with time_it('bare restore'):
        restored = bare.restore(number, args=restore)
        jax.block_until_ready([restored[k] for k in wanted])
      del restored
    shutil.rmtree(folder / 'bare')
    with time_it('restore'):
      meta = ours.read_meta(number)
      restored = jax.block_until_ready(ours.restore(number, meta, **wanted))
    restored = dict(zip(wanted, restored, strict=True))
    assert jax.device_get(fingerprints(restored)) == before
    del restored
    ours.close()
    shutil.rmtree(folder / 'ours')
  return seconds


def keep_one():
  return ocp.CheckpointManagerOptions(max_to_keep=1)


def report(seconds):
  s = {name: statistics.median(times) for name, times in seconds.items()}
  print(
    f'save keeps the caller {s["save: blocked"]:.3f} s, '
    f'{s["save: blocked"] / s["copy"]:.2f} times a copy to the host '
    f'({s["copy"]:.3f} s); bare Orbax {s["bare save: blocked"]:.3f} s\n'
    f'fingerprints take {s["fingerprints"]:.3f} s, '
    f'{s["fingerprints"] / s["save"]:.1%} of a save ({s["save"]:.2f} s), which '
    f'takes {s["save"] / s["bare save"]:.2f} times as long as by bare Orbax '
    f'({s["bare save"]:.2f} s)\n'
    f'restore takes {s["restore"]:.2f} s, '
    f'{s["restore"] / s["bare restore"]:.2f} times as long as by bare Orbax '
    f'({s["bare restore"]:.2f} s)'
  )


if __name__ == '__main__':
  main()
