"""The Canvas of a batch (inputs, labels, targets, loss weights) and its loss.

Every objective makes a Canvas from clean tokens and a key, and `canvas_loss`
computes its loss in nats. The hidden state of a position predicts the target of
that position, so the autoregressive objective shifts the inputs, not the
targets. Noise is keyed by the number of the row in the global batch, so it does
not depend on the mesh, the number of hosts or the number of microbatches.
"""

import dataclasses
import functools

import jax

from maskdiff.model import masks
from maskdiff.model.cross_entropy import cross_entropy
from maskdiff.objectives.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  name: str  # a key of table.OBJECTIVES
  schedule: Schedule
  eps: float  # times are in [eps, 1)
  time_sampling: str  # one of schedule.TIME_SAMPLINGS
  random_length_fraction: float  # share of rows cut to a random length
  attend_within: str  # row or document
  predict_mask: bool  # whether the softmax includes the mask token
  mask_id: int
  bos_id: int
  eos_id: int  # the last token of every document, and of nothing else
  loss_chunk_tokens: int  # `chunk` of cross_entropy


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
  """The inputs and targets of the rows of a batch.

  The loss of a batch is sum(weights * nll) / sum(num_tokens).
  """

  inputs: jax.Array  # [B, L] int32
  labels: masks.Labels  # [B, L] each
  targets: jax.Array  # [B, L] int32
  weights: jax.Array  # [B, L] float32, 0 at positions without a loss
  num_tokens: jax.Array  # [B] float32, tokens of text in the row
  mask_ratio: jax.Array  # [B] float32, expected share of masked tokens


def document_labels(c, tokens):
  """Returns the document numbers that limit attention, for masks.make_labels.

  Args:
    c: ObjectiveConfig.
    tokens: [B, L] int32, clean.

  Returns:
    [B, L] int32, counted from 0; or the int 0 if positions attend to the whole
    row.
  """
  if c.attend_within == 'row':
    return 0
  return masks.documents(tokens, c.eos_id)


def canvas_loss(c, model, canvas):
  """Returns the summed loss of a canvas and the nll of each position.

  Args:
    c: ObjectiveConfig.
    model: transformer.Transformer.
    canvas: Canvas.

  Returns:
    - float32 scalar, the sum of weight * nll in nats. Divide it by the number
      of tokens of the batch.
    - [B, L] float32 nll in nats, 0 where the weight is 0; without a gradient.
  """
  hidden = model(canvas.inputs, canvas.labels)
  with jax.named_scope('part(loss)'):
    return cross_entropy(
      hidden,
      model.vocabulary(),
      canvas.targets,
      canvas.weights,
      None if c.predict_mask else c.mask_id,
      c.loss_chunk_tokens,
    )
