"""Plots a plan as a bar chart of the time of each part."""

import io
import os

from maskdiff.errors import UserError
from maskdiff.files import outputs
from maskdiff.planner import calibration
from maskdiff.planner.tables import TOP_OPERATIONS


def check_plot(path):
  """Raises UserError unless matplotlib can write a plot in this format."""
  try:
    from matplotlib.backend_bases import FigureCanvasBase
  except ImportError as error:
    raise UserError(
      '--plot needs matplotlib: pip install matplotlib'
    ) from error
  known = FigureCanvasBase.get_supported_filetypes()
  suffix = os.path.splitext(path)[1][1:].lower()
  if suffix and suffix not in known:
    raise UserError(
      f'--plot {path!r}: unknown format; use one of {", ".join(sorted(known))}'
    )


def plot(plan, path):
  """Writes a bar chart of the time of each part of a step.

  Args:
    plan: a plan of a program that compiled.
    path: file to write; its suffix selects the format.

  Raises:
    UserError: see `check_plot`; the plan has no time, or the file cannot be
      written.
  """
  check_plot(path)
  if plan['step_s'] is None:
    raise UserError('--plot: the program did not compile, so it has no time')
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  shown = plan['operations'][:TOP_OPERATIONS]
  rest = sum(o['seconds'] for o in plan['operations'][TOP_OPERATIONS:])
  compute, waiting = '#1f5fbf', '#c0392b'
  bars = [(o['part'][-48:], o['seconds'], compute) for o in shown]
  bars.append(('all other operations', rest, compute))
  bars += [
    (f'waiting: {key}', plan[f'exposed_{key}_s'], waiting)
    for key in ('ici', 'dcn', 'host', 'prefetch')
    if plan[f'exposed_{key}_s'] > 0
  ]
  names, seconds, colors = zip(*bars[::-1], strict=True)
  figure, axes = plt.subplots(figsize=(8, 5), layout='constrained')
  axes.barh(names, [s * 1e3 for s in seconds], color=colors)
  axes.set_xlabel('ms per step, estimated')
  axes.set_title(
    f'{plan["topology"]}, {plan["step_s"]:.3f} s'
    + (f', MFU {calibration.cell(plan)}' if plan['mfu'] else ''),
    fontsize=10,
  )
  axes.spines[['top', 'right']].set_visible(False)
  image = io.BytesIO()
  form = os.path.splitext(path)[1][1:].lower() or 'png'
  try:
    figure.savefig(image, dpi=150, format=form)
  finally:
    plt.close(figure)
  outputs.write('plot', path, image.getvalue())
