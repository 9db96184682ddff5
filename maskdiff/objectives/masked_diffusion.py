"""Masked diffusion: mask a random share of a row, predict the masked tokens."""

import jax
import jax.numpy as jnp

from maskdiff.model import masks
from maskdiff.objectives.canvas import Canvas, documents
from maskdiff.objectives.schedule import sample_times


def masked_diffusion(c, tokens, rows, key, batch):
  """Masks a random share of each row and asks for the masked tokens.

  Each row draws a time t in [eps, 1) and every token is masked on its own with
  probability p = 1 - alpha(t); a masked token weighs -alpha'(t) / p. With the
  linear schedule that is LLaDA's pretraining loss (arXiv 2502.09992, alg. 1
  and GUIDELINES.md): p = (1 - eps) u + eps, weight 1/p, divided by B x L.

  A share of the rows is cut to a random length, which is equal to truncating
  them: the rest is padding, hidden from attention, never masked, not counted.

  Where attention stays within a document, it shows where documents end, also
  past masked tokens: the bound is on the text given the lengths of its
  documents, and a masked eos costs less.

  Args:
    c: ObjectiveConfig.
    tokens: [b, L] int32, clean tokens.
    rows: [b] int32, their numbers in the global batch.
    key: PRNG key of this step.
    batch: rows of the global batch.

  Returns:
    Canvas.
  """
  keys = jax.random.split(key, 4)
  by_row = lambda draw, key: jax.vmap(
    lambda row: draw(jax.random.fold_in(key, row))
  )(rows)
  length = tokens.shape[1]
  u = sample_times(c.time_sampling, keys[0], rows, batch)
  noise = by_row(lambda k: jax.random.uniform(k, (length,)), keys[1])
  cut = by_row(jax.random.uniform, keys[2]) < c.random_length_fraction
  random_length = by_row(
    lambda k: jax.random.randint(k, (), 1, length + 1), keys[3]
  )
  lengths = jnp.where(cut, random_length, length)
  return corrupt(c, tokens, u, noise, lengths)


def corrupt(c, tokens, u, noise, lengths):
  """The Canvas of masked diffusion for given draws.

  Args:
    c: ObjectiveConfig.
    tokens: [B, L] int32.
    u: [B] float32 in [0, 1); the time is (1 - eps) u + eps.
    noise: [B, L] float32 in [0, 1); a token is masked where noise < p.
    lengths: [B] int32, tokens of each row that are kept.
  """
  t = (1 - c.eps) * u + c.eps
  mask_ratio = c.schedule.mask_ratio(t)
  valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
  masked = valid & (noise < mask_ratio[:, None])
  # Times stop at eps. This makes the weights of a token average to 1 all the
  # same, so that the loss of a perfect model is the entropy; 1 when linear.
  whole = (1 - c.eps) / (1 - c.schedule.mask_ratio(c.eps))
  weight = whole * c.schedule.weight(t)
  shown = jnp.where(masked, c.mask_id, tokens)
  # Of the clean tokens: a masked eos must still end its document, or the
  # neighbours would see each other at some times and not at others.
  doc = documents(c, tokens)
  inputs, labels = show(shown, valid, c.bos_id, doc)
  return Canvas(
    inputs=inputs,
    labels=labels,
    targets=tokens,
    weights=jnp.where(masked, weight[:, None], 0.0),
    num_tokens=lengths.astype(jnp.float32),
    mask_ratio=mask_ratio,
  )


def show(tokens, valid, bos_id, doc=0):
  """Inputs and labels of a bidirectional network: the tokens as they are.

  Args:
    tokens: [B, L] int32.
    valid: [B, L] bool, False on padding.
    bos_id: not used.
    doc: what `documents` returns; by default a row is a single document.

  Returns:
    inputs [B, L] int32, and their masks.Labels.
  """
  del bos_id
  return tokens, masks.bidirectional(valid, doc)
