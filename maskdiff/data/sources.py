"""Finds the input files of a corpus and cuts them into parts.

`plan` reads names, sizes and metadata but no text, so it is fast for any
corpus. `read` yields the documents of one part. Parts depend only on the input,
not on the number of workers, the current directory or the mount point of the
files.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from typing import Any

from maskdiff.data import readers, source_files, unpack
from maskdiff.data.readers import Skipped
from maskdiff.data.source_files import Input
from maskdiff.errors import UserError, printable
from maskdiff.files.paths import local_path

# A part is 1/256 of the input, so that all workers finish at about the same
# time. The minimum keeps the cost of starting a part small. The maximum bounds
# the work that is lost if a machine fails.
PARTS = 256
MAX_PARTS = 1 << 16  # a sparse file may seem to have any size
MIN_PART_BYTES = 4 << 20
MAX_PART_BYTES = 1 << 30

_FORMATS = {
  '.txt': 'files',
  '.md': 'files',
  '.py': 'files',
  '.json': 'jsonl',
  '.ndjson': 'jsonl',
  '.jsonl': 'jsonl',
  '.parquet': 'parquet',
}
_RECORDS = ('jsonl', 'parquet')  # formats whose values may be records
_PACKED = ('.gz', '.zst')
_KNOWN = f'{", ".join(_FORMATS)}; all except .parquet also with .gz or .zst'
_KNOWN_RECORDS = '.jsonl, .ndjson, .json, also with .gz or .zst, or .parquet'
_FOREIGN = {'site-packages', 'dist-packages', '__pycache__'}


@dataclasses.dataclass(frozen=True)
class Part:
  """A piece of the input that one process reads on its own.

  Attributes:
    format: 'files' (a document per file), 'lines' (a document per line),
      'jsonl', 'parquet' or 'tfds'.
    paths: absolute paths of several small files, or of one file.
    start: start of the range of one file, in bytes for 'lines' and 'jsonl', in
      row groups for 'parquet', in records for 'tfds'.
    stop: end of the range, exclusive; 0 if the files are read whole.
    size: bytes of input as stored; an estimate for 'parquet' and 'tfds'.
    text_key: field that holds the text; '' for 'files' and 'lines', and if
      whole records are read.
    file_sizes: size of each file in bytes when the plan was made.
  """

  format: str
  paths: tuple[str, ...]
  start: int
  stop: int
  size: int
  text_key: str
  file_sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
  """All parts of a corpus, in the order of its sources and their paths.

  Attributes:
    parts: the parts.
    description: names of the sources.
    fingerprint: 16 hex digits, a hash of the name and size of every input file,
      the boundaries of the parts and the text key. Names are relative to the
      source, so a copy in another place has the same fingerprint.
    ignored: numbers of ignored files in directories and globs, by suffix or
      reason, and of linked folders and folders of prepared rows.
  """

  parts: tuple[Part, ...]
  description: str
  fingerprint: str
  ignored: dict[str, int]


def embedded() -> Iterator[tuple[str, str]]:
  """Returns the .py files of the Python standard library, sorted by path.

  They are about 1,800 files and 31 MB, present on every machine with Python.
  The corpus differs a little between Python versions, even patch releases, and
  between builds that omit modules. Compare numbers within one Python version.

  Returns:
    Iterator of (path relative to the library's root, text). Files that are
    empty or not valid UTF-8 are skipped. Line ends are kept.

  Raises:
    UserError: this Python was installed without its sources.
  """
  return (
    (i.name, text)
    for i in _embedded()
    for (data,) in readers.whole_file(i.path, i.size)
    if isinstance(text := readers.document(data, i.path), str)
  )


def plan(
  specs: Sequence[str],
  *,
  text_key: str = 'text',
  by_line: bool = False,
  records: bool = False,
  output: str | os.PathLike | None = None,
) -> Plan:
  """Returns the Plan of a corpus: its sources, cut into parts.

  Args:
    specs: sources. Each is 'embedded' (the Python standard library), a file, a
      directory, a glob, or 'tfds:DIR:SPLIT', where DIR is a prepared version
      such as ~/tensorflow_datasets/c4/en/3.1.0.
    text_key: field that holds the text, in formats with fields.
    by_line: whether each line of a .txt file is a document.
    records: whether `read_records` reads the parts: lines of JSON and rows of
      Parquet, whole. Other formats are not read, and text_key is not used.
    output: directory of the rows, which may be inside a source; its files are
      not input.

  Raises:
    UserError: a source is missing, unreadable, damaged, of unknown format or
      named twice, has no text or no text key, or needs a package that is not
      installed.
  """
  ignored = collections.Counter()
  if output is not None:
    output = os.path.realpath(local_path(output))
  text_key = '' if records else text_key
  inputs = [
    i
    for spec in specs
    for i in _inputs(spec, text_key, by_line, ignored, output)
  ]
  source_files.check_named_once(inputs)
  total = sum(i.size for i in inputs)
  if not total:
    raise UserError(f'no text in {", ".join(specs)}: give files with text')
  target = min(max(total // PARTS, MIN_PART_BYTES), MAX_PART_BYTES)
  target = max(target, total // MAX_PARTS)
  parts = tuple(_parts(inputs, text_key, target))
  content = [
    [(i.name, i.size) for i in inputs],
    [(p.format, p.text_key, len(p.paths), p.start, p.stop) for p in parts],
  ]
  python = f'Python {sys.version_info.major}.{sys.version_info.minor}'
  names = {'embedded': f'{python} standard library'}
  return Plan(
    parts=parts,
    description=' + '.join(names.get(s, printable(s)) for s in specs),
    fingerprint=hashlib.blake2b(
      json.dumps(content).encode(), digest_size=8
    ).hexdigest(),
    ignored=dict(ignored),
  )


def read(part: Part) -> Iterator[str | Skipped]:
  """Yields the documents of a part in the order of the input.

  Line ends inside a document and byte order marks are kept. Blank lines of
  line-based files are not documents.

  Raises:
    UserError: a file is missing, unreadable or damaged, or its size has changed
      since the plan was made; or the field text_key is missing.
  """
  reader = readers.READERS[part.format]
  for path, size in zip(part.paths, part.file_sizes, strict=True):
    for value, *place in reader(
      path, size, part.start, part.stop, part.text_key
    ):
      yield readers.document(value, path, *place)


def read_records(part: Part) -> Iterator[tuple[Any, tuple]]:
  """Yields the records of a part in the order of the input.

  Yields:
    (record, place). A record is the bytes of a line, or a dict of the columns
    of a row. The place is for `where`.

  Raises:
    UserError: as `read`.
  """
  reader = readers.RECORD_READERS[part.format]
  for path, size in zip(part.paths, part.file_sizes, strict=True):
    for value, *place in reader(path, size, part.start, part.stop):
      yield value, (path, *place)


def where(path: str, kind: str, at: int) -> str:
  """Returns the place of a record as text: the file and the number of a line.

  Args:
    path: the file.
    kind: 'line', counted from 1; 'byte', at which a line begins; or 'row',
      counted from 0.
    at: number.
  """
  if kind == 'byte':
    number = 1
    with open(path, 'rb') as file:
      while before := file.read(min(at, 1 << 20)):
        number += before.count(b'\n')
        at -= len(before)
    kind, at = 'line', number
  return f'{printable(path)} {kind} {at}'


def _inputs(
  spec: str,
  text_key: str,
  by_line: bool,
  ignored: collections.Counter,
  output: str | None,
) -> list[Input]:
  if spec == 'embedded' and text_key:
    return _embedded()
  if spec.startswith('tfds:') and text_key:
    return _tfds_shards(spec, text_key)
  path = os.path.abspath(local_path(spec))
  source_files.check_output(spec, path, output)
  format_of = functools.partial(_format, by_line=by_line, records=not text_key)
  if os.path.isdir(path):
    paths = source_files.walk(path, ignored, output=output)
    found = source_files.select(path, paths, format_of, ignored, output)
    found = source_files.without_second_names(found)
  elif os.path.exists(path):
    found = []
    if format := format_of(path):
      found.append(source_files.examine(os.path.dirname(path), path, format))
  elif glob.has_magic(path):
    root = os.path.dirname(path[: re.search(r'[*?[]', path).start()])
    try:
      found = glob.glob(path, recursive=True)
    except RecursionError as e:
      raise UserError(
        f'{spec} has folders nested too deep for **: name the folder itself'
      ) from e
    paths = [p for p in found if not os.path.isdir(p)]
    found = source_files.select(root, set(paths), format_of, ignored, output)
  else:
    raise UserError(f'no file or directory {spec}: correct the path')
  if not found:
    others = ', '.join(f'{n:,} {name}' for name, n in ignored.items())
    known = _KNOWN if text_key else _KNOWN_RECORDS
    raise UserError(
      f'no text files in {spec}'
      + (f' (not read: {printable(others)})' if others else '')
      + f': give files that end in {known}'
    )
  return found


def _embedded() -> list[Input]:
  root = sysconfig.get_paths()['stdlib']
  found = []
  if os.path.isdir(root):
    ignored = collections.Counter()
    format_of = lambda path: 'files' if path.endswith('.py') else None
    found = sorted(
      source_files.examine(root, path, format)
      for path in source_files.walk(root, ignored, foreign=_FOREIGN)
      if (format := format_of(path))
    )
    found = source_files.without_second_names(found)
  if not found:
    raise UserError(
      f'no .py files in {root}: use a Python with its standard library '
      'unpacked, or your own text'
    )
  return found


def _format(path: str, by_line: bool, records: bool) -> str | None:
  name = path.lower()
  stem = name.removesuffix('.gz').removesuffix('.zst')
  suffix = os.path.splitext(stem)[1]
  format = 'lines' if by_line and suffix == '.txt' else _FORMATS.get(suffix)
  if records and format not in _RECORDS:
    return None
  return format if stem == name or format != 'parquet' else None


def _tfds_shards(spec: str, text_key: str) -> list[Input]:
  directory, _, split = spec.removeprefix('tfds:').rpartition(':')
  directory = os.path.abspath(local_path(directory))
  if not os.path.isfile(os.path.join(directory, 'dataset_info.json')):
    raise UserError(
      f'no prepared dataset in {directory}: write tfds:DIR:SPLIT with the '
      'folder of a version, such as ~/tensorflow_datasets/c4/en/3.1.0'
    )
  tfds = unpack.module('tensorflow_datasets')
  try:
    info = tfds.builder_from_directory(directory).info
  except Exception as e:  # tfds raises several types
    raise readers.cannot_read(directory, e) from e
  if info.file_format.value != 'array_record':
    raise UserError(
      f'{directory} is in the format {info.file_format.value}: prepare it with '
      "file_format='array_record'"
    )
  if split not in info.splits:
    raise UserError(
      f'no split {split!r} in {directory}: choose one of '
      f'{", ".join(info.splits)}'
    )
  readers.tfds_feature(directory, text_key)
  return [
    source_files.examine(
      directory, str(shard.filename), 'tfds', shard.examples_in_shard
    )
    for shard in info.splits[split].file_instructions
  ]


def _parts(inputs: list[Input], text_key: str, target: int) -> Iterator[Part]:
  for format, run in itertools.groupby(inputs, key=lambda i: i.format):
    run = list(run)
    row_groups = {}
    if format == 'parquet':
      # Reading footers from a bucket is mostly waiting, so many threads help.
      with concurrent.futures.ThreadPoolExecutor(16) as pool:
        sizes = functools.partial(_row_group_bytes, text_key=text_key)
        row_groups = dict(zip(run, pool.map(sizes, run), strict=True))
    # A shard of tfds always gets a range, so that a truncated shard is noticed.
    limit = -1 if format == 'tfds' else target
    for first, last in _groups([i.size for i in run], limit):
      _, paths, sizes, *_ = zip(*run[first:last], strict=True)
      ranges = [(0, 0, sum(sizes))]
      if sum(sizes) > limit:
        ranges = _ranges(run[first], row_groups.get(run[first], []), target)
      for start, stop, size in ranges:
        key = '' if format in ('files', 'lines') else text_key
        yield Part(format, paths, start, stop, size, key, sizes)


def _groups(sizes: Sequence[int], target: int) -> Iterator[tuple[int, int]]:
  """Yields index ranges with at most `target` bytes, or of a single item."""
  first, total = 0, 0
  for at, size in enumerate(sizes):
    if at > first and total + size > target:
      yield first, at
      first, total = at, 0
    total += size
  if sizes:
    yield first, len(sizes)


def _ranges(
  i: Input, row_groups: list[int], target: int
) -> Iterator[tuple[int, int, int]]:
  """One file as (start, stop, bytes)."""
  if i.format == 'files' or i.path.lower().endswith(_PACKED):
    yield 0, 0, i.size
  elif i.format == 'parquet':
    for start, stop in _groups(row_groups, target):
      yield start, stop, sum(row_groups[start:stop])
  else:
    length = i.records or i.size
    count = min(max(1, -(-i.size // target)), length)
    for k in range(count):
      start, stop = (length * n // count for n in (k, k + 1))
      size = i.size * stop // length - i.size * start // length
      yield start, stop, size


def _row_group_bytes(i: Input, text_key: str) -> list[int]:
  """Returns the stored bytes of each row group of a Parquet file, estimated."""
  with readers.open_parquet(i.path, i.size, text_key) as (file, _):
    groups = range(file.metadata.num_row_groups)
    unpacked = [file.metadata.row_group(g).total_byte_size for g in groups]
  ends = list(itertools.accumulate(unpacked, initial=0))
  stored = [i.size * end // max(ends[-1], 1) for end in ends]
  return [stop - start for start, stop in itertools.pairwise(stored)]
