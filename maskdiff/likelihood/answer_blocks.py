"""Blocks of an answer, for networks that fill rows block by block."""

import numpy as np

from maskdiff.objectives.table import OBJECTIVES


def sizes(network, answer):
  """Returns the number of answer tokens in each block that has any.

  Networks without blocks see the row as one block.

  Args:
    network: Network.
    answer: [L] bool, of a row without padding. Its blocks are counted from its
      first token.
  """
  positions = np.flatnonzero(answer)
  length = network.block_length or len(answer)
  return np.unique(positions // length, return_counts=True)[1]


def has_unseen_text(network, answer):
  """Returns whether given text is after an answer token that does not see it.

  Args:
    network: Network.
    answer: [L] bool, as for `sizes`.
  """
  order = OBJECTIVES[network.objective].order
  if order == 'any' or answer.all():
    return False
  block = np.arange(len(answer)) // (network.block_length or 1)
  return block[~answer].max() > block[answer].min()
