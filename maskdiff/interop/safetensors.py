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

import numpy as np

from maskdiff.errors import UserError, inline
from maskdiff.files import folder as folder_lib
from maskdiff.interop import safetensors_header

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
_NAMES = {dtype: name for name, dtype in safetensors_header.DTYPES.items()}


class _State(NamedTuple):
  """State of a file; changed contents have another state.

  Inodes are left out, because gcsfuse changes the inodes of its files.
  """

  size: int
  time_ns: int


class Tensor(NamedTuple):
  """A tensor in a file.

  Attributes:
    path: path of the file.
    name: name of the tensor in the file.
    dtype: numpy dtype.
    shape: tuple of int.
    offset: position of the first byte in the file.
    state: _State of the file when its header was read.
  """

  path: str
  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int
  state: _State

  @property
  def num_bytes(self):
    return _num_bytes(self)

  def view(self):
    """Returns the tensor as a read-only memory map of the file.

    Only the accessed parts are read. The map is closed with its last view.

    Raises:
      UserError: the file cannot be read, or has changed since its header was
        read.
    """
    if not self.num_bytes:
      return np.zeros(self.shape, self.dtype)
    with _open(self.path) as file:
      if _state(file) != self.state:
        raise UserError(
          f'{inline(self.path)} has changed since its header was read: wait '
          'until it is complete, and start again'
        )
      return np.memmap(file, self.dtype, 'r', self.offset, self.shape)

  def __str__(self):
    return f'{inline(self.name, 200)} in {inline(self.path)}'


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

  Args:
    path: path of the file. If its last part is a link, see files.folder.

  Raises:
    UserError: the file cannot be read, is cut off, or is not in the format.
  """
  with _open(path) as file:
    state = _state(file)
    entries = safetensors_header.read(file, state.size, inline(path))
  return {entry.name: Tensor(path, *entry, state) for entry in entries}


def _open(path):
  folder, name = os.path.split(os.fspath(path))
  return folder_lib.open_file(folder or '.', name)


def _state(file):
  """Returns the _State of an open file."""
  found = os.fstat(file.fileno())
  return _State(found.st_size, found.st_mtime_ns)


def read_folder(folder):
  """Returns the tensors of a folder, a dict of Tensor by name.

  The folder has one safetensors file, or several and an index.

  Raises:
    UserError: the folder has neither; index and files disagree; a file is
      damaged, or a link to a file outside the folder.
  """
  single, index = os.path.join(folder, SINGLE), os.path.join(folder, INDEX)
  shown = inline(folder)
  if not os.path.lexists(index):
    if os.path.lexists(single):
      return read_header(single)
    others = sorted(n for n in _listing(folder) if n.endswith('.safetensors'))
    raise UserError(
      f'{shown} has no {SINGLE} and no {INDEX}'
      + (f', only {inline(", ".join(others[:4]))}' if others else '')
      + ': only safetensors files can be read'
    )
  file_of = _read_index(folder, index)
  shown_index, tensors = inline(index), {}
  for file in sorted(set(file_of.values())):
    path = os.path.join(folder, file)
    if not _is_name(file) or not os.path.lexists(path):
      raise UserError(
        f'{shown_index} names {inline(file, 200)}, which is not in {shown}'
      )
    for name, tensor in read_header(path).items():
      if name not in file_of:
        raise UserError(f'{tensor} is not in {shown_index}')
      if file_of[name] != file:
        raise UserError(
          f'{tensor}, but {shown_index} places it in '
          f'{inline(file_of[name], 200)}'
        )
      tensors[name] = tensor
  for name, file in file_of.items():
    if name not in tensors:
      raise UserError(
        f'{shown_index} places {inline(name, 200)} in {inline(file, 200)}, '
        'which lacks it'
      )
  return tensors


def _read_index(folder, path):
  """Returns the names of the files by name of the tensor."""
  index = folder_lib.read_json(folder, INDEX, safetensors_header.MAX_BYTES)
  file_of = index.get('weight_map') if isinstance(index, dict) else None
  if not isinstance(file_of, dict) or not all(
    isinstance(file, str) for file in file_of.values()
  ):
    raise UserError(
      f'{inline(path)} cannot be read as an index: it needs a "weight_map" '
      'from names of tensors to names of files'
    )
  return file_of


def _is_name(file):
  """Returns whether a text is the name of a file in the same folder."""
  return file not in ('', '.', '..') and not set(file) & {'/', '\0'}


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
    raise UserError(
      f'cannot write {inline(path)} ({error.strerror})'
    ) from error


def _listing(folder):
  try:
    return os.listdir(folder)
  except OSError as error:
    shown = inline(folder)
    raise UserError(f'cannot read {shown} ({error.strerror})') from error
