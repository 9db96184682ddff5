"""Each second of a run is counted once, also after kills and restarts."""

import errno
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
import types

import forked
import pytest

from maskdiff.errors import UserError
from maskdiff.files import appending
from maskdiff.monitoring import ledger as ledger_lib
from maskdiff.monitoring.ledger import (
  KINDS,
  LOST,
  Ledger,
  format_goodput,
  goodput,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def clock(monkeypatch):
  """A simulated clock that `clock.pass_(seconds)` moves forward."""
  fake = types.SimpleNamespace(now=1000.0)
  fake.time = lambda: fake.now
  fake.monotonic = lambda: fake.now

  def pass_(seconds):
    fake.now += seconds

  fake.pass_ = pass_
  monkeypatch.setattr(ledger_lib, 'time', fake)
  return fake


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'ledger.jsonl'


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


# Lines of one process


def test_nested_spans_are_counted_separately(clock, path):
  ledger = Ledger(path, active=True)
  clock.pass_(1)
  with ledger.span('step'):
    clock.pass_(2)
    with ledger.span('data'):
      clock.pass_(4)
    clock.pass_(8)
  ledger.write(7)
  clock.pass_(16)
  ledger.event('durable', step=6)
  opened, row, durable = lines_of(path)
  assert opened == {'time': 1000, 'event': 'opened', 'seconds': {}}
  seconds = {'other': 1, 'step': 10, 'data': 4}
  assert row == {'time': 1015, 'step': 7, 'seconds': seconds}
  assert durable['event'] == 'durable' and durable['step'] == 6
  assert durable['seconds'] == {'other': 16}


def test_open_span_is_split_between_lines(clock, path):
  ledger = Ledger(path, active=True)
  with ledger.span('eval'):
    clock.pass_(3)
    ledger.write(1)
    clock.pass_(4)
  ledger.write(2)
  assert [x['seconds'] for x in lines_of(path)[1:]] == [
    {'eval': 3},
    {'eval': 4},
  ]


def test_error_ends_the_span(clock, path):
  ledger = Ledger(path, active=True)
  with pytest.raises(KeyError), ledger.span('restore'), ledger.span('data'):
    clock.pass_(1)
    raise KeyError
  clock.pass_(2)
  ledger.close()
  assert lines_of(path)[-1]['seconds'] == {'data': 1, 'other': 2}


@pytest.mark.parametrize('seed', range(30))
def test_seconds_by_kind_sum_to_the_time_that_passed(seed, clock, path):
  """Random programs of spans, lines, kills and restarts."""
  rng = random.Random(seed)
  first = clock.now

  def live(ledger, depth):
    for _ in range(rng.randint(1, 6)):
      clock.pass_(rng.random())
      if rng.random() < 0.4:
        rng.choice([ledger.write, lambda n: ledger.event('e', n=n)])(1)
      if depth < 3 and rng.random() < 0.6:
        with ledger.span(rng.choice([*KINDS])):
          live(ledger, depth + 1)

  for process in range(rng.randint(1, 5)):
    ledger = Ledger(path, active=True)
    if process == 0:
      ledger.event('started', step=0)
    live(ledger, 0)
    if rng.random() < 0.5:  # otherwise it is killed
      ledger.close()
    clock.pass_(rng.random() * 10)
  result = goodput(path)
  end = lines_of(path)[-1]['time']
  assert result['wall_s'] == pytest.approx(end - first, abs=0.01)
  assert sum(result['seconds'].values()) == pytest.approx(result['wall_s'])
  assert all(spent >= 0 for spent in result['seconds'].values())


def test_unknown_kind_is_refused(path):
  ledger = Ledger(path, active=False)
  with pytest.raises(ValueError, match='stpe'), ledger.span('stpe'):
    pass


def test_inactive_ledger_writes_nothing(clock, path):
  ledger = Ledger(path, active=False)
  with ledger.span('step'):
    clock.pass_(2)
    assert ledger.current() == ('step', 2)
  ledger.write(1)
  ledger.close()
  assert ledger.totals()['step'] == 2
  assert not path.exists()


def test_current_works_in_any_thread(clock, path):
  ledger = Ledger(path, active=False)
  observed = []
  observe = lambda: observed.append(ledger.current())
  with ledger.span('eval'):
    clock.pass_(5)
    thread = threading.Thread(target=observe)
    thread.start()
    thread.join()
    with ledger.span('data'):
      clock.pass_(1)
      observe()
    observe()  # after an inner span the time starts again
    clock.pass_(3)
    ledger.beat()
    clock.pass_(2)
    observe()
  observe()
  assert observed == [
    ('eval', 5),
    ('data', 1),
    ('eval', 0),
    ('eval', 2),
    ('other', 0),
  ]
  assert ledger.totals()['eval'] == 10  # a beat loses no time


def test_no_time_is_lost_while_the_disk_is_full(
  clock, path, disk, monkeypatch, capsys
):
  """Also if more lines wait than fit in memory."""
  monkeypatch.setattr(appending, 'MAX_PENDING_BYTES', 2000)
  ledger = Ledger(path, active=True)
  ledger.event('started', step=0)
  disk.room, disk.error = 0, errno.EDQUOT
  for step in range(1, 101):
    with ledger.span('step'):
      clock.pass_(1)
    ledger.write(step)
  ledger.event('skipped', step=100)
  disk.room = None
  with ledger.span('eval'):
    clock.pass_(5)
  ledger.close()
  result = goodput(path)
  assert (result['wall_s'], result['steps']) == (105, len(lines_of(path)) - 4)
  assert result['seconds']['step'] == 100
  assert [x['event'] for x in lines_of(path)[-2:]] == ['skipped', 'closed']
  warning, ended = capsys.readouterr().err.splitlines()
  assert f'cannot write {path} (Disk quota exceeded)' in warning
  assert ended == f'{path} is written again'


def test_planted_link_is_replaced(path, tmp_path):
  victim = tmp_path / 'victim'
  victim.write_text('private')
  for plant in (os.symlink, os.link):
    plant(victim, path)
    Ledger(path, active=True).close()
    assert victim.read_text() == 'private'
    assert [x['event'] for x in lines_of(path)[-2:]] == ['opened', 'closed']
    path.unlink()


def test_numbers_that_are_not_finite_are_null(path):
  ledger = Ledger(path, active=True)
  ledger.event('skipped', loss=float('nan'), grad_norm=float('inf'))
  assert 'NaN' not in path.read_text() and 'Infinity' not in path.read_text()
  assert lines_of(path)[1]['loss'] is None


# Lines of killed processes

LIVE = """
import sys
from maskdiff.monitoring.ledger import Ledger
ledger = Ledger(sys.argv[1], active=True)
ledger.event('started', step=0)
for step in range(1, 10**9):
  with ledger.span('step'):
    pass
  ledger.write(step)
"""


def test_killed_process_leaves_its_lines(path):
  for _ in range(2):
    size = path.stat().st_size if path.exists() else 0
    process = subprocess.Popen(
      [sys.executable, '-c', LIVE, str(path)],
      env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    while not path.exists() or path.stat().st_size < size + 10_000:
      assert process.poll() is None
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
  result = goodput(path)
  assert result['restarts'] == 1
  assert result['steps'] > 10


def test_incomplete_line_is_skipped(clock, path):
  with_spans(path, clock)
  whole = path.read_bytes()
  for cut in range(len(whole)):
    path.write_bytes(whole[:cut])
    num_lines = whole[: cut + 1].count(b'\n')
    if not num_lines:
      with pytest.raises(UserError, match='no complete line'):
        goodput(path)
      continue
    goodput(path)
    Ledger(path, active=True).event('started', step=1)
    assert len(ledger_lib.read(path)) == num_lines + 2
    assert goodput(path)['restarts'] == (num_lines > 1)


def with_spans(path, clock):
  ledger = Ledger(path, active=True)
  ledger.event('started', step=0)
  for step in (10, 20):
    with ledger.span('step'):
      clock.pass_(10)
    ledger.write(step)


# Goodput, compared with values computed by hand


def write_lines(path, *lines):
  """Writes lines of (time, seconds by kind, step or event)."""
  with open(path, 'w') as f:
    for at, seconds, values in lines:
      row = {'time': at, **values, 'seconds': seconds}
      f.write(json.dumps(row) + '\n')


OPENED, ENDED = {'event': 'opened'}, {'event': 'ended'}
CLOSED = {'event': 'closed'}


def started(step):
  return {'event': 'started', 'step': step}


def did(step):
  return {'step': step}


def test_goodput_without_a_restart(path):
  write_lines(
    path,
    (100, {}, OPENED),
    (110, {'init': 4, 'restore': 6}, started(0)),
    (140, {'compile': 12, 'step': 17, 'other': 1}, did(10)),
    (160, {'step': 15, 'data': 5}, did(20)),
    (163, {'save': 3}, ENDED),
  )
  result = goodput(path)
  assert result['wall_s'] == 63
  assert result['goodput'] == pytest.approx(32 / 63)
  assert (result['lost_s'], result['restarts'], result['steps']) == (0, 0, 20)
  expected = {'init': 4, 'restore': 6, 'compile': 12, 'step': 32, 'data': 5}
  expected |= {'save': 3, 'other': 1}
  assert {k: s for k, s in result['seconds'].items() if s} == expected


def test_repeated_steps_and_down_time_are_lost(path):
  write_lines(
    path,
    (0, {}, OPENED),
    (10, {'init': 10}, started(0)),
    (30, {'step': 20}, did(10)),
    (60, {'step': 30}, did(20)),
    (62, {'step': 1, 'save': 1}, {'event': 'durable', 'step': 14}),
    # killed; steps 15 to 20 and one more second are lost
    (70, {}, OPENED),
    (75, {'restore': 5}, started(14)),
    (95, {'step': 20}, did(24)),
    (96, {'save': 1}, ENDED),
  )
  result = goodput(path)
  assert result['wall_s'] == 96
  assert result['seconds']['repeated'] == pytest.approx(30 * 6 / 10 + 1)
  assert result['seconds']['down'] == 8
  assert result['lost_s'] == pytest.approx(27)
  assert result['seconds']['step'] == pytest.approx(20 + 12 + 20)
  assert result['goodput'] == pytest.approx(52 / 96)
  assert (result['restarts'], result['steps']) == (1, 24)


def test_rollouts_are_useful_unless_they_are_repeated(path):
  write_lines(
    path,
    (0, {}, OPENED),
    (0, {}, started(0)),
    (50, {'rollout': 30, 'step': 20}, did(10)),
    (70, {'rollout': 8, 'step': 12}, did(14)),
    # killed; steps 11 to 14 are lost with their rollouts
    (70, {}, OPENED),
    (75, {'restore': 5}, started(10)),
    (100, {'rollout': 10, 'step': 15}, did(14)),
  )
  result = goodput(path)
  assert result['seconds']['rollout'] == pytest.approx(30 + 10)
  assert result['seconds']['step'] == pytest.approx(20 + 15)
  assert result['seconds']['repeated'] == pytest.approx(8 + 12)
  assert result['goodput'] == pytest.approx(75 / 100)


def test_steps_done_three_times_count_once(path):
  """The last process starts at an earlier step than the one before it."""
  write_lines(
    path,
    (0, {}, OPENED),
    (0, {}, started(0)),
    (100, {'step': 100}, did(100)),
    (100, {}, OPENED),
    (100, {}, started(80)),
    (140, {'step': 40}, did(120)),
    (140, {}, OPENED),  # killed during the restore: a failed start
    (145, {'restore': 5}, {'event': 'closed'}),
    (145, {}, OPENED),
    (145, {}, started(50)),
    (220, {'step': 75}, did(125)),
  )
  result = goodput(path)
  assert result['seconds']['step'] == pytest.approx(50 + 75)
  assert result['seconds']['repeated'] == pytest.approx(50 + 40)
  assert result['wall_s'] == 220
  assert (result['restarts'], result['steps']) == (2, 125)


def test_failed_starts_are_no_restarts(path):
  failed = lambda at: [(at, {}, OPENED), (at + 1, {'init': 1}, CLOSED)]
  write_lines(
    path,
    *failed(0),  # a wrong flag; the run begins on the next day
    *failed(50_000),
    (100_000, {}, OPENED),
    (100_000, {}, started(0)),
    (100_010, {'step': 10}, did(10)),
    *failed(100_020),  # down for 10 s; again down for 29 s
    (100_050, {}, OPENED),
    (100_051, {'restore': 1}, started(10)),
    (100_061, {'step': 10}, did(20)),
    (100_061, {}, ENDED),
    *failed(200_000),
  )
  result = goodput(path)
  assert (result['restarts'], result['steps']) == (1, 20)
  assert result['wall_s'] == 61
  assert result['seconds']['down'] == 10 + 29
  assert result['seconds']['init'] == 1
  assert result['goodput'] == pytest.approx(20 / 61)


def test_run_that_never_started_has_no_restarts(path):
  write_lines(path, (0, {}, OPENED), (9, {'init': 9}, CLOSED), (20, {}, OPENED))
  result = goodput(path)
  assert (result['wall_s'], result['restarts']) == (20, 0)


def test_preemption_loses_no_step(path):
  write_lines(
    path,
    (0, {}, OPENED),
    (0, {}, started(0)),
    (10, {'step': 10}, did(10)),
    (13, {'save': 3}, {'event': 'preempted'}),
    (20, {}, OPENED),
    (21, {'restore': 1}, started(10)),
  )
  result = goodput(path)
  assert result['seconds']['repeated'] == 0
  assert result['seconds']['step'] == 10
  assert result['seconds']['down'] == result['lost_s'] == 7
  assert result['steps'] == 10


def test_time_after_the_end_is_not_counted(path):
  write_lines(
    path,
    (0, {}, OPENED),
    (0, {}, started(0)),
    (10, {'step': 10}, did(10)),
    (10, {}, ENDED),
    (99_999, {}, OPENED),  # a day later, with more steps
    (99_999, {}, started(10)),
    (100_009, {'step': 10}, did(20)),
  )
  assert goodput(path)['wall_s'] == 20
  assert goodput(path)['goodput'] == 1


def test_backward_clock_gives_no_negative_time(path):
  write_lines(
    path,
    (50, {}, OPENED),
    (60, {'step': 10}, did(10)),
    (40, {}, OPENED),
    (42, {'restore': 2}, started(10)),
  )
  result = goodput(path)
  assert result['seconds']['down'] == 0
  assert result['wall_s'] == 12


def test_goodput_is_unknown_without_any_time(path):
  write_lines(path, (5, {}, OPENED))
  assert goodput(path)['goodput'] is None
  assert 'goodput unknown' in format_goodput(goodput(path))


# launch/goodput.py


def script(*arguments):
  return forked.run(
    ['launch/goodput.py', *map(str, arguments)],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    cwd=ROOT,
  )


def test_script_prints_the_table(path):
  write_lines(
    path,
    (0, {}, OPENED),
    (0, {}, started(0)),
    (1500, {'step': 1500}, did(1000)),
    (1900, {}, OPENED),
    (2000, {'restore': 100}, started(1000)),
  )
  ended = script('--workdir', path.parent)
  assert ended.stdout.splitlines() == [
    'step          1,500.0 s   75.0%',
    'down            400.0 s   20.0%',
    'restore         100.0 s    5.0%',
    'wall          2,000.0 s',
    '1,000 steps, 1 restart, goodput 75.0%',
  ]


def test_script_refuses_a_directory_without_ledger(tmp_path):
  ended = script('--workdir', tmp_path)
  (line,) = ended.stderr.splitlines()
  assert ended.returncode == 2
  assert line.startswith('error: cannot read') and 'work directory' in line


# docs/reliability.md


def test_page_lists_every_kind_with_its_meaning():
  page = (ROOT / 'docs' / 'reliability.md').read_text()
  table = page.partition('| category | time in |\n|---|---|\n')[2]
  rows = [f'| `{k}` | {v.meaning} |' for k, v in {**KINDS, **LOST}.items()]
  assert table.split('\n\n')[0].splitlines() == rows
  useful = [f'`{name}`' for name, kind in KINDS.items() if kind.useful]
  assert f'Goodput is the share of {" and ".join(reversed(useful))}.' in page


# Damaged lines

GOOD = [
  {'time': 0, 'event': 'opened', 'seconds': {}},
  {'time': 1, 'event': 'started', 'step': 0, 'seconds': {'init': 1}},
  {'time': 9, 'step': 10, 'seconds': {'step': 8}},
]
LINE = GOOD[-1]


@pytest.mark.parametrize(
  'damaged',
  [
    *('3', 'null', '[]', '{}', '\x00', '[' * 100_000, '"seconds"'),
    *(
      json.dumps(LINE | change)
      for change in (
        {'seconds': {'nap': 1}},
        {'seconds': {'step': -1}},
        {'seconds': {'step': float('nan')}},
        {'seconds': {'step': float('inf')}},
        {'seconds': {'step': 10**400}},
        {'seconds': {'step': '1'}},
        {'seconds': {'step': True}},
        {'seconds': [1]},
        {'seconds': None},
        {'time': None},
        {'time': '1'},
        {'time': -1},
        {'time': float('nan')},
        {'time': 1e12},
        {'step': '10'},
        {'step': None},
        {'step': -1},
        {'step': 1.5},
        {'step': 10**400},
        {'event': 3},
        {'event': ['opened']},
      )
    ),
    *(
      json.dumps({k: x for k, x in LINE.items() if k != lost} | change)
      for lost, change in (
        ('time', {}),
        ('seconds', {}),
        ('step', {}),
        ('step', {'event': 'started'}),
      )
    ),
  ],
)
def test_damaged_line_is_skipped_and_counted(path, damaged):
  good = [json.dumps(line) for line in GOOD]
  path.write_text('\n'.join([*good[:2], damaged, good[2]]) + '\n')
  result = goodput(path)
  assert (result['wall_s'], result['steps']) == (9, 10)
  assert ledger_lib.read_lines(path) == (GOOD, 1)
  format_goodput(result)
  path.write_text(damaged + '\n')
  with pytest.raises(UserError, match='no complete line'):
    goodput(path)


def test_new_process_appends_to_a_damaged_ledger(clock, path):
  path.write_bytes(json.dumps(GOOD[0]).encode() + b'\n\xff\n')
  Ledger(path, active=True).close()
  assert [line['event'] for line in ledger_lib.read(path)] == [
    *('opened', 'opened', 'closed')
  ]
  assert ledger_lib.read_lines(path).num_skipped == 1


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir])
def test_fifo_or_folder_in_place_of_the_ledger_is_one_line(path, make):
  make(path)
  with pytest.raises(UserError, match='not a regular file'):
    goodput(path)


def test_script_counts_damaged_lines(path):
  good = '\n'.join(map(json.dumps, GOOD))
  path.write_bytes(good.encode() + b'\n\xff\n3\n')
  ended = script('--workdir', path.parent)
  assert ended.returncode == 0
  assert ended.stdout.endswith('goodput 88.9%\n')
  assert ended.stderr == f'warning: {path}: 2 damaged lines are skipped\n'
