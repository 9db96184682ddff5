"""Writers of a run while the disk is full: rows wait, nothing blocks."""

import errno
import json
import os
import shutil
import sys
import threading
import types

import numpy as np
import pytest

from maskdiff.files import appending
from maskdiff.monitoring import metrics, skipped, terminal, wandb_run

ERRORS = (
  *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
  *(errno.EROFS, errno.ESTALE, errno.EIO),
)


@pytest.fixture
def warnings(monkeypatch):
  lines = []
  monkeypatch.setattr(terminal, 'warn', lines.append)
  return lines


def steps(workdir):
  return [row['step'] for row in metrics.read(workdir / 'metrics.jsonl')]


def events(workdir):
  """Returns the steps of all scalars in event files that can be read."""
  from tensorboardX.proto.event_pb2 import Event

  found = []
  for path in sorted((workdir / 'tensorboard').iterdir()):
    content = path.read_bytes()
    while len(content) >= 12:
      size = int.from_bytes(content[:8], 'little')
      event = Event.FromString(content[12 : 12 + size])
      found += [event.step] if event.summary.value else []
      content = content[size + 16 :]
    assert not content
  return found


@pytest.mark.parametrize('error', ERRORS)
def test_rows_and_events_wait_for_room(tmp_path, disk, warnings, error):
  writer = metrics.Writer(tmp_path, 0, True)
  for room in (0, 1, 30, 100, 150):
    step = len(steps(tmp_path))
    writer.scalars(step, {'loss': 1.0})
    disk.room, disk.error = room, error
    for more in range(1, 6):
      writer.scalars(step + more, {'loss': 1.0})
    disk.room = None
    writer.scalars(step + 6, {'loss': 1.0})
  writer.close()
  assert steps(tmp_path) == list(range(35))
  assert events(tmp_path) == list(range(35))
  reported = [w for w in warnings if os.strerror(error) in w]
  assert len(reported) == 2  # one for each file


def test_run_resumes_on_a_full_disk(tmp_path, disk, warnings):
  """Rows of repeated steps are dropped as soon as there is room."""
  writer = metrics.Writer(tmp_path, 0, True)
  for step in (1, 2, 3, 4):
    writer.scalars(step, {'loss': 1.0})
  writer.close()
  path = tmp_path / 'metrics.jsonl'
  before = path.read_bytes()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, 'fsync', lambda file: os.write(file, b'x'))
    disk.room = 0
    writer = metrics.Writer(tmp_path, 2, True)
    writer.scalars(3, {'loss': 2.0})
    assert path.read_bytes() == before
  disk.room = None
  writer.scalars(4, {'loss': 2.0})
  writer.close()
  assert [(r['step'], r['loss']) for r in metrics.read(path)] == [
    (1, 1.0),
    (2, 1.0),
    (3, 2.0),
    (4, 2.0),
  ]


def test_work_directory_that_vanishes(tmp_path, disk, warnings):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  writer = metrics.Writer(workdir, 0, True)
  writer.scalars(1, {'loss': 1.0})
  shutil.rmtree(workdir)
  writer.scalars(2, {'loss': 1.0})
  workdir.mkdir()
  writer.scalars(3, {'loss': 1.0})
  writer.close()
  assert steps(workdir) == [1, 2, 3]
  assert any('No such file' in w for w in warnings)


def test_failing_disk_leaves_one_event_file_per_failure(
  tmp_path, disk, warnings
):
  """Files that hold no whole event are removed again."""
  writer = metrics.Writer(tmp_path, 0, True)
  disk.room = 0
  for step in range(50):
    writer.scalars(step, {'loss': 1.0})
    disk.room = 40  # for the head of a file, but not for an event
  disk.room = None
  writer.close()
  assert len(list((tmp_path / 'tensorboard').iterdir())) == 2
  assert events(tmp_path) == list(range(50))


def test_rows_are_strict_json(tmp_path):
  writer = metrics.Writer(tmp_path, 0, True)
  writer.scalars(1, {'loss': float('nan'), 'list': [1.0, float('inf')]})
  writer.text(1, 'sample/0', 'half \ud83d of a pair')
  writer.close()

  def refuse(word):
    raise ValueError(word)

  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  row, text = (json.loads(line, parse_constant=refuse) for line in lines)
  assert row == {'step': 1, 'loss': None, 'list': [1.0, None]}
  assert text == {'step': 1, 'sample/0': 'half ? of a pair'}


def test_rows_of_damaged_files_are_kept_on_resume(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(
    '{"step": 1, "loss": NaN}\n[1]\n3\n{"loss": 1}\n{"step": "2"}\n'
    '{"step": true}\n{"step": 2, "loss": 0.5}\n{"step": 3}\n{"st'
  )
  metrics.Writer(tmp_path, 2, True).close()
  assert path.read_text() == (
    '{"step": 1, "loss": null}\n{"step": 2, "loss": 0.5}\n'
  )


def test_planted_links_are_replaced(tmp_path):
  victim = tmp_path / 'victim'
  victim.write_text('private')
  workdir = tmp_path / 'run'
  workdir.mkdir()
  for start_step in (0, 2):
    for name in ('metrics.jsonl', f'.metrics.jsonl.{os.getpid()}.tmp'):
      (workdir / name).unlink(missing_ok=True)
      (workdir / name).symlink_to(victim)
    writer = metrics.Writer(workdir, start_step, True)
    writer.scalars(start_step + 1, {'loss': 1.0})
    writer.close()
    assert steps(workdir) == [start_step + 1]
  assert victim.read_text() == 'private'


def test_planted_folder_of_events_is_replaced(tmp_path):
  elsewhere, workdir = tmp_path / 'elsewhere', tmp_path / 'run'
  elsewhere.mkdir()
  workdir.mkdir()
  (workdir / 'tensorboard').symlink_to(elsewhere)
  writer = metrics.Writer(workdir, 0, True)
  writer.scalars(
    1, {'loss': np.float32(1e30), 'large': 1e300, 'none': None, 'list': [1]}
  )
  writer.close()
  assert list(elsewhere.iterdir()) == [] and events(workdir) == [1]


def test_skipped_updates_on_a_full_disk(tmp_path, disk):
  """The error of the run says that the file is missing."""
  update = {
    'step': 3,
    'loss_nats_per_token': float('nan'),
    'grad_norm': 1.0,
    'in_a_row': 1,
    'samples': (4, 8),
  }
  give_up = lambda: skipped.give_up(
    tmp_path, [update], lambda facts: ['text'], lambda *_: ''
  )
  path = tmp_path / 'skipped_to_step_3.json'
  assert f'{path} lists their losses and samples' in give_up()
  assert '"loss_nats_per_token": null' in path.read_text()
  path.unlink()
  path.mkdir()
  assert f'{path} could not be written (Is a directory)' in give_up()


# The terminal


class Broken:
  """A stream on a full disk, or of a terminal that was closed."""

  def __init__(self, error):
    self.error, self.calls = error, 0

  def isatty(self):
    return False

  def write(self, text):
    self.calls += 1
    raise self.error

  flush = write


@pytest.mark.parametrize(
  'stream',
  [
    Broken(OSError(errno.ENOSPC, 'No space left on device')),
    Broken(BrokenPipeError(errno.EPIPE, 'Broken pipe')),
    Broken(ValueError('I/O operation on closed file')),
    None,
  ],
)
def test_output_that_cannot_be_written_does_not_end_the_run(
  monkeypatch, stream
):
  monkeypatch.setattr(sys, 'stderr', stream)
  monkeypatch.setattr(sys, 'stdout', stream)
  progress = terminal.Progress(0, 10, active=True)
  progress.update(1, 1.0, 'loss 2.5')
  progress.say('a message')
  progress.close()
  terminal.warn('warning: a')
  terminal.print_result('done')
  assert stream is None or stream.calls >= 4


def test_control_characters_are_escaped(capsys):
  progress = terminal.Progress(0, 10, active=True)
  progress.say('sample: \x1b]0;title\x07\n\tend')
  terminal.warn('a\x1b[2J')
  out, err = capsys.readouterr()
  assert err == 'sample: \\x1b]0;title\\x07\n\tend\na\\x1b[2J\n'


# wandb, without the package


class FakeRun:
  """A run of a wandb that stops answering at some row."""

  def __init__(self, stuck=None):
    self.rows, self.finished, self.stuck = [], False, stuck
    self.url = 'https://wandb.ai/me/project/runs/a'

  def define_metric(self, *_, **__):
    pass

  def log(self, row):
    if self.stuck and len(self.rows) == 2:
      self.stuck.wait()
    self.rows.append(row)

  def finish(self):
    self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
  """A module wandb whose user has logged in."""
  module = types.SimpleNamespace(
    run=FakeRun(),
    options=[],
    Settings=lambda **options: options,
    setup=lambda: types.SimpleNamespace(
      settings=types.SimpleNamespace(mode='online', relogin=True)
    ),
    login=lambda prompt, verify: True,
    teardown=lambda: None,
  )

  def init(**options):
    module.options.append(options)
    return module.run

  module.init = init
  monkeypatch.setitem(sys.modules, 'wandb', module)
  monkeypatch.setattr(wandb_run, 'END_S', 0.2)
  return module


def write_rows(workdir, number=4):
  writer = metrics.Writer(workdir, 0, True, 'project', {})
  for step in range(number):
    writer.scalars(step, {'loss': 1.0})
  writer.close()
  assert steps(workdir) == list(range(number))


def test_rows_reach_wandb(tmp_path, fake_wandb, warnings):
  write_rows(tmp_path)
  assert [row['step'] for row in fake_wandb.run.rows] == [0, 1, 2, 3]
  assert fake_wandb.run.finished
  assert warnings == ['wandb: https://wandb.ai/me/project/runs/a']


def test_wandb_without_a_login_is_offline_and_never_asks(
  tmp_path, fake_wandb, warnings
):
  asked = []
  fake_wandb.login = lambda prompt=True, verify=True: (
    asked.append(1) if prompt else False
  )
  write_rows(tmp_path)
  (options,) = fake_wandb.options
  assert options['mode'] == 'offline' and not asked
  assert len(fake_wandb.run.rows) == 4
  assert warnings == [
    'warning: wandb: there is no login (`wandb login`); rows are kept for '
    f'`wandb sync` in {tmp_path / "wandb"}'
  ]


@pytest.mark.parametrize(
  'error', [SystemExit(130), KeyboardInterrupt(), OSError(28, 'full')]
)
def test_wandb_that_wants_to_end_the_process_does_not(
  tmp_path, fake_wandb, warnings, error
):
  def init(**options):
    raise error

  fake_wandb.init = init
  write_rows(tmp_path)
  assert [w.partition(':')[0] for w in warnings] == ['warning', 'warning']
  assert warnings[1].endswith('the run continues without it')


@pytest.mark.parametrize('where', ['init', 'log'])
def test_wandb_that_hangs_does_not_delay_the_run(
  tmp_path, fake_wandb, warnings, where, monkeypatch
):
  stuck = threading.Event()
  monkeypatch.setattr(wandb_run, 'MAX_WAITING', 3)
  if where == 'init':
    fake_wandb.init = lambda **_: stuck.wait()
  else:
    fake_wandb.run = FakeRun(stuck)
  write_rows(tmp_path, number=20)
  warning = warnings[-1]
  assert 'wandb did not take all rows in time; it lacks' in warning
  stuck.set()


@pytest.mark.parametrize(
  'content', [b'', b'\xff', b'../../x', b'a\nb', b'x' * 10**6]
)
def test_damaged_wandb_id_is_replaced(tmp_path, fake_wandb, warnings, content):
  (tmp_path / 'wandb_id').write_bytes(content)
  metrics.Writer(tmp_path, 1, True, 'project', {}).close()
  (options,) = fake_wandb.options
  assert len(options['id']) == 8
  assert (tmp_path / 'wandb_id').read_text() == options['id']


def test_memory_for_rows_is_bounded(tmp_path, disk, warnings, monkeypatch):
  monkeypatch.setattr(appending, 'MAX_PENDING_BYTES', 1000)
  writer = metrics.Writer(tmp_path, 0, True)
  disk.room = 0
  for step in range(100):
    writer.scalars(step, {'loss': 1.0})
  disk.room = None
  writer.close()
  kept = steps(tmp_path)
  assert kept == list(range(100 - len(kept), 100)) and len(kept) > 20
  assert any(f'it lacks {100 - len(kept)} entries' in w for w in warnings)
