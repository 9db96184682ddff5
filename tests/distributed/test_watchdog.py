"""Reports of the watchdog about stalled runs."""

import io
import threading
import time

import pytest

from maskdiff.distributed import watchdog
from maskdiff.monitoring.ledger import Ledger


@pytest.fixture
def ledger(tmp_path):
  return Ledger(tmp_path / 'ledger.jsonl', active=False)


class FakeRun:
  """Ledger and event for the watchdog, on a simulated clock.

  Args:
    stall_s: see `watch`.
    current: function from a time to the result of `Ledger.current` at it.
    monkeypatch: pytest fixture.
  """

  def __init__(self, stall_s, current, monkeypatch):
    self._stall_s, self._current = stall_s, current
    self._time, self._reports = 0, []
    monkeypatch.setattr(watchdog, 'describe', self._describe)

  def current(self):
    return self._current(self._time)

  def totals(self):
    return {}

  def wait(self, seconds):
    self._time += seconds
    return self._time > self._end

  def _describe(self, kind, seconds, totals):
    self._reports.append(self._time)
    return ''

  def reports(self, seconds):
    """Returns the times of the reports within `seconds`."""
    self._end = seconds
    watchdog._check(self, self._stall_s, io.StringIO(), self)
    return self._reports


def test_stall_is_reported_once_per_stall_s(monkeypatch):
  run = FakeRun(20, lambda at: ('step', at), monkeypatch)
  assert run.reports(95) == [20, 40, 60, 80]


def test_beats_prevent_a_report(monkeypatch):
  run = FakeRun(20, lambda at: ('step', at % 19), monkeypatch)
  assert run.reports(1000) == []


def test_second_stall_is_reported_like_the_first(monkeypatch):
  run = FakeRun(
    20, lambda at: ('data', at if at < 50 else at - 50), monkeypatch
  )
  assert run.reports(95) == [20, 40, 70, 90]


def test_compilation_may_last_ten_times_as_long(monkeypatch):
  run = FakeRun(20, lambda at: ('compile', at), monkeypatch)
  assert run.reports(245) == [200, 220, 240]


def wait_for_data(resume):
  resume.wait()


def test_report_has_the_span_and_all_stacks(ledger):
  out, resume = io.StringIO(), threading.Event()
  sleeper = threading.Thread(target=wait_for_data, args=[resume], name='reader')
  sleeper.start()
  with watchdog.watch(ledger, 0.2, out):
    with ledger.span('init'):
      time.sleep(0.01)
    with ledger.span('data'):
      # Wait for a report, which has the stack of this function.
      while 'test_watchdog' not in out.getvalue():
        time.sleep(0.05)
  resume.set()
  sleeper.join()
  first, *rest = out.getvalue().splitlines()
  assert first.startswith("stall: 'data' has lasted 0.")
  assert 'init 0.0' in first and 'process' not in first
  (reader,) = [i for i, line in enumerate(rest) if line == 'thread reader:']
  assert any('in wait_for_data' in line for line in rest[reader:])
  (main,) = [i for i, line in enumerate(rest) if 'MainThread' in line]
  here = 'in test_report_has_the_span_and_all_stacks'
  assert any(here in line for line in rest[main:])


def test_threads_with_equal_stacks_are_grouped(ledger):
  resume = threading.Event()
  threads = [
    threading.Thread(target=wait_for_data, args=[resume], name=f'reader {i}')
    for i in range(3)
  ]
  for thread in threads:
    thread.start()
  deadline = time.monotonic() + 10
  together = 'thread reader 0, reader 1, reader 2:'
  while together not in (text := watchdog.describe('data', 1, {})):
    assert time.monotonic() < deadline, text
  resume.set()
  for thread in threads:
    thread.join()


def test_report_names_the_process(monkeypatch):
  monkeypatch.setattr(
    watchdog.runtime, 'process_name', lambda: 'process 3 of 4 on h'
  )
  assert 'lasted 1.0 s in process 3 of 4 on h;' in watchdog.describe(
    'step', 1, {}
  )


@pytest.mark.parametrize('stall_s', [0, 0.2])
def test_thread_ends_with_the_context(ledger, stall_s):
  before = threading.active_count()
  with watchdog.watch(ledger, stall_s, io.StringIO()):
    assert threading.active_count() == before + bool(stall_s)
  assert threading.active_count() == before


def test_closed_terminal_does_not_stop_the_watchdog(ledger):
  out = io.StringIO()
  out.close()
  with watchdog.watch(ledger, 0.04, out):
    time.sleep(0.2)
    assert 'watchdog' in [t.name for t in threading.enumerate()]
