"""The bar chart of a plan."""

import sys

import pytest
from made_plan import made_plan

from maskdiff.errors import UserError
from maskdiff.planner import plot


def test_plot_is_written(tmp_path):
  pytest.importorskip('matplotlib')
  plot.plot(made_plan(), str(tmp_path / 'plan.png'))
  assert (tmp_path / 'plan.png').read_bytes().startswith(b'\x89PNG')


def test_plot_that_cannot_be_written_is_one_error(tmp_path):
  pytest.importorskip('matplotlib')
  with pytest.raises(UserError, match='cannot write'):
    plot.plot(made_plan(), str(tmp_path / 'no' / 'plan.png'))
  with pytest.raises(UserError, match='has no time'):
    plot.plot(made_plan(step_s=None), str(tmp_path / 'plan.png'))


def test_missing_matplotlib_is_one_error(monkeypatch):
  for name in ('matplotlib', 'matplotlib.backend_bases'):
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(UserError, match='pip install matplotlib'):
    plot.plot(made_plan(), 'plan.png')


def test_unknown_format_is_one_error():
  pytest.importorskip('matplotlib')
  with pytest.raises(UserError, match=r'plan\.doc.*png'):
    plot.check_plot('plan.doc')
