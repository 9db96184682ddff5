"""Tiny networks with a drafter of each kind."""

import functools

import jax
import numpy as np
import tiny

from maskdiff.model import transformer
from maskdiff.model.drafter import DrafterConfig
from maskdiff.model.network import Network

KINDS = ('medusa', 'mtp', 'block')
PLAIN = tiny.model(layers=3, vocab_size=13, tie_embeddings=True)


def model(kind, length=4, frozen=True, **changes):
  """Returns the TransformerConfig of a drafter of two layers."""
  drafter = DrafterConfig(kind, 2, length, frozen)
  return tiny.model(
    layers=3, vocab_size=13, tie_embeddings=True, drafter=drafter, **changes
  )


@functools.cache
def params(kind, length=4):
  """Returns parameters whose drafts differ; the network's are always equal."""
  key = jax.random.key(0)
  of_network = transformer.init(PLAIN, key)
  drafter = transformer.init(model(kind, length), key)['drafter']
  random = np.random.default_rng(1)
  # No weight is 0, so that every one matters.
  shake = lambda x: x + 0.3 * random.normal(size=x.shape).astype(np.float32)
  return {**of_network, 'drafter': jax.tree.map(shake, drafter)}


def network(kind, length=4):
  """Returns the Network with a drafter."""
  return Network(
    config=model(kind, length),
    params=params(kind, length),
    objective='drafting',
    predict_mask=False,
    mask_id=4,
    bos_id=1,
    eos_id=2,
    draft_length=length,
  )


def without_drafter():
  """Returns the autoregressive Network that all drafters are for."""
  return Network(
    config=PLAIN,
    params={k: v for k, v in params('mtp').items() if k != 'drafter'},
    objective='autoregressive',
    predict_mask=False,
    mask_id=4,
    bos_id=1,
    eos_id=2,
  )
