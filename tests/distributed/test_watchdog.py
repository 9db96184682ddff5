"""A run that hangs says where; one that gets on says nothing."""

import io
import threading
import time

import pytest

from maskdiff.distributed import watchdog
from maskdiff.monitoring.ledger import Ledger


@pytest.fixture
def ledger(tmp_path):
  return Ledger(tmp_path / 'ledger.jsonl', active=False)


class Told:
  """What `watch` prints on a clock of its own that a test lets run.

  `reports(seconds)` is when it reported within so many seconds, while `now`
  tells for a time what `Ledger.current` returns then.
  """

  def __init__(self, stall_s, now, monkeypatch):
    self._stall_s, self._now, self._at, self._reports = stall_s, now, 0, []
    monkeypatch.setattr(watchdog, 'describe', self._describe)

  def current(self):
    return self._now(self._at)

  def totals(self):
    return {}

  def wait(self, seconds):
    self._at += seconds
    return self._at > self._end

  def _describe(self, kind, seconds, totals):
    self._reports.append(self._at)
    return ''

  def reports(self, seconds):
    self._end = seconds
    watchdog._look(self, self._stall_s, io.StringIO(), self)
    return self._reports


def test_a_stall_is_told_once_per_stall_s(monkeypatch):
  told = Told(20, lambda at: ('step', at), monkeypatch)
  assert told.reports(95) == [20, 40, 60, 80]


def test_beats_that_go_on_are_no_stall(monkeypatch):
  told = Told(20, lambda at: ('step', at % 19), monkeypatch)
  assert told.reports(1000) == []


def test_a_second_stall_is_told_like_the_first(monkeypatch):
  told = Told(20, lambda at: ('data', at if at < 50 else at - 50), monkeypatch)
  assert told.reports(95) == [20, 40, 70, 90]


def test_a_compilation_may_last_ten_times_as_long(monkeypatch):
  told = Told(20, lambda at: ('compile', at), monkeypatch)
  assert told.reports(245) == [200, 220, 240]


def wait_for_data(go_on):
  go_on.wait()


def test_what_is_told_names_the_span_and_all_stacks(ledger):
  out, go_on = io.StringIO(), threading.Event()
  sleeper = threading.Thread(target=wait_for_data, args=[go_on], name='reader')
  sleeper.start()
  with watchdog.watch(ledger, 0.2, out):
    with ledger.span('init'):
      time.sleep(0.01)
    with ledger.span('data'):
      while 'test_watchdog' not in out.getvalue():  # ends by this test's stack
        time.sleep(0.05)
  go_on.set()
  sleeper.join()
  first, *rest = out.getvalue().splitlines()
  assert first.startswith("stall: 'data' has lasted 0.")
  assert 'init 0.0' in first and 'process' not in first
  (reader,) = [i for i, line in enumerate(rest) if line == 'thread reader:']
  assert any('in wait_for_data' in line for line in rest[reader:])
  (main,) = [i for i, line in enumerate(rest) if 'MainThread' in line]
  here = 'in test_what_is_told_names_the_span_and_all_stacks'
  assert any(here in line for line in rest[main:])


def test_threads_that_wait_alike_are_told_together(ledger):
  go_on = threading.Event()
  threads = [
    threading.Thread(target=wait_for_data, args=[go_on], name=f'reader {i}')
    for i in range(3)
  ]
  for thread in threads:
    thread.start()
  deadline = time.monotonic() + 10
  together = 'thread reader 0, reader 1, reader 2:'
  while together not in (text := watchdog.describe('data', 1, {})):
    assert time.monotonic() < deadline, text
  go_on.set()
  for thread in threads:
    thread.join()


def test_a_process_of_several_says_which_it_is(monkeypatch):
  monkeypatch.setattr(watchdog.runtime, 'who', lambda: 'process 3 of 4 on h')
  assert 'lasted 1.0 s in process 3 of 4 on h;' in watchdog.describe(
    'step', 1, {}
  )


@pytest.mark.parametrize('stall_s', [0, 0.2])
def test_no_thread_is_left_behind(ledger, stall_s):
  before = threading.active_count()
  with watchdog.watch(ledger, stall_s, io.StringIO()):
    assert threading.active_count() == before + bool(stall_s)
  assert threading.active_count() == before


def test_a_closed_terminal_does_not_end_the_watch(ledger):
  out = io.StringIO()
  out.close()
  with watchdog.watch(ledger, 0.04, out):
    time.sleep(0.2)
    assert 'watchdog' in [t.name for t in threading.enumerate()]
