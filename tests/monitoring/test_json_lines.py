"""Reading JSON lines files that are damaged or come from strangers."""

import json
import os
import tracemalloc

import pytest

from maskdiff.errors import UserError
from maskdiff.monitoring import json_lines, metrics, metrics_file

# Lines of metrics.jsonl that are not rows.
DAMAGED = {
  'not UTF-8': b'{"step": 3, "text": "\xff"}',
  'UTF-16': '{"step": 3}'.encode('utf-16'),
  'cut short': b'{"step": 3, "train/lo',
  'two rows': b'{"step": 3}{"step": 4}',
  'zeros': b'\0' * 4096,
  'not JSON': b'step 3',
  'a number': b'3',
  'a list': b'[{"step": 3}]',
  'null': b'null',
  'NaN': b'NaN',
  'a text': b'"step"',
  'no step': b'{"loss": 3.0}',
  'step is a text': b'{"step": "3"}',
  'step is a bool': b'{"step": true}',
  'step is a float': b'{"step": 3.0}',
  'step is null': b'{"step": null}',
  'step is a list': b'{"step": [3]}',
  'step is negative': b'{"step": -3}',
  'step is NaN': b'{"step": NaN}',
  'step is infinite': b'{"step": 1e999}',
  'step is huge': b'{"step": 1%s}' % (b'0' * 400),
  'step has too many digits': b'{"step": 1%s}' % (b'0' * 5000),
  'nested': b'[' * 100_000,
  'a nested value': b'{"step": 3, "x": %s1%s}' % (b'[' * 500, b']' * 500),
  'half of a surrogate pair': b'{"step": 3, "sample/0": "\\ud800"}',
}


@pytest.mark.parametrize('line', DAMAGED.values(), ids=DAMAGED)
def test_damaged_line_is_skipped_and_its_neighbours_are_kept(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 5}\n')
  assert metrics_file.read(path) == ([{'step': 1}, {'step': 5}], 1)
  # As the only line, the first and the last.
  path.write_bytes(line + b'\n')
  assert metrics_file.read(path) == ([], 1)


def test_values_of_metrics_may_have_any_type(tmp_path):
  """A NaN, or a metric that a stage adds, is not damage."""
  path = tmp_path / 'metrics.jsonl'
  line = '{"step": 0, "a": NaN, "b": 1e999, "c": "x", "d": [1, {}], "e": null}'
  path.write_text(line + '\r\n\n')
  ((row,), num_skipped) = metrics_file.read(path)
  assert num_skipped == 0
  assert row['b'] == float('inf') and row['d'] == [1, {}]


def test_line_that_is_being_written_is_not_damage(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  whole = b'\xef\xbb\xbf{"step": 1}\n{"step": 2, "x": "\xc3\xa4"}'
  for cut in range(len(whole)):
    path.write_bytes(whole[:cut])
    rows, num_skipped = metrics_file.read(path)
    assert [row['step'] for row in rows] == ([1] if cut >= 14 else [])
    assert num_skipped == 0
  path.write_bytes(whole)
  assert [row['step'] for row in metrics_file.read(path).values] == [1, 2]


def test_line_without_end_takes_bounded_memory(tmp_path):
  """A sparse line of 256 MiB between two rows."""
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n')
  os.truncate(path, 1 << 28)
  with open(path, 'ab') as f:
    f.write(b'\n{"step": 2}\n')
  tracemalloc.start()
  rows, num_skipped = metrics_file.read(path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert [row['step'] for row in rows] == [1, 2] and num_skipped == 1
  assert peak < 4 * json_lines.MAX_LINE_BYTES


def test_lines_of_the_limit_are_read_and_longer_ones_are_not(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(json_lines, 'MAX_LINE_BYTES', 32)
  path = tmp_path / 'lines'
  for length in (*range(30, 35), 64, 65):
    text = json.dumps({'x': 'x' * (length - 10)})
    assert len(text) + 1 == length
    path.write_text(f'{{"a": 1}}\n{text}\n{{"b": 2}}\n')
    found = json_lines.read(path, lambda value: True)
    expected = [{'a': 1}, {'b': 2}]
    if length <= 32:
      expected[1:1] = [json.loads(text)]
    assert found == (expected, int(length > 32))


def test_reading_ends_in_a_file_of_terabytes(tmp_path, monkeypatch):
  monkeypatch.setattr(json_lines, 'MAX_LINE_BYTES', 1 << 12)
  monkeypatch.setattr(json_lines, 'MAX_SKIPPED_BYTES', 1 << 20)
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n')
  os.truncate(path, 1 << 40)
  assert metrics_file.read(path) == ([{'step': 1}], 1)


def test_values_in_memory_are_bounded(tmp_path, monkeypatch):
  monkeypatch.setattr(json_lines, 'MAX_BYTES', 1 << 16)
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n' * 100)
  assert len(metrics_file.read(path).values) == 100
  path.write_text('{"step": 1}\n' * 200)
  with pytest.raises(UserError, match='too many lines to be kept in memory'):
    metrics_file.read(path)
  assert len(list(metrics_file.each(path))) == 200


def test_other_than_regular_files_are_refused(tmp_path):
  """A FIFO would block the reader for ever."""
  os.mkfifo(tmp_path / 'fifo')
  for path in (tmp_path / 'fifo', tmp_path, '/dev/null'):
    for read in (metrics_file.read, metrics.read):
      with pytest.raises(UserError, match='cannot read .* regular'):
        read(path)
  assert metrics_file.read(tmp_path / 'none') == ([], 0)
  assert list(metrics_file.each(tmp_path / 'none')) == []


def test_resumed_run_keeps_the_rows_around_damaged_lines(tmp_path, capsys):
  path = tmp_path / 'metrics.jsonl'
  lines = [b'{"step": 2}', *DAMAGED.values(), b'{"step": 4}', b'{"step": 6}']
  path.write_bytes(b'\n'.join(lines) + b'\n')
  writer = metrics.Writer(tmp_path, 4, True)
  writer.scalars(6, {'loss': 1.0})
  writer.close()
  assert 'damaged lines are skipped' in capsys.readouterr().err
  rows = [json.loads(line) for line in path.read_bytes().splitlines()]
  assert rows == [{'step': 2}, {'step': 4}, {'step': 6, 'loss': 1.0}]


def test_finite_numbers():
  for value in (0, -1, 2.5, 10**99, -1e100):
    assert json_lines.finite(value) == float(value)
  for value in (True, None, '1', [1], float('nan'), float('inf'), 10**400):
    assert json_lines.finite(value) is None


def test_warning_counts_the_damaged_lines():
  warning = lambda number: json_lines.Lines([], number).warning('a/b')
  assert warning(0) == ''
  assert warning(1) == 'a/b: 1 damaged line is skipped'
  assert warning(1234) == 'a/b: 1,234 damaged lines are skipped'
