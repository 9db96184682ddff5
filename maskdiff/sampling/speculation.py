"""Speculative decoding: a network verifies the draft of D - 1 tokens.

The draft comes from a network with windows (windows.py) or from a drafter
(drafts.py). A pass gives the distribution p of the token after each part of the
draft, so that it verifies all of them, and the next draft is made from it.

The tokens are those of decoding one token per step. At temperature 0 they are
equal, token for token: a token of the draft is accepted if it is the most
probable one. At other temperatures they have the same distribution, by
speculative sampling (Leviathan et al., arXiv 2211.17192): a token x that was
drawn from q is accepted with probability min(1, p(x) / q(x)), and a rejected
one is replaced by a draw from max(0, p - q), normalized. Published code draws a
token from p, accepts x if the two are equal, and continues with the drawn token
if not. Its tokens have the same distribution, but it accepts with probability
sum(p q), which is at most the sum(min(p, q)) of this rule.
"""

import jax
import jax.numpy as jnp

from maskdiff.sampling import candidates, commit, remasking
from maskdiff.sampling.state import Draft


def verify(network, c, settings, draft, logits, propose, keys):
  """Accepts a part of the draft, adds a token, and makes the next draft.

  Args:
    network: Network.
    c: SamplerConfig.
    settings: Settings, each field [B].
    draft: Draft.
    logits: [B, D, V] float32, of the token after 0, 1, ... tokens of the draft.
    propose: (accepted tokens of the draft [B] int32, the token after them [B]
      int32) -> logits of the next draft, [B, D - 1, V] float32.
    keys: two arrays of [B] PRNG keys.

  Returns:
    - token [B, D] int32 and its confidence [B, D] float32; the first `number`
      of a row are final;
    - number [B] int32 from 1 to D: the accepted tokens, and one more;
    - the next Draft, of the slots after these.
  """
  s, logits = settings, commit.allowed(network, settings, logits)
  token_keys, draft_keys = jax.vmap(jax.random.split, out_axes=1)(keys[0])
  target = candidates.tempered(logits, s.temperature, s.top_k, s.top_p)
  accepted, added = _accept(s, draft, logits, target, token_keys, keys[1])
  index = jnp.arange(logits.shape[1])
  drafted = jnp.pad(draft.tokens, ((0, 0), (0, 1)))
  token = jnp.where(index < accepted[:, None], drafted, added[:, None])
  following = commit.allowed(network, s, propose(accepted, added))
  next_draft = Draft(
    candidates.draw(following, s.temperature, s.top_k, s.top_p, draft_keys),
    candidates.tempered(following, s.temperature, s.top_k, s.top_p),
  )
  confidence = candidates.CONFIDENCES[c.confidence](logits, token)
  return token, confidence, accepted + 1, next_draft


def _accept(settings, draft, logits, target, token_keys, accept_keys):
  """Returns how many tokens of a draft are accepted, and the token after them.

  Args:
    settings: Settings, each field [B].
    draft: Draft.
    logits: [B, D, V] float32, after 0, 1, ... tokens of the draft.
    target: `logits` at the temperature, with top-k and nucleus applied.
    token_keys: [B] PRNG keys, for the token.
    accept_keys: [B] PRNG keys.

  Returns:
    [B] int32 from 0 to D - 1, and [B] int32.
  """
  rows = jnp.arange(len(target))
  best, drawn = candidates.best(logits), settings.temperature > 0
  there = draft.tokens >= 0
  length = lambda accepts: jnp.cumprod(accepts & there, axis=1).sum(axis=1)
  number = length(draft.tokens == best[:, :-1])
  greedy = number, best[rows, number]

  def sampled():
    log_p, log_q = map(jax.nn.log_softmax, (target, draft.logits))
    of_token = lambda x: jnp.take_along_axis(
      x, jnp.maximum(draft.tokens, 0)[..., None], axis=2
    )[..., 0]
    ratio = jnp.exp(of_token(log_p[:, :-1]) - of_token(log_q))
    u = remasking.uniform(accept_keys, draft.tokens.shape[1])
    number = length(u < ratio)
    token = candidates.best(
      _remainder(draft, log_p, log_q, number)
      + candidates.gumbel(token_keys, log_p.shape[2:])
    )
    return tuple(
      jnp.where(drawn, a, b)
      for a, b in zip((number, token), greedy, strict=True)
    )

  return jax.lax.cond(drawn.any(), sampled, lambda: greedy)


def _remainder(draft, log_p, log_q, number):
  """Returns logits of the distribution of the token after an accepted part.

  It is max(0, p - q), normalized, if a token of the draft was rejected there,
  and p if there was none.

  Args:
    draft: Draft.
    log_p: [B, D, V].
    log_q: [B, D - 1, V].
    number: [B] int32, accepted tokens.

  Returns:
    [B, V] float32.
  """
  rows, one_more = jnp.arange(len(log_p)), ((0, 0), (0, 1))
  log_p = log_p[rows, number]
  log_q = jnp.pad(log_q, (*one_more, (0, 0)))[rows, number]
  tokens = jnp.pad(draft.tokens, one_more, constant_values=-1)
  rejected = tokens[rows, number] >= 0
  rest = jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0)
  # If p and q are equal up to rounding, nothing may be left.
  rejected &= rest.any(axis=1)
  return jnp.where(rejected[:, None], jnp.log(rest), log_p)
