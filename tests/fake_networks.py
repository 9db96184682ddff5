"""Networks of a few lines that replace the Transformer in the sampler."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maskdiff.model.network import Network
from maskdiff.sampling import passes


class Config(NamedTuple):
  """Stands for a TransformerConfig."""

  function: Callable  # (params, tokens, valid) -> logits
  vocab_size: int = 1 << 31
  predict_next: bool = False


class Fake:
  """A network whose logits are a function of (params, tokens, valid)."""

  def __init__(self, config, params):
    self.function, self.params = config.function, params

  def __call__(self, tokens, labels):
    return self.function(self.params, tokens, labels.doc >= 0)  # [B, L, V]

  def logits(self, hidden):
    return hidden


def network(function, params=None, **fields):
  """Returns a Network that computes a function, for use after `put_in`.

  Args:
    function: (params, tokens, valid) -> logits, as for `Fake`; or a
      TransformerConfig, for a real network.
    params: an array or a tree of arrays.
    **fields: fields of Network that differ from the defaults here.
  """
  defaults = dict(
    objective='masked_diffusion', predict_mask=False, mask_id=4, bos_id=1
  )
  config = Config(function) if callable(function) else function
  return Network(config=config, params=params, **{**defaults, **fields})


def put_in(monkeypatch):
  """Makes the sampler call the function in Network.config."""
  monkeypatch.setattr(passes, 'bind', Fake)


def conditionals(joint, ids, mask_id, vocab_size):
  """Returns the exact denoiser of a known distribution.

  Args:
    joint: [n, ..., n] of L axes, probabilities of L tokens.
    ids: the n tokens of its axes.
    mask_id: id of the mask token, which marks an unknown token.
    vocab_size: V.

  Returns:
    Function for `network`: from (params, tokens [B, L] int32, valid) to
    [B, L, V] float32 log-probabilities of tokens given the known tokens.
  """
  joint, ids = jnp.asarray(joint, jnp.float32), jnp.asarray(ids)

  def of_row(tokens):
    weight = joint
    for axis in range(joint.ndim):
      fits = (tokens[axis] == ids) | (tokens[axis] == mask_id)
      weight *= fits.reshape(
        [-1 if a == axis else 1 for a in range(joint.ndim)]
      )
    p = [
      weight.sum([a for a in range(joint.ndim) if a != axis])
      for axis in range(joint.ndim)
    ]
    p = jnp.stack(p) / weight.sum()  # [L, n]
    return (
      jnp.full((joint.ndim, vocab_size), -jnp.inf).at[:, ids].set(jnp.log(p))
    )

  return lambda params, tokens, valid: jax.vmap(of_row)(tokens)
