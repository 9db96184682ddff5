"""Writes and reads stage.json, the name of the stage of a run and its panels.

From this file the report knows which figures to draw, without the code of the
stage.
"""

import dataclasses
import json
import os

from maskdiff.errors import UserError

NAME = 'stage.json'
# Names of FIGURES in curves.py. Runs without the file have these panels.
PRETRAINING = ('heldout', 'training', 'by_ratio', 'training_by_ratio')


@dataclasses.dataclass(frozen=True)
class Curve:
  """A panel of the report that shows one metric over time.

  Attributes:
    id: id of the HTML element; no other panel has it.
    title, note: texts above the figure.
    key: name of the metric, such as 'train/reward'.
    scale: factor of the values.
    smooth: whether to add a moving average.
    reduce: 'last', 'max' or 'mean': how neighbouring rows become one point if
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


def write(workdir, name, panels):
  """Writes stage.json.

  Args:
    workdir: work directory.
    name: `Stage.name`.
    panels: `Stage.panels`.
  """
  plain = [p if isinstance(p, str) else dataclasses.asdict(p) for p in panels]
  with open(os.path.join(workdir, NAME), 'w') as f:
    json.dump({'name': name, 'panels': plain}, f, indent=2)


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
    with open(path) as f:
      panels = json.load(f)['panels']
    return tuple(p if isinstance(p, str) else Curve(**p) for p in panels)
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'cannot read the panels in {path} ({error}); delete the file to draw '
      'the panels of pretraining'
    ) from error
