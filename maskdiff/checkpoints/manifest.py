"""What a checkpoint says of itself: its arrays and their fingerprints.

A dict of JSON values, kept beside the arrays of a step as its `meta`:

    format_version, leaves: {name: {shape, dtype, fingerprint}}, digest,

where the digest is of all the rest, and whatever else the caller puts there.
"""

import hashlib
import json
import os

import jax

from maskdiff.errors import UserError

FORMAT_VERSION = 2


class Damaged(Exception):
  """A step on disk is not what was saved; the message says how it is seen."""


def flat(tree):
  """The leaves of a tree by their paths, such as params/blocks/q."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def nest(named):
  """The reverse of `flat`, as dicts of dicts whatever the tree was made of."""
  tree = {}
  for name, leaf in named.items():
    *folders, last = name.split('/')
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[last] = leaf
  return tree


def describe(items):
  """Shapes and dtypes of the arrays of a tree, a dict by name."""
  return {
    name: {'shape': list(leaf.shape), 'dtype': str(leaf.dtype)}
    for name, leaf in flat(items).items()
  }


def make(meta, leaves, fingerprints):
  """The manifest of a step.

  Args:
    meta: dict of JSON values to put in.
    leaves: from `describe`.
    fingerprints: tree of numbers, of the same arrays.
  """
  prints = flat(fingerprints)
  meta = {
    'format_version': FORMAT_VERSION,
    **meta,
    'leaves': {
      name: {**leaf, 'fingerprint': int(prints[name])}
      for name, leaf in leaves.items()
    },
  }
  return {**meta, 'digest': _digest(meta)}


def read(path):
  """Reads the manifest of a step, a dict.

  Args:
    path: of the file.

  Raises:
    Damaged: it is not there, or not as it was written.
    UserError: it was written by another version.
  """
  try:
    with open(path) as f:
      meta = json.load(f)
  except (OSError, ValueError) as error:
    reason = ' '.join(str(error).split())
    raise Damaged(f'its meta cannot be read: {reason}') from error
  digest = meta.pop('digest', None) if isinstance(meta, dict) else None
  intact = digest is not None and digest == _digest(meta)
  version = meta.get('format_version') if isinstance(meta, dict) else None
  # The first format had no digest; of others a version that is not intact
  # may be a flipped bit of this one.
  known = version == 1 if digest is None else intact
  if known and version != FORMAT_VERSION:
    raise UserError(
      f'{os.path.dirname(os.path.dirname(path))} has checkpoint format '
      f'{version}; this version reads {FORMAT_VERSION}'
    )
  if not intact:
    raise Damaged('its meta is not as it was written')
  return meta


def compare(step_path, leaves, wanted):
  """Compares the arrays of a step with those that are wanted.

  Args:
    step_path: path, for messages.
    leaves: of a manifest.
    wanted: dict from an item, the first part of a name, to a tree of shapes.

  Raises:
    UserError: a name, shape or dtype differs; it names the array and both.
  """
  ours = describe(wanted)
  theirs = {
    name: {'shape': leaf['shape'], 'dtype': leaf['dtype']}
    for name, leaf in leaves.items()
    if name.partition('/')[0] in wanted
  }
  show = lambda leaf: f'{leaf["dtype"]}{leaf["shape"]}' if leaf else 'none'
  for name in sorted(ours.keys() | theirs.keys()):
    if ours.get(name) != theirs.get(name):
      raise UserError(
        f'{step_path} does not fit this config: it has '
        f'{show(theirs.get(name))} for {name}, where '
        f'{show(ours.get(name))} is wanted'
      )


def changed(leaves, fingerprints):
  """The names of arrays whose fingerprint is not that of a manifest's leaves.

  Args:
    leaves: of a manifest.
    fingerprints: tree of numbers, of some of its arrays.
  """
  return [
    name
    for name, value in flat(fingerprints).items()
    if int(value) != leaves[name]['fingerprint']
  ]


def _digest(meta):
  text = json.dumps(meta, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
