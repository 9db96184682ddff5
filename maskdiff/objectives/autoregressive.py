"""Autoregression: predict each token from the tokens before it."""

import jax.numpy as jnp

from maskdiff.model import masks
from maskdiff.objectives.canvas import (
  Canvas,
  answer_positions,
  document_labels,
  text_positions,
)


def make_canvas(c, rows, numbers, key, batch, progress=0.0):
  """Returns a Canvas whose targets are the answers, with weight 1.

  The inputs are the tokens shifted right, with bos in front. The targets are
  the same as in masked diffusion, so the two losses are comparable. Arguments
  as for masked_diffusion.make_canvas; there is no noise. The loss of a row is
  the exact negative log-likelihood of its answers given its prompts.

  The labels belong to the predicted tokens. The first token of a row is
  predicted from bos. If attention stays within documents, the first token of a
  later document is predicted from a single token: from bos if the rows have the
  column `doc`, else from the eos that ends the previous document.
  """
  del numbers, key, batch, progress
  valid = text_positions(rows)
  doc = document_labels(c, rows)
  inputs, labels = show(c, rows.tokens, valid, doc)
  if rows.doc is not None:
    inputs = jnp.where(masks.continues_document(labels), inputs, c.bos_id)
  answer = answer_positions(rows, valid)
  return Canvas(
    inputs=inputs,
    labels=labels,
    targets=rows.tokens,
    weights=answer.astype(jnp.float32),
    num_tokens=answer.sum(axis=1, dtype=jnp.float32),
    mask_ratio=jnp.zeros((len(rows.tokens), 1), jnp.float32),
  )


def show(c, tokens, valid, doc=0):
  """Returns the inputs of a causal network: the tokens shifted right by one.

  The prediction for a position is at that position.

  Args:
    c: ObjectiveConfig or Network; `bos_id` precedes the first token of a row.
    tokens: [B, L] int32.
    valid: [B, L] bool, False on padding.
    doc: from `document_labels`; by default each row is one document.

  Returns:
    inputs [B, L] int32, and their masks.Labels.
  """
  inputs = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=c.bos_id)
  return inputs, masks.causal(valid, doc)
