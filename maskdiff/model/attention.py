"""Attention under the visibility rule of masks.py.

`attend` chooses the fastest implementation for the machine; all give the same
answer. `xla` evaluates the rule into a mask and runs anywhere. `splash`
(splash.py) is the Pallas kernel for TPU, `cudnn` is flash attention on NVIDIA
GPUs; neither ever holds [B, H, L, L] scores.

On a mesh the kernels run on each device's own rows and heads, and on its own
part of the queries where `sequence` splits the length. Keys and values are
whole along the length, so that the softmax is exact.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from maskdiff.distributed import chips
from maskdiff.distributed.mesh import BATCH_AXES, batch_shards
from maskdiff.errors import UserError
from maskdiff.model import masks
from maskdiff.model import splash as splash_lib
from maskdiff.model.splash import RESIDUALS

IMPLEMENTATIONS = ('auto', 'xla', 'splash', 'cudnn')
# By the first word of a device kind; older GPUs of NVIDIA start with Tesla.
KERNELS = {'TPU': 'splash', 'NVIDIA': 'cudnn', 'Tesla': 'cudnn'}
CUDNN_CAPABILITY = (8, 0)  # Ampere: the first with flash attention in cuDNN
CUDNN_DTYPES = ('bfloat16', 'float16')
CUDNN_MAX_HEAD_DIM = 128  # on every GPU that has it; 256 from Hopper on


def attend(q, k, v, labels, implementation):
  """Softmax attention of every position over the positions it sees.

  Scores are scaled by 1/sqrt(K) and normalised in float32. Consecutive groups
  of H/G query heads share a key head. A position that sees nothing (there is
  none under the constructors of masks.py) would return the mean of all values.
  Padding returns something finite, which depends on the implementation.

  Args:
    q: [B, H, L, K].
    k: [B, G, L, K], v: [B, G, L, K]; G divides H.
    labels: masks.Labels of the L positions.
    implementation: one of IMPLEMENTATIONS. `auto` is splash on TPU and cudnn on
      NVIDIA GPUs where they suit the arrays, the labels and the mesh, else xla.

  Returns:
    [B, H, L, K] in the dtype of q.

  Raises:
    UserError: the implementation is not for this machine or does not suit.
  """
  if implementation == 'auto':
    implementation = fastest(q, k, labels)
  return {'xla': xla, 'splash': splash, 'cudnn': cudnn}[implementation](
    q, k, v, labels
  )


def fastest(q, k, labels):
  """The implementation that `auto` stands for; arguments as for `attend`."""
  kernel = _kernel(device_kind())
  if kernel is None or misfit(kernel, q, k, labels):
    return 'xla'
  # A mask for cuDNN is L^2 numbers, and so is the gradient it makes of it:
  # take that where it is asked for.
  masked = kernel == 'cudnn' and not _needs_no_mask(labels)
  return 'xla' if masked else kernel


def device_kind():
  """What the program runs on, as JAX names it."""
  # A mesh of a topology that is not here (ahead-of-time compilation) says what
  # it is made of; otherwise ask the backend.
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else getattr(mesh, 'abstract_device', None)
  kind = getattr(device, 'device_kind', None)
  return kind or jax.devices()[0].device_kind


def _capability():
  """The CUDA compute capability as two integers, or None if it is unknown."""
  device = jax.devices()[0]
  # A mesh does not tell it, and may be of machines that are not here.
  if device.device_kind != device_kind():
    return None
  capability = getattr(device, 'compute_capability', None)
  return capability and tuple(map(int, capability.split('.')))


def _kernel(kind):
  return KERNELS.get(kind.split()[0])


def _parts():
  """Into how many parts the mesh splits the length."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape['sequence']


def misfit(kernel, q, k, labels):
  """Why `splash` or `cudnn` cannot serve these arguments, or None."""
  batch, heads, length, head_dim = q.shape
  groups, parts = k.shape[1], _parts()
  mesh = jax.sharding.get_abstract_mesh()
  shards, tensor = 1, 1
  if not mesh.empty:
    shards, tensor = batch_shards(mesh), mesh.shape['tensor']
  if batch % shards:
    return (
      f'{batch} rows do not split over the {shards} devices of '
      'config.mesh.replica and fsdp'
    )
  if heads % tensor or groups % tensor:
    return (
      f'{heads} heads and {groups} kv_heads do not split over '
      f'config.mesh.tensor={tensor}'
    )
  if kernel == 'splash':
    return _splash_misfit(length, parts, labels)
  return _cudnn_misfit(length, parts, labels, q.dtype, head_dim)


def _splash_misfit(length, parts, labels):
  unit = parts * splash_lib.LANES
  if length % unit:
    return (
      f'the length of {length} is not a multiple of {unit}, '
      f'{splash_lib.LANES} for each part of config.mesh.sequence={parts}'
    )
  if labels.regime == masks.GENERAL:
    return 'it skips tiles by a regime (masks.py), and these labels follow none'
  return None


def _cudnn_misfit(length, parts, labels, dtype, head_dim):
  if (capability := _capability()) and capability < CUDNN_CAPABILITY:
    dotted = lambda version: '.'.join(map(str, version))
    return (
      f'it needs compute capability {dotted(CUDNN_CAPABILITY)} (Ampere), and '
      f'this GPU ({device_kind()}) has {dotted(capability)}'
    )
  if dtype not in CUDNN_DTYPES:
    return f'it computes in bfloat16, not in config.model.dtype={dtype}'
  if head_dim % 8 or head_dim > CUDNN_MAX_HEAD_DIM:
    return (
      f'config.model.head_dim={head_dim} is not a multiple of 8 up to '
      f'{CUDNN_MAX_HEAD_DIM}'
    )
  if length % parts:
    return f'the length {length} does not split over {parts} devices'
  if not _needs_no_mask(labels) and (length // parts) % 2:
    return f'documents need a mask, and a mask an even length, not {length}'
  return None


def _require(kernel, kind, q, k, labels):
  reason = misfit(kernel, q, k, labels)
  if _kernel(kind) != kernel:
    reason = f'it does not run on this device ({kind})'
  if reason:
    raise UserError(
      f'config.model.attention={kernel}: {reason}; '
      '--config.model.attention=auto chooses what fits'
    )


def xla(q, k, v, labels):
  """Dense attention; see `attend`. Scores take [B, H, L, L] float32."""
  batch, heads, length, head_dim = q.shape
  groups = k.shape[1]
  q = q.reshape(batch, groups, heads // groups, length, head_dim)
  scores = jnp.einsum(
    'bghlk,bgsk->bghls', q, k, preferred_element_type=jnp.float32
  )
  scores *= 1 / math.sqrt(head_dim)
  if labels.regime == masks.BIDIRECTIONAL:
    seen = labels.doc[:, :, None] == labels.doc[:, None, :]
  else:
    seen = masks.visible(labels, labels)
  scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum('bghls,bgsk->bghlk', weights, v)
  out = out.reshape(batch, heads, length, head_dim)
  return checkpoint_name(out, RESIDUALS)


def splash(q, k, v, labels, interpret=False):
  """Pallas splash attention; see `attend`.

  Where a causal regime is split over `sequence`, the last part has the most to
  do and the others wait for it; a bidirectional one is balanced.

  Its gradient needs compiler.options on the chips of splash.TILES.

  Args:
    interpret: run the kernel's Python on any machine, to test it.

  Raises:
    UserError: see `misfit`.
  """
  kind = device_kind()
  _require('splash', 'TPU' if interpret else kind, q, k, labels)
  chip = chips.by_kind(kind)
  kernel = splash_lib.make_kernel(
    labels.regime, q.shape[2], _parts(), chip and chip.name, interpret
  )
  spec = splash_lib.split_spec(kernel, 'sequence')

  def on_device(kernel, q, k, v, query, key):
    return splash_lib.run(kernel, q, k, v, query.doc, key.doc)

  return _on_each_device(on_device, (q, k, v), labels, (kernel,), (spec,))


def _on_each_device(function, arrays, labels, more=(), specs=()):
  """function(*more, q, k, v, labels of queries, labels of keys), by device."""
  if jax.sharding.get_abstract_mesh().empty:
    return function(*more, *arrays, labels, labels)
  queries = P(BATCH_AXES, 'tensor', 'sequence', None)
  keys = P(BATCH_AXES, 'tensor', None, None)
  return jax.shard_map(
    function,
    in_specs=(
      *specs,
      queries,
      keys,
      keys,
      P(BATCH_AXES, 'sequence'),
      P(BATCH_AXES, None),
    ),
    out_specs=queries,
    check_vma=False,  # Pallas calls do not say how their outputs vary
  )(*more, *arrays, labels, labels)


def cudnn(q, k, v, labels, implementation='cudnn'):
  """cuDNN flash attention through jax.nn.dot_product_attention; see `attend`.

  Rows of a single document need no mask where all of it is seen, or all that
  comes before: padding is cut off by the number of keys of each row. Others
  are given the rule as a mask, [B, 1, L, L], which cuDNN adds to the scores in
  the dtype of q: still flash attention, but with L^2 to read.

  Rematerialisation runs the forward kernel again, since JAX gives its residual
  no name. Written without a GPU: the arguments are tested by having the same
  call run with XLA, and by lowering it for CUDA.

  Args:
    implementation: of jax.nn.dot_product_attention.

  Raises:
    UserError: see `misfit`.
  """
  if implementation == 'cudnn':
    _require('cudnn', device_kind(), q, k, labels)
  on_device = functools.partial(
    _cudnn_prefix if _needs_no_mask(labels) else _cudnn_mask,
    functools.partial(
      jax.nn.dot_product_attention, implementation=implementation
    ),
  )
  out = _on_each_device(on_device, (q, k, v), labels)
  return checkpoint_name(out, RESIDUALS)


def _needs_no_mask(labels):
  # cuDNN counts the queries of causal attention from the first key.
  whole = labels.regime == masks.CAUSAL and _parts() == 1
  return labels.single and (whole or labels.regime == masks.BIDIRECTIONAL)


def _cudnn_mask(attention, q, k, v, query, key):
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  seen = masks.visible(query, key)[:, None]
  return attention(q, k, v, mask=seen).swapaxes(1, 2)


def _cudnn_prefix(attention, q, k, v, query, key):
  """Padding on the left is turned to the right, where cuDNN can cut it off.

  All queries are kept: those of padding see the row's document, and nothing
  sees them.
  """
  valid = key.doc >= 0
  count = jnp.maximum(valid.sum(axis=1, dtype=jnp.int32), 1)
  start = jnp.argmax(valid, axis=1)
  causal = query.regime == masks.CAUSAL
  roll = jax.vmap(lambda x, by: jnp.roll(x, by, axis=1))

  def turn(by, *arrays):
    rolled = lambda *arrays: [roll(x, by) for x in arrays]
    same = lambda *arrays: list(arrays)
    return jax.lax.cond(jnp.any(by != 0), rolled, same, *arrays)

  if causal:
    q, k, v = turn(-start, q, k, v)
  else:  # in which order the keys stand does not matter
    k, v = turn(-start, k, v)
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  out = attention(q, k, v, is_causal=causal, key_value_seq_lengths=count)
  out = out.swapaxes(1, 2)
  return turn(start, out)[0] if causal else out
