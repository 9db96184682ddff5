"""Reads are bounded, and refuse what is not a regular file of the form."""

import json
import os

import pytest

from maskdiff.errors import UserError, one_line, printable
from maskdiff.files import reading


def test_value_of_a_json_file_is_returned(tmp_path):
  path = tmp_path / 'a.json'
  value = {'a': [1, 2.5, None, True, 'ü\u2028😀'], 'b': {}}
  for content in (json.dumps(value), '\ufeff' + json.dumps(value)):
    path.write_text(content, encoding='utf-8')
    assert reading.read_json(path) == value


@pytest.mark.parametrize('kind', ['fifo', 'folder', 'missing', 'null'])
def test_only_regular_files_are_read(tmp_path, kind):
  path = tmp_path / 'a'
  if kind == 'fifo':
    os.mkfifo(path)
  elif kind == 'folder':
    path.mkdir()
  elif kind == 'null':
    path = '/dev/null'
  with pytest.raises(UserError, match='cannot read'):
    reading.read_bytes(path)
  with pytest.raises(UserError, match='cannot read'):
    reading.read_bytes('a\0b')


def test_read_is_bounded(tmp_path):
  path = tmp_path / 'a'
  with open(path, 'wb') as f:
    f.truncate(1 << 40)  # sparse: takes no space
  with pytest.raises(UserError, match='more than 1,000 bytes'):
    reading.read_bytes(path, 1000)
  path.write_bytes(b'x' * 1000)
  assert reading.read_bytes(path, 1000) == b'x' * 1000


@pytest.mark.parametrize(
  ('content', 'reason'),
  [
    (b'{"a": 1', 'not valid JSON'),
    (b'', 'not valid JSON'),
    (b'\xff\xfe', 'not valid JSON'),
    (b'1' * 10_000, 'not valid JSON'),
    (b'[' * 100_000 + b']' * 100_000, 'nested more than 100'),
    (b'{"a":' * 101 + b'1' + b'}' * 101, 'nested more than 100'),
    (b'["\\ud800"]', 'surrogate'),
  ],
)
def test_json_that_is_refused(content, reason):
  with pytest.raises(UserError, match=reason) as caught:
    reading.parse_json(content, 'line 3')
  assert str(caught.value).startswith('line 3 is') or 'line 3 has' in str(
    caught.value
  )
  assert '\n' not in str(caught.value)


def test_json_of_the_largest_depth_is_read():
  value = reading.parse_json('[' * 100 + ']' * 100, 'x')
  for _ in range(99):
    (value,) = value
  assert value == []
  wide = reading.parse_json(json.dumps([[]] * 1000), 'x')
  assert wide == [[]] * 1000


def test_control_characters_are_escaped():
  text = 'a\tü\n\x1b[31m\x9b\x7f\r\ud800'
  assert printable(text) == 'a\tü\n\\x1b[31m\\x9b\\x7f\\r\\ud800'
  assert one_line('a\nb\x1b') == 'a b\\x1b'
