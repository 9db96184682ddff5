"""Masked diffusion: mask a random share of a row, predict the masked tokens."""

import dataclasses

import jax
import jax.numpy as jnp

from maskdiff.model import annealing, masks
from maskdiff.objectives.canvas import (
  Canvas,
  answer_positions,
  document_labels,
  text_positions,
)
from maskdiff.objectives.schedule import draw_by_number, sample_times
from maskdiff.objectives.time_density import TimeDensity, Weight


def make_canvas(c, rows, numbers, key, batch, progress=0.0):
  """Masks a random share of each row; the targets are the masked tokens.

  Each row draws a time t in [eps, 1). Each of its tokens is masked
  independently with probability p = 1 - alpha(t), and a masked token has the
  weight -alpha'(t) / p. With the linear schedule this is LLaDA's pretraining
  loss (arXiv 2502.09992, alg. 1 and GUIDELINES.md): p = (1 - eps) u + eps,
  weight 1/p, divided by B x L. `c.time_density` and `c.weight` may draw other
  times and weigh them differently, in the first `c.uniform_after` of the
  training; the loss is then not the bound, except with importance weights.

  Rows with `answer` mask and count only answers. The loss is then a bound on
  the negative log-likelihood of the answers given the prompts. It is divided by
  the number of answer tokens of the batch, as in SMDM (arXiv 2410.18514), or
  has another denominator; see canvas.divisor.

  With `c.complementary_masks` every row is in the Canvas twice. The second copy
  masks the tokens that the first does not, with the weights of its own mask
  ratio alpha(t). Both losses estimate the same expectation, and every token is
  masked in one of the copies (Fast-dLLM v2 and LLaDA 2.0 do this in
  fine-tuning).

  A share of the rows is cut to a random length. This equals truncation: the
  rest of the row is padding, which is never attended to, masked or counted. A
  row that is cut before its answers has no loss.

  If attention stays within documents, the labels reveal where a document ends
  even if its eos is masked. The loss is then a bound given the lengths of the
  documents, and predicting a masked eos is easier.

  With `c.anneal_steps` attention is between causal and bidirectional attention
  (model/annealing.py), by the same draw for all rows of the step.

  Args:
    c: ObjectiveConfig.
    rows: data.rows.Rows of [b, L], clean.
    numbers: [b] int32, numbers of the rows in the global batch.
    key: PRNG key of this step.
    batch: rows of the global batch.
    progress: share of the training that is done, float32 scalar in [0, 1].

  Returns:
    Canvas of b rows; of 2 b with complementary masks, in pairs.
  """
  length = rows.tokens.shape[1]
  u, noise, lengths = draw(c, length, numbers, key, batch)
  canvas = corrupt(c, rows, u, noise, lengths, progress)
  if not c.anneal_steps:
    return canvas
  # `draw` uses four keys of its own.
  of_queries = annealing.draw(
    jax.random.fold_in(key, 4), length, c.share_open(progress)
  )
  labels = masks.annealed(canvas.labels, of_queries)
  return dataclasses.replace(canvas, labels=labels)


def draw(c, length, numbers, key, batch, parts=1):
  """Draws the random numbers of `corrupt`.

  Args:
    c: ObjectiveConfig.
    length: L.
    numbers: see `make_canvas`.
    key: see `make_canvas`.
    batch: see `make_canvas`.
    parts: K, the number of times per row, stratified over B x K.

  Returns:
    u [b, K] float32, noise [b, L] float32 and lengths [b] int32.
  """
  keys = jax.random.split(key, 4)
  by_row = lambda draw, key: draw_by_number(draw, key, numbers)
  units = numbers[:, None] * parts + jnp.arange(parts, dtype=numbers.dtype)
  u = sample_times(
    c.time_sampling, keys[0], units.reshape(-1), batch * parts
  ).reshape(units.shape)
  noise = by_row(lambda k: jax.random.uniform(k, (length,)), keys[1])
  cut = by_row(jax.random.uniform, keys[2]) < c.random_length_fraction
  random_length = by_row(
    lambda k: jax.random.randint(k, (), 1, length + 1), keys[3]
  )
  return u, noise, jnp.where(cut, random_length, length)


def corrupt(c, rows, u, noise, lengths, progress=0.0):
  """Returns the Canvas of masked diffusion for given random draws.

  Args:
    c: ObjectiveConfig.
    rows: data.rows.Rows of [B, L].
    u: [B] float32 in [0, 1), or [B, K] for K blocks; the time is
      (1 - eps) d + eps, where d is the quantile u of the density of times.
    noise: [B, L] float32 in [0, 1); a token is masked where noise < p.
    lengths: [B] int32, tokens of each row before the cut.
    progress: see `make_canvas`.
  """
  u = u.reshape(len(u), -1)
  ratio, weight = by_position(
    c, lambda schedule: ratios_and_weights(c, schedule, u, progress)
  )
  masked = noise < by_token(c, ratio, noise.shape[1])
  if c.complementary_masks:
    # The two copies of a row are neighbours, so that they stay on its device.
    pair = lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:])
    ratio, weight = pair(ratio, 1 - ratio), pair(*weight)
    masked = pair(masked, ~masked)
    rows, lengths = jax.tree.map(lambda x: pair(x, x), (rows, lengths))
  return canvas_of(c, rows, ratio, weight, masked, lengths)


def with_masks(c, rows, t, masked, lengths):
  """Returns the Canvas of masked diffusion for given times and masks.

  The weights are those of the start of the training; see ObjectiveConfig. Rows
  have no complementary copy: the masks are the caller's.

  Args:
    c: ObjectiveConfig.
    rows: data.rows.Rows of [B, L], clean.
    t: [B] float32 in (0, 1], or [B, K] for K blocks: the times,
      which determine the weights.
    masked: [B, L] bool; prompts and padding are never masked.
    lengths: [B] int32, tokens of each row before the cut.
  """
  early = c.uniform_after > 0
  weight = c.weight if early else Weight()
  density = c.time_density if early else TimeDensity()
  t = t.reshape(len(t), -1)
  d = (t - c.eps) / (1 - c.eps)
  ratio, weights = by_position(
    c,
    lambda schedule: (
      schedule.mask_ratio(t),
      weight.at(schedule, density, c.eps, d),
    ),
  )
  return canvas_of(c, rows, ratio, weights, masked, lengths)


def by_position(c, function):
  """Calls a function with the Schedule of each position of a block.

  Args:
    c: ObjectiveConfig.
    function: Schedule -> tree of [B, K].

  Returns:
    The tree of the function; of [B, K, n] if the n positions of a block differ.
  """
  first, *others = map(function, c.position_schedules)
  if not others:
    return first
  return jax.tree.map(lambda *x: jnp.stack(x, axis=-1), first, *others)


def by_token(c, x, length):
  """Returns the values of K parts for each token: [B, L] or [B, 1].

  Args:
    c: ObjectiveConfig.
    x: [B, K], or [B, K, n] as from `by_position`.
    length: L.
  """
  if x.ndim == 3:
    return x.reshape(len(x), -1)[:, :length]
  if x.shape[1] == 1:
    return x
  return jnp.repeat(x, c.block_length, axis=1)[:, :length]


def canvas_of(c, rows, ratio, weight, masked, lengths):
  """Returns the Canvas for mask ratios, weights and masks.

  Args:
    c: ObjectiveConfig.
    rows: data.rows.Rows of [B, L], clean.
    ratio: [B, K], or [B, K, n] as from `by_position`.
    weight: of the same shape.
    masked: [B, L] bool.
    lengths: [B] int32, tokens of each row before the cut.
  """
  weight = by_token(c, weight, rows.tokens.shape[1])
  valid = jnp.arange(rows.tokens.shape[1]) < lengths[:, None]
  if rows.doc is not None:
    valid = valid & text_positions(rows)
  answer = answer_positions(rows, valid)
  masked = answer & masked
  noisy = jnp.where(masked, c.mask_id, rows.tokens)
  # Without columns, the lengths need no sum over a sharded axis.
  num_tokens = answer.sum(axis=1) if rows.columns else lengths
  # Labels come from the clean tokens, so that a masked eos still ends its
  # document. Otherwise neighbouring documents would attend to each other.
  doc = document_labels(c, rows)
  inputs, labels = show(c, noisy, valid, doc)
  next_weights = None
  if c.autoregressive_weight:
    follows = answer & masks.continues_document(labels)
    next_weights = jnp.where(follows, c.autoregressive_weight, 0.0)
  return Canvas(
    inputs=inputs,
    labels=labels,
    targets=rows.tokens,
    weights=jnp.where(masked, weight, 0.0),
    num_tokens=num_tokens.astype(jnp.float32),
    mask_ratio=ratio if ratio.ndim == 2 else ratio.mean(axis=2),
    next_weights=next_weights,
  )


def ratios_and_weights(c, schedule, u, progress):
  """Returns mask ratios and weights of masked tokens, each of the shape of u.

  With complementary masks, it returns the weights of both masks as a tuple.
  Arguments as for `corrupt`; `schedule` is that of a position. After
  `uniform_after`, all positions have the schedule of the config.
  """

  def at(schedule, density, weight):
    d = density.quantile(u)
    weights_of = weight.of_pair if c.complementary_masks else weight.at
    weights = weights_of(schedule, density, c.eps, d)
    return schedule.mask_ratio((1 - c.eps) * d + c.eps), weights

  early = at(schedule, c.time_density, c.weight)
  if c.uniform_after >= 1:
    return early
  late = at(c.schedule, TimeDensity(), Weight())
  return jax.tree.map(
    lambda a, b: jnp.where(progress < c.uniform_after, a, b), early, late
  )


def show(c, tokens, valid, doc=0):
  """Returns the inputs of a bidirectional network: the tokens, unshifted.

  Args:
    c: not used.
    tokens: [B, L] int32.
    valid: [B, L] bool, False on padding.
    doc: from `document_labels`; by default each row is one document.

  Returns:
    inputs [B, L] int32, and their masks.Labels.
  """
  del c
  return tokens, masks.bidirectional(valid, doc)
