"""Weighted cross entropy over the vocabulary that skips positions of weight 0.

The loop of vocabulary_loop.py computes the loss and both gradients at once, at
positions with a weight only. The result is exact, not an approximation.
"""

import functools

import jax
import jax.numpy as jnp

from maskdiff.model import vocabulary_loop as loops


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
  hidden, head, targets, weights, exclude, chunk, confidence=0.0
):
  """Returns sum(weights * nll) and the nll of each weighted position.

  With `confidence`, the loss of a position whose most probable token is its
  target is nll + confidence * entropy of its predicted distribution.

  Args:
    hidden: [B, L, D], final hidden states in the compute dtype.
    head: [D, V], the vocabulary projection, float32 or the compute dtype.
    targets: [B, L] int32.
    weights: [B, L] float32; a position of weight 0 is not computed.
    exclude: token id left out of the softmax, or None.
    chunk: tokens per iteration of the loop, which holds chunk x V float32.
    confidence: weight of the entropy of correct predictions.

  Returns:
    - `loss`: float32 scalar, nats. The only output with a gradient.
    - `nll`: [B, L] float32 nats, 0 where the weight is 0.
  """
  loop = functools.partial(
    _loop,
    exclude=exclude,
    chunk=chunk,
    confidence=confidence,
    gradients=False,
  )
  return loops.on_devices(
    loop, hidden, head, (targets, weights), ('scalar', 'tokens')
  )


def _forward(hidden, head, targets, weights, exclude, chunk, confidence):
  loop = functools.partial(
    _loop,
    exclude=exclude,
    chunk=chunk,
    confidence=confidence,
    gradients=True,
  )
  loss, nll, d_hidden, d_head = loops.on_devices(
    loop,
    hidden,
    head,
    (targets, weights),
    ('scalar', 'tokens', 'states', 'head'),
  )
  # Residuals must be arrays. The scalar stands for the dtype of the head.
  return (loss, nll), (d_hidden, d_head, jnp.zeros((), head.dtype))


def _backward(exclude, chunk, confidence, residuals, cotangents):
  del exclude, chunk, confidence
  d_hidden, d_head, like = residuals
  scale, _ = cotangents
  return (
    (d_hidden * scale).astype(d_hidden.dtype),
    (d_head * scale).astype(like.dtype),
    None,
    None,
  )


cross_entropy.defvjp(_forward, _backward)


def _loop(
  hidden,
  head,
  targets,
  weights,
  *,
  part,
  parts,
  exclude,
  chunk,
  confidence,
  gradients,
):
  """Returns (loss, nll), with `gradients` also those by hidden and head."""
  shape = hidden.shape
  hidden = hidden.reshape(-1, shape[-1])  # [T, D]
  targets, weights = targets.reshape(-1), weights.reshape(-1)  # [T]

  def body(index, carry):
    loss, nll, *sums = carry
    h, y, w = (loops.read(x, index) for x in (hidden, targets, weights))
    logits, is_target = loops.project(h, head, y, exclude)
    token_nll, log_norm = loops.nll_of(logits, is_target)
    token_nll = jnp.where(w != 0, token_nll, 0)
    loss += jnp.sum(w * token_nll)
    nll = loops.write(nll, index, token_nll)
    d_entropy = 0.0
    if confidence:
      entropy, d_entropy = _entropy(logits, log_norm)
      share = jnp.where(jnp.argmax(logits, axis=1) == y, confidence, 0.0)
      loss += jnp.sum(w * share * entropy)
      d_entropy = share[:, None] * d_entropy
    if gradients:
      d_nll = jnp.exp(logits - log_norm[:, None]) - is_target
      d_logits = (d_nll + d_entropy) * w[:, None]
      sums = loops.add_gradients(sums, index, h, head, d_logits)
    return loss, nll, *sums

  start = jnp.zeros((), jnp.float32), jnp.zeros(targets.shape, jnp.float32)
  if gradients:
    start += loops.zero_gradients(hidden, head)
  loss, nll, *sums = loops.over_selected(
    body, start, weights != 0, chunk, part, parts
  )
  if gradients:
    sums[0] = sums[0].reshape(shape)
  return loss, nll.reshape(shape[:-1]), *sums


def _entropy(logits, log_norm):
  """Returns the entropy of a softmax, [t] nats, and its gradient, [t, V].

  Args:
    logits: [t, V] float32; -inf for a token left out of the softmax.
    log_norm: [t] float32, logsumexp of the logits.
  """
  log_p = logits - log_norm[:, None]
  p = jnp.exp(log_p)
  log_p = jnp.where(p > 0, log_p, 0)
  entropy = -jnp.sum(p * log_p, axis=1)
  return entropy, -p * (log_p + entropy[:, None])
