"""The golden files of policy optimization: networks, cases and gradients."""

import dataclasses
import functools
import re

import golden_models
import golden_sdlm
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import GOLDEN

from maskdiff.likelihood import row_bounds
from maskdiff.likelihood.device_queries import RowQueries
from maskdiff.likelihood.queries import Answers
from maskdiff.model.network import Network
from maskdiff.rl import policy_loss
from maskdiff.rl.batch import Batch
from maskdiff.rl.units import Units

NAMES = 'model_a', 'model_b'
IDS = {'model_a': (510, 508), 'model_b': (297, 295)}  # mask, eos
CHUNK = 64
# Rows are padded to these shapes, so that few programs are compiled.
ROWS, LENGTH = 24, 20


@functools.cache
def arrays(file):
  """Returns the arrays of a golden file."""
  with np.load(GOLDEN / f'{file}.npz') as found:
    return dict(found)


def case(file, prefix):
  """Returns the arrays whose names begin with `prefix.`, without it."""
  start = prefix + '.'
  return {
    key.removeprefix(start): value
    for key, value in arrays(file).items()
    if key.startswith(start)
  }


def cases(file, prefix):
  """Returns the numbers of cases such as 'loss0' that a file has."""
  parts = {part for key in arrays(file) for part in key.split('.')}
  return sorted(x for x in parts if re.fullmatch(rf'{prefix}\d+', x))


@functools.cache
def network(name, predict_next=False):
  """Returns a golden network as a Network of masked diffusion."""
  config, params = golden_models.load(name)
  return Network(
    config=dataclasses.replace(config, predict_next=predict_next),
    params=params,
    objective='masked_diffusion',
    predict_mask=True,
    mask_id=IDS[name][0],
    bos_id=-1,
  )


def batch_of(ids, prompt_len, counted=None, valid=None, steps=None):
  """Returns a Batch; counted and steps are [B, answer slots]."""
  answer = np.broadcast_to(np.arange(ids.shape[1]) >= prompt_len, ids.shape)
  widen = lambda x: np.pad(x, ((0, 0), (int(prompt_len), 0)))
  return Batch(
    tokens=ids,
    valid=np.ones(ids.shape, bool) if valid is None else valid,
    answer=answer,
    counted=answer if counted is None else widen(counted.astype(bool)),
    steps=None if steps is None else widen(steps),
  )


@functools.partial(jax.jit, static_argnames='guidance')
def _rows(network, answers, queries, cotangent, guidance):
  def of(params):
    policy = dataclasses.replace(network, params=params)
    return row_bounds.log_probs((policy,), answers, queries, CHUNK, guidance)[0]

  found, pull = jax.vjp(of, network.params)
  return found, pull(cotangent)[0]


def log_probs(network, batch, queries, cotangent=None, guidance=0.0):
  """Returns log-probabilities [n, B, L], and the gradient for a cotangent."""
  shape = queries.masked.shape
  number = shape[0] * shape[1]
  copies = lambda x: np.tile(x, (shape[0], 1))
  if cotangent is None:
    cotangent = np.zeros(shape, np.float32)

  def rows(x):
    x = np.asarray(x).reshape(number, shape[2])
    return np.pad(x, ((0, -number % ROWS), (0, max(0, LENGTH - shape[2]))))

  answers = Answers(*(rows(copies(x)) for x in policy_loss.answers(batch)))
  flat = RowQueries(
    rows(queries.masked)[None],
    rows(queries.scored)[None],
    np.ones((1, number + -number % ROWS), np.float32),
  )
  with jax.default_matmul_precision('highest'):
    found, gradient = _rows(
      network, answers, flat, rows(cotangent)[None], guidance
    )
  return found[0, :number, : shape[2]].reshape(shape), gradient


def check_gradient(network, batch, queries, cotangent, recorded):
  """Compares gradient norms with recorded ones, to 1e-4 of the total."""
  _, gradient = log_probs(network, batch, queries, cotangent)
  if network.block_length:
    norms = golden_sdlm.gradient_norms(gradient)
  else:
    norms = {
      key: np.linalg.norm(np.asarray(x, np.float64).ravel())
      for key, x in golden_models.to_torch(gradient).items()
    }
  total = float(recorded['gradnorm_total'])
  tolerance = 1e-4 * total + 1e-6
  found = np.sqrt(sum(norm**2 for norm in norms.values()))
  assert found == pytest.approx(total, abs=tolerance)
  names = [key for key in recorded if key.startswith('gradnorm.')]
  assert not names or len(names) == len(norms)
  for key in names:
    norm = norms[key.removeprefix('gradnorm.')]
    assert norm == pytest.approx(float(recorded[key]), abs=tolerance), key


def loss(name, s, probs, queries, batch, advantages):
  """Returns value, metrics and the derivative by `probs.new`, [n, B, L]."""

  def of(new):
    return policy_loss.loss(
      name, s, probs._replace(new=new), queries, batch, advantages
    )

  (value, metrics), derivative = jax.value_and_grad(of, has_aux=True)(
    jnp.asarray(probs.new)
  )
  return float(value), metrics, np.array(derivative)


def token_queries(batch, scored):
  """Returns one copy whose tokens have the weight 1, for recorded values."""
  wide = batch.answer[None]
  return RowQueries(wide, scored[None], np.ones(wide.shape[:2], np.float32))


def wide(batch, x):
  """Returns [B, slots] values at the answer slots of rows, [1, B, L]."""
  return np.pad(x, ((0, 0), (batch.tokens.shape[1] - x.shape[1], 0)))[None]


def check_loss(value, recorded):
  """Compares a loss, to 2e-5 x (1 + |loss|)."""
  tolerance = 2e-5 * (1 + abs(float(recorded)))
  assert value == pytest.approx(float(recorded), abs=tolerance)


def check_derivative(found, recorded):
  """Compares derivatives, to 1e-4 of the largest."""
  np.testing.assert_allclose(found, recorded, atol=1e-4 * abs(recorded).max())


def sequence_units(advantages, score):
  """Returns Units of answers with ratio 1 and one token each."""
  ones = np.ones(len(score), np.float32)
  return Units(score, 0 * ones, None, ones > 0, advantages, ones)
