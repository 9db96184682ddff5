"""The networks and decoders that speculation.py compares.

To compare another network, add a line to METHODS.
"""

from typing import NamedTuple

BASE, ONE, SPECULATIVE = 'autoregressive', 'one per step', 'speculative'
THRESHOLDS = (0.1, 0.3, 0.5, 0.8, 0.9, 0.95, 0.98)


TIMED = 0.9  # the threshold of decoders whose speed is measured


def is_timed(decoder):
  """Returns whether the speed of a decoder of this name is measured."""
  *_, last = decoder.split()
  return last not in map(str, THRESHOLDS) or last == str(TIMED)


def by_threshold(rule, name=None, **settings):
  """Returns decoders with each of THRESHOLDS.

  Args:
    rule: remasking rule.
    name: begins the names of the decoders. Default: the rule.
    **settings: other settings of the sampler.

  Returns:
    Dict from a name to settings.
  """
  return {
    f'{name or rule} {x}': {'remasking': rule, 'threshold': x, **settings}
    for x in THRESHOLDS
  }


EXACT = {'cache': 'prefix'}
APPROXIMATE = {'cache': 'dual', 'block_length': 32}
GREEDY = {ONE: EXACT}
DRAFTS = {SPECULATIVE: {'remasking': 'speculative', **EXACT}}
PREFIX = {'remasking': 'longest_prefix', 'threshold': 1.0}
WINDOWS = {ONE: PREFIX | EXACT} | DRAFTS
for rule in ('longest_prefix', 'threshold'):  # a prefix, or any subset
  WINDOWS |= by_threshold(rule, **EXACT)
ENTROPY = by_threshold(
  'longest_prefix', 'entropy', confidence='entropy', **EXACT
)
# Above 1, `threshold` commits one token per step, with the same program.
ALONE = {'remasking': 'threshold', 'threshold': 2.0}
BLOCKS = {ONE: ALONE | EXACT} | by_threshold('threshold', **EXACT)
MASKED = {ONE: ALONE | APPROXIMATE} | by_threshold('threshold', **APPROXIMATE)


class Method(NamedTuple):
  """A trained network and its decoders.

  Attributes:
    name: of the network, in tables.
    decoders: dict from a name to settings of the sampler. The decoder ONE
      commits one token per step; a drafter verifies tokens of this decoder.
  """

  name: str
  decoders: dict


# By work directory, which is named as in configs/speculation.py.
METHODS = {
  BASE: Method('autoregressive', GREEDY),
  'continued': Method('autoregressive, trained further', GREEDY),
  'sdlm_4': Method('windows of 4', WINDOWS),
  'sdlm_8': Method('windows of 8', WINDOWS | ENTROPY),
  'sdlm_16': Method('windows of 16', WINDOWS),
  'sdlm_32': Method('windows of 32', WINDOWS),
  'medusa_8': Method('Medusa heads, 8 tokens', DRAFTS),
  'mtp_8': Method('multi-token heads, 8 tokens', DRAFTS),
  'block_8': Method('block drafter, 8 tokens', DRAFTS),
  'blocks_4': Method('blocks of 4', BLOCKS),
  'blocks_16': Method('blocks of 16', BLOCKS),
  'blocks_32': Method('blocks of 32', BLOCKS),
  'masked': Method('masked diffusion', MASKED),
}
