"""Checks the values of a manifest of prepared data, which is not trusted.

Somebody else may have made the directory. After the checks, names are names of
files in the directory, numbers are finite and small enough for the arithmetic
on samples, and no two shards have the same file.
"""

import math
import re

from maskdiff.data import rows as rows_lib

# Their product, the tokens of a split, fits int64.
MAX_ROWS = 1 << 40
MAX_ROW_LENGTH = 1 << 20
MAX_VOCAB_SIZE = 1 << 31

_DIGEST = re.compile('[0-9a-f]{16}')


def version(fields) -> int:
  """Returns the format version of the JSON value of a manifest.

  Raises:
    ValueError: the value has no format version.
  """
  found = _dict(fields, 'the manifest').get('format_version')
  _check(type(found) is int, 'format_version', found, 'an integer')
  return found


def check(fields: dict, splits: tuple[str, ...]) -> None:
  """Checks the JSON value of a manifest.

  Args:
    fields: value of manifest.json.
    splits: names of the splits.

  Raises:
    ValueError: names the first bad value and its place.
  """
  _names(
    fields,
    'the manifest',
    'format_version source settings tokenizer_fingerprint vocab_size eos_id '
    'row_length dtype skipped splits columns statistics',
    optional='columns statistics',
  )
  for name in ('source', 'tokenizer_fingerprint'):
    _check(isinstance(fields[name], str), name, fields[name], 'a text')
  _integer(fields, 'vocab_size', 'vocab_size', 1, MAX_VOCAB_SIZE)
  _integer(fields, 'eos_id', 'eos_id', 0, fields['vocab_size'] - 1)
  _integer(fields, 'row_length', 'row_length', 1, MAX_ROW_LENGTH)
  dtype = fields['dtype']
  _check(dtype in ('uint16', 'uint32'), 'dtype', dtype, 'uint16 or uint32')
  _dict(fields['settings'], 'settings')
  _check(
    all(isinstance(v, str | int | float) for v in fields['settings'].values()),
    'settings',
    fields['settings'],
    'a flat table',
  )
  for reason in _dict(fields['skipped'], 'skipped'):
    _integer(fields['skipped'], reason, f'skipped[{reason!r}]')
  statistics = _dict(fields.get('statistics', {}), 'statistics')
  for name in statistics:
    _integer(statistics, name, f'statistics[{name!r}]', 0, 1 << 62)
  columns = _dict(fields.get('columns', {}), 'columns')
  names = tuple(columns)
  _check(
    columns == rows_lib.disk_dtypes(names, fields['row_length']),
    'columns',
    columns,
    'columns of rows with their dtypes',
  )
  found = _dict(fields['splits'], 'splits')
  _names(found, 'splits', ' '.join(splits))
  files = set()
  for name in splits:
    _split(found[name], f'splits.{name}', files)


def _split(split, where: str, files: set) -> None:
  _names(
    split,
    where,
    'shards rows tokens text_bytes documents unigram_entropy_nats',
  )
  _integer(split, 'rows', f'{where}.rows')
  # Bits per byte divide by the tokens and the bytes of a split that has rows.
  for name in ('tokens', 'text_bytes'):
    _integer(split, name, f'{where}.{name}', int(split['rows'] > 0), 1 << 62)
  _integer(split, 'documents', f'{where}.documents', 0, 1 << 62)
  entropy = split['unigram_entropy_nats']
  _check(
    type(entropy) in (int, float) and 0 <= entropy < math.inf,
    f'{where}.unigram_entropy_nats',
    entropy,
    'a finite number, not negative',
  )
  shards = split['shards']
  _check(isinstance(shards, list), f'{where}.shards', shards, 'a list')
  for i, shard in enumerate(shards):
    check_shard(shard, f'{where}.shards[{i}]')
    file = shard['file']
    _check(file not in files, f'{where}.shards[{i}].file', file, 'named once')
    files.add(file)
  rows = sum(shard['rows'] for shard in shards)
  _check(
    rows == split['rows'],
    f'{where}.rows',
    split['rows'],
    f'the sum over the shards, {rows}',
  )


def check_shard(shard, where: str) -> None:
  """Checks the JSON value of the entry of a shard.

  Args:
    shard: value.
    where: its place, for the message.

  Raises:
    ValueError: names the first bad value and its place.
  """
  _names(shard, where, 'file rows bytes digest sample_digest')
  file = shard['file']
  _check(
    isinstance(file, str) and file.isprintable() and _is_plain(file),
    f'{where}.file',
    file,
    'the name of a file in the directory',
  )
  _integer(shard, 'rows', f'{where}.rows', 1)
  _integer(shard, 'bytes', f'{where}.bytes', 1, 1 << 62)
  for name in ('digest', 'sample_digest'):
    digest = shard[name]
    _check(
      isinstance(digest, str) and bool(_DIGEST.fullmatch(digest)),
      f'{where}.{name}',
      digest,
      '16 hex digits',
    )


def _is_plain(name: str) -> bool:
  return name not in ('', '.', '..') and '/' not in name


def _names(value, where: str, names: str, optional: str = '') -> None:
  """Checks that a value is a table with exactly these names."""
  names, optional = set(names.split()), set(optional.split())
  missing = sorted(names - optional - _dict(value, where).keys())
  unknown = sorted(value.keys() - names)
  if missing:
    raise ValueError(f'{where} has no {missing[0]!r}')
  if unknown:
    raise ValueError(f'{where} has the unknown name {unknown[0][:40]!r}')


def _dict(value, where: str) -> dict:
  _check(isinstance(value, dict), where, value, 'a table')
  return value


def _integer(
  table, name: str, where: str, low: int = 0, high: int = MAX_ROWS
) -> None:
  value = table[name]
  # True is an int.
  _check(
    type(value) is int and low <= value <= high,
    where,
    value,
    f'an integer from {low} to {high}',
  )


def _check(condition: bool, where: str, value, expected: str) -> None:
  if not condition:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + '...'
    raise ValueError(f'{where} is {shown}: must be {expected}')
