"""The autoregressive baseline: predict every token from those before it."""

import jax.numpy as jnp

from maskdiff.model import masks
from maskdiff.objectives.canvas import Canvas, documents


def autoregressive(c, tokens, rows, key, batch):
  """Shows the tokens before each one, from a bos on, and asks for it.

  The same L tokens are predicted as under masked diffusion, so the two losses
  compare. Arguments as for `masked_diffusion`; there is no noise.

  Labels are those of the predicted token. Where attention stays within a
  document, the first token of one is predicted from the eos before it and
  nothing else: this eos does for it what bos does for the first of a row.
  """
  del rows, key, batch
  b, length = tokens.shape
  valid = jnp.ones(tokens.shape, bool)
  inputs, labels = show(tokens, valid, c.bos_id, documents(c, tokens))
  return Canvas(
    inputs=inputs,
    labels=labels,
    targets=tokens,
    weights=jnp.ones(tokens.shape, jnp.float32),
    num_tokens=jnp.full((b,), length, jnp.float32),
    mask_ratio=jnp.zeros((b,), jnp.float32),
  )


def show(tokens, valid, bos_id, doc=0):
  """Inputs and labels of a causal network: the tokens shifted right by one.

  The prediction for a position stands at that position.

  Args:
    tokens: [B, L] int32.
    valid: [B, L] bool, False on padding.
    bos_id: stands before the first token of a row.
    doc: what `documents` returns; by default a row is a single document.

  Returns:
    inputs [B, L] int32, and their masks.Labels.
  """
  inputs = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=bos_id)
  return inputs, masks.causal(valid, doc)
