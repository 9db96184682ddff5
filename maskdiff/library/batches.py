"""Arguments of the library as arrays: rows of tokens, texts, seeds.

Checks read values on the host. Inside jit, where arguments may be traced
arrays, only their shapes and dtypes are checked.
"""

import numbers
from typing import Any, NamedTuple

import jax
import numpy as np

from maskdiff.data.rows import PADDING
from maskdiff.distributed.mesh import batch_shards
from maskdiff.errors import UserError


class Batch(NamedTuple):
  """Rows of one length; `size` rows are the caller's, further rows are empty.

  Attributes:
    tokens: [B, L] int32.
    valid: [B, L] bool, False on padding.
    doc: [B, L] int32, -1 on padding; None if the caller gave no documents.
    size: number of rows of the caller.
    length: number of positions of the caller's longest row.
  """

  tokens: Any
  valid: Any
  doc: Any
  size: int
  length: int


def ids_of(model, text, name='prompt'):
  """Returns the token ids of a text, or a checked list of token ids.

  Args:
    model: Model.
    text: str; or a list or array of int.
    name: name of the argument, for messages.

  Raises:
    UserError: the model has no tokenizer for a text, the text is not Unicode,
      or an id is not an integer in the vocabulary.
  """
  if isinstance(text, str):
    if model.tokenizer is None:
      raise UserError(
        f'{name} {text[:40]!r} is a text, but the model was loaded without a '
        'tokenizer: give token ids'
      )
    try:
      return model.tokenizer.encode(text)
    except ValueError as error:
      raise UserError(f'{name} {text[:40]!r}: {error}') from error
  ids = _array(text, name, 1)
  check_ids(model, ids, name)
  return ids.tolist()


def texts_of(texts, name='prompts'):
  """Returns a list of texts or token lists, after a check that it is a list.

  Raises:
    UserError: it is one text, a number or not iterable, or it is empty.
  """
  if isinstance(texts, (str, bytes)) or not hasattr(texts, '__iter__'):
    raise UserError(f'{name}={texts!r}: give a list, one element per row')
  texts = list(texts)
  if not texts:
    raise UserError(f'{name} is empty: give at least one element')
  return texts


def seeds_of(seed, size):
  """Returns one seed per row.

  Args:
    seed: int, the seed of the first row, which grows by 1 per row; or a list of
      `size` int.
    size: number of rows.

  Raises:
    UserError: a seed is not an integer in [0, 2^32), or the list has another
      length.
  """
  one = _is_whole(seed)
  seeds = [seed + i for i in range(size)] if one else seed
  if np.ndim(seeds) != 1 or len(seeds) != size:
    raise UserError(
      f'seed={seed!r}: give an integer, or a list of {size}, one per row'
    )
  for value in seeds:
    if not _is_whole(value) or not 0 <= value < 2**32:
      raise UserError(f'seed={value!r} must be an integer in [0, {2**32})')
  return [int(value) for value in seeds]


def check_whole(**values):
  """Raises a UserError if a value is not an integer of at least 1."""
  for name, value in values.items():
    if not _is_whole(value) or value < 1:
      raise UserError(f'{name}={value!r} must be an integer of at least 1')


def batch_of(model, rows, lengths=None, doc=None, pad_to=lambda length: length):
  """Returns the Batch of rows of tokens, whose size the mesh can divide.

  Args:
    model: Model.
    rows: list of texts or token lists of any lengths; or an array [B, L] of
      int.
    lengths: [B] int, tokens of each row of an array, the rest is padding;
      default: all.
    doc: [B, L] int, documents, -1 on padding; or None.
    pad_to: function from the longest length to L.

  Raises:
    UserError: see `ids_of`; rows are empty or longer than the training rows;
      or lengths do not fit the rows.
  """
  if _is_array(rows):
    tokens = _array(rows, 'rows', 2)
    sizes = _lengths(lengths, tokens.shape)
  else:
    if lengths is not None:
      raise UserError('lengths: are for rows that are one array [B, L]')
    ids = [ids_of(model, row, 'row') for row in texts_of(rows, 'rows')]
    sizes = np.array([len(row) for row in ids])
    tokens = np.zeros((len(ids), max(sizes)), np.int32)
    for i, row in enumerate(ids):
      tokens[i, : len(row)] = row
  size, length = tokens.shape
  if not size or not length:
    raise UserError(f'rows have shape {tokens.shape}: give at least one token')
  context = model.config.data.length
  if length > context:
    raise UserError(
      f'rows have {length} positions, but the model was trained on rows of '
      f'config.data.length={context}: shorten or split them'
    )
  valid = np.arange(length) < sizes[:, None]
  if doc is not None:
    doc = per_position('doc', doc, tokens.shape, 'iu')
    valid = valid & (doc >= 0)
    doc = _numpy_of(doc, valid).where(valid, doc, PADDING).astype(np.int32)
  if not traced(tokens) and not traced(valid):
    check_ids(model, np.asarray(tokens)[np.asarray(valid)], 'rows')
  # Padding may have any id.
  tokens = _numpy_of(tokens, valid).where(valid, tokens, 0).astype(np.int32)
  added = -size % batch_shards(model.mesh), pad_to(length) - length
  tokens, valid = padded(tokens, *added), padded(valid, *added)
  if doc is not None:
    doc = _numpy_of(doc, valid).where(valid, padded(doc, *added), PADDING)
  return Batch(tokens, valid, doc, size, length)


def per_position(name, x, shape, kind):
  """Returns an argument with one value per position.

  Args:
    name: name of the argument, for messages.
    x: [B, L] array; or a list of rows, short rows padded with 0.
    shape: (B, L) of the caller's rows.
    kind: kinds of NumPy dtypes that are accepted, such as 'b'.

  Raises:
    UserError: another shape or dtype.
  """
  if not _is_array(x):
    x = _filled(name, x, shape)
  return checked(name, x, shape, kind)


def checked(name, x, shape, kind):
  """Returns an array after a check of its shape and the kind of its dtype."""
  x = x if isinstance(x, jax.Array) else np.asarray(x)
  if x.shape != tuple(shape) or x.dtype.kind not in kind:
    expected = {'b': 'bool', 'i': 'int', 'f': 'float'}[kind[0]]
    raise UserError(
      f'{name} is {x.dtype} of shape {list(x.shape)}: give {expected} of shape '
      f'{list(shape)}'
    )
  return x


def padded(x, rows, positions=0):
  """Returns an array with further zeros along its first one or two axes."""
  widths = [(0, rows), (0, positions)][: x.ndim]
  widths += [(0, 0)] * (x.ndim - 2)
  return _numpy_of(x).pad(x, widths)


def check_ids(model, ids, name):
  """Raises a UserError if an id of an array is not in the vocabulary."""
  vocab_size = model.config.model.vocab_size
  outside = ids[(ids < 0) | (ids >= vocab_size)]
  if outside.size:
    raise UserError(
      f'{name}: token id {outside[0]} is outside of the vocabulary, '
      f'[0, {vocab_size})'
    )


def _array(x, name, ndim):
  """Returns an array of integers of any size with `ndim` axes."""
  try:
    x = x if isinstance(x, jax.Array) else np.asarray(x)
  except ValueError as error:  # lists of unequal lengths
    raise UserError(f'{name}: token ids must be integers') from error
  if x.ndim == ndim == 1 and not x.size:
    return np.zeros(0, np.int32)
  if x.ndim != ndim or x.dtype.kind not in 'iu':
    raise UserError(
      f'{name} is {x.dtype} of shape {list(x.shape)}: token ids must be '
      f'integers with {ndim} {"axis" if ndim == 1 else "axes"}'
    )
  return x if traced(x) else np.asarray(x)


def _filled(name, rows, shape):
  """Returns rows of values as one array, with zeros on padding."""
  try:
    rows = [np.asarray(row) for row in rows]
    fits = len(rows) == shape[0] and all(
      row.ndim == 1 and len(row) <= shape[1] for row in rows
    )
  except (TypeError, ValueError):
    fits = False
  if not fits:
    raise UserError(f'{name}: give {shape[0]} rows of up to {shape[1]} values')
  dtypes = [row.dtype for row in rows if row.size] or [np.bool_]
  x = np.zeros(shape, np.result_type(*dtypes))
  for i, row in enumerate(rows):
    x[i, : len(row)] = row
  return x


def _lengths(lengths, shape):
  if lengths is None:
    return np.full(shape[0], shape[1])
  lengths = np.asarray(checked('lengths', lengths, shape[:1], 'iu'))
  if lengths.min() < 0 or lengths.max() > shape[1]:
    raise UserError(
      f'lengths={lengths.tolist()} must lie in [0, {shape[1]}], the positions '
      'of the rows'
    )
  return lengths


def _is_whole(x):
  return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _is_array(x):
  return isinstance(x, (jax.Array, np.ndarray))


def traced(x):
  """Returns whether an array is traced by JAX, so that it has no values."""
  return isinstance(x, jax.core.Tracer)


def _numpy_of(*arrays):
  """Returns the module for arrays: jax.numpy if one is traced, else numpy."""
  return jax.numpy if any(map(traced, arrays)) else np
