"""Progress of commands: throttled lines on standard error."""

import time

import pytest

from maskdiff.monitoring import progress


@pytest.fixture
def clock(monkeypatch):
  """A clock that the test sets."""
  now = [100.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  return now


def test_lines_are_counted_now_and_then(clock, capsys):
  count = progress.counter(1000, 'lines')
  for _ in range(250):
    clock[0] += 0.1
    count()
  assert capsys.readouterr().err == ''
  clock[0] += 15
  count(150)
  clock[0] += 1
  count()
  assert capsys.readouterr().err == ('400 of 1,000 lines, about 60 s left\n')


def test_waiting_prints_the_time_until_the_work_ends(monkeypatch, capsys):
  monkeypatch.setattr(progress, 'LOG_S', 0.02)
  with pytest.raises(ValueError):
    with progress.waiting('compiling'):
      time.sleep(0.2)
      raise ValueError
  first, *printed = capsys.readouterr().err.splitlines()
  assert first == 'compiling'
  assert printed and set(printed) == {'compiling: 0 s'}
  time.sleep(0.1)
  assert capsys.readouterr().err == ''
