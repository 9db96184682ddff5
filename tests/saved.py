"""Reads the newest checkpoint of a run with Orbax only."""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

ITEMS = ('params', 'opt_state', 'guard', 'ema')


def newest(workdir):
  """Returns the last step, its meta as JSON values, and its arrays by name."""
  steps = pathlib.Path(workdir, 'checkpoints').glob('*')
  path = max(
    (p for p in steps if p.name.isdecimal()), key=lambda p: int(p.name)
  )
  meta = json.loads((path / 'meta' / 'metadata').read_text())
  trees = {
    item: arrays(path / item) for item in ITEMS if (path / item).exists()
  }
  leaves = jax.tree_util.tree_leaves_with_path(trees)
  return (
    int(path.name),
    meta,
    {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves},
  )


def arrays(path):
  """Returns an item as a tree of NumPy arrays, regardless of its sharding."""
  with ocp.PyTreeCheckpointer() as checkpointer:
    args = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
      checkpointer.metadata(path).item_metadata.tree,
    )
    return checkpointer.restore(path, restore_args=args)
