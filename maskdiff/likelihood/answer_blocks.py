"""Blocks of an answer, which a network fills from left to right.

To a left-to-right network every token is a block, and to a network that
predicts tokens in any order the whole row is one.
"""

import numpy as np

from maskdiff.objectives.table import OBJECTIVES


def sizes(network, answer):
  """Returns the number of answer tokens in each block that has any.

  Args:
    network: Network.
    answer: [L] bool, of a row without padding. Its blocks are counted from its
      first token.
  """
  block = _block_of(network, len(answer))
  return np.unique(block[answer], return_counts=True)[1]


def has_unseen_text(network, answer):
  """Returns whether given text is after an answer token that does not see it.

  Args:
    network: Network.
    answer: [L] bool, as for `sizes`.
  """
  block = _block_of(network, len(answer))
  return not answer.all() and block[~answer].max() > block[answer].min()


def _block_of(network, length):
  """Returns the number of the block of each position, [L] int."""
  size = {'any': length, 'left_to_right': 1, 'blocks': network.block_length}
  return np.arange(length) // size[OBJECTIVES[network.objective].order]
