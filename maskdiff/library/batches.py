"""Rows of tokens as arrays of one length, with the padding marked."""

from typing import Any, NamedTuple

import jax
import numpy as np

from maskdiff.data.rows import PADDING
from maskdiff.distributed.mesh import batch_shards
from maskdiff.errors import UserError
from maskdiff.library import arguments


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
    UserError: see `arguments.ids_of`; there are no tokens; rows are longer than
      the training rows; or lengths do not fit the rows.
  """
  if _is_array(rows):
    tokens = arguments.array_of_ids(rows, 'rows', 2)
    sizes = _lengths(lengths, tokens.shape)
  else:
    if lengths is not None:
      raise UserError('lengths: are for rows that are one array [B, L]')
    ids = [
      arguments.ids_of(model, row, 'row')
      for row in arguments.texts_of(rows, 'rows')
    ]
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
  if not arguments.traced(valid) and not valid.any():
    raise UserError('rows have no tokens: all positions are padding')
  if not arguments.traced(tokens) and not arguments.traced(valid):
    arguments.check_ids(model, np.asarray(tokens)[np.asarray(valid)], 'rows')
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
  return arguments.checked(name, x, shape, kind)


def padded(x, rows, positions=0):
  """Returns an array with further zeros along its first one or two axes."""
  widths = [(0, rows), (0, positions)][: x.ndim]
  widths += [(0, 0)] * (x.ndim - 2)
  return _numpy_of(x).pad(x, widths)


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
  lengths = arguments.checked('lengths', lengths, shape[:1], 'iu')
  if arguments.traced(lengths):
    return lengths
  lengths = np.asarray(lengths)
  if lengths.min() < 0 or lengths.max() > shape[1]:
    raise UserError(
      f'lengths={lengths.tolist()} must lie in [0, {shape[1]}], the positions '
      'of the rows'
    )
  return lengths


def _is_array(x):
  return isinstance(x, (jax.Array, np.ndarray))


def _numpy_of(*arrays):
  """Returns the module for arrays: jax.numpy if one is traced, else numpy."""
  return jax.numpy if any(map(arguments.traced, arrays)) else np
