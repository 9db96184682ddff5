"""A figure of the report with its title, note and menu."""

from typing import NamedTuple

import plotly.graph_objects as go

from maskdiff.monitoring import history, traces


class Panel(NamedTuple):
  """A figure of the report.

  Attributes:
    id: id of its HTML element.
    title, note: texts above the figure.
    figure: plotly Figure.
    choices: entries of the menu of the panel; empty without a menu.
    over_time: whether the x axis is steps or tokens.
    range: initial range of the y axis; None to let Plotly choose.
    range_bits: the same in bits per byte; None if the unit does not apply.
    not_drawn: sentence about values that are not finite, or ''. A panel without
      curves is shown if it has this sentence.
  """

  id: str
  title: str
  note: str
  figure: go.Figure
  choices: list = ()
  over_time: bool = True
  range: list | None = None
  range_bits: list | None = None
  not_drawn: str = ''


def make_figure():
  """Returns an empty Plotly figure without template and legend."""
  return go.Figure(layout=dict(template='none', showlegend=False))


def with_ranges(panel, shown, low=None, title=None):
  """Returns the panel with a range of the y axis, and a title if given.

  Args:
    panel: Panel.
    shown: list of Series.
    low: see `traces.axis_ranges`.
    title: title of the y axis.
  """
  if title:
    panel.figure.update_yaxes(title=title)
  range_, range_bits = traces.axis_ranges(shown, low)
  return panel._replace(range=range_, range_bits=range_bits)


def not_drawn(counts):
  """Returns a sentence about values that are not drawn; '' if there are none.

  Args:
    counts: list of (run, number of values that are not finite, number of all
      values).
  """
  found = [
    f'{number:,} of {total:,} values of {traces.short_name(run)}'
    for run, number, total in counts
    if number
  ]
  return f'Not finite, so not drawn: {", ".join(found)}.' if found else ''


def of_metrics(runs, keys_of):
  """Returns `not_drawn` for metrics of runs.

  Args:
    runs: list of history.Run.
    keys_of: function from a run to the names of its metrics in the panel.
  """
  return not_drawn([(r, *history.not_finite(r, keys_of(r))) for r in runs])
