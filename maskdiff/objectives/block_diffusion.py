"""Block diffusion: masked diffusion within a block, given the blocks before it.

A row is divided into blocks of `block_length` tokens. The log-likelihood of a
row is the sum over its blocks of the log-likelihood of a block given the blocks
to its left, and each term has the bound of masked diffusion (BD3-LM, arXiv
2503.09573, eq. 6). One forward pass computes all terms. The network sees two
copies of the row, [noisy ; clean]. A noisy position sees its own noisy block
and the clean blocks before it; a clean position sees the clean blocks up to its
own (model/masks.py). Only the noisy copy carries a loss.

With `clean_attention='causal'`, a clean position sees the clean tokens up to
itself, and the clean copy is an autoregressive model. It may have a loss of its
own, `autoregressive_weight` times the negative log-likelihood of each token
given the tokens before it. The bound is that of the noisy copy.

Between the extremes: one block per row is masked diffusion, and blocks of one
token are autoregression, with the predicted token masked instead of shifted.
"""

import dataclasses

import jax.numpy as jnp

from maskdiff.model import masks
from maskdiff.objectives import masked_diffusion


def make_canvas(c, rows, numbers, key, batch, progress=0.0):
  """Masks a random share of each block; the targets are the masked tokens.

  Every block draws its own time, stratified over the blocks of the batch, and
  has masks and weights as in masked diffusion. Arguments as for
  masked_diffusion.make_canvas. If a block is the whole row, the Canvas is that
  of masked diffusion, with the same draws.

  A block of one token is always masked, with weight 1: its loss given the
  tokens to its left does not depend on the time, so this is the bound without
  noise. It equals the negative log-likelihood.

  Blocks are counted from the start of the row. If attention stays within
  documents, the first and last blocks of a document may be shorter.

  Returns:
    Canvas whose inputs are [noisy ; clean], [b, 2 L], unless a block is the
    whole row. It has twice as many rows with complementary masks; both copies
    of a row have the same clean copy.
  """
  length = rows.tokens.shape[1]
  u, noise, lengths = masked_diffusion.draw(
    c, length, numbers, key, batch, -(-length // c.block_length)
  )
  return corrupt(c, rows, u, noise, lengths, progress)


def corrupt(c, rows, u, noise, lengths, progress=0.0):
  """Returns the Canvas of block diffusion for given random draws.

  Arguments as for masked_diffusion.corrupt, with one u per block.
  """
  if c.block_length > 1:
    canvas = masked_diffusion.corrupt(c, rows, u, noise, lengths, progress)
  else:
    ones = jnp.ones_like(u)
    canvas = masked_diffusion.canvas_of(c, rows, ones, ones, noise < 1, lengths)
  return _with_clean_copy(c, canvas)


def with_masks(c, rows, t, masked, lengths):
  """Returns the Canvas of block diffusion for given times and masks.

  Arguments as for masked_diffusion.with_masks, with one time per block.
  """
  canvas = masked_diffusion.with_masks(c, rows, t, masked, lengths)
  return _with_clean_copy(c, canvas)


def _with_clean_copy(c, canvas):
  doc = 0 if canvas.labels.single else canvas.labels.doc
  valid = canvas.labels.doc >= 0
  inputs, labels = _two_copies(c, canvas.inputs, canvas.targets, valid, doc)
  one_copy = inputs.shape == canvas.inputs.shape
  return dataclasses.replace(
    canvas,
    inputs=inputs,
    labels=labels,
    next_weights=None if one_copy else canvas.next_weights,
  )


def show_masked(c, tokens, masked, valid, doc=0):
  """Returns inputs whose hidden states predict masked tokens of all blocks.

  A masked token is predicted from its own block, and from the clean tokens of
  the blocks before it, also if these are masked too.

  Args:
    c: ObjectiveConfig or Network.
    tokens: [B, L] int32, clean.
    masked: [B, L] bool.
    valid: [B, L] bool, False on padding.
    doc: from `document_labels`; by default each row is one document.

  Returns:
    inputs [B, M] int32, and their masks.Labels. M is 2 L, or L if a block is
    the whole row. The first L positions are the masked copy.
  """
  noisy = jnp.where(masked, c.mask_id, tokens)
  return _two_copies(c, noisy, tokens, valid, doc)


def _two_copies(c, noisy, clean, valid, doc):
  """Returns [noisy ; clean] and its Labels; only `noisy` if it is one block."""
  if copies(c, clean.shape[1]) == 1:
    return noisy, masks.bidirectional(valid, doc)
  causal = c.clean_attention == 'causal'
  labels = masks.block_diffusion(valid, c.block_length, doc, causal)
  return jnp.concatenate([noisy, clean], axis=1), labels


def show(c, tokens, valid, doc=0):
  """Returns the inputs of a network that fills a row block by block.

  Every block sees itself and the blocks before it, so the last block that has
  masked tokens is predicted as in training if the blocks before it are clean.
  If clean attention is causal, blocks with a mask token are noisy and the other
  blocks are clean.

  Args:
    c: ObjectiveConfig or Network.
    tokens: [B, L] int32.
    valid: [B, L] bool, False on padding.
    doc: from `document_labels`; by default each row is one document.

  Returns:
    inputs [B, L] int32, and their masks.Labels.
  """
  if c.clean_attention == 'causal':
    noisy = tokens == c.mask_id
    return tokens, masks.clean_or_noisy_blocks(
      noisy, valid, c.block_length, doc
    )
  return tokens, masks.block_causal(valid, c.block_length, doc)


def copies(c, length):
  """Returns the copies of each token in a training row: 2, or 1 for a block."""
  return 2 if c.block_length < length else 1


def visible_pairs(c, length):
  """Returns pairs of a query and a key that it sees, divided by L^2."""
  block = c.block_length / length
  if block >= 1:
    return 1.0
  # Half of the clean copy, with the diagonal; of blocks, or of positions.
  clean = (1 + (1 / length if c.clean_attention == 'causal' else block)) / 2
  return block + (1 - block) / 2 + clean
