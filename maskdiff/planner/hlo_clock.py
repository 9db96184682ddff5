"""Simulated time of a program, and the transfers that it waits for."""

import collections
import dataclasses


@dataclasses.dataclass
class Clock:
  """Simulated time and pending transfers during one run of a computation."""

  now: float = 0.0  # seconds since the start
  # Queue -> time at which its last transfer ends.
  free: dict = dataclasses.field(default_factory=collections.Counter)
  # Name of a transfer -> (queue, time at which it ends).
  ends: dict = dataclasses.field(default_factory=dict)

  def begin(self, name, queue, seconds):
    """Appends a transfer to a queue."""
    self.free[queue] = max(self.now, self.free[queue]) + seconds
    self.ends[name] = queue, self.free[queue]

  def wait(self, name):
    """Waits for a transfer; returns its queue and the seconds waited."""
    queue, end = self.ends.get(name, ('', self.now))
    waited = max(0.0, end - self.now)
    self.now += waited
    return queue, waited
