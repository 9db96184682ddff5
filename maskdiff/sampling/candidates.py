"""Candidates: a token for every slot, and how sure the network is of it.

Both come from the logits of the slots, [B, S, V] float32. A token is drawn at
a temperature, perhaps among the most probable ones alone; confidence is always
that of the network itself, at temperature 1 and over the whole vocabulary.
"""

import jax
import jax.numpy as jnp


def suppress(logits, ids):
  """Makes tokens impossible.

  Args:
    logits: [B, S, V] float32.
    ids: tuple of int.

  Returns:
    logits with -inf at the ids.
  """
  return logits.at[..., jnp.array(ids)].set(-jnp.inf) if ids else logits


def guide(conditional, unconditional, scale):
  """Classifier-free guidance: what the prompt changes, exaggerated.

  u + (w + 1)(c - u), as in LLaDA's generate.py; w = 0 leaves the conditional
  logits.

  Args:
    conditional: [B, S, V] float32, c.
    unconditional: [B, S, V] float32, u.
    scale: w.
  """
  return unconditional + (scale + 1) * (conditional - unconditional)


def truncate(logits, top_k, top_p):
  """Leaves the most probable tokens: `top_k` first, `top_p` of what remains.

  Tokens that tie with the last one to stay do so too.

  Args:
    logits: [B, S, V] float32, divided by the temperature.
    top_k: how many stay; 0: all.
    top_p: the fewest most probable tokens stay whose probabilities add up to
      this; 1: all (nucleus sampling, arXiv 1904.09751).

  Returns:
    logits with -inf at the other tokens.
  """
  if 0 < top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p < 1:
    falling = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    p = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p  # the mass of more probable tokens
    stay = (before < top_p) & (falling > -jnp.inf)
    least = jnp.min(falling, axis=-1, where=stay, initial=jnp.inf)
    logits = jnp.where(logits < least[..., None], -jnp.inf, logits)
  return logits


def gumbel(keys, shape):
  """[B, *shape] float32 standard Gumbel noise, of each row by its own key."""
  return jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys)


def draw(logits, temperature, top_k, top_p, keys):
  """Draws a token per slot.

  Gumbel noise is added in log space and float32: lower precision biases the
  draw (arXiv 2409.02908). LLaDA's exp(logit) / (-ln u)^T in float64 has the
  same argmax.

  Args:
    logits: [B, S, V] float32.
    temperature: 0 for the most probable token.
    top_k: see `truncate`; it does not change the most probable token.
    top_p: see `truncate`; nor does it.
    keys: [B] PRNG keys.

  Returns:
    [B, S] int32.
  """
  if temperature > 0:
    logits = truncate(logits / temperature, top_k, top_p)
    logits += gumbel(keys, logits.shape[1:])
  return best(logits)


def best(logits):
  """The most probable token, the lowest id on ties, [..., V] to [...] int32.

  XLA does not vectorize argmax on a CPU, but the maximum and minimum of floats,
  which hold ids exactly: 8 times as fast. If a logit is NaN, so is the
  confidence, and the token does not matter.
  """

  def of_floats(logits):
    vocab = logits.shape[-1]
    ids = jax.lax.broadcasted_iota(jnp.float32, logits.shape, logits.ndim - 1)
    top = jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(logits == top, ids, vocab - 1.0), axis=-1)
    return first.astype(jnp.int32)

  return jax.lax.platform_dependent(
    logits,
    cpu=of_floats,
    default=lambda x: jnp.argmax(x, axis=-1).astype(jnp.int32),
  )


def probability(logits, token):
  """That of the token that was drawn (LLaDA, arXiv 2502.09992, alg. 5)."""
  chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
  return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))


def entropy(logits, token):
  """1 - H / ln V of the slot: 1 if the network is sure, 0 if all is equal.

  Orders slots as the negative entropy of Dream (arXiv 2508.15487) does, on the
  scale of SDLM's confidence, so that it compares with a threshold.
  """
  del token
  log_p = jax.nn.log_softmax(logits, axis=-1)
  nats = -jnp.sum(jnp.exp(log_p) * jnp.maximum(log_p, -1e9), axis=-1)
  return 1 - nats / jnp.log(logits.shape[-1])


def margin(logits, token):
  """By how much the most probable token of the slot beats the second one.

  arXiv 2502.06768; `topk_margin` of Dream.
  """
  del token
  best, second = jnp.moveaxis(
    jax.lax.top_k(jax.nn.softmax(logits, axis=-1), 2)[0], -1, 0
  )
  return best - second


# (logits [B, S, V], token [B, S]) -> [B, S] float32 in [0, 1]; NaN where logits
# are NaN or inf. -inf is a token that cannot be.
CONFIDENCES = {
  'probability': probability,
  'entropy': entropy,
  'margin': margin,
}
