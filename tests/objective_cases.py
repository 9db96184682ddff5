"""A tiny objective and network, for the tests of objectives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from maskdiff.data.rows import Rows
from maskdiff.model import transformer
from maskdiff.objectives import canvas as canvas_lib
from maskdiff.objectives import table
from maskdiff.objectives.canvas import ObjectiveConfig
from maskdiff.objectives.schedule import Schedule

MASK, EOS = 3, 1
CONFIG = ObjectiveConfig(
  name='masked_diffusion',
  schedule=Schedule(),
  eps=1e-3,
  time_sampling='antithetic',
  random_length_fraction=0.0,
  attend_within='row',
  predict_mask=False,
  mask_id=MASK,
  bos_id=2,
  eos_id=EOS,
  loss_chunk_tokens=64,
)
# Small enough for enumeration: three tokens and the mask token, four positions.
TINY = tiny.model(vocab_size=4, embed=8, layers=1, head_dim=4, mlp=8)
L = 4


def strong_params(config):
  """Returns weights so large that the predictions are far from uniform."""
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32),
    transformer.shapes(config),
  )


def random_tokens(batch, length, seed=0, vocab=3):
  random = np.random.default_rng(seed)
  return jnp.asarray(random.integers(0, vocab, (batch, length)), jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss(c, config, params, canvas):
  """Returns the sum of weight * nll, and the nll per position."""
  return canvas_lib.canvas_loss(c, transformer.bind(config, params), canvas)


@functools.partial(jax.jit, static_argnums=0)
def log_probabilities(config, params, inputs, labels):
  network = transformer.bind(config, params)
  return jax.nn.log_softmax(network.logits(network(inputs, labels)))


def without_mask(log_p):
  """Removes the mask token, the last: [..., V] becomes [..., V - 1]."""
  p = np.exp(np.asarray(log_p, np.float64)[..., :MASK])
  return np.log(p / p.sum(axis=-1, keepdims=True))


@functools.partial(jax.jit, static_argnums=(0, 4))
def make_canvas(c, rows, numbers, key, batch):
  """Returns the Canvas of Rows, or of tokens without other columns."""
  rows = rows if isinstance(rows, Rows) else Rows(rows)
  return table.make_canvas(c, rows, numbers, key, batch)


@functools.cache
def canvas_of(c, batch=64, length=512, seed=0):
  """Returns random tokens and their canvas."""
  tokens = random_tokens(batch, length)
  rows = jnp.arange(batch)
  return tokens, make_canvas(c, tokens, rows, jax.random.key(seed), batch)


# A packed row: a document, an empty document, and the start of a third.
PACKED = np.array([0, 2, 2, EOS, EOS, 2, 0, 0, 2, 0])
DOC = np.array([0, 0, 0, 0, 1, 2, 2, 2, 2, 2])
CONFINED = dataclasses.replace(CONFIG, attend_within='document')


# The same tokens with stored documents, in no order, and padding between them.
STORED_DOC = np.array([2, 2, 2, -1, -1, 0, 0, 0, 1, -1])
STORED_ANSWER = np.array([0, 1, 1, 0, 1, 0, 1, 0, 1, 0], bool)


def packed(batch):
  """Returns [batch, 10] int32, copies of PACKED."""
  return jnp.tile(jnp.asarray(PACKED, jnp.int32), (batch, 1))


def stored(batch):
  """Returns Rows of `packed` with STORED_DOC and STORED_ANSWER."""
  tile = lambda x: jnp.tile(jnp.asarray(x), (batch, 1))
  doc = tile(STORED_DOC.astype(np.int32))
  return Rows(packed(batch), doc, tile(STORED_ANSWER))
