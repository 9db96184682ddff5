"""Drafting: train a drafter to guess the tokens after the next one.

The network itself is autoregressive. Windows stand at answers of the row, and
the drafter predicts the D - 1 tokens of each window from the tokens before it,
as it will in decoding: the first of them is the second next token of the hidden
states that it reads, or, for a block drafter, the first after its anchor
(model/drafter.py).

With `autoregressive_weight` 0 only the drafter is trained, and the network does
not change (Medusa-1, DFlash). With a weight both are trained (Medusa-2;
Gloeckle et al., arXiv 2404.19737).

The loss is no likelihood of a text. It is a weighted mean over drafts, whose
weights are draft_decay to the power of their position: 0.8 in Medusa (arXiv
2401.10774, section 2.2), exp(-1/7), exp(-1/5) and exp(-1/4) for blocks of 16,
10 and 8 in DFlash (arXiv 2602.06036), and 1 in Gloeckle et al.
"""

import dataclasses

import jax
import jax.numpy as jnp

from maskdiff.model import drafter, masks, transformer
from maskdiff.model.cross_entropy import cross_entropy
from maskdiff.objectives import autoregressive, sdlm
from maskdiff.objectives.schedule import draw_by_number


def make_canvas(c, rows, numbers, key, batch, progress=0.0):
  """Returns a Canvas of an autoregressive row and windows of drafts.

  The windows begin at random answers, or every D tokens after a random shift of
  at most D; see config.objective.anchors. A window needs a token of its
  document before it. A draft has a weight if it and all drafts before it in its
  window are answers of the document.

  Arguments as for masked_diffusion.make_canvas.
  """
  canvas = autoregressive.make_canvas(c, rows, None, None, None)
  length, size = canvas.targets.shape[1], c.window_length
  answer = canvas.weights > 0
  begins = answer & masks.continues_document(canvas.labels)
  by_row = lambda draw: draw_by_number(draw, key, numbers)
  if c.anchors == 'random':
    noise = by_row(lambda k: jax.random.uniform(k, (length,)))
    starts = sdlm.random_starts(c, begins, noise)
  else:
    shift = by_row(lambda k: jax.random.randint(k, (1,), 1, size + 1))
    starts = shift + jnp.arange(-(-length // size)) * size
  positions = starts[:, :, None] + jnp.arange(size - 1)  # [B, W, n]
  inside = jnp.minimum(positions, length - 1)
  at = lambda x, index: jnp.take_along_axis(
    x, index.reshape(len(x), -1), axis=1
  ).reshape(index.shape)
  doc, of_first = canvas.labels.doc, inside[:, :, :1]
  drafted = (positions < length) & at(answer, inside)
  drafted &= (at(doc, inside) == at(doc, of_first)) & at(begins, of_first)
  weights = jnp.cumprod(drafted.astype(jnp.float32), axis=2)
  weights *= c.draft_decay ** jnp.arange(size - 1)
  weights = weights.reshape(len(starts), -1)
  next_weights = None
  if c.autoregressive_weight:
    next_weights = next_weight(c, length) * canvas.weights
  return dataclasses.replace(
    canvas,
    weights=weights,
    num_tokens=weights.sum(axis=1),
    next_weights=next_weights,
    starts=starts,
    window_length=size - 1,
  )


def loss(c, model, canvas):
  """Returns the summed loss of the drafts of a canvas, and their nll.

  Args:
    c: ObjectiveConfig.
    model: transformer.Transformer with a drafter.
    canvas: Canvas.

  Returns:
    As canvas.canvas_loss. The nll is [B, W n], followed by [B, L] of the
    network's next tokens if the Canvas has `next_weights`.
  """
  hidden, states = drafter.windows(
    model, canvas.inputs, canvas.labels, canvas.starts
  )
  batch, length = canvas.targets.shape
  positions = canvas.starts[:, :, None] + jnp.arange(states.shape[2])
  targets = jnp.take_along_axis(
    canvas.targets,
    jnp.minimum(positions, length - 1).reshape(batch, -1),
    axis=1,
  )
  exclude = None if c.predict_mask else c.mask_id
  nll_of = lambda hidden, head, targets, weights: cross_entropy(
    hidden, head, targets, weights, exclude, c.loss_chunk_tokens
  )
  with jax.named_scope('part(loss)'):
    if model.config.drafter.kind == 'medusa':
      total, nll = _of_heads(nll_of, model, states, targets, canvas.weights)
    else:
      flat = states.reshape(batch, -1, states.shape[3])
      total, nll = nll_of(flat, model.vocabulary(), targets, canvas.weights)
    if canvas.next_weights is None:
      return total, nll
    next_total, next_nll = nll_of(
      hidden,
      model.vocabulary(),
      canvas.targets,
      canvas.next_weights,
    )
  return total + next_total, jnp.concatenate([nll, next_nll], axis=1)


def _of_heads(nll_of, model, states, targets, weights):
  """Returns loss and nll of heads with a vocabulary matrix each.

  Args:
    nll_of: function (hidden, head, targets, weights) -> total, nll.
    model: transformer.Transformer.
    states: [B, W, n, D].
    targets: [B, W n] int32.
    weights: [B, W n] float32.
  """
  by_head = lambda x: jnp.moveaxis(x.reshape(states.shape[:3]), 2, 0)
  of_network = model.vocabulary()

  def one(total, xs):
    states, difference, targets, weights = xs
    added, nll = nll_of(states, of_network + difference, targets, weights)
    return total + added, nll

  total, nll = jax.lax.scan(
    one,
    jnp.zeros((), jnp.float32),
    (
      jnp.moveaxis(states, 2, 0),
      model.drafter.vocabulary[...],
      by_head(targets),
      by_head(weights),
    ),
  )
  return total, jnp.moveaxis(nll, 0, 2).reshape(targets.shape)


def next_weight(c, length):
  """Returns the weight of a next token in the sum of a Canvas.

  The sum is divided by the weights of the drafts. The weight is such that the
  loss is the mean over drafts plus autoregressive_weight times the mean over
  next tokens, if all tokens of a row are answers and no window is cut. It is a
  constant, so that the loss is the same for any division into microbatches.
  """
  of_window = sum(c.draft_decay**i for i in range(c.window_length - 1))
  return c.autoregressive_weight * num_windows(c, length) / length * of_window


def flops_per_token(c, m, length):
  """Returns matrix-product FLOPs of a training step per token of a row.

  A weight takes 2 FLOPs in a forward pass and 4 more in a backward pass, which
  the network has only if it is trained. A vocabulary matrix is counted for all
  drafts, with 2 FLOPs less if it is not trained, and for the next tokens if
  they have a loss.

  Args:
    c: ObjectiveConfig.
    m: transformer.TransformerConfig with a drafter.
    length: L.
  """
  d = m.drafter
  shapes = transformer.shapes(m)
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  windows = num_windows(c, length) / length  # per token
  width, head = m.heads * m.head_dim, m.vocab_size * m.embed
  passes = 2 if d.frozen else 6
  network = count(shapes['blocks']) + 2 * m.layers * width * length / 2
  flops = passes * network
  if c.autoregressive_weight:
    flops += 6 * head
  fixed = d.frozen and d.kind != 'medusa'
  flops += (4 if fixed else 6) * targets(c, length) * head
  weights = shapes['drafter']
  if d.kind == 'medusa':
    flops += 6 * windows * count(weights['residual'])
  elif d.kind == 'mtp':
    causal = 2 * d.drafts * width * length / 2
    flops += 6 * (count(weights['blocks']) + causal)
  else:
    blocks, context = weights['blocks'], weights['fuse'].size
    context += count([blocks['k'], blocks['v']])
    keys = length / 2 + d.length
    own = count(blocks) + 2 * d.layers * width * keys
    flops += 6 * (context + windows * d.length * own)
  return flops


def targets(c, length):
  """Returns the drafts of a training row, divided by L."""
  return num_windows(c, length) * (c.window_length - 1) / length


def num_windows(c, length):
  """Returns the number of windows of a training row."""
  if c.anchors == 'stride':
    return -(-length // c.window_length)
  return sdlm.num_windows(c, length)
