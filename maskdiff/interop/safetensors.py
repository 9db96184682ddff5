"""The safetensors format: tensors as views of their file, and a writer.

A file is eight bytes with the length of a JSON header, the header, which gives
dtype, shape and place of each tensor, and their bytes, little-endian in row
order (github.com/huggingface/safetensors, README). A folder with more than one
file has an index, from the name of a tensor to its file.

Own code beside the package of the same name, for what that does not do: a
transposed slice of a tensor without reading the rest, a writer that is never
given more than a part of one, and errors that say which tensor and which file.
"""

import contextlib
import json
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
_MAX_HEADER = 100 << 20  # as in the original reader


class Tensor(NamedTuple):
  """A tensor in a file.

  Attributes:
    path: of the file.
    name: in the file.
    dtype: numpy dtype.
    shape: tuple.
    offset: of its first byte in the file.
  """

  path: str
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def size(self):
    """Bytes."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

  def view(self):
    """The tensor as a read-only array that reads what is looked at.

    Its memory is that of the file; it is unmapped with the last view of it.
    """
    if not self.size:
      return np.zeros(self.shape, self.dtype)
    return np.memmap(self.path, self.dtype, 'r', self.offset, self.shape)

  def __str__(self):
    return f'{self.name} in {self.path}'


class New(NamedTuple):
  """A tensor to be written.

  Attributes:
    name: in the file.
    dtype: numpy dtype.
    shape: tuple.
    parts: function without arguments to an iterable of arrays of the dtype,
      which joined along the first axis are the tensor.
  """

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  parts: Callable[[], Iterable[np.ndarray]]

  @property
  def size(self):
    """Bytes."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def read_header(path):
  """The tensors of a file, a dict by name.

  Raises:
    UserError: it cannot be read, is cut off, or is not of the format.
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
      f'{path} is cut off or no safetensors file: it has {size} bytes, and '
      f'its header alone should have {length}; download it again'
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
      f'{path} is damaged or no safetensors file: its header cannot be read '
      f'({one_line(error, 100)})'
    ) from error
  tensors, data, end = {}, 8 + length, 0
  for name, (dtype, shape, first, last) in sorted(
    found.items(), key=lambda item: item[1][2:]
  ):
    if dtype not in DTYPES:
      raise UserError(
        f'{name} in {path} has dtype {dtype}; supported are '
        f'{", ".join(DTYPES)}: weights that are quantized must be converted '
        'to one of them first'
      )
    tensors[name] = Tensor(path, name, DTYPES[dtype], shape, data + first)
    if min(shape, default=0) < 0 or last - first != tensors[name].size:
      raise UserError(
        f'{name} in {path} has {last - first} bytes, but {dtype}{list(shape)} '
        f'takes {tensors[name].size}: the file is damaged'
      )
    if first != end:
      raise UserError(
        f'{name} in {path} begins at byte {first} of the data, not at {end}, '
        'where the tensor before it ends: the file is damaged'
      )
    end = last
    if data + end > size:
      raise UserError(
        f'{path} is cut off within {name}: it has {size} bytes, its header '
        f'says {data + max(entry[3] for entry in found.values())}; download '
        'it again'
      )
  if data + end != size:
    raise UserError(
      f'{path} has {size} bytes, its header says {data + end}: the file is '
      'damaged'
    )
  return tensors


def read_folder(folder):
  """The tensors of a folder with one file, or with several and an index.

  Raises:
    UserError: there is neither; index and files do not agree; or a file
      cannot be used.
  """
  single, index = os.path.join(folder, SINGLE), os.path.join(folder, INDEX)
  if not os.path.exists(index):
    if os.path.exists(single):
      return read_header(single)
    others = sorted(n for n in _listing(folder) if n.endswith('.safetensors'))
    raise UserError(
      f'{folder} has no {SINGLE} and no {INDEX}'
      + (f', only {", ".join(others[:4])}' if others else '')
      + ': only safetensors are read'
    )
  try:
    with open(index, encoding='utf-8') as f:
      where = json.load(f)['weight_map']
    files = sorted(set(where.values()))
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    reason = one_line(error, 100)
    raise UserError(
      f'{index} cannot be read as an index ({reason}): it needs a "weight_map"'
    ) from error
  inside = {}
  for file in files:
    path = os.path.join(folder, file)
    if os.path.basename(file) != file or not os.path.exists(path):
      raise UserError(f'{index} names {file}, which is not in {folder}')
    for name, tensor in read_header(path).items():
      if name not in where:
        raise UserError(f'{tensor} is not in {index}')
      if where[name] != file:
        raise UserError(f'{tensor}, but {index} has it in {where[name]}')
      inside[name] = tensor
  for name in where:
    if name not in inside:
      raise UserError(
        f'{index} has {name} in {where[name]}, and it is not there'
      )
  return inside


def write(path, tensors):
  """Writes a file, part by part.

  Args:
    path: of the file.
    tensors: list of New; their data has this order.

  Raises:
    UserError: it cannot be written.
  """
  entries, end = {'__metadata__': {'format': 'pt'}}, 0
  for t in tensors:
    entries[t.name] = {
      'dtype': _NAMES[t.dtype],
      'shape': list(t.shape),
      'data_offsets': [end, end + t.size],
    }
    end += t.size
  header = json.dumps(entries, separators=(',', ':')).encode()
  header += b' ' * (-len(header) % 8)
  with writing(path), open(path, 'wb') as f:
    f.write(struct.pack('<Q', len(header)) + header)
    for t in tensors:
      begun = f.tell()
      for part in t.parts():
        if part.dtype != t.dtype:
          raise TypeError(f'{t.name}: {part.dtype} where {t.dtype} is declared')
        part = np.ascontiguousarray(part).reshape(-1)
        f.write(part.view(np.uint8))  # bfloat16 has no buffer of its own
      if f.tell() - begun != t.size:
        raise ValueError(f'{t.name}: {f.tell() - begun} bytes, not {t.size}')
    f.flush()
    os.fsync(f.fileno())


def write_folder(folder, tensors, max_bytes):
  """Writes a folder: one file, or several and their index.

  Args:
    folder: that is there.
    tensors: list of New.
    max_bytes: of the data of a file that holds more than one tensor.

  Raises:
    UserError: it cannot be written.
  """
  files, room = [[]], max_bytes
  for t in tensors:
    if files[-1] and t.size > room:
      files.append([])
      room = max_bytes
    files[-1].append(t)
    room -= t.size
  if len(files) == 1:
    write(os.path.join(folder, SINGLE), tensors)
    return
  where = {}
  for i, inside in enumerate(files):
    name = f'model-{i + 1:05}-of-{len(files):05}.safetensors'
    write(os.path.join(folder, name), inside)
    where |= {t.name: name for t in inside}
  index = {
    'metadata': {'total_size': sum(t.size for t in tensors)},
    'weight_map': dict(sorted(where.items())),
  }
  path = os.path.join(folder, INDEX)
  with writing(path), open(path, 'w', encoding='utf-8') as f:
    json.dump(index, f, indent=2)


@contextlib.contextmanager
def writing(path):
  """Turns errors of the disk into a UserError that names the file."""
  try:
    yield
  except OSError as error:
    raise UserError(f'cannot write {path} ({error.strerror})') from error


def _listing(folder):
  try:
    return os.listdir(folder)
  except OSError as error:
    raise UserError(f'cannot read {folder} ({error.strerror})') from error
