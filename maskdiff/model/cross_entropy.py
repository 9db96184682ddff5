"""Weighted cross entropy over the vocabulary that skips positions of weight 0.

About half of the tokens of masked diffusion carry no loss. The positions with a
loss are sorted to the front, and a loop with a dynamic trip count computes them
in chunks of fixed size: the loss and both gradients at once. The cost is
proportional to the number of masked tokens, and no [B, L, V] array of logits
exists. The result is exact, not an approximation.

On a mesh each device computes its own tokens with the whole head, which is
gathered once in the compute dtype. The n devices along `tensor` hold the same
tokens, and each computes every n-th. The loop contains no collective, so trip
counts may differ between devices. The gradient of the head is accumulated in
float32 and reduce-scattered to the shards of the parameter.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maskdiff.distributed.mesh import AXES, BATCH_AXES


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(hidden, head, targets, weights, exclude, chunk):
  """Returns sum(weights * nll) and the nll of each weighted position.

  Args:
    hidden: [B, L, D], final hidden states in the compute dtype.
    head: [D, V], the vocabulary projection, float32 or the compute dtype.
    targets: [B, L] int32.
    weights: [B, L] float32; a position of weight 0 is not computed.
    exclude: token id left out of the softmax, or None.
    chunk: tokens per iteration of the loop, which holds chunk x V float32.

  Returns:
    - `loss`: float32 scalar, nats. The only output with a gradient.
    - `nll`: [B, L] float32 nats, 0 where the weight is 0.
  """
  loss, nll, _, _ = _apply(
    hidden, head, targets, weights, exclude, chunk, gradients=False
  )
  return loss, nll


def _forward(hidden, head, targets, weights, exclude, chunk):
  loss, nll, d_hidden, d_head = _apply(
    hidden, head, targets, weights, exclude, chunk, gradients=True
  )
  # Residuals must be arrays. The scalar stands for the dtype of the head.
  return (loss, nll), (d_hidden, d_head, jnp.zeros((), head.dtype))


def _backward(exclude, chunk, residuals, cotangents):
  del exclude, chunk
  d_hidden, d_head, like = residuals
  scale, _ = cotangents
  return (
    (d_hidden * scale).astype(d_hidden.dtype),
    (d_head * scale).astype(like.dtype),
    None,
    None,
  )


cross_entropy.defvjp(_forward, _backward)


def _apply(hidden, head, targets, weights, exclude, chunk, gradients):
  """Runs the loop on every device; see `cross_entropy` for the arguments."""
  loop = functools.partial(
    _loop, exclude=exclude, chunk=chunk, gradients=gradients
  )
  head = head.astype(hidden.dtype)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return loop(hidden, head, targets, weights, part=0, parts=1)

  def on_device(hidden, head, targets, weights):
    loss, nll, d_hidden, d_head = loop(
      hidden,
      head,
      targets,
      weights,
      part=jax.lax.axis_index('tensor'),
      parts=mesh.shape['tensor'],
    )
    loss = jax.lax.psum(loss, AXES)
    nll = jax.lax.psum(nll, 'tensor')
    if gradients:
      d_hidden = jax.lax.psum(d_hidden, 'tensor')
      d_head = jax.lax.psum_scatter(d_head, 'fsdp', tiled=True)
      d_head = jax.lax.psum_scatter(
        d_head, 'tensor', scatter_dimension=1, tiled=True
      )
      # Without the barrier XLA moves the reduction out of the loop over
      # microbatches, and the loop carries the whole unreduced gradient.
      d_head = jax.lax.optimization_barrier(d_head)
      d_head = jax.lax.psum(d_head, ('replica', 'sequence'))
    return loss, nll, d_hidden, d_head

  tokens = P(BATCH_AXES, 'sequence')
  states = P(BATCH_AXES, 'sequence', None)
  return jax.shard_map(
    on_device,
    in_specs=(states, P(), tokens, tokens),
    out_specs=(
      P(),
      tokens,
      states if gradients else None,
      P('fsdp', 'tensor') if gradients else None,
    ),
    # The checker does not support trip counts that differ between devices.
    check_vma=False,
  )(hidden, head, targets, weights)


def _loop(
  hidden, head, targets, weights, *, part, parts, exclude, chunk, gradients
):
  """Returns loss, nll and gradients of tokens part, part + parts, ..."""
  shape, dtype = targets.shape, hidden.dtype
  hidden = hidden.reshape(-1, hidden.shape[-1])  # [T, D]
  targets, weights = targets.reshape(-1), weights.reshape(-1)  # [T]
  size = len(targets)
  chunk = min(chunk, -(-size // parts))

  # Positions with a loss come first. Out-of-range indices pad the last chunk:
  # they read 0, and writes to them are dropped.
  order = jnp.argsort(weights == 0, stable=True)
  order = jnp.pad(
    order, (0, -size % (chunk * parts)), constant_values=size
  ).reshape(-1, parts)[:, part]
  count = (jnp.sum(weights != 0) - part + parts - 1) // parts
  vocab = jnp.arange(head.shape[1])

  def body(i, carry):
    loss, nll, d_hidden, d_head = carry
    index = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
    h = hidden.at[index].get(mode='fill', fill_value=0)
    y = targets.at[index].get(mode='fill', fill_value=0)
    w = weights.at[index].get(mode='fill', fill_value=0)
    with jax.named_scope('part(loss: logits)'):
      logits = jnp.einsum(
        'td,dv->tv', h, head, preferred_element_type=jnp.float32
      )
    if exclude is not None:
      logits = jnp.where(vocab == exclude, -jnp.inf, logits)
    is_target = vocab == y[:, None]
    log_norm = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    token_nll = jnp.where(w != 0, log_norm - target_logit, 0)
    loss += jnp.sum(w * token_nll)
    nll = nll.at[index].set(token_nll, mode='drop')
    if gradients:
      d_logits = (jnp.exp(logits - log_norm[:, None]) - is_target) * w[:, None]
      d_logits = d_logits.astype(dtype)
      with jax.named_scope('part(loss: gradient of hidden states)'):
        d_h = jnp.einsum('tv,dv->td', d_logits, head)
      d_hidden = d_hidden.at[index].set(d_h, mode='drop')
      with jax.named_scope('part(loss: gradient of the head)'):
        d_head += jnp.einsum(
          'td,tv->dv', h, d_logits, preferred_element_type=jnp.float32
        )
    return loss, nll, d_hidden, d_head

  start = (
    jnp.zeros((), jnp.float32),
    jnp.zeros((size,), jnp.float32),
    jnp.zeros(hidden.shape, dtype) if gradients else None,
    jnp.zeros(head.shape, jnp.float32) if gradients else None,
  )
  loss, nll, d_hidden, d_head = jax.lax.fori_loop(
    0, -(-count // chunk), body, start
  )
  if gradients:
    d_hidden = d_hidden.reshape(*shape, -1)
  return loss, nll.reshape(shape), d_hidden, d_head
