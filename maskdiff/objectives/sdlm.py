"""SDLM: predict a window of D tokens at once, after any clean prefix.

A window stands at a position of the row. Its inputs are the last token before
that position, the anchor, and D - 1 mask tokens. Its hidden states predict the
D tokens from that position on, each without seeing the others (Sequential
Diffusion Language Models, arXiv 2509.24007). One forward pass computes many
windows of a row, [windows ; clean]: the clean copy is causal and has no loss,
and a window sees the clean positions strictly before its anchor, which the
window has itself. Every mask token is masked with probability 1, so the loss
has no time and no weights.

As in autoregressive.py, the clean copy is shifted right by one, so that a
position has the token before the one that it predicts. The anchor of a window
is then the shifted token of its first position.

Published networks were trained without bos, which `bos_id=-1` says. The first
token of a document is then given, not predicted.

The mean over all windows is the negative log-likelihood of a model that always
emits D independent tokens, averaged over the offset of its windows
(docs/speculation.md). Windows of one token are autoregression.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maskdiff.model import masks
from maskdiff.objectives import autoregressive
from maskdiff.objectives.canvas import Canvas
from maskdiff.objectives.schedule import draw_by_number


class Clean(NamedTuple):
  """Rows as the clean copy has them; [B, L] each."""

  inputs: jax.Array  # int32, the tokens shifted right
  doc: jax.Array  # int32, documents that limit attention, -1 on padding
  targets: jax.Array  # int32, the tokens
  answer: jax.Array  # bool, targets that may carry a loss


def make_canvas(c, rows, numbers, key, batch, progress=0.0):
  """Returns a Canvas of windows, whose targets are the tokens of each window.

  With `c.anchors='stride'` the windows divide the row, after each row is
  shifted right by a random number of tokens below D. Every window within the
  row has the same probability. With 'random', window_repeats x answers / D
  windows begin at random answers, without replacement (sdlm/preprocess/
  preprocess_sdlm.py of OpenGVLab/SDLM).

  A target has weight 1 if it and all targets before it in its window are
  answers of the document of the window. num_tokens counts these targets, so
  that the loss is a mean over predicted tokens for any D. With windows of one
  token the Canvas is that of the autoregressive objective.

  Arguments as for masked_diffusion.make_canvas. The published code also ends
  the targets of a window at its first eos. Here the column `answer` ends there.
  """
  if c.window_length == 1:
    return autoregressive.make_canvas(c, rows, numbers, key, batch, progress)
  clean = clean_copy(c, rows)
  by_row = lambda draw: draw_by_number(draw, key, numbers)
  if c.anchors == 'random':
    noise = by_row(lambda k: jax.random.uniform(k, clean.doc.shape[1:]))
    return at_starts(c, clean, random_starts(c, clean.answer, noise))
  shift = by_row(lambda k: jax.random.randint(k, (), 0, c.window_length))
  return at_stride(c, shifted(clean, shift))


def clean_copy(c, rows):
  """Returns the Clean of data.rows.Rows, by the autoregressive objective."""
  canvas = autoregressive.make_canvas(c, rows, None, None, None)
  has_input = canvas.inputs >= 0  # False in place of a missing bos
  return Clean(
    jnp.where(has_input, canvas.inputs, c.mask_id),
    jnp.where(has_input, canvas.labels.doc, -1),
    canvas.targets,
    has_input & (canvas.weights > 0),
  )


def shifted(clean, shift):
  """Returns a Clean with rows moved to the right.

  Args:
    clean: Clean.
    shift: [B] int32, positions of padding before each row. As many tokens leave
      the row at its end.
  """
  index = jnp.arange(clean.doc.shape[1]) - shift[:, None]
  move = lambda x, padding: jnp.where(
    index >= 0,
    jnp.take_along_axis(x, jnp.maximum(index, 0), axis=1),
    jnp.asarray(padding, x.dtype),
  )
  return Clean(*(map(move, clean, (0, -1, 0, False))))


def random_starts(c, answer, noise):
  """Draws the first positions of windows among the answers of each row.

  Args:
    c: ObjectiveConfig.
    answer: [B, L] bool.
    noise: [B, L] float32 in [0, 1).

  Returns:
    [B, K] int32 ascending, with L in place of missing windows.
  """
  length = answer.shape[1]
  most = num_windows(c, length)
  found = answer.sum(axis=1, keepdims=True)
  share = c.window_repeats / c.window_length
  number = jnp.minimum(jnp.floor(found * share + 1e-3), found)
  order = jnp.argsort(jnp.where(answer, noise, 2.0), axis=1)[:, :most]
  starts = jnp.where(jnp.arange(most) < number, order, length)
  return jnp.sort(starts, axis=1).astype(jnp.int32)


def num_windows(c, length):
  """Returns the number of windows for which a training row has room."""
  if c.anchors == 'stride':
    return length // c.window_length
  share = c.window_repeats / c.window_length
  return max(1, min(length, int(length * share + 1e-3)))


def at_starts(c, clean, starts):
  """Returns the Canvas of windows that begin at given positions.

  Args:
    c: ObjectiveConfig.
    clean: Clean.
    starts: [B, K] int32, the first target of each window; L or more: none.
  """
  inputs, labels = windows(c, clean.inputs, clean.doc, starts)
  causal = masks.make_labels(masks.CAUSAL, clean.doc >= 0, clean.doc)
  return _canvas(c, clean, starts, inputs, masks.concatenate(labels, causal))


def at_stride(c, clean):
  """Returns the Canvas of windows that divide the rows of a Clean.

  If the length is not a multiple of D, the last tokens are in no window, and
  the labels follow no regime.
  """
  batch, length = clean.doc.shape
  starts = jnp.arange(num_windows(c, length)) * c.window_length
  starts = jnp.broadcast_to(starts.astype(jnp.int32), (batch, len(starts)))
  if length % c.window_length:
    return at_starts(c, clean, starts)
  is_anchor = jnp.arange(length) % c.window_length == 0
  inputs = jnp.where(is_anchor, clean.inputs, c.mask_id)
  labels = masks.strided_windows(
    clean.doc, c.window_length, c.window_attention == 'causal'
  )
  return _canvas(c, clean, starts, inputs, labels)


def _canvas(c, clean, starts, inputs, labels):
  batch, length = clean.doc.shape
  positions = starts[:, :, None] + jnp.arange(c.window_length)  # [B, K, D]
  inside = jnp.minimum(positions, length - 1).reshape(batch, -1)
  at = lambda x: jnp.take_along_axis(x, inside, axis=1).reshape(positions.shape)
  doc = at(clean.doc)
  scored = at(clean.answer) & (positions < length) & (doc == doc[:, :, :1])
  weights = jnp.cumprod(scored.astype(jnp.float32), axis=2).reshape(batch, -1)
  masked = 1 - 1 / c.window_length
  return Canvas(
    inputs=jnp.concatenate([inputs, clean.inputs], axis=1),
    labels=labels,
    targets=at(clean.targets).reshape(batch, -1),
    weights=weights,
    num_tokens=weights.sum(axis=1),
    mask_ratio=jnp.full((batch, 1), masked, jnp.float32),
    window_length=c.window_length,
  )


def windows(c, inputs, doc, starts):
  """Returns the inputs of windows, [B, K D] int32, and their masks.Labels.

  Args:
    c: ObjectiveConfig or Network.
    inputs: [B, L] int32, the tokens shifted right.
    doc: [B, L] int32, -1 on padding.
    starts: [B, K] int32; a window at L or beyond is hidden.
  """
  length = inputs.shape[1]
  inside = jnp.minimum(starts, length - 1)
  at = lambda x: jnp.take_along_axis(x, inside, axis=1)
  rest = jnp.full((*starts.shape, c.window_length - 1), c.mask_id, jnp.int32)
  tokens = jnp.concatenate([at(inputs)[..., None], rest], axis=2)
  labels = masks.windows(
    jnp.where(starts < length, at(doc), -1),
    starts,
    c.window_length,
    c.window_attention == 'causal',
  )
  return tokens.reshape(len(starts), -1), labels


def show(c, tokens, valid, doc=0):
  """Returns the inputs of the clean copy, as autoregressive.show.

  Its outputs are those of a causal network. The predictions of SDLM come from
  windows; see `show_masked` and sampling/windows.py.
  """
  if c.bos_id < 0:
    valid = valid.at[:, 0].set(False)
    c = dataclasses.replace(c, bos_id=c.mask_id)
  return autoregressive.show(c, tokens, valid, doc)


def show_masked(c, tokens, masked, valid, doc=0):
  """Returns inputs with a window at every token that is not masked.

  A window has the masked positions after its first position, up to D in all. If
  fewer are left before the next window, the window is shorter. The last window
  extends beyond the row.

  Args:
    c: ObjectiveConfig or Network.
    tokens: [B, L] int32, clean.
    masked: [B, L] bool.
    valid: [B, L] bool, False on padding, which is at the ends of a row.
    doc: as for `show`.

  Returns:
    inputs [B, 2 L + D - 1] int32, and their masks.Labels.
  """
  inputs, causal = show(c, tokens, valid, doc)
  added = ((0, 0), (0, c.window_length - 1))
  more = lambda x, padding: jnp.pad(x, added, constant_values=padding)
  pos = jnp.arange(tokens.shape[1] + c.window_length - 1, dtype=jnp.int32)
  begins = more(causal.doc >= 0, False) & ~more(masked, True)
  starts = jax.lax.cummax(jnp.where(begins, pos, -1), axis=1)
  in_window = (starts >= 0) & (pos - starts < c.window_length)
  own_doc = jnp.take_along_axis(causal.doc, jnp.maximum(starts, 0), axis=1)
  labels = masks.Labels(
    doc=jnp.where(in_window, own_doc, -1),
    pos=jnp.broadcast_to(pos, starts.shape),
    block=masks.window_block(starts, c.window_attention == 'causal'),
    reach=starts,
  )
  window_inputs = jnp.where(begins, more(inputs, 0), c.mask_id)
  return (
    jnp.concatenate([window_inputs, inputs], axis=1),
    masks.concatenate(labels, causal),
  )


def copies(c, length):
  """Returns the positions of a training row, divided by L."""
  return 1 + targets(c, length) if c.window_length > 1 else 1


def targets(c, length):
  """Returns the positions of all windows of a training row, divided by L."""
  if c.window_length == 1:
    return 1
  return num_windows(c, length) * c.window_length / length


def visible_pairs(c, length):
  """Returns pairs of a query and a key that it sees, divided by L^2.

  Random windows are as far from the start of the row as windows at a stride are
  on average.
  """
  if c.window_length == 1:
    return 0.5
  size = c.window_length / length
  own = (size + 1 / length) / 2 if c.window_attention == 'causal' else size
  before = (1 - size) / 2
  clean = (1 + 1 / length) / 2
  return targets(c, length) * (own + before) + clean
