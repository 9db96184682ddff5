"""Reads and writes safetensors files; tensors are memory-mapped views.

A file begins with eight bytes, the length of a JSON header. The header gives
dtype, shape and byte range of each tensor. The data follow, little-endian and
in row-major order (github.com/huggingface/safetensors, README). A folder with
more than one file has an index from tensor names to files.

Conversions need three features that the package `safetensors` lacks: reading a
transposed slice of a tensor without the rest, writing a tensor part by part,
and errors that name the tensor and the file.
"""

import contextlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from maskdiff.errors import UserError, one_line

DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I64': np.dtype(np.int64),
  'I32': np.dtype(np.int32),
  'U8': np.dtype(np.uint8),
}
SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100 << 20  # bytes, as in the package safetensors


class Tensor(NamedTuple):
  """A tensor in a file.

  Attributes:
    path: path of the file.
    name: name of the tensor in the file.
    dtype: numpy dtype.
    shape: tuple of int.
    offset: position of the first byte in the file.
  """

  path: str
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def num_bytes(self):
    return _num_bytes(self)

  def view(self):
    """Returns the tensor as a read-only memory map of the file.

    Only the accessed parts are read. The map is closed with its last view.
    """
    if not self.num_bytes:
      return np.zeros(self.shape, self.dtype)
    return np.memmap(self.path, self.dtype, 'r', self.offset, self.shape)

  def __str__(self):
    return f'{self.name} in {self.path}'


class New(NamedTuple):
  """A tensor to be written.

  Attributes:
    name: name in the file.
    dtype: numpy dtype.
    shape: tuple of int.
    parts: function without arguments that returns an iterable of arrays of this
      dtype. Concatenated along the first axis, they are the tensor.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  parts: Callable[[], Iterable[np.ndarray]]

  @property
  def num_bytes(self):
    return _num_bytes(self)


def _num_bytes(tensor):
  return math.prod(tensor.shape) * tensor.dtype.itemsize


def read_header(path):
  """Returns the tensors of a file, a dict of Tensor by name.

  Raises:
    UserError: the file cannot be read, is cut off, or is not in the format.
  """
  try:
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
      start = f.read(8)
      length = struct.unpack('<Q', start)[0] if len(start) == 8 else 0
      header = f.read(length) if length <= min(size, _MAX_HEADER) else b''
  except OSError as error:
    raise UserError(f'cannot read {path} ({error.strerror})') from error
  if len(start) < 8 or len(header) < length:
    raise UserError(
      f'{path} is cut off or not a safetensors file: it has {size} bytes, but '
      f'its header alone should have {length}; download the file again'
    )
  try:
    entries = json.loads(header)
    entries.pop('__metadata__', None)
    found = {
      name: (e['dtype'], tuple(map(int, e['shape'])), *e['data_offsets'])
      for name, e in entries.items()
    }
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f'{path} is damaged or not a safetensors file: its header is not valid '
      f'({one_line(error, 100)})'
    ) from error
  tensors, data, end = {}, 8 + length, 0
  for name, (dtype, shape, first, last) in sorted(
    found.items(), key=lambda item: item[1][2:]
  ):
    if dtype not in DTYPES:
      raise UserError(
        f'{name} in {path} has dtype {dtype}; supported are '
        f'{", ".join(DTYPES)}: convert quantized weights to one of them first'
      )
    tensors[name] = Tensor(path, name, DTYPES[dtype], shape, data + first)
    if min(shape, default=0) < 0 or last - first != tensors[name].num_bytes:
      raise UserError(
        f'{name} in {path} has {last - first} bytes, but {dtype}{list(shape)} '
        f'takes {tensors[name].num_bytes}: the file is damaged'
      )
    if first != end:
      raise UserError(
        f'{name} in {path} begins at byte {first} of the data, not at {end}, '
        'where the tensor before it ends: the file is damaged'
      )
    end = last
    if data + end > size:
      raise UserError(
        f'{path} is cut off within {name}: it has {size} bytes, but its header '
        f'says {data + max(entry[3] for entry in found.values())}; download '
        'the file again'
      )
  if data + end != size:
    raise UserError(
      f'{path} has {size} bytes, but its header says {data + end}: the file is '
      'damaged'
    )
  return tensors


def read_folder(folder):
  """Returns the tensors of a folder, a dict of Tensor by name.

  The folder has one safetensors file, or several and an index.

  Raises:
    UserError: the folder has neither; index and files disagree; or a file is
      damaged.
  """
  single, index = os.path.join(folder, SINGLE), os.path.join(folder, INDEX)
  if not os.path.exists(index):
    if os.path.exists(single):
      return read_header(single)
    others = sorted(n for n in _listing(folder) if n.endswith('.safetensors'))
    raise UserError(
      f'{folder} has no {SINGLE} and no {INDEX}'
      + (f', only {", ".join(others[:4])}' if others else '')
      + ': only safetensors files can be read'
    )
  try:
    with open(index, encoding='utf-8') as f:
      file_of = json.load(f)['weight_map']
    files = sorted(set(file_of.values()))
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    reason = one_line(error, 100)
    raise UserError(
      f'{index} cannot be read as an index ({reason}): it needs a "weight_map"'
    ) from error
  tensors = {}
  for file in files:
    path = os.path.join(folder, file)
    if os.path.basename(file) != file or not os.path.exists(path):
      raise UserError(f'{index} names {file}, which is not in {folder}')
    for name, tensor in read_header(path).items():
      if name not in file_of:
        raise UserError(f'{tensor} is not in {index}')
      if file_of[name] != file:
        raise UserError(f'{tensor}, but {index} places it in {file_of[name]}')
      tensors[name] = tensor
  for name, file in file_of.items():
    if name not in tensors:
      raise UserError(f'{index} places {name} in {file}, which lacks it')
  return tensors


def write(path, tensors):
  """Writes a safetensors file, part by part.

  Args:
    path: path of the file.
    tensors: list of New, in the order of their data.

  Raises:
    UserError: the file cannot be written.
  """
  entries, end = {'__metadata__': {'format': 'pt'}}, 0
  for t in tensors:
    entries[t.name] = {
      'dtype': _NAMES[t.dtype],
      'shape': list(t.shape),
      'data_offsets': [end, end + t.num_bytes],
    }
    end += t.num_bytes
  header = json.dumps(entries, separators=(',', ':')).encode()
  header += b' ' * (-len(header) % 8)
  with writing(path), open(path, 'wb') as f:
    f.write(struct.pack('<Q', len(header)) + header)
    for t in tensors:
      start = f.tell()
      for part in t.parts():
        if part.dtype != t.dtype:
          raise TypeError(f'{t.name}: part of {part.dtype}, not {t.dtype}')
        part = np.ascontiguousarray(part).reshape(-1)
        f.write(part.view(np.uint8))  # bfloat16 has no buffer protocol
      if f.tell() - start != t.num_bytes:
        written = f.tell() - start
        raise ValueError(f'{t.name}: {written} bytes, not {t.num_bytes}')
    f.flush()
    os.fsync(f.fileno())


def write_folder(folder, tensors, max_bytes):
  """Writes tensors to one file, or to several files and an index.

  Args:
    folder: an existing folder.
    tensors: list of New.
    max_bytes: most bytes of data per file; a larger tensor gets its own file.

  Raises:
    UserError: a file cannot be written.
  """
  files, free_bytes = [[]], max_bytes
  for t in tensors:
    if files[-1] and t.num_bytes > free_bytes:
      files.append([])
      free_bytes = max_bytes
    files[-1].append(t)
    free_bytes -= t.num_bytes
  if len(files) == 1:
    write(os.path.join(folder, SINGLE), tensors)
    return
  file_of = {}
  for i, members in enumerate(files):
    name = f'model-{i + 1:05}-of-{len(files):05}.safetensors'
    write(os.path.join(folder, name), members)
    file_of |= {t.name: name for t in members}
  index = {
    'metadata': {'total_size': sum(t.num_bytes for t in tensors)},
    'weight_map': dict(sorted(file_of.items())),
  }
  path = os.path.join(folder, INDEX)
  with writing(path), open(path, 'w', encoding='utf-8') as f:
    json.dump(index, f, indent=2)


@contextlib.contextmanager
def writing(path):
  """Turns an OSError into a UserError that names the file."""
  try:
    yield
  except OSError as error:
    raise UserError(f'cannot write {path} ({error.strerror})') from error


def _listing(folder):
  try:
    return os.listdir(folder)
  except OSError as error:
    raise UserError(f'cannot read {folder} ({error.strerror})') from error
