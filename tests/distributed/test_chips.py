"""Chips are found by device kind and by topology name."""

import pytest

from maskdiff.distributed import chips
from maskdiff.errors import UserError


@pytest.mark.parametrize(
  'kind, name',
  [
    ('TPU v5 lite', 'v5e'),
    ('TPU v5', 'v5p'),
    ('TPU v6e', 'v6e'),
    ('TPU7x', 'tpu7x'),
  ],
)
def test_chip_is_found_by_device_kind(kind, name):
  assert chips.by_kind(kind).name == name
  assert chips.PEAK_FLOPS[kind] == chips.by_kind(kind).peak_flops


def test_unknown_device_kind_is_none():
  assert chips.by_kind('abacus') is None


def test_names_and_kinds_are_unique():
  kinds = [kind for chip in chips.CHIPS for kind in chip.device_kinds]
  assert len(set(kinds)) == len(kinds)
  assert len({chip.name for chip in chips.CHIPS}) == len(chips.CHIPS)


@pytest.mark.parametrize(
  'topology, name, shape',
  [
    ('v5p:4x4x4', 'v5p', (4, 4, 4)),
    ('v5e:1x1', 'v5e', (1, 1)),
    ('v6e:16x16', 'v6e', (16, 16)),
    ('tpu7x:4x4x4', 'tpu7x', (4, 4, 4)),
  ],
)
def test_topology_is_parsed_into_chip_and_shape(topology, name, shape):
  chip, found = chips.parse_topology(topology)
  assert (chip.name, found) == (name, shape)


@pytest.mark.parametrize(
  'topology, message',
  [
    ('v5p', 'give a chip of v4, v5e, v5p, v6e, tpu7x and a'),
    ('v9:2x2', 'give a chip of'),
    ('v5p-128', 'give a chip of'),
    ('v5p:2x2', 'a shape of v5p has 3 axes, e.g. v5p:4x4x4'),
    ('v5e:2x2x2', 'a shape of v5e has 2 axes, e.g. v5e:4x4'),
    ('v5e:0x2', 'a shape of v5e has 2 axes'),
  ],
)
def test_malformed_topology_is_refused(topology, message):
  with pytest.raises(UserError, match=message):
    chips.parse_topology(topology)


def test_devices_of_a_chip_add_up_to_its_published_figures():
  """docs.cloud.google.com/tpu/docs/tpu7x: of a chip, with two devices."""
  chip = chips.by_kind('TPU7x')
  assert chip.devices == 2
  assert chip.devices * chip.peak_flops == 2307e12
  assert chip.devices * chip.hbm_bandwidth == 7380e9
  assert 0.95 * 192 < chip.devices * chip.hbm_gib < 192
  # 1200 GB/s in both directions over six links.
  assert chip.link_bandwidth == 0.9 * 1200e9 / 12
