"""A trained network: config, parameters and token ids in one pytree."""

import dataclasses
import functools
from typing import Any

import jax

from maskdiff.model.transformer import TransformerConfig


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['params'],
  meta_fields=[
    'config',
    'objective',
    'predict_mask',
    'mask_id',
    'bos_id',
    'eos_id',
    'context',
    'block_length',
    'clean_attention',
    'length_ids',
    'window_length',
    'window_attention',
    'draft_length',
  ],
)
@dataclasses.dataclass(frozen=True)
class Network:
  """The parameters of a network, and the settings that its training has fixed.

  A Network is a pytree whose leaves are the parameters. The other fields are
  static: functions are compiled once for all Networks that differ only in the
  parameters.

  Attributes:
    config: TransformerConfig.
    params: parameter tree.
    objective: name of the training objective, a key of table.OBJECTIVES.
    predict_mask: whether the network may predict the mask token.
    mask_id: id of the mask token.
    bos_id: id of the token before the first token of a left-to-right row.
    eos_id: id of the end-of-text token; -1 if the tokenizer has none.
    context: tokens of a training row; 0 if unknown.
    block_length: tokens of a block, for block diffusion; else 0.
    clean_attention: 'block' or 'causal', attention of the blocks before.
    length_ids: ids of the tokens that name lengths of answers. They are never
      predicted in an answer.
    window_length: tokens that a pass predicts at once, for sdlm; else 0.
    window_attention: 'bidirectional' or 'causal', attention within a window.
    draft_length: tokens that a pass verifies, with a drafter; else 0.
  """

  config: TransformerConfig
  params: Any
  objective: str
  predict_mask: bool
  mask_id: int
  bos_id: int
  eos_id: int = -1
  context: int = 0
  block_length: int = 0
  clean_attention: str = 'block'
  length_ids: tuple[int, ...] = ()
  window_length: int = 0
  window_attention: str = 'bidirectional'
  draft_length: int = 0

  @property
  def ahead(self):
    """Slots that a step of the sampler may fill from left to right; or 0."""
    return self.window_length or self.draft_length
