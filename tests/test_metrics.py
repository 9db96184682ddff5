"""Rows of metrics that survive crashes, and lines that people can read."""

import json
import types

import pytest

from maskdiff import metrics


def write(workdir, rows, start_step=0, active=True):
  writer = metrics.Writer(workdir, start_step, active)
  for step, values in rows:
    writer.scalars(step, values)
  writer.close()


def steps(workdir):
  return [row['step'] for row in metrics.read(workdir / 'metrics.jsonl')]


def test_rows_come_back_as_they_were_written(tmp_path):
  write(tmp_path, [(1, {'loss': 0.1, 'list': [1.0, 2.5]}), (2, {'loss': 3e-9})])
  assert metrics.read(tmp_path / 'metrics.jsonl') == [
    {'step': 1, 'loss': 0.1, 'list': [1.0, 2.5]},
    {'step': 2, 'loss': 3e-9},
  ]


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path):
  writer = metrics.Writer(tmp_path, 0, True)
  writer.scalars(1, {'loss': 1.0})
  writer.text(1, 'sample', 'two\nlines')
  assert metrics.read(tmp_path / 'metrics.jsonl') == [
    {'step': 1, 'loss': 1.0},
    {'step': 1, 'sample': 'two\nlines'},
  ]
  writer.close()


def test_rows_after_the_restored_step_are_dropped(tmp_path):
  write(tmp_path, [(n, {'loss': 1.0}) for n in (0, 2, 4, 6)])
  write(tmp_path, [(n, {'loss': 2.0}) for n in (6, 8)], start_step=4)
  rows = metrics.read(tmp_path / 'metrics.jsonl')
  assert [(row['step'], row['loss']) for row in rows] == [
    (0, 1.0),
    (2, 1.0),
    (4, 1.0),
    (6, 2.0),
    (8, 2.0),
  ]


def test_a_run_from_scratch_keeps_no_rows(tmp_path):
  """Not even those before its first step, which it writes as well."""
  write(tmp_path, [(0, {'loss': 1.0}), (2, {'loss': 1.0})])
  write(tmp_path, [(0, {'loss': 2.0})])
  assert metrics.read(tmp_path / 'metrics.jsonl') == [{'step': 0, 'loss': 2.0}]


def test_a_torn_last_line_is_passed_over(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  write(tmp_path, [(n, {'loss': 1.0}) for n in (2, 4, 6)])
  path.write_text(path.read_text()[:-7])
  assert steps(tmp_path) == [2, 4]
  write(tmp_path, [(6, {'loss': 1.0})], start_step=4)
  assert steps(tmp_path) == [2, 4, 6]
  for line in path.read_text().splitlines():
    json.loads(line)


def test_no_file_has_no_rows(tmp_path):
  assert metrics.read(tmp_path / 'metrics.jsonl') == []


def test_an_inactive_writer_writes_nothing(tmp_path):
  writer = metrics.Writer(tmp_path / 'none', 0, False)
  writer.scalars(1, {'loss': 1.0})
  writer.text(1, 'sample', 'text')
  writer.close()
  assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_scalars_and_the_texts(tmp_path):
  writer = metrics.Writer(tmp_path, 0, True)
  writer.scalars(3, {'train/loss_nats_per_token': 1.5, 'list': [1.0]})
  writer.text(3, 'sample', 'some words')
  writer.close()
  (events,) = (tmp_path / 'tensorboard').glob('events.out.tfevents.*')
  content = events.read_bytes()
  assert b'train/loss_nats_per_token' in content
  assert b'some words' in content


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
  progress = metrics.Progress(start_step=10, steps=1000, active=True)
  progress.update(20, 4.0, 'loss 2.5')  # 980 steps to go
  progress.say('a message')
  progress.close()
  out, err = capsys.readouterr()
  assert out == ''
  assert err == 'step 20/1000  loss 2.5  1:05:20 left\na message\n'


def test_progress_of_other_hosts_is_silent(capsys):
  progress = metrics.Progress(0, 10, active=False)
  progress.update(1, 1.0, 'loss')
  progress.say('a message')
  progress.close()
  assert capsys.readouterr() == ('', '')


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
  monkeypatch.setattr(metrics.sys.stderr, 'isatty', lambda: True)
  progress = metrics.Progress(0, 10, active=True)
  progress.update(5, 1.0, 'loss 2.5')
  progress.say('a message')
  progress.update(10, 1.0, 'loss 2.0')
  progress.close()
  err = capsys.readouterr().err
  assert '10/10' in err
  assert 'a message\n' in err


def test_a_table_lines_up_with_numbers_to_the_right():
  rows = [('name', 'shape', 'number'), ('embed', (4, 2), 8), ('q', (), 12_345)]
  assert metrics.table(rows).splitlines() == [
    'name   shape   number',
    'embed  (4, 2)       8',
    'q      ()      12,345',
  ]


@pytest.mark.parametrize(
  'kind, peak', [('TPU v4', 275e12), ('NVIDIA H100 80GB HBM3', 989e12)]
)
def test_utilization_is_work_done_over_peak_of_all_devices(kind, peak):
  devices = [types.SimpleNamespace(device_kind=kind)] * 4
  # 6 FLOPs for each of 1e9 weights, 1e5 tokens a second.
  assert metrics.utilization(1e5, 6e9, devices) == pytest.approx(
    6e14 / (4 * peak)
  )


def test_utilization_of_unknown_devices_is_not_guessed():
  devices = [types.SimpleNamespace(device_kind='abacus')]
  assert metrics.utilization(1e5, 6e9, devices) is None
