"""The splash kernel, compiled by the TPU compiler for a topology by name."""

import re

import pytest
import tpu_compiler
from tpu_compiler import needs_libtpu

from maskdiff.model import masks
from maskdiff.planner import hlo, hlo_kernels

COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from maskdiff.distributed import compiler
from maskdiff.distributed.mesh import BATCH_AXES, make_mesh
from maskdiff.model import annealing, masks
from maskdiff.model.attention import attend

devices = topologies.get_topology_desc(
  platform='tpu', topology_name='v5e:2x4'
).devices
m = make_mesh(fsdp=2, sequence=4, devices=devices)

def shape(size, dtype, *spec):
  sharding = NamedSharding(m, P(BATCH_AXES, *spec))
  return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

q = shape((2, 4, 2048, 128), jnp.bfloat16, 'tensor', 'sequence')
k = shape((2, 2, 2048, 128), jnp.bfloat16, 'tensor', 'sequence')
valid = shape((2, 2048), bool, 'sequence')
doc = shape((2, 2048), jnp.int32, 'sequence')
regimes = {
  'bidirectional': masks.BIDIRECTIONAL,
  'causal': masks.CAUSAL,
  'block diffusion': masks.block_diffusion(jnp.ones((1, 1), bool), 32).regime,
  'annealed': masks.ANNEALED,
}

def compile(regime, k):
  def loss(q, k, v, valid, doc):
    labels = masks.make_labels(regime, valid, doc)
    if regime == masks.ANNEALED:
      number = annealing.draw(jax.random.key(0), 2048, 0.5)
      labels = masks.annealed(labels, number)
    out = attend(q, k, v, labels, labels, 'auto')
    return out.astype(jnp.float32).sum()
  step = jax.jit(
    jax.grad(loss, argnums=(0, 1, 2)), compiler_options=compiler.options(m)
  )
  with jax.set_mesh(m):
    return step.lower(q, k, k, valid, doc).compile().as_text()

hlo = {name: compile(regime, k) for name, regime in regimes.items()}
hlo['heads'] = compile(masks.BIDIRECTIONAL, q)
print(json.dumps(hlo))
"""


@pytest.mark.slow
@needs_libtpu
def test_split_rows_compile_for_a_pod_without_a_square_array():
  """Uses the real TPU compiler; `auto` selects splash.

  Two key heads are gathered to four devices. Four are exchanged for positions.
  """
  compiled = tpu_compiler.run(COMPILE)
  gathers = lambda name: re.search(r'= bf16\S* all-gather', compiled[name])
  assert gathers('bidirectional') and not gathers('heads')
  assert 'all-to-all(' in compiled['heads']
  for name, text in compiled.items():
    assert 'splash_mha_fwd' in text and 'splash_mha_dkv' in text, name
    # No scores of all queries, and none of the 512 queries of one device.
    for square in ('2048,2048]', '512,2048]', '2048,512]'):
      assert square not in text, name


NARROW = """
import json
import jax, jax.numpy as jnp
from maskdiff.distributed import compiler
from maskdiff.distributed.mesh import make_mesh
from maskdiff.model import masks
from maskdiff.model.attention import attend
from maskdiff.planner.target import topology_devices
from jax.sharding import NamedSharding, PartitionSpec

m = make_mesh(devices=topology_devices('v5e:1x1'))
labels = masks.bidirectional(jnp.ones((1, 256), bool))

def loss(x):
  out = attend(x, x, x, labels, labels, 'splash')
  return out.astype(jnp.float32).sum()

def compile(width):
  x = jax.ShapeDtypeStruct(
    (1, 1, 256, width), jnp.bfloat16,
    sharding=NamedSharding(m, PartitionSpec()),
  )
  step = jax.jit(jax.grad(loss), compiler_options=compiler.options(m))
  with jax.set_mesh(m):
    return step.lower(x).compile().as_text()

print(json.dumps([compile(width) for width in (64, 192)]))
"""


@needs_libtpu
def test_heads_of_64_and_192_channels_compile_unpadded():
  """Uses the real TPU compiler; a plan prices whole vectors of 128 lanes."""
  for width, text in zip((64, 192), tpu_compiler.run(NARROW), strict=True):
    module = hlo.parse(text)
    of_lanes = 2 * 256 * 256 * (-(-width // 128) * 128)
    for kernel, products in ('splash_mha_fwd', 2), ('splash_mha_dkv', 5):
      call = next(x for x in text.splitlines() if f'%{kernel}' in x)
      # Positions fill the lanes of queries, keys and values; outputs are
      # [..., L, K].
      assert f'bf16[1,{width},256]' in call and f'bf16[1,256,{width}]' in call
      (found,) = (
        i
        for computation in module.computations.values()
        for name, i in computation.items()
        if name.startswith(kernel)
      )
      flops = hlo_kernels.attention_flops(
        module, found, masks.BIDIRECTIONAL, 'v5e'
      )
      assert flops == products * of_lanes
