"""Metrics files, wandb, progress and tables."""

import importlib
import json
import struct
import time
import types

import pytest

from maskdiff.errors import UserError
from maskdiff.monitoring import metrics, terminal, wandb_run


def write(workdir, rows, start_step=0, active=True):
  writer = metrics.Writer(workdir, start_step, active)
  for step, values in rows:
    writer.scalars(step, values)
  writer.close()


def steps(workdir):
  return [row['step'] for row in metrics.read(workdir / 'metrics.jsonl')]


def test_rows_round_trip(tmp_path):
  write(tmp_path, [(1, {'loss': 0.1, 'list': [1.0, 2.5]}), (2, {'loss': 3e-9})])
  assert metrics.read(tmp_path / 'metrics.jsonl') == [
    {'step': 1, 'loss': 0.1, 'list': [1.0, 2.5]},
    {'step': 2, 'loss': 3e-9},
  ]


def test_rows_are_flushed_at_once(tmp_path):
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


def test_new_run_drops_all_old_rows(tmp_path):
  """Rows of step 0 too; the new run writes them again."""
  write(tmp_path, [(0, {'loss': 1.0}), (2, {'loss': 1.0})])
  write(tmp_path, [(0, {'loss': 2.0})])
  assert metrics.read(tmp_path / 'metrics.jsonl') == [{'step': 0, 'loss': 2.0}]


def test_incomplete_last_line_is_skipped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  write(tmp_path, [(n, {'loss': 1.0}) for n in (2, 4, 6)])
  path.write_text(path.read_text()[:-7])
  assert steps(tmp_path) == [2, 4]
  write(tmp_path, [(6, {'loss': 1.0})], start_step=4)
  assert steps(tmp_path) == [2, 4, 6]
  for line in path.read_text().splitlines():
    json.loads(line)


def test_missing_file_has_no_rows(tmp_path):
  assert metrics.read(tmp_path / 'metrics.jsonl') == []


def test_inactive_writer_writes_nothing(tmp_path):
  writer = metrics.Writer(tmp_path / 'none', 0, False)
  writer.scalars(1, {'loss': 1.0})
  writer.text(1, 'sample', 'text')
  writer.close()
  assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_the_scalars_and_the_texts(tmp_path):
  writer = metrics.Writer(tmp_path, 0, True)
  writer.scalars(3, {'train/loss_nats_per_token': 1.5, 'list': [1.0]})
  writer.text(3, 'sample/0', 'some words')
  writer.scalars(6, {'train/loss_nats_per_token': 0.5})
  writer.close()
  scalars, texts, _ = board(tmp_path)
  assert scalars == [
    (3, 'train/loss_nats_per_token', 1.5),
    (6, 'train/loss_nats_per_token', 0.5),
  ]
  ((step, name, text),) = texts
  assert step == 3 and name.startswith('sample/0')
  assert text == '```\nsome words\n```'


def test_tensorboard_drops_repeated_steps(tmp_path):
  write(tmp_path, [(n, {'loss': 1.0}) for n in (2, 4, 6)])
  write(tmp_path, [(6, {'loss': 2.0})], start_step=4)
  scalars, _, restarts = board(tmp_path)
  assert (6, 'loss', 2.0) in scalars
  assert restarts == [5]  # older events are void from this step on


def board(workdir):
  """Reads TensorBoard's event files.

  A record is the length (8 bytes), a checksum (4), the event, a checksum (4).

  Returns:
    scalars and texts as (step, name, value), and the steps from which older
    events are void.
  """
  from tensorboardX.proto.event_pb2 import Event, SessionLog

  scalars, texts, restarts = [], [], []
  for path in sorted((workdir / 'tensorboard').glob('events.out.tfevents.*')):
    content = path.read_bytes()
    while content:
      (size,) = struct.unpack('<Q', content[:8])
      event = Event.FromString(content[12 : 12 + size])
      content = content[size + 16 :]
      if event.session_log.status == SessionLog.START and event.step:
        restarts.append(event.step)
      for value in event.summary.value:
        if value.WhichOneof('value') == 'simple_value':
          scalars.append((event.step, value.tag, value.simple_value))
        else:
          text = value.tensor.string_val[0].decode()
          texts.append((event.step, value.tag, text))
  return scalars, texts, restarts


@pytest.fixture
def wandb(monkeypatch):
  """The wandb package in offline mode."""
  package = pytest.importorskip('wandb')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  yield package
  package.teardown()


def wandb_runs(workdir, values=('loss', 'train/mfu')):
  """Reads wandb's files of all runs, the oldest first.

  A file is a header of 7 bytes and blocks of 32 KiB. Each record or part of a
  record has a checksum (4 bytes), a length (2) and a kind (1): complete 1,
  first part 2, middle part 3, last part 4.

  Returns:
    For each run its record, rows of `values` as (step, name, value), and a
    dict from the names of texts to (step, text).
  """
  from wandb.proto.wandb_internal_pb2 import Record

  importlib.import_module('wandb').teardown()  # flushes all files
  found = []
  files = workdir.glob('wandb/offline-run-*/*.wandb')
  for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
    content, at, part = path.read_bytes(), 7, b''
    run, rows, texts = None, [], {}
    while at < len(content):
      if 32768 - at % 32768 < 7:  # no room for a header
        at += 32768 - at % 32768
        continue
      _, size, kind = struct.unpack('<IHB', content[at : at + 7])
      part += content[at + 7 : at + 7 + size]
      at += 7 + size
      if kind in (2, 3):
        continue
      record, part = Record.FromString(part), b''
      if record.HasField('run'):
        run = record.run
      items = {
        item.key or '/'.join(item.nested_key): json.loads(item.value_json)
        for item in record.history.item
      }
      for name, value in items.items():
        if name.endswith('/path'):
          text = (path.parent / 'files' / value).read_text()
          texts[name.removesuffix('/path')] = (items['step'], text)
        elif name in values:
          rows.append((items['step'], name, value))
    found.append((run, rows, texts))
  return found


def wandb_writer(workdir, start_step=0, **config):
  return metrics.Writer(workdir, start_step, True, 'project', config)


def test_wandb_has_the_scalars_and_the_texts(tmp_path, wandb):
  writer = wandb_writer(tmp_path, steps=6)
  writer.scalars(3, {'loss': 1.5, 'train/mfu': 0.25, 'list': [1.0]})
  writer.text(3, 'sample/0', 'a < b\nwords')
  writer.scalars(6, {'loss': 0.5})
  writer.close()
  ((run, rows, texts),) = wandb_runs(tmp_path)
  assert run.project == 'project' and run.display_name == tmp_path.name
  config = {c.key: json.loads(c.value_json) for c in run.config.update}
  assert config['steps'] == 6
  # wandb does not keep the order of the values of a row.
  expected = [(3, 'loss', 1.5), (3, 'train/mfu', 0.25), (6, 'loss', 0.5)]
  assert sorted(rows) == expected
  ((name, (step, text)),) = texts.items()
  assert name == 'sample/0' and step == 3
  assert text.endswith('>a &lt; b\nwords</pre>')
  # metrics.jsonl is the same as without wandb.
  assert steps(tmp_path) == [3, 3, 6]


@pytest.mark.slow
def test_resumed_run_continues_its_wandb_run(tmp_path, wandb):
  """The config may change. A new run gets a new wandb run."""
  for start_step, size in ((0, 1), (4, 2), (0, 3)):
    writer = wandb_writer(tmp_path, start_step, size=size)
    writer.scalars(start_step + 2, {'loss': 1.0})
    writer.close()
    if not start_step:
      time.sleep(1.1)  # folder names contain the run id and the second
  (first, _, _), (second, rows, _), (third, _, _) = wandb_runs(tmp_path)
  assert first.run_id == second.run_id != third.run_id
  assert rows == [(6, 'loss', 1.0)]


@pytest.mark.parametrize(
  'key', ['', pytest.param('a' * 40, marks=pytest.mark.slow)]
)
def test_rows_are_kept_if_wandb_is_unreachable(
  tmp_path, wandb, monkeypatch, key
):
  """No account, or no network."""
  monkeypatch.setenv('WANDB_MODE', 'online')
  monkeypatch.setenv('WANDB_BASE_URL', 'http://127.0.0.1:9')
  monkeypatch.setenv('WANDB_API_KEY', key)
  monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
  monkeypatch.setattr(wandb_run, 'START_S', 1)
  warnings = []
  monkeypatch.setattr(terminal, 'warn', warnings.append)
  writer = wandb_writer(tmp_path)
  writer.scalars(2, {'loss': 1.0})
  writer.close()
  ((_, rows, _),) = wandb_runs(tmp_path)
  assert rows == [(2, 'loss', 1.0)]
  (warning,) = warnings
  assert 'wandb sync' in warning and '\n' not in warning


def test_wandb_error_does_not_end_the_run(tmp_path, wandb, monkeypatch):
  warnings = []
  monkeypatch.setattr(terminal, 'warn', warnings.append)
  writer = wandb_writer(tmp_path)
  writer.scalars(2, {'loss': 1.0})

  log = wandb.sdk.wandb_run.Run.log

  def fail(self, row):
    if row['step'] == 4:
      raise ConnectionResetError('Connection lost')
    log(self, row)

  monkeypatch.setattr(wandb.sdk.wandb_run.Run, 'log', fail)
  writer.scalars(4, {'loss': 0.5})
  writer.text(4, 'sample/0', 'text')
  writer.close()
  assert steps(tmp_path) == [2, 4, 4]
  assert warnings == [
    'warning: wandb, the row of step 4: Connection lost; '
    'the run continues without it'
  ]


def test_wandb_that_cannot_be_opened_does_not_end_the_run(
  tmp_path, wandb, monkeypatch
):
  warnings = []
  monkeypatch.setattr(terminal, 'warn', warnings.append)
  monkeypatch.setattr(wandb, 'init', lambda **_: 1 / 0)
  writer = wandb_writer(tmp_path)
  writer.scalars(2, {'loss': 1.0})
  writer.close()
  assert steps(tmp_path) == [2]
  assert len(warnings) == 2
  assert warnings[1].endswith('the run continues without it')


def test_missing_wandb_is_refused(monkeypatch):
  monkeypatch.setattr(wandb_run.importlib.util, 'find_spec', lambda name: None)
  wandb_run.require_wandb('')
  with pytest.raises(UserError, match='pip install wandb'):
    wandb_run.require_wandb('project')


def test_progress_is_plain_lines_without_a_terminal(capsys):
  progress = terminal.Progress(start_step=10, steps=1000, active=True)
  progress.update(20, 4.0, 'loss 2.5')  # 980 steps to go
  progress.say('a message')
  progress.close()
  out, err = capsys.readouterr()
  assert out == ''
  assert err == 'step 20/1000  loss 2.5  1:05:20 left\na message\n'


def test_inactive_progress_prints_nothing(capsys):
  progress = terminal.Progress(0, 10, active=False)
  progress.update(1, 1.0, 'loss')
  progress.say('a message')
  progress.close()
  assert capsys.readouterr() == ('', '')


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
  monkeypatch.setattr(terminal.sys.stderr, 'isatty', lambda: True)
  progress = terminal.Progress(0, 10, active=True)
  progress.update(5, 1.0, 'loss 2.5')
  progress.say('a message')
  progress.update(10, 1.0, 'loss 2.0')
  progress.close()
  err = capsys.readouterr().err
  assert '10/10' in err
  assert 'a message\n' in err


def test_table_aligns_numbers_to_the_right():
  rows = [('name', 'shape', 'number'), ('embed', (4, 2), 8), ('q', (), 12_345)]
  assert terminal.table(rows).splitlines() == [
    'name   shape   number',
    'embed  (4, 2)       8',
    'q      ()      12,345',
  ]


@pytest.mark.parametrize(
  'kind, peak', [('TPU v4', 275e12), ('NVIDIA H100 80GB HBM3', 989e12)]
)
def test_utilization_is_flops_over_the_peak_of_all_devices(kind, peak):
  devices = [types.SimpleNamespace(device_kind=kind)] * 4
  # 6 FLOPs for each of 1e9 weights, 1e5 tokens per second.
  assert metrics.utilization(1e5, 6e9, devices) == pytest.approx(
    6e14 / (4 * peak)
  )


def test_utilization_of_unknown_devices_is_none():
  devices = [types.SimpleNamespace(device_kind='abacus')]
  assert metrics.utilization(1e5, 6e9, devices) is None
