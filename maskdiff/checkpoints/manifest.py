"""Metadata of a checkpoint: config, position, fingerprint of every array.

In memory it is a `Meta`; on disk it is a JSON object with the keys

    format_version, config, stage, identity, position, evaluation_due,
    leaves: {name: {shape, dtype, fingerprint}}, digest,

where `leaves` is the manifest: every array with its fingerprint. `digest` is a
hash of all other keys. Format 2, written by pretraining only, can also be read.
Its `samples` is the position of the stage, and its `data` the identity.
"""

import dataclasses
import hashlib
import json
import math
import os
import re

import jax
import numpy as np

from maskdiff.errors import UserError, one_line
from maskdiff.files import reading

FORMAT_VERSION = 3


class Damaged(Exception):
  """A step on disk differs from what was saved; the message says how."""


@dataclasses.dataclass(frozen=True)
class Meta:
  """Metadata of a checkpoint. None: the checkpoint does not record the field.

  Attributes:
    config: the run's config as JSON values, from `config_json`.
    stage: name of the stage, such as 'pretraining'.
    identity: `Stage.identity` of the run, JSON values; compared on resume.
    position: position of the stage without its arrays, from `position.split`.
    evaluation_due: whether the evaluation of this step was interrupted. A
      resumed run repeats it.
    leaves: {name: {shape, dtype, fingerprint}} of every array; set by `make`.
  """

  config: dict | None = None
  stage: str | None = None
  identity: dict | None = None
  position: dict | int | None = None
  evaluation_due: bool | None = None
  leaves: dict | None = None


_KEYS = tuple(field.name for field in dataclasses.fields(Meta))
_TYPES = {
  'config': dict,
  'stage': str,
  'identity': dict,
  'evaluation_due': bool,
  'leaves': dict,
}


def config_json(config):
  """Returns a ConfigDict as plain JSON values."""
  return json.loads(config.to_json())


def flat(tree):
  """Returns the leaves of a tree by path, such as params/blocks/q."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def nest(named):
  """Inverts `flat`; returns nested dicts, also where the tree had tuples."""
  tree = {}
  for name, leaf in named.items():
    *folders, last = name.split('/')
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[last] = leaf
  return tree


def describe(items):
  """Returns the shape and dtype of every array of a tree, by name."""
  return {
    name: {'shape': list(leaf.shape), 'dtype': str(leaf.dtype)}
    for name, leaf in flat(items).items()
  }


def make(meta, leaves, fingerprints):
  """Returns the JSON object of a checkpoint's metadata.

  Args:
    meta: Meta. Fields that are None are not written.
    leaves: shapes and dtypes of the arrays, from `describe`.
    fingerprints: tree of integers, one for each array.
  """
  prints = flat(fingerprints)
  recorded = {
    key: value for key in _KEYS if (value := getattr(meta, key)) is not None
  }
  values = {
    'format_version': FORMAT_VERSION,
    **recorded,
    'leaves': {
      name: {**leaf, 'fingerprint': int(prints[name])}
      for name, leaf in leaves.items()
    },
  }
  return {**values, 'digest': json_digest(values)}


def read(path):
  """Reads the file with the result of `make`; returns a Meta.

  Raises:
    Damaged: the file is missing, differs from what was written, or holds values
      that `make` does not write.
    UserError: the file has the format of another version.
  """
  try:
    values = reading.read_json(path)
  except UserError as error:
    raise Damaged(f'its meta cannot be read: {one_line(error)}') from error
  is_dict = isinstance(values, dict)
  digest = values.pop('digest', None) if is_dict else None
  intact = digest is not None and digest == json_digest(values)
  version = values.get('format_version') if is_dict else None
  # Without a matching digest, another version number may be a flipped bit of
  # FORMAT_VERSION. Format 1 had no digest.
  version_known = version == 1 if digest is None else intact
  if version_known and version not in (2, FORMAT_VERSION):
    raise UserError(
      f'{os.path.dirname(os.path.dirname(path))} has checkpoint format '
      f'{version}; this version of maskdiff reads formats 2 and '
      f'{FORMAT_VERSION}'
    )
  if not intact:
    raise Damaged('its meta differs from what was written')
  if version == 2 and 'samples' in values:
    values['stage'] = 'pretraining'
    values['identity'] = values.pop('data', None)
    values['position'] = values.pop('samples')
  # A digest protects from accidents; a stranger can compute one.
  if reason := _problem(values):
    raise Damaged(f'its meta is wrong: {one_line(reason)}')
  return Meta(**{key: values[key] for key in _KEYS if key in values})


def _problem(values):
  """Returns why the values of a file cannot come from `make`, or None."""
  for key, kind in _TYPES.items():
    if key in values and not isinstance(values[key], kind):
      return f'{key} is not a {kind.__name__}'
  if 'leaves' not in values:
    return 'it has no leaves'
  folders = set()
  for name, leaf in values['leaves'].items():
    if not isinstance(leaf, dict) or not _is_leaf(leaf):
      return f'the shape, dtype or fingerprint of {name!r} is not one'
    parts = name.split('/')
    if len(parts) > 100 or not {'', '.', '..'}.isdisjoint(parts):
      return f'{name!r} is not the name of an array'
    folders |= {'/'.join(parts[:n]) for n in range(1, len(parts))}
  if clash := folders & values['leaves'].keys():
    return f'{min(clash)!r} is an array and also the start of a name'
  return None


def _is_leaf(leaf):
  """Returns whether a dict is an entry of `leaves`."""
  shape, name = leaf.get('shape'), leaf.get('dtype')
  sizes = [leaf.get('fingerprint'), *(shape if type(shape) is list else [None])]
  if not all(type(n) is int and 0 <= n < 2**63 for n in sizes):
    return False
  if not isinstance(name, str) or not re.fullmatch(r'\w{1,20}', name):
    return False  # NumPy would parse an expression
  try:
    dtype = np.dtype(name)
  except (TypeError, ValueError):
    return False
  number = name == 'bool' or jax.dtypes.issubdtype(dtype, np.number)
  return number and name == dtype.name and math.prod(shape) < 2**59


def compare(step_path, leaves, targets):
  """Checks that the arrays of a step have the expected shapes and dtypes.

  Args:
    step_path: path of the step, for the error message.
    leaves: `Meta.leaves` of the step.
    targets: dict from item (the first part of a name) to a tree of shapes.

  Raises:
    UserError: a name, shape or dtype differs. The message has both values.
  """
  expected = describe(targets)
  on_disk = {
    name: {'shape': leaf['shape'], 'dtype': leaf['dtype']}
    for name, leaf in leaves.items()
    if name.partition('/')[0] in targets
  }
  show = lambda leaf: f'{leaf["dtype"]}{leaf["shape"]}' if leaf else 'none'
  for name in sorted(expected.keys() | on_disk.keys()):
    if expected.get(name) != on_disk.get(name):
      raise UserError(
        f'{step_path} does not fit this config: it has '
        f'{show(on_disk.get(name))} for {name}, but the config needs '
        f'{show(expected.get(name))}'
      )


def changed(leaves, fingerprints):
  """Returns the names of arrays whose fingerprint differs from the manifest.

  Args:
    leaves: `Meta.leaves`.
    fingerprints: tree of integers, for some or all of these arrays.
  """
  return [
    name
    for name, value in flat(fingerprints).items()
    if int(value) != leaves[name]['fingerprint']
  ]


def json_digest(values):
  """Returns a hash of JSON values as 16 hexadecimal digits."""
  text = json.dumps(values, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
