"""Every implementation of attention follows the rule of masks.py.

test_splash.py tests the splash kernel.
"""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
  assert_equals_xla,
  cpu_mesh,
  draw,
  packed,
  padded,
  two_documents,
  value_and_gradients,
)
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

from maskdiff.errors import UserError
from maskdiff.model import attention, masks


def query_by_query(q, k, v, labels):
  """Returns attention by loops over rows, queries and heads, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  doc, pos, block, reach = (
    np.asarray(x) for x in (labels.doc, labels.pos, labels.block, labels.reach)
  )
  batch, heads, length, head_dim = q.shape
  group = heads // k.shape[1]

  def sees(b, i, j):
    if doc[b, i] != doc[b, j]:
      return False
    if block[b, j] < 0:
      return pos[b, j] < reach[b, i]
    return block[b, j] == block[b, i]

  out = np.zeros_like(q)
  for b, i, h in np.ndindex(batch, length, heads):
    seen = [j for j in range(length) if sees(b, i, j)]
    scores = k[b, h // group, seen] @ q[b, h, i] / np.sqrt(head_dim)
    weights = np.exp(scores - scores.max())
    out[b, h, i] = weights / weights.sum() @ v[b, h // group, seen]
  return out


LABELS = {
  'bidirectional': masks.bidirectional(padded(12)),
  'causal': masks.causal(padded(12)),
  'bidirectional, packed': masks.bidirectional(padded(12), packed(12)),
  'causal, packed': masks.causal(padded(12), packed(12)),
  'block-causal, packed': masks.block_causal(padded(12), 5, packed(12)),
  'block diffusion': masks.block_diffusion(padded(6), 2, packed(6)),
  'general': two_documents(3, 6, 2),
}


@pytest.mark.parametrize('kv_heads', [4, 2, 1])
@pytest.mark.parametrize('labels', LABELS.values(), ids=LABELS)
def test_xla_equals_a_loop_over_visible_keys(labels, kv_heads):
  q, k, v, _ = draw(3, 12, 4, kv_heads, 8)
  np.testing.assert_allclose(
    attention.xla(q, k, v, labels, labels),
    query_by_query(q, k, v, labels),
    atol=2e-6,
  )


@pytest.mark.parametrize('labels', LABELS.values(), ids=LABELS)
def test_invisible_keys_and_values_have_no_influence(labels):
  """The scores of the invisible keys are large."""
  q, k, v, _ = draw(3, 12, 4, 2, 8)
  query = 7
  hidden = ~masks.visible(labels, labels)[:, None, query, :, None]
  out = attention.xla(q, k, v, labels, labels)[:, :, query]
  poisoned = attention.xla(
    q, jnp.where(hidden, 1e4, k), jnp.where(hidden, 1e4, v), labels, labels
  )[:, :, query]
  np.testing.assert_array_equal(out, poisoned)


def test_xla_returns_the_dtype_of_the_query_and_sums_scores_in_float32():
  q, k, v, _ = draw(3, 12, 4, 2, 64)
  half = lambda *arrays: [x.astype(jnp.bfloat16) for x in arrays]
  q, k, v = half(q, k, v)
  labels = LABELS['bidirectional']
  out = attention.xla(q, k, v, labels, labels)
  assert out.dtype == jnp.bfloat16
  exact = query_by_query(q, k, v, labels)
  np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize('labels', LABELS.values(), ids=LABELS)
def test_auto_is_xla_on_the_cpu(labels):
  q, k, v, _ = draw(3, 12, 4, 2, 8)
  np.testing.assert_array_equal(
    attention.attend(q, k, v, labels, labels, 'auto'),
    attention.attend(q, k, v, labels, labels, 'xla'),
  )


KINDS = {'tpu': 'TPU v5p', 'gpu': 'NVIDIA H100 80GB HBM3', 'cpu': 'cpu'}
FULL = masks.bidirectional(jnp.ones((8, 256), bool))


@pytest.fixture
def on(monkeypatch):
  """on('gpu') makes the code believe that it runs on a GPU."""

  def pretend(machine):
    monkeypatch.setattr(attention, 'device_kind', lambda: KINDS[machine])

  return pretend


def shapes(labels, heads=4, kv_heads=2, head_dim=64, dtype=jnp.bfloat16):
  batch, length = labels.doc.shape
  shape = lambda n: jax.ShapeDtypeStruct((batch, n, length, head_dim), dtype)
  return shape(heads), shape(kv_heads), labels, labels


def regimes(length):
  """Returns {name: (labels of 8 rows, kernel on TPU, kernel on GPU)}."""
  valid = jnp.ones((8, length), bool)
  doc = jnp.zeros((8, length), jnp.int32)
  return {
    'bidirectional': (masks.bidirectional(valid), 'splash', 'cudnn'),
    'causal': (masks.causal(valid), 'splash', 'cudnn'),
    'packed': (masks.bidirectional(valid, doc), 'splash', 'xla'),
    'block-causal': (masks.block_causal(valid, 4), 'splash', 'xla'),
    'block diffusion': (
      masks.block_diffusion(valid[:, ::2], 4),
      'splash',
      'xla',
    ),
    'general': (two_documents(8, length // 2, 4), 'xla', 'xla'),
  }


@pytest.mark.parametrize('name', regimes(256))
def test_auto_chooses_by_machine_and_regime(on, name):
  labels, on_tpu, on_gpu = regimes(256)[name]
  for machine, expected in ('tpu', on_tpu), ('gpu', on_gpu), ('cpu', 'xla'):
    on(machine)
    assert attention.fastest(*shapes(labels)) == expected


@pytest.mark.parametrize('kind', ['TPU v4', 'TPU7x', 'TPU v9', 'TPU9x'])
def test_auto_is_splash_on_every_tpu(monkeypatch, kind):
  monkeypatch.setattr(attention, 'device_kind', lambda: kind)
  assert attention.fastest(*shapes(FULL)) == 'splash'


@pytest.mark.parametrize('kind, lines', [('TPU7x', 0), ('TPU v99', 1)])
def test_unknown_tpu_is_one_line(monkeypatch, capsys, kind, lines):
  monkeypatch.setattr(attention, 'device_kind', lambda: kind)
  q, k, query, key = shapes(FULL)
  for _ in range(2):
    out = jax.eval_shape(
      lambda q, k: attention.attend(q, k, k, query, key, 'auto'), q, k
    )
    assert out.shape == q.shape
  warnings = capsys.readouterr().err.splitlines()
  assert len(warnings) == lines
  assert all(kind in line and 'splash' in line for line in warnings)


@pytest.mark.parametrize(
  'machine, length, options, expected',
  [
    ('tpu', 640, {}, 'splash'),
    ('tpu', 200, {}, 'xla'),  # not a multiple of 128
    ('tpu', 256, {'dtype': jnp.float32, 'head_dim': 80}, 'splash'),
    ('gpu', 200, {}, 'cudnn'),
    ('gpu', 201, {}, 'cudnn'),
    ('gpu', 256, {'dtype': jnp.float16, 'head_dim': 128}, 'cudnn'),
    ('gpu', 256, {'dtype': jnp.float32}, 'xla'),
    ('gpu', 256, {'head_dim': 256}, 'xla'),
    ('gpu', 256, {'head_dim': 68}, 'xla'),
  ],
)
def test_auto_chooses_by_shape(on, machine, length, options, expected):
  on(machine)
  labels = masks.bidirectional(jnp.ones((8, length), bool))
  assert attention.fastest(*shapes(labels, **options)) == expected


@pytest.mark.parametrize(
  'machine, kernel', [('tpu', 'splash'), ('gpu', 'cudnn')]
)
@pytest.mark.parametrize(
  'sizes, batch, heads, kv_heads, suits',
  [
    ({'fsdp': 4, 'tensor': 2}, 8, 4, 4, True),
    ({'fsdp': 4, 'tensor': 2}, 1, 4, 4, False),  # a single prompt on a pod
    ({'fsdp': 4, 'tensor': 2}, 8, 3, 3, False),
    ({'fsdp': 4, 'tensor': 2}, 8, 4, 1, False),
    ({'fsdp': 4, 'sequence': 2}, 4, 4, 1, True),
  ],
)
def test_auto_is_a_kernel_only_if_the_mesh_splits_the_arrays(
  on, machine, kernel, sizes, batch, heads, kv_heads, suits
):
  on(machine)
  labels = masks.bidirectional(jnp.ones((batch, 256), bool))
  with jax.set_mesh(cpu_mesh(**sizes)):
    chosen = attention.fastest(*shapes(labels, heads, kv_heads))
  assert chosen == (kernel if suits else 'xla')


TOO_OLD = [('Tesla T4', '7.5'), ('NVIDIA TITAN RTX', '7.5')]


@pytest.fixture
def gpu(monkeypatch):
  """gpu(kind, capability) makes the code believe that it runs on this GPU."""

  def pretend(kind, capability):
    device = types.SimpleNamespace(
      device_kind=kind, compute_capability=capability
    )
    monkeypatch.setattr(jax, 'devices', lambda: [device])

  return pretend


@pytest.mark.parametrize(
  'kind, capability, expected',
  [
    *((*old, 'xla') for old in TOO_OLD),
    ('NVIDIA A100-SXM4-80GB', '8.0', 'cudnn'),
    ('NVIDIA L4', '8.9', 'cudnn'),
    ('NVIDIA B200', '10.0', 'cudnn'),
  ],
)
def test_auto_is_cudnn_from_ampere_on(gpu, kind, capability, expected):
  gpu(kind, capability)
  assert attention.fastest(*shapes(FULL)) == expected


@pytest.mark.parametrize('kind, capability', TOO_OLD)
def test_cudnn_on_an_old_gpu_is_one_error(gpu, kind, capability):
  gpu(kind, capability)
  q, k, labels, _ = shapes(FULL)
  message = f'needs compute capability 8.0 (Ampere); this GPU ({kind})'
  with pytest.raises(UserError, match=re.escape(message)) as error:
    attention.attend(q, k, k, labels, labels, 'cudnn')
  assert 'has 7.5; set --config.model.attention=auto' in str(error.value)
  assert '\n' not in str(error.value)


def test_capability_of_the_mesh_is_not_that_of_this_machine(gpu, on):
  gpu('Tesla T4', '7.5')
  on('gpu')
  assert attention.fastest(*shapes(FULL)) == 'cudnn'


@pytest.mark.parametrize('length, expected', [(512, 'splash'), (256, 'xla')])
def test_auto_is_splash_if_each_part_of_a_row_is_whole_tiles(
  on, length, expected
):
  on('tpu')
  labels = masks.causal(jnp.ones((1, length), bool))
  with jax.set_mesh(cpu_mesh(sequence=4)):
    assert attention.fastest(*shapes(labels)) == expected


@pytest.mark.parametrize('kv_heads, expected', [(1, 'xla'), (2, 'cudnn')])
def test_auto_is_xla_for_split_causal_queries_on_a_gpu(on, kv_heads, expected):
  """cuDNN takes the first query of each device to be at the first key."""
  on('gpu')
  with jax.set_mesh(cpu_mesh(sequence=2)):
    labels = masks.causal(jnp.ones((1, 256), bool))
    assert attention.fastest(*shapes(labels, 4, kv_heads)) == expected


@pytest.mark.parametrize(
  'name, machine, labels, options, message',
  [
    (
      'splash',
      'cpu',
      FULL,
      {},
      'splash: splash does not run on this device (cpu)',
    ),
    ('splash', 'gpu', FULL, {}, 'does not run on this device (NVIDIA H100'),
    ('cudnn', 'tpu', FULL, {}, 'does not run on this device (TPU v5p)'),
    (
      'splash',
      'tpu',
      masks.bidirectional(jnp.ones((8, 200), bool)),
      {},
      'the length 200 is not a multiple of 128',
    ),
    (
      'splash',
      'tpu',
      two_documents(8, 128, 16),
      {},
      'these labels were built by hand',
    ),
    (
      'cudnn',
      'gpu',
      FULL,
      {'dtype': jnp.float32},
      'not in config.model.dtype=float32',
    ),
    ('cudnn', 'gpu', FULL, {'head_dim': 256}, 'config.model.head_dim=256'),
    (
      'cudnn',
      'gpu',
      masks.block_causal(jnp.ones((8, 201), bool), 4),
      {},
      'an even length, not 201',
    ),
  ],
)
def test_unsupported_implementation_is_one_error(
  on, name, machine, labels, options, message
):
  on(machine)
  q, k, labels, _ = shapes(labels, **options)
  with pytest.raises(UserError, match=re.escape(message)) as error:
    jax.eval_shape(
      lambda q, k, v: attention.attend(q, k, v, labels, labels, name),
      *(q, k, k),
    )
  assert '--config.model.attention=auto' in str(error.value)


@pytest.mark.parametrize(
  'sizes, heads, message',
  [
    ({'fsdp': 3}, 4, 'a batch of 8 rows is not divisible by the 3 devices'),
    ({'tensor': 8}, 4, 'not both divisible by config.mesh.tensor=8'),
    ({'sequence': 4}, 4, '(128 x config.mesh.sequence=4)'),
  ],
)
def test_unsupported_mesh_is_one_error(on, sizes, heads, message):
  on('tpu')
  q, k, labels, _ = shapes(FULL, heads)
  with jax.set_mesh(cpu_mesh(**sizes)):
    with pytest.raises(UserError, match=re.escape(message)):
      jax.eval_shape(
        lambda q, k, v: attention.attend(q, k, v, labels, labels, 'splash'),
        *(q, k, k),
      )


as_cudnn = functools.partial(
  assert_equals_xla, attention.cudnn, implementation='xla'
)


@pytest.mark.parametrize('heads, kv_heads', [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize('make', [masks.bidirectional, masks.causal])
def test_call_of_cudnn_equals_xla_with_gradients(make, heads, kv_heads):
  """Without padding and with padding on either side, without a mask."""
  labels = make(padded(24))
  assert attention._needs_no_mask(labels, labels, parts=1)
  as_cudnn(labels, heads, kv_heads, 16)


@pytest.mark.parametrize('labels', LABELS.values(), ids=LABELS)
def test_call_of_cudnn_equals_xla_in_every_regime(labels):
  as_cudnn(labels, 4, 2, 16)


@pytest.mark.parametrize(
  'sizes',
  [
    {'fsdp': 2, 'tensor': 2},
    {'sequence': 2},  # splits the heads
    {'sequence': 4},  # splits the queries
    {'fsdp': 2, 'sequence': 4},
  ],
)
@pytest.mark.parametrize('name', LABELS)
def test_call_of_cudnn_equals_xla_on_a_mesh(name, sizes):
  labels = jax.tree.map(lambda x: x[1:], LABELS[name])
  as_cudnn(labels, 4, 2, 16, m=cpu_mesh(**sizes))


@pytest.mark.parametrize('make', [masks.bidirectional, masks.causal])
def test_call_of_cudnn_equals_xla_with_padding_on_both_sides(make):
  index = jnp.arange(24)
  valid = (index >= jnp.array([[3], [0]])) & (index < jnp.array([[17], [9]]))
  as_cudnn(make(valid), 4, 2, 16)


def test_row_of_padding_is_finite():
  labels = masks.bidirectional(jnp.zeros((2, 8), bool))
  attend = functools.partial(attention.cudnn, implementation='xla')
  for x in value_and_gradients(attend, *draw(2, 8, 2, 2, 16), labels):
    assert jnp.isfinite(x).all()


@pytest.mark.parametrize(
  'make, calls, mask_type, square',
  [
    (masks.bidirectional, 'fmhaSoftmax', 'PADDING', False),
    (masks.causal, 'fmhaSoftmax', 'PADDING_CAUSAL', False),
    (
      lambda valid: masks.block_causal(valid, 32),
      'fmhaScaleBiasSoftmax',
      'NO_MASK',
      True,
    ),
  ],
)
def test_cudnn_lowers_to_flash_attention_for_cuda(
  monkeypatch, on, make, calls, mask_type, square
):
  """Without a GPU: JAX's checks pass, and the program calls cuDNN."""
  monkeypatch.setattr(jax_cudnn, 'check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(jax_cudnn, 'check_compute_capability', lambda _: False)
  monkeypatch.setattr(
    jax_cudnn, 'is_cuda_compute_capability_equal', lambda _: False
  )
  on('gpu')
  q, k, labels, _ = shapes(make(padded(256)))

  def loss(q, k, v):
    out = attention.attend(q, k, v, labels, labels, 'cudnn')
    return out.astype(jnp.float32).sum()

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k)
  program = gradients.lower(lowering_platforms=('cuda',)).as_text()
  assert set(re.findall(r'__cudnn\$(\w+)', program)) == {
    calls,
    calls + 'Backward',
  }
  kinds = re.findall(r'mask_type[^A-Z]*([A-Z_]+)', program)
  assert kinds == [mask_type, mask_type]
  assert ('256x256' in program) == square
