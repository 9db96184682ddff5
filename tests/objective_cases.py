"""A tiny objective and network, for the tests of objectives."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from maskdiff.data.rows import Rows
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.model import masks, transformer
from maskdiff.objectives import canvas as canvas_lib
from maskdiff.objectives import masked_diffusion, table
from maskdiff.objectives.canvas import ObjectiveConfig
from maskdiff.objectives.schedule import Schedule
from maskdiff.objectives.time_density import TimeDensity, Weight

MASK, EOS = 3, 1
CONFIG = ObjectiveConfig(
  name='masked_diffusion',
  schedule=Schedule(),
  eps=1e-3,
  time_sampling='antithetic',
  time_density=TimeDensity(),
  weight=Weight(),
  uniform_after=1.0,
  random_length_fraction=0.0,
  block_length=2,
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
def make_canvas(c, rows, numbers, key, batch, progress=0.0):
  """Returns the Canvas of Rows, or of tokens without other columns."""
  rows = rows if isinstance(rows, Rows) else Rows(rows)
  return table.make_canvas(c, rows, numbers, key, batch, progress)


@functools.cache
def canvas_of(c, batch=64, length=512, seed=0):
  """Returns random tokens and their canvas."""
  tokens = random_tokens(batch, length)
  rows = jnp.arange(batch)
  return tokens, make_canvas(c, tokens, rows, jax.random.key(seed), batch)


def check_rows_do_not_depend_on_devices_or_parts(draw, copies=1):
  """Checks canvases of rows on 8 devices, and of some rows of the batch.

  Args:
    draw: (rows, numbers) -> Canvas, for a batch of 64 rows.
    copies: rows of the Canvas per row; those of a row are neighbours.
  """
  tokens, numbers = random_tokens(64, 16), jnp.arange(64)
  whole = draw(tokens, numbers)
  mesh = mesh_lib.make_mesh(fsdp=8)
  with jax.set_mesh(mesh):
    rows = jax.device_put(Rows(tokens), mesh_lib.batch_sharding(mesh))
    sharded = draw(rows, numbers)
  assert len(sharded.weights.sharding.device_set) == 8
  some = np.array([32, 33, 6, 7])
  part = draw(tokens[some], numbers[some])
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  of_some = (copies * some[:, None] + np.arange(copies)).ravel()
  for field in ('inputs', 'weights', 'mask_ratio', 'num_tokens'):
    expected = np.asarray(getattr(whole, field))
    close(getattr(sharded, field), expected)
    close(getattr(part, field), expected[of_some])


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


# Enumeration of all masks of a row

TOKENS = np.array([2, 0, 1, 1])
ALL_MASKS = np.array(list(itertools.product([False, True], repeat=L)))


def nll_by_mask(params):
  """Returns [16], the summed nll of the masked tokens for each mask."""
  inputs = jnp.asarray(np.where(ALL_MASKS, MASK, TOKENS))
  labels = masks.bidirectional(jnp.ones(ALL_MASKS.shape, bool))
  log_p = without_mask(log_probabilities(TINY, params, inputs, labels))
  return -np.where(ALL_MASKS, log_p[:, np.arange(L), TOKENS], 0).sum(axis=1)


def enumerated_bound(params):
  """Returns the negative ELBO of TOKENS in nats, by enumeration.

  It is the sum over l of 1/l times the mean over all masks of l tokens. It does
  not depend on the schedule: term l is the integral of t^(l-1) (1-t)^(L-l) over
  t, times the sum over the masks.
  """
  nll, count = nll_by_mask(params), ALL_MASKS.sum(axis=1)
  return sum(nll[count == l].mean() / l for l in range(1, L + 1))


def nll_of(params):
  """Returns the function `nll` of `expected_loss` for the tiny network."""

  def nll(canvas):
    return np.asarray(loss(CONFIG, TINY, params, canvas)[1], np.float64)

  return nll


def expected_loss(c, nll, answer=None, points=None):
  """Returns the expectation of the loss over u and the mask, for TOKENS.

  A quadrature over u. For each u all masks are enumerated with
  their probabilities; `corrupt` gets draws that lead to each mask.

  Args:
    c: ObjectiveConfig.
    nll: function from a Canvas to the nll of its positions, [B, L].
    answer: [L] bool, tokens that may be masked; default: all.
    points: number of points of the midpoint rule, for weights that are not
      smooth in u; default: 24 points of Gauss-Legendre quadrature.
  """
  if points is None:
    at, point_weights = np.polynomial.legendre.leggauss(24)
    at, point_weights = (at + 1) / 2, point_weights / 2
  else:
    at, point_weights = (np.arange(points) + 0.5) / points, 1 / points
    point_weights = np.full(points, point_weights)
  u = np.repeat(at, len(ALL_MASKS)).astype(np.float32)
  if answer is None:
    answer = np.ones(L, bool)
  mask = np.tile(ALL_MASKS, (len(at), 1))
  tokens = jnp.asarray(np.tile(TOKENS, (len(u), 1)), jnp.int32)
  draws = np.where(mask, 0.0, 1.0).astype(np.float32)
  rows = Rows(tokens, answer=np.tile(answer, (len(u), 1)))
  canvas = masked_diffusion.corrupt(c, rows, u, draws, np.full(len(u), L))
  np.testing.assert_array_equal(canvas.inputs == MASK, mask & answer)
  assert (canvas.num_tokens == answer.sum()).all()
  of_row = np.sum(np.asarray(canvas.weights) * nll(canvas), axis=1)
  p = np.asarray(canvas.mask_ratio, np.float64)
  probability = np.where(mask, p, 1 - p).prod(axis=1)
  mean_by_point = (probability * of_row).reshape(len(at), -1).sum(axis=1)
  return mean_by_point @ point_weights
