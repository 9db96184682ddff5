"""Peak FLOP/s, memory and link bandwidths of accelerator chips.

Peaks and HBM bandwidths are published by the vendors. Other figures that a
time estimate needs are derived or assumed:

- `clock_hz` is the clock of the TPU compiler's cost model. It is not
  published. With these values the compiler's estimate for its best large
  matrix product is 87% to 97% of the peak. That of Ironwood follows from its
  peak, two matrix units per core and 4 FLOPs per cycle and cell, as on v6e; a
  product of 8192 x 8192 matrices is estimated at 80% of the peak.
- `hbm_gib` is the memory that the compiler lets a program use, taken from its
  out-of-memory messages. It is less than the advertised memory of the chip.
- `link_bandwidth` is one direction of one ICI link: 90% of the published
  bidirectional bandwidth of a chip divided by twice its number of links.
  Permutations of large arrays reach 86% (86.3 GB/s on v5p and 86.8 on v6e:
  marin-community/marin, issue 6736).
- `pair_bandwidth` is one direction between the two devices of a chip. Their
  connection is six times as fast as an ICI link (MaxText, docs/guides/
  custom_model.md).
- `mxu_width` is from jax/_src/pallas/mosaic/tpu_info.py.
- `dcn_bandwidth` is the published network bandwidth of a host divided by its
  number of chips. Only large transfers of all chips at once reach it.
- `host_bandwidth` is one direction of PCIe, with generation 4 or 5 assumed by
  chip.
"""

import dataclasses
import re

from maskdiff.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """Figures of one TPU chip; see the module docstring for their sources.

  If a chip has several JAX devices, the figures are those of a device. They
  share the links of the chip.
  """

  name: str  # as in the name of a topology: v5p in v5p:4x4x4
  device_kinds: tuple  # values of jax.Device.device_kind
  peak_flops: float  # dense bfloat16, FLOP/s
  clock_hz: float
  hbm_gib: float  # usable by a program
  hbm_bandwidth: float  # bytes/s
  link_bandwidth: float  # bytes/s, one ICI link, one direction
  torus_axes: int  # dimensions of the ICI torus
  wrap_multiple: int  # an axis of a multiple of this size is a ring
  host_bandwidth: float  # bytes/s to or from host memory, one direction
  dcn_bandwidth: float  # bytes/s between slices, one direction
  mxu_width: int  # rows and columns of a matrix unit
  devices: int = 1  # JAX devices per chip
  pair_bandwidth: float = 0.0  # bytes/s between two devices of a chip


# 4 chips per host and 200 Gbit/s for v4 and v5p; 8 chips and 2 x 100 Gbit/s for
# v5e; 8 chips and 4 x 200 Gbit/s for v6e; 100 Gbit/s per chip of Ironwood.
CHIPS = (
  Chip(
    name='v4',
    device_kinds=('TPU v4',),
    peak_flops=275e12,
    clock_hz=1.05e9,
    hbm_gib=30.75,
    hbm_bandwidth=1228e9,
    link_bandwidth=45e9,
    torus_axes=3,
    wrap_multiple=4,
    host_bandwidth=16e9,
    dcn_bandwidth=6.25e9,
    mxu_width=128,
  ),
  Chip(
    name='v5e',
    device_kinds=('TPU v5 lite', 'TPU v5e'),
    peak_flops=197e12,
    clock_hz=1.5e9,
    hbm_gib=15.75,
    hbm_bandwidth=819e9,
    link_bandwidth=45e9,
    torus_axes=2,
    wrap_multiple=16,
    host_bandwidth=16e9,
    dcn_bandwidth=3.125e9,
    mxu_width=128,
  ),
  Chip(
    name='v5p',
    device_kinds=('TPU v5', 'TPU v5p'),
    peak_flops=459e12,
    clock_hz=1.75e9,
    hbm_gib=95.74,
    hbm_bandwidth=2765e9,
    link_bandwidth=90e9,
    torus_axes=3,
    wrap_multiple=4,
    host_bandwidth=32e9,
    dcn_bandwidth=6.25e9,
    mxu_width=128,
  ),
  Chip(
    name='v6e',
    device_kinds=('TPU v6 lite', 'TPU v6e'),
    peak_flops=918e12,
    clock_hz=1.75e9,
    hbm_gib=31.25,
    hbm_bandwidth=1640e9,
    link_bandwidth=90e9,
    torus_axes=2,
    wrap_multiple=16,
    host_bandwidth=32e9,
    dcn_bandwidth=12.5e9,
    mxu_width=256,
  ),
  # Ironwood: half of 2307 TFLOP/s, 192 GiB and 7380 GB/s; 1200 GB/s of links
  # per chip (docs.cloud.google.com/tpu/docs/tpu7x).
  Chip(
    name='tpu7x',
    device_kinds=('TPU7x',),
    peak_flops=1153.5e12,
    clock_hz=2.2e9,
    hbm_gib=94.75,
    hbm_bandwidth=3690e9,
    link_bandwidth=90e9,
    torus_axes=3,
    wrap_multiple=4,
    host_bandwidth=16e9,
    dcn_bandwidth=6.25e9,
    mxu_width=256,
    devices=2,
    pair_bandwidth=540e9,
  ),
)

# Dense bfloat16 peak, FLOP/s per device, by jax.Device.device_kind.
PEAK_FLOPS = {
  **{kind: chip.peak_flops for chip in CHIPS for kind in chip.device_kinds},
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
}

# Bandwidth of the memory of the GPUs, bytes/s: NVIDIA's data sheets of A100,
# H100 (both as SXM) and H200, which also have the peaks above.
GPU_BANDWIDTH = {
  'NVIDIA A100-SXM4-40GB': 1555e9,
  'NVIDIA A100-SXM4-80GB': 2039e9,
  'NVIDIA H100 80GB HBM3': 3350e9,
  'NVIDIA H200': 4800e9,
}


def by_kind(device_kind):
  """Returns the Chip of a JAX device kind; None if it is unknown."""
  for chip in CHIPS:
    if device_kind in chip.device_kinds:
      return chip
  return None


def parse_topology(topology):
  """Parses the name of a TPU slice.

  Args:
    topology: chip and shape, e.g. 'v5p:4x4x4' or 'v5e:2x4'.

  Returns:
    The Chip, and the shape of the slice as a tuple with one entry per torus
    axis.

  Raises:
    UserError: the name is malformed, or the chip is unknown.
  """
  match = re.fullmatch(r'(\w+):(\d+(?:x\d+)*)', topology)
  known = {chip.name: chip for chip in CHIPS}
  if not match or match[1] not in known:
    raise UserError(
      f'--topology {topology!r}: give a chip of {", ".join(known)} and a '
      'shape, e.g. v5p:4x4x4 or v5e:2x4'
    )
  chip = known[match[1]]
  shape = tuple(map(int, match[2].split('x')))
  if len(shape) != chip.torus_axes or min(shape) < 1:
    example = 'x'.join('4' * chip.torus_axes)
    raise UserError(
      f'--topology {topology!r}: a shape of {chip.name} has {chip.torus_axes} '
      f'axes, e.g. {chip.name}:{example}'
    )
  return chip, shape
