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

from maskdiff.model import masks
from maskdiff.model.cross_entropy import cross_entropy
from maskdiff.objectives.schedule import Schedule

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
  with jax.named_scope('part(loss)'):
    return cross_entropy(
      hidden,
      model.vocabulary(),
      canvas.targets,
      canvas.weights,
      None if c.predict_mask else c.mask_id,
      c.loss_chunk_tokens,
    )
