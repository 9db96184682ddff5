"""Loops that project selected positions onto the vocabulary, in chunks.

About half of the tokens of masked diffusion carry no loss. The selected
positions are sorted to the front, and a loop with a dynamic trip count computes
them in chunks of fixed size. The cost is proportional to the number of selected
positions, and no [B, L, V] array of logits exists.

On a mesh each device computes its own tokens with the whole head, which is
gathered once in the compute dtype. The n devices along `tensor` hold the same
tokens, and each computes every n-th. The loop contains no collective, so trip
counts may differ between devices. The gradient of the head is accumulated in
float32 and reduce-scattered to the shards of the parameter.

Letters in shapes: T tokens of a device, t tokens of a chunk.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maskdiff.distributed.mesh import (
  AXES,
  BATCH_AXES,
  STATE_AXES,
  pad_length,
)
from maskdiff.model.products import rows_first


def on_devices(loop, hidden, head, tokens, outputs):
  """Runs a loop on every device of the mesh, or on one device without a mesh.

  Args:
    loop: (hidden, head, *tokens, part, parts) -> tuple of arrays, computed from
      the selected positions part, part + parts, ... of the device.
    hidden: [B, L, D], final hidden states in the compute dtype.
    head: [D, V], the vocabulary projection, float32 or the compute dtype.
    tokens: tuple of [B, L] arrays.
    outputs: a key of `SPECS` for each output of the loop. Each output is summed
      over the devices that computed a part of it.

  Returns:
    Tuple of the outputs of the loop.
  """
  head = head.astype(hidden.dtype)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return loop(hidden, head, *tokens, part=0, parts=1)
  length = hidden.shape[1]
  hidden, *tokens = pad_length(hidden, *tokens)  # padding is not selected

  def on_device(hidden, head, *tokens):
    part, parts = jax.lax.axis_index('tensor'), mesh.shape['tensor']
    results = loop(hidden, head, *tokens, part=part, parts=parts)
    return tuple(
      _sum_over_devices(output, x)
      for output, x in zip(outputs, results, strict=True)
    )

  found = jax.shard_map(
    on_device,
    in_specs=(SPECS['states'], P(), *[SPECS['tokens']] * len(tokens)),
    out_specs=tuple(SPECS[output] for output in outputs),
    # The checker does not support trip counts that differ between devices.
    check_vma=False,
  )(hidden, head, *tokens)
  of_tokens = lambda output: output in ('tokens', 'states')
  return tuple(
    x[:, :length] if of_tokens(output) else x
    for output, x in zip(outputs, found, strict=True)
  )


SPECS = {
  'scalar': P(),
  'tokens': P(BATCH_AXES, 'sequence'),  # [B, L]
  'states': P(BATCH_AXES, 'sequence', None),  # [B, L, D]
  'head': P(STATE_AXES, 'tensor'),  # [D, V]
}


def _sum_over_devices(output, x):
  if output == 'scalar':
    return jax.lax.psum(x, AXES)
  if output != 'head':
    return jax.lax.psum(x, 'tensor')
  x = jax.lax.psum_scatter(x, STATE_AXES, tiled=True)
  x = jax.lax.psum_scatter(x, 'tensor', scatter_dimension=1, tiled=True)
  # Without the barrier XLA moves the reduction out of the loop over
  # microbatches, and the loop carries the whole unreduced gradient.
  x = jax.lax.optimization_barrier(x)
  return jax.lax.psum(x, 'replica')


def over_selected(body, start, selected, chunk, part, parts):
  """Returns the carry after `carry = body(index, carry)` for every chunk.

  Args:
    body: (index [t] int32, carry) -> carry. The indices are positions to
      `read` and `write`. Out-of-range indices pad the last chunk.
    start: the first carry.
    selected: [T] bool, the positions to compute.
    chunk: largest number of positions per chunk.
    part: number of this device among those that hold the same tokens.
    parts: number of these devices.
  """
  size = len(selected)
  chunk = min(chunk, -(-size // parts))
  # Selected positions come first.
  order = jnp.argsort(~selected, stable=True)
  count = jnp.sum(selected)
  order = jnp.where(jnp.arange(size) < count, order, size)
  order = jnp.pad(
    order, (0, -size % (chunk * parts)), constant_values=size
  ).reshape(-1, parts)[:, part]
  count = (count - part + parts - 1) // parts

  def step(i, carry):
    return body(jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk), carry)

  return jax.lax.fori_loop(0, -(-count // chunk), step, start)


def read(x, index):
  """Returns x[index], and 0 for an index out of range."""
  return x.at[index].get(mode='fill', fill_value=0)


def write(x, index, values):
  """Returns x with x[index] = values; drops values out of range."""
  return x.at[index].set(values, mode='drop')


def project(hidden, head, targets, exclude):
  """Returns logits [t, V] float32; and [t, V] bool, True at the targets.

  Args:
    hidden: [t, D].
    head: [D, V], of the same dtype.
    targets: [t] int32.
    exclude: token id left out of the softmax, or None.
  """
  vocab = jnp.arange(head.shape[1])
  with jax.named_scope('part(loss: logits)'):
    logits = jnp.einsum(
      'td,dv->tv', hidden, head, preferred_element_type=jnp.float32
    )
  if exclude is not None:
    logits = jnp.where(vocab == exclude, -jnp.inf, logits)
  return logits, vocab == targets[:, None]


def nll_of(logits, is_target):
  """Returns nll and log-normalizer of each token of a chunk, [t] each, nats."""
  log_norm = jax.nn.logsumexp(logits, axis=-1)
  target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
  return log_norm - target_logit, log_norm


def zero_gradients(hidden, head):
  """Returns gradients before the first chunk: [T, D], and [D, V] float32."""
  return jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32)


def add_gradients(gradients, index, hidden, head, d_logits):
  """Returns the gradients by hidden states and head after one more chunk.

  Args:
    gradients: ([T, D] in the compute dtype, [D, V] float32).
    index: [t] int32.
    hidden: [t, D], hidden states of the chunk.
    head: [D, V].
    d_logits: [t, V] float32, gradient by the logits of the chunk.
  """
  d_hidden, d_head = gradients
  d_logits = d_logits.astype(hidden.dtype)
  with jax.named_scope('part(loss: gradient of hidden states)'):
    d_h = jnp.einsum('tv,dv->td', d_logits, head)
  d_hidden = write(d_hidden, index, d_h)
  with jax.named_scope('part(loss: gradient of the head)'):
    d_head += jnp.einsum(
      'dt,tv->dv',
      rows_first(hidden),
      d_logits,
      preferred_element_type=jnp.float32,
    )
  return d_hidden, d_head
