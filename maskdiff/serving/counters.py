"""Counters of a server, in the text format of Prometheus."""

import collections

# Name, without the prefix, and help.
_COUNTERS = {
  'requests': 'Requests by path and status.',
  'prompt_tokens': 'Tokens of the prompts of answered requests.',
  'completion_tokens': 'Tokens of the answers.',
  'forward_passes': 'Forward passes of the rows of filled answers.',
}
_LATENCIES = {
  'first_token_seconds': 'From the body of a request to its first text.',
  'request_seconds': 'From the body of a request to the end of its answer.',
}
_GAUGES = {
  'requests_running': 'Requests in rows.',
  'requests_waiting': 'Requests that wait for a row.',
}


class Counters:
  """Numbers that only grow; used on the event loop only."""

  def __init__(self):
    self._values = collections.Counter()

  def add(self, name, value=1, **labels):
    """Adds to a counter.

    Args:
      name: a key of _COUNTERS.
      value: number.
      **labels: str, without quotes and backslashes.
    """
    text = ','.join(f'{key}="{value}"' for key, value in labels.items())
    self._values[f'{name}_total' + f'{{{text}}}' * bool(labels)] += value

  def observe(self, name, seconds):
    """Adds a latency; `name` is a key of _LATENCIES."""
    self._values[f'{name}_sum'] += seconds
    self._values[f'{name}_count'] += 1

  def text(self, running, waiting):
    """Returns all numbers in Prometheus' format.

    Args:
      running: number of requests in rows.
      waiting: number of requests that wait for a row.
    """
    gauges = {'requests_running': running, 'requests_waiting': waiting}
    lines = []

    def family(name, kind, help, values):
      lines.append(f'# HELP maskdiff_{name} {help}')
      lines.append(f'# TYPE maskdiff_{name} {kind}')
      lines.extend(f'maskdiff_{key} {value}' for key, value in values.items())

    for name, help in _COUNTERS.items():
      name = f'{name}_total'
      found = {k: v for k, v in self._values.items() if k.startswith(name)}
      family(name, 'counter', help, found or {name: 0})
    for name, help in _LATENCIES.items():
      keys = (f'{name}_sum', f'{name}_count')
      family(name, 'summary', help, {key: self._values[key] for key in keys})
    for name, help in _GAUGES.items():
      family(name, 'gauge', help, {name: gauges[name]})
    return '\n'.join(lines) + '\n'
