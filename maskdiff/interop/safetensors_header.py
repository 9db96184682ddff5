"""Reads the header of a safetensors file that nobody vouches for.

The byte ranges of the tensors must cover the data without holes and overlaps,
and each range must have the size of its tensor. So no tensor is larger than the
file, and nothing is allocated by a number in the header.
"""

import math
import struct
from typing import NamedTuple

import ml_dtypes
import numpy as np

from maskdiff.errors import UserError, inline, one_line
from maskdiff.files import reading

DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32),
  'U8': np.dtype(np.uint8),
}
# Bytes of a header or an index. A tensor takes about 120 bytes, so this is
# enough for 60,000 tensors. Parsing takes up to thirty times this memory.
MAX_BYTES = 8 << 20
_MAX_AXES = 32


class Entry(NamedTuple):
  """A tensor in a header.

  Attributes:
    name: name of the tensor.
    dtype: numpy dtype.
    shape: tuple of int.
    offset: position of the first byte in the file.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int


def read(file, size, path):
  """Returns the tensors of a file, a list of Entry in the order of their data.

  Args:
    file: binary file object at position 0.
    size: number of bytes of the file.
    path: path of the file, for error messages.

  Raises:
    UserError: the file cannot be read, is cut off, or is not in the format.
  """
  header, data = _read_bytes(file, size, path)
  try:
    found = _check(reading.parse_json(header, 'header', unique_keys=True))
  except UserError as error:
    raise UserError(
      f'{path} is damaged or not a safetensors file: its header is not valid '
      f'({one_line(error, 150)})'
    ) from error
  entries, end = [], 0
  by_range = sorted(found.items(), key=lambda item: item[1][2:])
  for name, (dtype, shape, first, last) in by_range:
    shown = f'{inline(name, 200)} in {path}'
    if dtype not in DTYPES:
      raise UserError(
        f'{shown} has dtype {one_line(dtype, 30)}; supported are '
        f'{", ".join(DTYPES)}: convert quantized weights to one of them first'
      )
    takes = math.prod(shape) * DTYPES[dtype].itemsize
    if last - first != takes:
      raise UserError(
        f'{shown} has {last - first} bytes, but {dtype}{list(shape)!s:.200} '
        f'takes {takes}: the file is damaged'
      )
    if first != end:
      raise UserError(
        f'{shown} begins at byte {first} of the data, not at {end}, where the '
        'tensor before it ends: the file is damaged'
      )
    end = last
    if data + end > size:
      raise UserError(
        f'{path} is cut off within {inline(name, 200)}: it has {size} bytes, '
        f'but its header says {data + max(e[3] for e in found.values())}; '
        'download the file again'
      )
    entries.append(Entry(name, DTYPES[dtype], shape, data + first))
  if data + end != size:
    raise UserError(
      f'{path} has {size} bytes, but its header says {data + end}: the file '
      'is damaged'
    )
  return entries


def _read_bytes(file, size, path):
  """Returns the header, bytes, and the position of the data after it."""
  try:
    start = file.read(8)
    length = struct.unpack('<Q', start)[0] if len(start) == 8 else 0
    if MAX_BYTES < length <= size:
      raise UserError(
        f'{path} has a header of {length:,} bytes; the limit is {MAX_BYTES:,}'
      )
    header = file.read(length) if length <= size else b''
  except OSError as error:
    raise UserError(f'cannot read {path} ({error.strerror})') from error
  if len(start) < 8 or len(header) < length:
    raise UserError(
      f'{path} is cut off or not a safetensors file: it has {size} bytes, but '
      f'its header alone should have {length}; download the file again'
    )
  return header, 8 + length


def _check(header):
  """Returns (dtype, shape, first byte, end) of each tensor of a header.

  Raises:
    UserError: a value has another type, or is out of bounds.
  """
  if not isinstance(header, dict):
    raise UserError('it is not an object')
  metadata = header.pop('__metadata__', {})
  if not isinstance(metadata, dict) or not all(
    isinstance(value, str) for value in metadata.values()
  ):
    raise UserError('__metadata__ does not map names to texts')
  found = {}
  for name, entry in header.items():
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape = fields.get('dtype'), fields.get('shape')
    offsets = fields.get('data_offsets')
    if (
      not isinstance(dtype, str)
      or not (_are_sizes(shape) and _are_sizes(offsets))
      or len(offsets) != 2
    ):
      raise UserError(
        f'{name!r:.100} needs dtype, a shape and two data_offsets of whole '
        f'numbers, but is {entry!r:.100}'
      )
    # NumPy computes sizes in int64, and without regard to axes of length 0.
    if len(shape) > _MAX_AXES or math.prod(filter(None, shape)) >= 2**59:
      raise UserError(f'{name!r:.100} has the shape {shape!r:.100}')
    found[name] = (dtype, tuple(shape), *offsets)
  return found


def _are_sizes(values):
  return isinstance(values, list) and all(
    type(value) is int and 0 <= value < 2**63 for value in values
  )
