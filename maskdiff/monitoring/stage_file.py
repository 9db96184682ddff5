"""Writes and reads stage.json, the name of the stage of a run and its panels.

From this file the report knows which figures to draw, without the code of the
stage.
"""

import dataclasses
import json
import os
import re

from maskdiff.errors import UserError, one_line
from maskdiff.files import atomic, json_text, reading
from maskdiff.monitoring.json_lines import finite

NAME = 'stage.json'
MAX_BYTES = 1 << 20
MAX_PANELS = 100
REDUCTIONS = ('last', 'max', 'mean')
# Names of FIGURES in curves.py. Runs without the file have these panels.
PRETRAINING = ('heldout', 'training', 'by_ratio', 'training_by_ratio')
# Ids of panels that curves.py draws for every run with their metrics.
OF_EVERY_RUN = (
  *('by_window_position', 'training_by_window_position'),
  *('learning_rate', 'grad_norm', 'tokens_per_s', 'mfu'),
  *('step_s', 'skipped', 'goodput'),
)


@dataclasses.dataclass(frozen=True)
class Curve:
  """A panel of the report that shows one metric over time.

  Attributes:
    id: id of the HTML element, of letters, digits, _ and -; no other panel
      has it.
    title, note: texts above the figure.
    key: name of the metric, such as 'train/reward'.
    scale: factor of the values.
    smooth: whether to add a moving average.
    reduce: one of REDUCTIONS: how neighbouring rows become one point if
      the run is long.
    from_zero: whether the y axis begins at 0.
  """

  id: str
  title: str
  note: str
  key: str
  scale: float = 1
  smooth: bool = False
  reduce: str = 'last'
  from_zero: bool = True


def content(name, panels):
  """Returns the text of stage.json.

  Args:
    name: `Stage.name`.
    panels: `Stage.panels`.

  Raises:
    UserError: `read_panels` would refuse a panel.
  """
  plain = [p if isinstance(p, str) else dataclasses.asdict(p) for p in panels]
  _panels({'panels': json.loads(json_text.dumps(plain))})
  return json_text.dumps({'name': name, 'panels': plain}, indent=2)


def write(workdir, name, panels):
  """Writes stage.json; see `content`.

  Raises:
    OSError: the file cannot be written.
  """
  atomic.write(os.path.join(workdir, NAME), content(name, panels))


def read_panels(workdir):
  """Reads the panels of stage.json; those of pretraining without the file.

  Returns:
    Tuple of Curves and names of figures, as in `Stage.panels`.

  Raises:
    UserError: the file cannot be read or has another form.
  """
  path = os.path.join(workdir, NAME)
  if not os.path.exists(path):
    return PRETRAINING
  try:
    return _panels(reading.read_json(path, MAX_BYTES))
  except (UserError, TypeError) as error:
    raise UserError(
      f'cannot read the panels in {path} ({one_line(error)}); delete the file '
      'to draw the panels of pretraining'
    ) from error


def _panels(stage):
  """Returns the panels of the JSON value of a stage.json.

  Raises:
    UserError, TypeError: the value has another form.
  """
  panels = stage.get('panels') if isinstance(stage, dict) else None
  if not isinstance(panels, list) or len(panels) > MAX_PANELS:
    raise UserError(f'panels is not a list of at most {MAX_PANELS} panels')
  # Curve raises TypeError for missing and unknown fields.
  panels = [p if isinstance(p, str) else Curve(**_object(p)) for p in panels]
  used = {*PRETRAINING, *OF_EVERY_RUN}
  for curve in panels:
    if isinstance(curve, Curve):
      _check(curve)
      if curve.id in used:
        raise UserError(f'two panels have the id {curve.id!r}')
      used.add(curve.id)
  return tuple(dict.fromkeys(panels))


def _object(value):
  if not isinstance(value, dict):
    raise UserError(f'a panel is {one_line(repr(value), 60)}')
  return value


def _check(curve):
  """Raises UserError if a field of a Curve has a wrong type or value."""
  is_id = lambda x: (
    isinstance(x, str) and re.fullmatch('[A-Za-z][A-Za-z0-9_-]{0,63}', x)
  )
  checks = {
    'id': is_id,
    'scale': lambda x: finite(x) is not None,
    'reduce': lambda x: x in REDUCTIONS,
    **dict.fromkeys(
      ('title', 'note', 'key'), lambda x: isinstance(x, str) and len(x) < 10_000
    ),
    **dict.fromkeys(('smooth', 'from_zero'), lambda x: isinstance(x, bool)),
  }
  for name, valid in checks.items():
    if not valid(getattr(curve, name)):
      value = one_line(repr(getattr(curve, name)), 60)
      raise UserError(f'a panel has {name}={value}')
