"""Attention under the visibility rule of masks.py.

`attend` chooses the fastest of three implementations of the same function.
`xla` evaluates the rule into a mask and runs on any device. `splash`
(splash.py) is the Pallas kernel for TPUs. `cudnn` is flash attention on NVIDIA
GPUs. The two kernels never hold the [B, H, L, L] scores.

On a mesh a kernel computes the rows and heads of its own device. If `sequence`
splits the length, a device has some heads of whole rows, or all heads of its
own queries (mesh.attention_axes). Keys and values are whole along the length in
both cases, so the softmax is exact.
"""

import functools
import math
import sys

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from maskdiff.distributed import chips
from maskdiff.distributed.mesh import (
  ACTIVATION_RULES,
  BATCH_AXES,
  attention_axes,
  batch_shards,
  device_kind,
)
from maskdiff.errors import UserError
from maskdiff.model import masks
from maskdiff.model import splash as splash_lib
from maskdiff.model.splash import RESIDUALS

# By the beginning of the device kind. Older NVIDIA GPUs are 'Tesla'.
KERNELS = {'TPU': 'splash', 'NVIDIA': 'cudnn', 'Tesla': 'cudnn'}
CUDNN_CAPABILITY = (8, 0)  # cuDNN has flash attention from Ampere on
CUDNN_DTYPES = ('bfloat16', 'float16')
CUDNN_MAX_HEAD_DIM = 128  # on Ampere; Hopper and later allow 256


def attend(q, k, v, query, key, implementation):
  """Returns softmax attention of each position over the positions it sees.

  Scores are scaled by 1/sqrt(K) and normalised in float32. H/G consecutive
  query heads share one key head. The output at padding is finite and depends on
  the implementation. A position that sees nothing would return the mean of all
  values; the constructors of masks.py make no such position.

  Args:
    q: [B, H, L, K].
    k: [B, G, S, K]; G divides H.
    v: [B, G, S, K].
    query: masks.Labels of the L queries.
    key: masks.Labels of the S keys; in self-attention those of the queries.
    implementation: a choice of config.model.attention. `auto` is splash on TPUs
      and cudnn on NVIDIA GPUs if the kernel supports the arrays, the labels and
      the mesh, else xla.

  Returns:
    [B, H, L, K] in the dtype of q.

  Raises:
    UserError: the implementation does not run on this device, or does not
      support these arguments.
  """
  if implementation == 'auto':
    implementation = fastest(q, k, query, key)
  return {'xla': xla, 'splash': splash, 'cudnn': cudnn}[implementation](
    q, k, v, query, key
  )


def fastest(q, k, query, key):
  """Returns the implementation that `auto` selects, as for `attend`."""
  kernel = _kernel(device_kind())
  if kernel is None or misfit(kernel, q, k, query, key):
    return 'xla'
  # With a mask, cuDNN reads L^2 mask entries and writes a gradient of the same
  # size. `auto` therefore uses cuDNN only without a mask.
  no_mask = _needs_no_mask(query, key, _parts(q, k))
  needs_mask = kernel == 'cudnn' and not no_mask
  return 'xla' if needs_mask else kernel


def _capability():
  """Returns the CUDA compute capability as two integers, or None if unknown."""
  device = jax.devices()[0]
  # The program may be compiled for another machine, of unknown capability.
  if device.device_kind != device_kind():
    return None
  capability = getattr(device, 'compute_capability', None)
  return capability and tuple(map(int, capability.split('.')))


def _kernel(kind):
  names = (name for start, name in KERNELS.items() if kind.startswith(start))
  return next(names, None)


@functools.cache  # one line per process
def _warn_of_unknown_tpu(kind):
  print(
    f'warning: {kind} is not a chip of maskdiff/distributed/chips.py: splash '
    'uses small tiles, the compiler its default options',
    file=sys.stderr,
  )


def _query_axes(q, k):
  """Returns the mesh axes that split heads and queries in attention."""
  _, heads, length, _ = attention_axes(q.shape[1], k.shape[1])[0]
  return ACTIVATION_RULES[heads], length and ACTIVATION_RULES[length]


def _parts(q, k):
  """Returns the number of parts into which attention splits the queries."""
  _, length = _query_axes(q, k)
  return jax.sharding.get_abstract_mesh().shape[length] if length else 1


def misfit(kernel, q, k, query, key):
  """Returns why `splash` or `cudnn` cannot compute these arguments, or None."""
  batch, heads, length, head_dim = q.shape
  groups, parts = k.shape[1], _parts(q, k)
  mesh = jax.sharding.get_abstract_mesh()
  shards, tensor = 1, 1
  if not mesh.empty:
    shards, tensor = batch_shards(mesh), mesh.shape['tensor']
  if batch % shards:
    return (
      f'a batch of {batch} rows is not divisible by the {shards} devices of '
      'config.mesh.replica and config.mesh.fsdp'
    )
  if heads % tensor or groups % tensor:
    return (
      f'{heads} heads and {groups} kv_heads are not both divisible by '
      f'config.mesh.tensor={tensor}'
    )
  if kernel == 'splash':
    return _splash_misfit(length, parts, query, key)
  no_mask = _needs_no_mask(query, key, parts)
  return _cudnn_misfit(length, parts, no_mask, q.dtype, head_dim)


def _splash_misfit(length, parts, query, key):
  if query.doc.shape != key.doc.shape or query.regime != key.regime:
    return 'splash is for self-attention, and the queries are not the keys'
  unit = parts * splash_lib.LANES
  if length % unit:
    return (
      f'the length {length} is not a multiple of {unit} '
      f'({splash_lib.LANES} x config.mesh.sequence={parts})'
    )
  if query.regime == masks.GENERAL:
    return (
      'splash needs one of the fixed regimes of masks.py (bidirectional, '
      'causal, block-causal, block diffusion, annealed); these labels were '
      'built by hand'
    )
  return None


def _cudnn_misfit(length, parts, no_mask, dtype, head_dim):
  if (capability := _capability()) and capability < CUDNN_CAPABILITY:
    dotted = lambda version: '.'.join(map(str, version))
    return (
      f'cudnn needs compute capability {dotted(CUDNN_CAPABILITY)} (Ampere); '
      f'this GPU ({device_kind()}) has {dotted(capability)}'
    )
  if dtype not in CUDNN_DTYPES:
    return f'cudnn computes in bfloat16, not in config.model.dtype={dtype}'
  if head_dim % 8 or head_dim > CUDNN_MAX_HEAD_DIM:
    return (
      f'config.model.head_dim={head_dim} is not a multiple of 8 or exceeds '
      f'{CUDNN_MAX_HEAD_DIM}'
    )
  if length % parts:
    return (
      f'the length {length} is not divisible by config.mesh.sequence={parts}'
    )
  local_length = length // parts
  if not no_mask and local_length % 2:
    return (
      'cudnn needs a mask for these labels, and a mask needs an even length, '
      f'not {local_length}' + (' per device' if parts > 1 else '')
    )
  return None


def _require(kernel, kind, q, k, query, key):
  reason = misfit(kernel, q, k, query, key)
  if _kernel(kind) != kernel:
    reason = f'{kernel} does not run on this device ({kind})'
  if reason:
    raise UserError(
      f'config.model.attention={kernel}: {reason}; '
      'set --config.model.attention=auto'
    )


def xla(q, k, v, query, key):
  """Dense attention; see `attend`. Memory: [B, H, L, S] float32 scores."""
  batch, heads, length, head_dim = q.shape
  groups = k.shape[1]
  q = q.reshape(batch, groups, heads // groups, length, head_dim)
  scores = jnp.einsum(
    'bghlk,bgsk->bghls', q, k, preferred_element_type=jnp.float32
  )
  scores *= 1 / math.sqrt(head_dim)
  visible = masks.visible(query, key)
  lowest = jnp.finfo(jnp.float32).min
  scores = jnp.where(visible[:, None, None], scores, lowest)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum('bghls,bgsk->bghlk', weights, v)
  out = out.reshape(batch, heads, length, head_dim)
  return checkpoint_name(out, RESIDUALS)


def splash(q, k, v, query, key, interpret=False):
  """Pallas splash attention; see `attend` for the first five arguments.

  If the mesh axis `sequence` splits the queries instead of the heads, causal
  attention and block diffusion are unbalanced: the other devices wait for the
  one with the most work, in causal attention that of the last queries.

  On the chips in splash.TILES the backward kernel needs the larger VMEM limit
  that distributed/compiler.py sets.

  Args:
    interpret: emulate the kernel in Python on any device, for tests.

  Raises:
    UserError: see `misfit`.
  """
  kind = device_kind()
  _require('splash', 'TPU' if interpret else kind, q, k, query, key)
  chip = chips.by_kind(kind)
  if chip is None and not interpret:
    _warn_of_unknown_tpu(kind)
  kernel = splash_lib.make_kernel(
    query.regime, q.shape[2], _parts(q, k), chip and chip.name, interpret
  )
  spec = splash_lib.split_spec(kernel, _query_axes(q, k)[1])

  def on_device(kernel, q, k, v, query, key):
    if query.number is not None:
      kernel = splash_lib.with_numbers(kernel, query.number[0])
    return splash_lib.run(kernel, q, k, v, query.doc, key.doc)

  return _on_each_device(on_device, (q, k, v), query, key, (kernel,), (spec,))


def _on_each_device(function, arrays, query, key, more=(), specs=()):
  """Calls function(*more, q, k, v, query labels, key labels) on each device."""
  if jax.sharding.get_abstract_mesh().empty:
    return function(*more, *arrays, query, key)
  heads, length = _query_axes(*arrays[:2])
  queries = P(BATCH_AXES, heads, length, None)
  keys = P(BATCH_AXES, heads, None, None)
  return jax.shard_map(
    function,
    in_specs=(
      *specs,
      queries,
      keys,
      keys,
      P(BATCH_AXES, length),
      P(BATCH_AXES, None),
    ),
    out_specs=queries,
    check_vma=False,  # Pallas calls do not declare how their outputs vary
  )(*more, *arrays, query, key)


def cudnn(q, k, v, query, key, implementation='cudnn'):
  """cuDNN flash attention by jax.nn.dot_product_attention; see `attend`.

  Rows of one document need no mask in the bidirectional and causal regimes:
  cuDNN takes the number of keys of each row and ignores the padding after them.
  Other labels need a mask, [B, 1, L, S], which cuDNN adds to the scores in the
  dtype of q. The kernel is still flash attention, but it reads L^2 entries.

  Rematerialization always runs the forward kernel again, because JAX does not
  name the residual that the backward kernel needs.

  Args:
    implementation: argument of jax.nn.dot_product_attention. Tests pass 'xla'
      to run the same call on a CPU.

  Raises:
    UserError: see `misfit`.
  """
  if implementation == 'cudnn':
    _require('cudnn', device_kind(), q, k, query, key)
  no_mask = _needs_no_mask(query, key, _parts(q, k))
  on_device = functools.partial(
    _cudnn_prefix if no_mask else _cudnn_mask,
    functools.partial(
      jax.nn.dot_product_attention, implementation=implementation
    ),
  )
  out = _on_each_device(on_device, (q, k, v), query, key)
  return checkpoint_name(out, RESIDUALS)


def _needs_no_mask(query, key, parts):
  if not (query.single and key.single and query.regime == key.regime):
    return False
  # The causal mask of cuDNN aligns query 0 with key 0. If the mesh splits the
  # length, that is wrong for every device but the first.
  causal = query.regime == masks.CAUSAL and parts == 1
  return causal or query.regime == masks.BIDIRECTIONAL


def _cudnn_mask(attention, q, k, v, query, key):
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  visible = masks.visible(query, key)[:, None]
  return attention(q, k, v, mask=visible).swapaxes(1, 2)


def _cudnn_prefix(attention, q, k, v, query, key):
  """Attention without a mask, after moving left padding to the right.

  cuDNN takes the number of keys of each row, so padding must follow the valid
  keys. Outputs at padding are computed too; they attend to valid keys only.
  """
  valid = key.doc >= 0
  # At least one key, so that a row of padding has a finite output.
  count = jnp.maximum(valid.sum(axis=1, dtype=jnp.int32), 1)
  start = jnp.argmax(valid, axis=1)
  causal = query.regime == masks.CAUSAL
  roll = jax.vmap(lambda x, by: jnp.roll(x, by, axis=1))

  def roll_rows(by, *arrays):
    rolled = lambda *arrays: [roll(x, by) for x in arrays]
    unchanged = lambda *arrays: list(arrays)
    return jax.lax.cond(jnp.any(by != 0), rolled, unchanged, *arrays)

  if causal:
    q, k, v = roll_rows(-start, q, k, v)
  else:  # the order of the keys does not matter
    k, v = roll_rows(-start, k, v)
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  out = attention(q, k, v, is_causal=causal, key_value_seq_lengths=count)
  out = out.swapaxes(1, 2)
  return roll_rows(start, out)[0] if causal else out
