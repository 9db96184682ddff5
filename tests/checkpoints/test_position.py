"""Positions of stages: values in meta, arrays in an item of the checkpoint."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdiff.checkpoints import manifest, position, restore
from maskdiff.checkpoints.checkpoint import Checkpointer
from maskdiff.distributed import mesh as mesh_lib

POSITION = {
  'prompts': 512,
  'inner': {'step': 3, 'temperature': 0.1 + 0.2, 'rest': {}},
  'text': 'a/b',
  'none': None,
  'rollout': {'tokens': jnp.arange(64).reshape(8, 8), 'nll': jnp.ones(8) / 3},
  'weights': jnp.full(3, 0.1, jnp.bfloat16),
}


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  leaves = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  for x, y in leaves:
    assert type(x) is type(y)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize('given', [0, 2**40, 'end', None, {}, POSITION])
def test_position_survives_a_checkpoint(given, tmp_path):
  """Also if its arrays were sharded; they return replicated."""
  mesh = mesh_lib.make_mesh()
  if given is POSITION:
    tokens = jax.device_put(
      given['rollout']['tokens'], mesh_lib.batch_sharding(mesh)
    )
    given = given | {'rollout': given['rollout'] | {'tokens': tokens}}
  values, arrays = position.split(given)
  items = {'params': {'w': jnp.ones(4)}}
  items |= {position.ITEM: arrays} if arrays else {}
  with contextlib.closing(Checkpointer(tmp_path, keep=1)) as checkpointer:
    checkpointer.save(1, items, manifest.Meta(position=values))
    checkpointer.finish()
    meta = checkpointer.read_meta(1)
    targets = position.targets(meta.leaves, mesh_lib.replicated(mesh))
    assert bool(targets) == bool(arrays)
    restored = checkpointer.restore(1, meta, **targets) if targets else [{}]
    restore.verify(checkpointer, 1, meta)
  found = position.join(meta.position, *restored)
  assert_same(found, given)
  assert all(
    x.sharding.is_fully_replicated
    for x in jax.tree.leaves(found)
    if isinstance(x, jax.Array)
  )


def test_values_are_json_and_arrays_are_not_among_them():
  values, arrays = position.split(POSITION)
  assert json.loads(json.dumps(values)) == values
  assert 'weights' not in values and values['rollout'] == {}
  assert manifest.flat(arrays).keys() == {
    'rollout/tokens',
    'rollout/nll',
    'weights',
  }


@pytest.mark.parametrize(
  'given, message',
  [
    ({'rows': np.ones(2)}, 'rows is a ndarray; use .* jax.Array'),
    ({'n': np.int64(3)}, 'n is a int64'),
    ({'inner': {'rows': [1, 2]}}, 'rows is a list'),
    ({'key': jax.random.key(0)}, 'key is a PRNG key'),
    ({'a/b': 1}, "'a/b' is not a string without slashes"),
    ({3: 1}, '3 is not a string'),
    (jnp.ones(2), 'position is a ArrayImpl'),
  ],
)
def test_other_positions_are_refused(given, message):
  with pytest.raises(TypeError, match=message):
    position.split(given)
