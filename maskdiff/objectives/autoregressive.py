"""Autoregression: predict each token from the tokens before it."""

import jax.numpy as jnp

from maskdiff.model import masks
from maskdiff.objectives.canvas import Canvas, document_labels


def make_canvas(c, tokens, rows, key, batch):
  """Returns a Canvas whose targets are all tokens, with weight 1.

  The inputs are the tokens shifted right, with bos in front. The L targets are
  the same as in masked diffusion, so the two losses are comparable. Arguments
  as for masked_diffusion.make_canvas; there is no noise.

  The labels belong to the predicted tokens. The first token of a row is
  predicted from bos. If attention stays within documents, the first token of a
  later document is predicted from the eos before it and from no other token.
  """
  del rows, key, batch
  b, length = tokens.shape
  valid = jnp.ones(tokens.shape, bool)
  inputs, labels = show(tokens, valid, c.bos_id, document_labels(c, tokens))
  return Canvas(
    inputs=inputs,
    labels=labels,
    targets=tokens,
    weights=jnp.ones(tokens.shape, jnp.float32),
    num_tokens=jnp.full((b,), length, jnp.float32),
    mask_ratio=jnp.zeros((b,), jnp.float32),
  )


def show(tokens, valid, bos_id, doc=0):
  """Returns the inputs of a causal network: the tokens shifted right by one.

  The prediction for a position is at that position.

  Args:
    tokens: [B, L] int32.
    valid: [B, L] bool, False on padding.
    bos_id: id of the token before the first token of a row.
    doc: from `document_labels`; by default each row is one document.

  Returns:
    inputs [B, L] int32, and their masks.Labels.
  """
  inputs = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=bos_id)
  return inputs, masks.causal(valid, doc)
