"""Topologies, without libtpu; tests/launch/test_launch_plan.py compiles.

No test here loads libtpu, which reads its settings when JAX starts.
"""

import importlib.util

import pytest

from maskdiff import config
from maskdiff.errors import UserError
from maskdiff.planner import target


def test_missing_libtpu_is_one_error(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='pip install -r requirements-tpu.txt'):
    target.open_target(config.default(), 'v5p:4x4x4')


def refused(monkeypatch, topology, num_slices=1):
  """Returns the options that libtpu gets for a topology that it refuses."""
  received = {}

  def get_topology_desc(**options):
    received.update(options)
    raise RuntimeError('no such\nthing')

  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
  monkeypatch.setattr(target.topologies, 'get_topology_desc', get_topology_desc)
  with pytest.raises(UserError, match=r'libtpu refuses it \(no such thing\)'):
    target.topology_devices(topology, num_slices)
  return received


# No axis of the torus closes to a ring.
OPEN = (False, False, False)


@pytest.mark.parametrize(
  'topology, num_slices, options',
  [
    ('v5p:4x4x4', 1, {'wrap': (True, True, True)}),
    ('v5p:2x2x4', 1, {'wrap': (False, False, True)}),
    ('v5p:4x4x4', 2, {'wrap': (True, True, True), 'num_slices': 2}),
    ('v5e:8x16', 1, {'wrap': (False, True, False)}),
    ('v5e:1x1', 1, {'wrap': OPEN, 'chips_per_host_bounds': (1, 1, 1)}),
    ('v6e:1x2', 1, {'wrap': OPEN, 'chips_per_host_bounds': (1, 2, 1)}),
    ('tpu7x:2x2x1', 1, {'wrap': OPEN}),
    ('v4:2x2x1', 1, {'wrap': OPEN, 'chip_config_name': 'megacore'}),
  ],
)
def test_options_of_libtpu(monkeypatch, topology, num_slices, options):
  received = refused(monkeypatch, topology, num_slices)
  assert received == {'platform': 'tpu', 'topology_name': topology} | options


def test_num_slices_must_be_positive(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
  with pytest.raises(UserError, match='num_slices=0'):
    target.topology_devices('v5p:4x4x4', 0)


def test_bad_topology_is_reported_without_libtpu(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='give a chip of'):
    target.topology_devices('v5litepod-16')
