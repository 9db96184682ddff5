"""Divides the position of a stage into JSON values and arrays, for checkpoints.

The position of a stage says how far the stage has come; a run resumes from it.
It is a JSON value (for pretraining one integer), or a dict from names to JSON
values, jax.Arrays and nested dicts:

    {'prompts': 512, 'round': 3, 'rollout': {'tokens': jax.Array, ...}}

A checkpoint holds the values in its metadata and the arrays in the item
`position`, with a fingerprint for each array.
"""

import jax

from maskdiff.checkpoints import manifest

ITEM = 'position'  # item of a checkpoint, if the position has arrays


def split(position):
  """Splits a position into values and arrays; `join` is the inverse.

  Args:
    position: see the module. Names are strings without '/'.

  Returns:
    The position without its arrays, as JSON values; and nested dicts of the
    arrays, {} if there are none.

  Raises:
    TypeError: a leaf is neither a JSON value nor a jax.Array of numbers.
  """
  if not isinstance(position, dict):
    return _value('position', position), {}
  values, arrays = {}, {}
  for name, leaf in position.items():
    if not isinstance(name, str) or '/' in name or not name:
      raise TypeError(
        f'position: the name {name!r} is not a string without slashes'
      )
    if isinstance(leaf, dict):
      values[name], below = split(leaf)
      if below:
        arrays[name] = below
    elif isinstance(leaf, jax.Array):
      if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(f'position: {name} is a PRNG key; store its key_data')
      arrays[name] = leaf
    else:
      values[name] = _value(name, leaf)
  return values, arrays


def _value(name, leaf):
  """Returns a leaf that JSON can hold; otherwise raises TypeError."""
  if leaf is None or type(leaf) in (bool, int, float, str):
    return leaf
  raise TypeError(
    f'position: {name} is a {type(leaf).__name__}; use bool, int, float, str, '
    'None, a dict or a jax.Array'
  )


def join(values, arrays):
  """Returns the position from the two results of `split`."""
  if not isinstance(values, dict):
    return values
  return values | {
    name: join(values.get(name, {}), leaf) if isinstance(leaf, dict) else leaf
    for name, leaf in arrays.items()
  }


def targets(leaves, sharding):
  """Returns ShapeDtypeStructs of the arrays of a saved position.

  Args:
    leaves: `Meta.leaves` of the checkpoint.
    sharding: sharding of every restored array.

  Returns:
    {ITEM: nested dicts} for `Checkpointer.restore`; {} if there are no arrays.
  """
  return manifest.nest(
    {
      name: jax.ShapeDtypeStruct(
        leaf['shape'], leaf['dtype'], sharding=sharding
      )
      for name, leaf in leaves.items()
      if name.startswith(f'{ITEM}/')
    }
  )
