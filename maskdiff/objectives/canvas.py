"""The Canvas of a batch (inputs, labels, targets, loss weights) and its loss.

Every objective makes a Canvas from clean Rows and a key, and `canvas_loss`
computes its loss in nats. The hidden state of a position predicts the target of
that position, so the autoregressive objective shifts the inputs, not the
targets. Noise is keyed by the number of the row in the global batch, so it does
not depend on the mesh, the number of hosts or the number of microbatches.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from maskdiff.data.rows import PADDING
from maskdiff.model import masks
from maskdiff.model.cross_entropy import cross_entropy
from maskdiff.objectives.schedule import Schedule
from maskdiff.objectives.time_density import TimeDensity, Weight


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  name: str  # a key of table.OBJECTIVES
  schedule: Schedule
  eps: float  # times are in [eps, 1)
  time_sampling: str  # one of schedule.TIME_SAMPLINGS
  time_density: TimeDensity
  weight: Weight
  uniform_after: float  # share of the training with time_density and weight
  random_length_fraction: float  # share of rows cut to a random length
  block_length: int  # tokens of a block, under block_diffusion
  attend_within: str  # row or document
  predict_mask: bool  # whether the softmax includes the mask token
  mask_id: int
  bos_id: int
  eos_id: int  # the last token of every document, and of nothing else
  loss_chunk_tokens: int  # `chunk` of cross_entropy
  complementary_masks: bool = False  # whether a row is also masked elsewhere
  clean_attention: str = 'block'  # or 'causal', of the clean copy
  autoregressive_weight: float = 0.0  # of the loss of the clean copy
  position_power: float = 1.0  # above 1, blocks mask later tokens more often
  denominator: str = 'token'  # or row, batch; see `divisor`
  confidence_weight: float = 0.0  # of the entropy of correct predictions
  anneal_steps: int = 0  # see `share_open`; 0 after these steps
  train_steps: int = 1  # of the training, if anneal_steps > 0
  window_length: int = 1  # tokens of a window, under sdlm
  window_attention: str = 'bidirectional'  # or 'causal', within a window
  anchors: str = 'stride'  # or 'random', positions of the windows
  window_repeats: float = 3.0  # random windows per target of an answer
  draft_decay: float = 0.8  # weight of a draft by that of the one before

  @property
  def position_schedules(self):
    """The Schedule of each position of a block; a single one for all if equal.

    The mask ratio of the first position is raised to `position_power`, that of
    the last to 1 / position_power, and those between to a geometric sequence of
    exponents.
    """
    n = self.block_length
    if self.position_power == 1 or n == 1:
      return (self.schedule,)
    return tuple(
      dataclasses.replace(
        self.schedule, exponent=self.position_power ** (1 - 2 * i / (n - 1))
      )
      for i in range(n)
    )

  def share_open(self, progress):
    """Returns the share of pairs of a query and a later key that are open.

    Args:
      progress: share of the training that is done, float32 scalar in [0, 1].
    """
    step = jnp.round(progress * self.train_steps)
    return jnp.minimum((step + 1) / self.anneal_steps, 1)

  def is_bound(self, progress):
    """Returns whether the expected loss is the bound.

    The term of `confidence_weight` is left out, as it is in the metrics.

    Args:
      progress: share of the training that is done, in [0, 1].
    """
    if self.autoregressive_weight or self.anneal_steps:
      return False
    if self.position_power != 1 and progress < self.uniform_after:
      return False  # a bound, but averaged over other orders of the tokens
    importance = self.weight.name == 'importance'
    uniform = self.weight.name == 'bound' and self.time_density.is_uniform
    return importance or uniform or progress >= self.uniform_after


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    'inputs',
    'labels',
    'targets',
    'weights',
    'num_tokens',
    'mask_ratio',
    'next_weights',
    'starts',
  ],
  meta_fields=['window_length'],
)
@dataclasses.dataclass(frozen=True)
class Canvas:
  """The inputs and targets of the rows of a batch.

  The loss of a batch is sum(weights * nll) / sum(num_tokens), or has another
  denominator, see `divisor`. Inputs may have more positions than targets,
  M >= L: the first L predict the targets, and the others are only attended to.
  A row has K mask ratios, one for each part of L/K tokens.

  With `next_weights`, the last L inputs are a clean, causal copy of the row. It
  predicts the same targets from the tokens before them, and the loss has these
  weights for it.

  With `window_length` above 1, `weights` are those of windows of this many
  tokens, one after another, and the metrics show the loss by position in a
  window.

  With `starts`, a drafter predicts windows of the targets (drafting.py):
  `weights` belong to its drafts, [B, W n], and `next_weights` to the targets.
  """

  inputs: jax.Array  # [B, M] int32
  labels: masks.Labels  # [B, M] each
  targets: jax.Array  # [B, L] int32
  weights: jax.Array  # [B, L] float32, 0 at positions without a loss
  num_tokens: jax.Array  # [B] float32, tokens that may carry a loss
  mask_ratio: jax.Array  # [B, K] float32, expected share of masked tokens
  next_weights: jax.Array | None = None  # [B, L] float32
  starts: jax.Array | None = None  # [B, W] int32, the first draft of a window
  window_length: int = 1  # tokens predicted at once

  @property
  def all_weights(self):
    """The weights, and then `next_weights`: [B, L] or [B, 2 L] float32."""
    if self.next_weights is None:
      return self.weights
    return jnp.concatenate([self.weights, self.next_weights], axis=1)


def document_labels(c, rows):
  """Returns the document numbers that limit attention, for masks.make_labels.

  Args:
    c: ObjectiveConfig.
    rows: data.rows.Rows of [B, L], clean.

  Returns:
    [B, L] int32 >= 0, except on padding; or the int 0 if positions attend to
    the whole row and padding is only at its ends.
  """
  if c.attend_within == 'document':
    if rows.doc is None:
      return masks.documents(rows.tokens, c.eos_id)
    return rows.doc
  # An array, because stored rows may have padding anywhere.
  return 0 if rows.doc is None else jnp.zeros_like(rows.doc)


def text_positions(rows):
  """Returns [B, L] bool, False on padding, of data.rows.Rows of [B, L]."""
  if rows.doc is None:
    return jnp.ones(rows.tokens.shape, bool)
  return rows.doc != PADDING


def answer_positions(rows, valid):
  """Returns the positions that may carry a loss, [B, L] bool.

  Args:
    rows: data.rows.Rows of [B, L].
    valid: [B, L] bool, False on padding.
  """
  return valid if rows.answer is None else valid & rows.answer


def divisor(c, canvas):
  """Returns the number that divides the summed loss of each row, [B] float32.

  The loss of a batch is the sum of `canvas_loss` over the sum of these numbers.
  Both are sums over rows, so microbatches and devices change no denominator.
  'token' and 'batch' are those of dLLM (github.com/ZHZisZZ/dllm,
  core/trainers/mdlm.py), and 'row' is its `sequence` and the rule of LLaDA's
  fine-tuning (arXiv 2502.09992, alg. 2). Published code counts rows without an
  answer too; here they do not change the loss.

  Args:
    c: ObjectiveConfig.
    canvas: Canvas.
  """
  if c.denominator == 'token':
    return canvas.num_tokens
  return (canvas.num_tokens > 0).astype(jnp.float32)


def canvas_loss(c, model, canvas):
  """Returns the summed loss of a canvas and the nll of each position.

  Args:
    c: ObjectiveConfig.
    model: transformer.Transformer.
    canvas: Canvas.

  Returns:
    - float32 scalar, the sum of weight * nll in nats. With `confidence_weight`,
      the entropy of a correct prediction, times this weight, is added to its
      nll (dFactory, LLaDA 2.0). Divide the sum by the sum of `divisor`. With
      the denominator 'row', the weights are divided by the number of tokens of
      their row.
    - [B, L] float32 nll in nats, 0 where the weight is 0; without a gradient.
      [B, 2 L] with `next_weights`: the second half is that of the clean copy.
  """
  hidden = model(canvas.inputs, canvas.labels)
  length = canvas.targets.shape[1]
  targets, weights = canvas.targets, canvas.all_weights
  if canvas.next_weights is None:
    hidden = hidden[:, :length]
  else:
    if not model.config.predict_next:
      # The clean copy predicts the next token, the noisy copy its own.
      right = jnp.pad(hidden[:, length:-1], ((0, 0), (1, 0), (0, 0)))
      hidden = jnp.concatenate([hidden[:, :length], right], axis=1)
    targets = jnp.concatenate([targets, targets], axis=1)
  if c.denominator == 'row':
    weights = weights / jnp.maximum(canvas.num_tokens, 1)[:, None]
  with jax.named_scope('part(loss)'):
    return cross_entropy(
      hidden,
      model.vocabulary(),
      targets,
      weights,
      None if c.predict_mask else c.mask_id,
      c.loss_chunk_tokens,
      c.confidence_weight,
    )
