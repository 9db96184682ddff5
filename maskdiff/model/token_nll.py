"""Negative log-likelihood of selected tokens, with a gradient per token.

`cross_entropy` computes gradients in its forward pass, because it knows the
weight of each token. In ratios of sequence likelihoods, preference losses and
reinforcement learning, the weight of a token depends on sums over whole rows.
`token_nll` therefore computes the logits again in the backward pass, and keeps
one float32 per token, the log-normalizer. It takes four products with the head;
`cross_entropy` takes three.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from maskdiff.model import vocabulary_loop as loops

# Name of the saved log-normalizers for policies of `jax.checkpoint`. If a
# policy saves them, the backward pass does not repeat the forward loop.
LOG_NORMALIZERS = 'log_normalizers'


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def token_nll(hidden, head, targets, where, exclude, chunk):
  """Returns the nll of each selected token, differentiable in reverse mode.

  Tokens whose cotangent is 0 are not computed in the backward pass, for example
  the tokens of a row whose ratio is clipped. Second derivatives are not
  supported.

  Args:
    hidden: [B, L, D], final hidden states in the compute dtype.
    head: [D, V], the vocabulary projection, float32 or the compute dtype.
    targets: [B, L] int32.
    where: [B, L] bool, the tokens to compute.
    exclude: token id left out of the softmax, or None.
    chunk: tokens per iteration of the loop, which holds chunk x V float32.

  Returns:
    [B, L] float32 nats, 0 at the other tokens.
  """
  return _forward(hidden, head, targets, where, exclude, chunk)[0]


def _forward(hidden, head, targets, where, exclude, chunk):
  nll, log_norm = loops.on_devices(
    functools.partial(_values, exclude=exclude, chunk=chunk),
    hidden,
    head,
    (targets, where),
    ('tokens', 'tokens'),
  )
  log_norm = checkpoint_name(log_norm, LOG_NORMALIZERS)
  return nll, (hidden, head, targets, where, log_norm)


def _backward(exclude, chunk, residuals, cotangent):
  hidden, head, targets, where, log_norm = residuals
  cotangent = jnp.where(where, cotangent, 0)
  d_hidden, d_head = loops.on_devices(
    functools.partial(_gradients, exclude=exclude, chunk=chunk),
    hidden,
    head,
    (targets, log_norm, cotangent),
    ('states', 'head'),
  )
  return d_hidden, d_head.astype(head.dtype), None, None


token_nll.defvjp(_forward, _backward)


def _values(hidden, head, targets, where, *, part, parts, exclude, chunk):
  """Returns nll and log-normalizers, [B, L] each."""
  shape = targets.shape
  hidden = hidden.reshape(-1, hidden.shape[-1])  # [T, D]
  targets, where = targets.reshape(-1), where.reshape(-1)  # [T]

  def body(index, carry):
    h, y = loops.read(hidden, index), loops.read(targets, index)
    results = loops.nll_of(*loops.project(h, head, y, exclude))
    return tuple(
      loops.write(x, index, new) for x, new in zip(carry, results, strict=True)
    )

  zeros = jnp.zeros(targets.shape, jnp.float32)
  results = loops.over_selected(body, (zeros, zeros), where, chunk, part, parts)
  return tuple(x.reshape(shape) for x in results)


def _gradients(
  hidden, head, targets, log_norm, cotangent, *, part, parts, exclude, chunk
):
  """Returns the gradients by hidden states and head."""
  shape = hidden.shape
  hidden = hidden.reshape(-1, shape[-1])  # [T, D]
  targets, log_norm, cotangent = (
    x.reshape(-1) for x in (targets, log_norm, cotangent)
  )  # [T]

  def body(index, gradients):
    h, y, z, g = (
      loops.read(x, index) for x in (hidden, targets, log_norm, cotangent)
    )
    logits, is_target = loops.project(h, head, y, exclude)
    d_logits = (jnp.exp(logits - z[:, None]) - is_target) * g[:, None]
    return loops.add_gradients(gradients, index, h, head, d_logits)

  start = loops.zero_gradients(hidden, head)
  d_hidden, d_head = loops.over_selected(
    body, start, cotangent != 0, chunk, part, parts
  )
  return d_hidden.reshape(shape), d_head
