"""Tokens drawn from the logits of slots, and the confidence of each.

Logits are [B, S, V] float32. A token is drawn at a temperature, among all
tokens or the most probable ones (top-k, nucleus sampling). Confidence is
computed at temperature 1 and over the whole vocabulary.
"""

import jax
import jax.numpy as jnp


def suppress(logits, ids, rows=None):
  """Returns logits with -inf at some token ids.

  Args:
    logits: [..., V] float32; with `rows`, [B, S, V].
    ids: tuple of n int.
    rows: [B, n] bool, the rows in which each id is suppressed; None: all.
  """
  at_ids = logits.at[..., jnp.array(ids)]
  if rows is None:
    return at_ids.set(-jnp.inf)
  return at_ids.min(jnp.where(rows, -jnp.inf, jnp.inf)[:, None])


def suppress_each(logits, ids):
  """Returns logits with -inf at token ids that differ between rows.

  Args:
    logits: [B, S, V] float32.
    ids: [B, n] int32; -1 for no token.
  """
  where = jnp.arange(logits.shape[-1]) == ids[:, :, None]
  return jnp.where(where.any(axis=1)[:, None], -jnp.inf, logits)


def guide(conditional, unconditional, scale):
  """Returns logits under classifier-free guidance, u + (w + 1)(c - u).

  As in LLaDA's generate.py. w = 0 gives the conditional logits, bit for bit.

  Args:
    conditional: float32, c, given the prompt.
    unconditional: float32, u, with the prompt masked.
    scale: w, a number or an array that broadcasts against the logits.
  """
  guided = unconditional + (scale + 1) * (conditional - unconditional)
  return jnp.where(scale > 0, guided, conditional)


def truncate(logits, top_k, top_p):
  """Returns logits with -inf outside of the top-k tokens and the nucleus.

  The nucleus is computed from the renormalized probabilities of the top-k
  tokens. Tokens tied with the least probable remaining token also remain. One
  sort serves both. It is skipped if both are off in all rows.

  Args:
    logits: [B, S, V] float32, divided by the temperature.
    top_k: [B] int32, number of most probable tokens; 0: all.
    top_p: [B] float32, nucleus sampling (arXiv 1904.09751), the smallest set of
      most probable tokens with this total probability; 1: all.
  """
  vocab = logits.shape[-1]
  top_k = jnp.where((top_k > 0) & (top_k < vocab), top_k, vocab)[:, None, None]
  top_p = top_p[:, None, None]

  def lowest_remaining():
    falling = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    rank = jnp.broadcast_to(top_k - 1, (*logits.shape[:-1], 1))
    lowest = jnp.take_along_axis(falling, rank, axis=-1)
    falling = jnp.where(falling < lowest, -jnp.inf, falling)
    p = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p  # probability of more probable tokens
    in_nucleus = (before < top_p) & (falling > -jnp.inf)
    nucleus = jnp.min(
      falling, axis=-1, where=in_nucleus, initial=jnp.inf, keepdims=True
    )
    return jnp.where(top_p < 1, nucleus, lowest)

  lowest = jax.lax.cond(
    jnp.any(top_k < vocab) | jnp.any(top_p < 1),
    lowest_remaining,
    lambda: jnp.full((*logits.shape[:-1], 1), -jnp.inf, logits.dtype),
  )
  return jnp.where(logits < lowest, -jnp.inf, logits)


def tempered(logits, temperature, top_k, top_p):
  """Returns the logits of the distribution that tokens are drawn from.

  Args:
    logits: [B, S, V] float32.
    temperature: [B] float32; rows at temperature 0 are unchanged.
    top_k: [B] int32, see `truncate`.
    top_p: [B] float32, see `truncate`.
  """
  is_drawn = temperature > 0
  scaled = logits / jnp.where(is_drawn, temperature, 1)[:, None, None]
  k, p = jnp.where(is_drawn, top_k, 0), jnp.where(is_drawn, top_p, 1)
  return truncate(scaled, k, p)


def gumbel(keys, shape):
  """Returns [B, *shape] float32 Gumbel noise, each row from its own key.

  `keys` may also be the noise itself, which is then returned.
  """
  if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
    return keys
  return jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys)


def draw(logits, temperature, top_k, top_p, keys):
  """Draws a token for each slot.

  Gumbel noise is added to logits in float32, because lower precision biases the
  draw (arXiv 2409.02908). LLaDA computes exp(logit) / (-ln u)^T in float64,
  which has the same argmax. If all temperatures are 0, no noise is drawn.

  Args:
    logits: [B, S, V] float32.
    temperature: [B] float32; 0 takes the most probable token.
    top_k: [B] int32, see `truncate`; not used at temperature 0.
    top_p: [B] float32, see `truncate`; not used at temperature 0.
    keys: [B] PRNG keys, or Gumbel noise [B, S, V].

  Returns:
    [B, S] int32.
  """
  is_drawn = temperature > 0  # [B]
  # Outside of the branches, its maximum is shared with that of the confidence.
  most_probable = best(logits)

  def drawn():
    left = tempered(logits, temperature, top_k, top_p)
    token = best(left + gumbel(keys, logits.shape[1:]))
    return jnp.where(is_drawn[:, None], token, most_probable)

  return jax.lax.cond(is_drawn.any(), drawn, lambda: most_probable)


def best(logits):
  """Returns the most probable token, the lowest id on ties.

  On a CPU, XLA vectorizes the maximum and minimum of floats but not argmax, so
  the CPU version computes the id as a float, 8 times as fast. float32 is exact
  for ids up to 2^24. If a logit is NaN, the token is meaningless, and its
  confidence is NaN.

  Args:
    logits: [..., V] float32.

  Returns:
    [...] int32.
  """

  def with_float_ids(logits):
    vocab = logits.shape[-1]
    ids = jax.lax.broadcasted_iota(jnp.float32, logits.shape, logits.ndim - 1)
    top = jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(logits == top, ids, vocab - 1.0), axis=-1)
    return first.astype(jnp.int32)

  return jax.lax.platform_dependent(
    logits,
    cpu=with_float_ids,
    default=lambda x: jnp.argmax(x, axis=-1).astype(jnp.int32),
  )


def probability(logits, token):
  """Returns the probability of the token (LLaDA, arXiv 2502.09992, alg. 5)."""
  logit = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
  return jnp.exp(logit - jax.nn.logsumexp(logits, axis=-1))


def entropy(logits, token):
  """Returns 1 - H / ln V: 1 for a certain token, 0 for a uniform distribution.

  The ranking equals that by Dream's negative entropy (arXiv 2508.15487). The
  values lie in [0, 1] as SDLM's confidence does, so that a threshold can be
  applied to them.
  """
  del token
  log_p = jax.nn.log_softmax(logits, axis=-1)
  nats = -jnp.sum(jnp.exp(log_p) * jnp.maximum(log_p, -1e9), axis=-1)
  return 1 - nats / jnp.log(logits.shape[-1])


def margin(logits, token):
  """Returns the difference of the two largest probabilities of the slot.

  arXiv 2502.06768; `topk_margin` of Dream.
  """
  del token
  first, second = jnp.moveaxis(
    jax.lax.top_k(jax.nn.softmax(logits, axis=-1), 2)[0], -1, 0
  )
  return first - second


# (logits [B, S, V], token [B, S]) -> [B, S] float32 in [0, 1], NaN where a
# logit is NaN or +inf. A logit of -inf marks a suppressed token.
CONFIDENCES = {
  'probability': probability,
  'entropy': entropy,
  'margin': margin,
}
