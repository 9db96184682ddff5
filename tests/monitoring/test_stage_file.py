"""stage.json: the panels of a run that its stage declares."""

import made_runs
import pytest

from maskdiff.errors import UserError
from maskdiff.monitoring import curves, history, stage_file
from maskdiff.monitoring.stage_file import Curve

REWARD = Curve(
  'reward', 'Reward', 'Mean.', 'train/reward', smooth=True, from_zero=False
)


@pytest.fixture
def workdir(tmp_path):
  rows = [made_runs.train_row(n, 8.0, reward=n / 10) for n in range(1, 31)]
  return made_runs.write(tmp_path / 'run', rows)


def test_panels_are_read_as_written(workdir):
  assert stage_file.read_panels(workdir) == stage_file.PRETRAINING
  stage_file.write(workdir, 'toy', ('training', REWARD))
  assert stage_file.read_panels(workdir) == ('training', REWARD)


def test_panels_of_several_stages_stand_side_by_side(workdir, tmp_path):
  """Each panel is drawn once, with the runs that have its metric."""
  other = made_runs.write(tmp_path / 'old', [made_runs.train_row(5, 7.0)])
  stage_file.write(workdir, 'toy', (REWARD, 'training'))
  runs = history.read_runs([str(workdir), str(other)])
  found = curves.panels(runs)
  ids = [panel.id for panel in found]
  assert ids[:3] == ['reward', 'training', 'learning_rate']
  assert ids.count('training') == 1
  assert {trace.meta['run'] for trace in found[0].figure.data} == {0}
  assert {trace.meta['run'] for trace in found[1].figure.data} == {0, 1}
  assert found[0].range[0] > 0  # the axis fits the values


@pytest.mark.parametrize(
  'text', ['', '{}', '{"panels": [{"id": 3, "colour": "red"}]}', '[]']
)
def test_damaged_file_is_one_line(workdir, text):
  (workdir / 'stage.json').write_text(text)
  with pytest.raises(UserError, match='cannot read the panels in') as error:
    history.read_run(str(workdir))
  assert '\n' not in str(error.value)


def test_unknown_panel_is_one_line(workdir):
  stage_file.write(workdir, 'toy', ('of_the_future',))
  with pytest.raises(UserError, match="the panel 'of_the_future', which"):
    curves.panels([history.read_run(str(workdir))])
