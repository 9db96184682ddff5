"""Objectives: clean tokens and a key become a Canvas, a Canvas becomes nats.

A Canvas says what the network is shown and what it is asked for. Targets stand
at the position that predicts them, so an objective that predicts the next
token shifts here and nowhere else. Noise is keyed by the number of the row in
the global batch: it is the same for any mesh, number of hosts and number of
microbatches.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from maskdiff import masks
from maskdiff.cross_entropy import cross_entropy
from maskdiff.schedule import Schedule, sample_times

# A row packs documents: positions see all of it, or only their own document.
ATTEND_WITHIN = ('row', 'document')


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  name: str
  schedule: Schedule
  eps: float  # times lie in [eps, 1)
  time_sampling: str  # one of schedule.TIME_SAMPLINGS
  random_length_fraction: float  # of the sequences, cut to a random length
  attend_within: str  # one of ATTEND_WITHIN
  predict_mask: bool  # whether the mask id takes part in the softmax
  mask_id: int
  bos_id: int
  eos_id: int  # the last token of every document, and nowhere else
  loss_chunk_tokens: int


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    'inputs',
    'labels',
    'targets',
    'weights',
    'num_tokens',
    'mask_ratio',
  ],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Canvas:
  """What the rows of a batch show the network and ask of it.

  The loss of a batch is sum(weights * nll) / sum(num_tokens).
  """

  inputs: jax.Array  # [B, L] int32
  labels: masks.Labels  # [B, L] each
  targets: jax.Array  # [B, L] int32
  weights: jax.Array  # [B, L] float32, 0 where nothing is asked
  num_tokens: jax.Array  # [B] float32, tokens of text that the row stands for
  mask_ratio: jax.Array  # [B] float32, expected share of masked tokens


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
  inputs, labels = show(c.name, shown, valid, c.bos_id, doc)
  return Canvas(
    inputs=inputs,
    labels=labels,
    targets=tokens,
    weights=jnp.where(masked, weight[:, None], 0.0),
    num_tokens=lengths.astype(jnp.float32),
    mask_ratio=mask_ratio,
  )


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
  inputs, labels = show(c.name, tokens, valid, c.bos_id, documents(c, tokens))
  return Canvas(
    inputs=inputs,
    labels=labels,
    targets=tokens,
    weights=jnp.ones(tokens.shape, jnp.float32),
    num_tokens=jnp.full((b,), length, jnp.float32),
    mask_ratio=jnp.zeros((b,), jnp.float32),
  )


def documents(c, tokens):
  """The documents to which attention is confined.

  Args:
    c: ObjectiveConfig.
    tokens: [B, L] int32, clean.

  Returns:
    [B, L] int32 from 0 on, or 0 if attention is not confined.
  """
  if c.attend_within == 'row':
    return 0
  return masks.documents(tokens, c.eos_id)


def show(objective, tokens, valid, bos_id, doc=0):
  """How a network trained with this objective is shown a row of tokens.

  In either case the prediction for a position stands at that position.

  Args:
    objective: one of OBJECTIVES; all but the autoregressive see both ways.
    tokens: [B, L] int32.
    valid: [B, L] bool, False on padding.
    bos_id: stands before the first token of an autoregressive row.
    doc: what `documents` returns; by default a row is a single document.

  Returns:
    inputs [B, L] int32, and their masks.Labels.
  """
  if objective != 'autoregressive':
    return tokens, masks.bidirectional(valid, doc)
  inputs = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=bos_id)
  return inputs, masks.causal(valid, doc)


MAKE_CANVAS = {
  'masked_diffusion': masked_diffusion,
  'autoregressive': autoregressive,
}
OBJECTIVES = tuple(MAKE_CANVAS)


def make_canvas(c, tokens, rows, key, batch):
  """The Canvas of the configured objective; see `masked_diffusion`."""
  return MAKE_CANVAS[c.name](c, tokens, rows, key, batch)


def canvas_loss(c, model, canvas):
  """Sum over the canvas of weight x nll, in nats, and the nll by position.

  Args:
    c: ObjectiveConfig.
    model: model.Transformer.
    canvas: Canvas.

  Returns:
    float32 scalar, to be divided by the batch's number of tokens, and the
    [B, L] float32 nll, 0 where the weight is 0 and without gradient.
  """
  hidden = model(canvas.inputs, canvas.labels)
  return cross_entropy(
    hidden,
    model.vocabulary(),
    canvas.targets,
    canvas.weights,
    None if c.predict_mask else c.mask_id,
    c.loss_chunk_tokens,
  )
