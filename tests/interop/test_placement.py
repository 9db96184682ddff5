"""Which models several processes copy."""

import jax
import pytest
import tiny

from maskdiff.distributed import consensus
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.interop import placement
from maskdiff.model import transformer

CONFIG = tiny.config(tiny.MODEL_KEYS)
BYTES = 4 * transformer.num_params(transformer.from_config(CONFIG))[0]


@pytest.mark.parametrize(
  'memory, tensor, copied',
  [(2 * BYTES, 1, True), (2 * BYTES - 8, 1, False), (2 * BYTES, 16, False)],
)
def test_a_copy_takes_half_of_the_memory_at_most(
  monkeypatch, memory, tensor, copied
):
  """And `tensor` does not span processes."""
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(consensus, 'from_first', lambda work: work())
  monkeypatch.setattr(placement, '_memory_bytes', lambda: memory)
  monkeypatch.setattr(mesh_lib, 'one_replica_per_process', lambda _: 'copies')
  monkeypatch.setattr(mesh_lib, 'make_mesh', lambda **_: 'spread')
  expected = 'copies' if copied else 'spread'
  assert placement.mesh_of(CONFIG, tensor) == expected


def test_one_process_uses_all_devices():
  mesh = placement.mesh_of(CONFIG, 2)
  assert mesh.devices.shape == (1, jax.device_count() // 2, 1, 2)


def test_host_memory_is_that_of_cpu_devices():
  assert placement._memory_bytes() > 1 << 28
