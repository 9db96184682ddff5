"""Decompresses .gz and .zst files in bounded memory and to a bounded size."""

import gzip
import importlib
import io
import zlib
from typing import BinaryIO

from maskdiff.errors import UserError

# What a damaged file may raise, in addition to OSError.
DAMAGE = (EOFError, zlib.error)

# Text is compressed to 1/5 or so, and repeated lines to 1/200. A file that
# grows more was made to fill memory or disk.
MAX_EXPANSION = 1000
MIN_LIMIT_BYTES = 1 << 28

# A window of 2 GiB, the largest, is made by `zstd --long=31`.
_MAX_WINDOW_BYTES = 1 << 31
# 4 bytes of a .zst file may stand for 128 KiB, and the library returns all
# output of its input at once: 64 MiB for this input.
_ZSTD_INPUT_BYTES = 1 << 11


def unpacked(path: str, file: BinaryIO, size: int, buffer: int) -> BinaryIO:
  """Returns a file object with the decompressed bytes of a file.

  Files without the suffix .gz or .zst are returned unchanged.

  Args:
    path: path of the file.
    file: the open file.
    size: its size in bytes.
    buffer: bytes per read.

  Reading raises UserError if the file grows to more than MAX_EXPANSION times
  its size, and more than MIN_LIMIT_BYTES.
  """
  if path.lower().endswith('.gz'):
    file = gzip.GzipFile(fileobj=file)
  elif path.lower().endswith('.zst'):
    file = _Zstandard(file)
  else:
    return file
  limit = limit_bytes(size)
  return io.BufferedReader(_Limited(path, file, limit), buffer)


def limit_bytes(size: int) -> int:
  """Returns the number of bytes to which a file of a size may grow."""
  return max(MIN_LIMIT_BYTES, MAX_EXPANSION * size)


def expands(path: str, limit: int) -> UserError:
  """Returns the error for a file that grows to more than `limit` bytes."""
  return UserError(
    f'{path} unpacks to more than {limit:,} bytes, over {MAX_EXPANSION:,} '
    'times its size: remove it, or unpack it first if it is text'
  )


class _Limited(io.RawIOBase):
  """Reads a file; raises UserError after `limit` bytes."""

  def __init__(self, path: str, file: BinaryIO, limit: int):
    self._path, self._file, self._limit = path, file, limit
    self._left = limit

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    count = self._file.readinto(buffer)
    self._left -= count
    if self._left < 0:
      raise expands(self._path, self._limit)
    return count


class _Zstandard(io.RawIOBase):
  """Decompresses a file; unlike zstandard's reader, it detects truncation."""

  def __init__(self, file: BinaryIO):
    zstandard = module('zstandard')
    self._unpacker = zstandard.ZstdDecompressor(
      max_window_size=_MAX_WINDOW_BYTES
    )
    self._error = zstandard.ZstdError
    self._file = file
    self._frame = None
    self._packed, self._unpacked = b'', memoryview(b'')

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._unpacked:
      packed = self._packed or self._file.read(_ZSTD_INPUT_BYTES)
      if not packed and self._frame:
        raise EOFError('the compressed data are truncated')
      if not packed:
        return 0
      self._frame = self._frame or self._unpacker.decompressobj()
      try:
        self._unpacked = memoryview(self._frame.decompress(packed))
      except self._error as e:
        raise OSError(str(e)) from e
      self._packed = self._frame.unused_data
      if self._frame.eof:
        self._frame = None
    count = min(len(buffer), len(self._unpacked))
    buffer[:count] = self._unpacked[:count]
    self._unpacked = self._unpacked[count:]
    return count


def module(name: str):
  """Imports an optional package; raises UserError if it is not installed."""
  try:
    return importlib.import_module(name)
  except ImportError as e:
    package = name.partition('.')[0]
    raise UserError(
      f'{package} is not installed and this format needs it: pip install -r '
      'requirements-data.txt'
    ) from e
