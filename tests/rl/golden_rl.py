"""The golden files of policy optimization: networks, cases and gradients."""

import dataclasses
import functools
import json
import re

import golden_models
import golden_sdlm
import jax
import numpy as np
import pytest
from golden_models import GOLDEN

from maskdiff.likelihood import device_queries, row_bounds
from maskdiff.likelihood.device_queries import RowQueries
from maskdiff.likelihood.queries import Answers
from maskdiff.model.network import Network
from maskdiff.rl import advantages as advantages_lib
from maskdiff.rl import batch as batch_lib
from maskdiff.rl import copies, policy_loss, spg, trace
from maskdiff.rl.batch import Batch
from maskdiff.rl.policy_loss import LogProbs
from maskdiff.rl.units import Units


def compiled(function, *static):
  """Returns a function of NumPy arrays; operations one by one compile longer.

  Args:
    function: of JAX arrays.
    *static: numbers of the arguments that are not arrays.
  """
  function = jax.jit(function, static_argnums=static)
  return lambda *args: jax.tree.map(np.array, function(*args))


whole_answer_masks = compiled(copies.whole_answer_masks, 0)
coupled_token_masks = compiled(copies.coupled_token_masks, 0)
random_mask_copies = compiled(copies.random_mask_copies, 0)
along_trace = compiled(trace.along_trace, 1)
exact_count = compiled(device_queries.exact_count, 3)
spg_copies = compiled(spg.copies, 0)
spg_units = compiled(spg.units, 0)
block_masks = compiled(spg.block_masks, 1)
block_mask_copies = compiled(spg.block_mask_copies, 0)
advantages = compiled(advantages_lib.advantages, 1, 2, 3)
until_eos = compiled(batch_lib.until_eos, 2, 3)

NAMES = 'model_a', 'model_b'
CHUNK = 64
# Arrays are padded to these sizes, so that few programs are compiled.
ROWS, LENGTH, COPIES = 24, 20, 12


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
  """Returns the names of cases that a file has, such as 'loss0'."""
  parts = {part for key in arrays(file) for part in key.split('.')}
  return sorted(x for x in parts if re.fullmatch(rf'{prefix}\d+', x))


@functools.cache
def mask_id(name):
  config = json.loads((GOLDEN / name / 'config.json').read_text())
  return config['mask_token_id']


@functools.cache
def network(name, predict_next=False):
  """Returns a golden network as a Network of masked diffusion."""
  config, params = golden_models.load(name)
  return Network(
    config=dataclasses.replace(config, predict_next=predict_next),
    params=params,
    objective='masked_diffusion',
    predict_mask=True,
    mask_id=mask_id(name),
    bos_id=-1,
  )


def pad(x, copies=False):
  """Pads the positions of rows with 0, and the copies if `copies` is set."""
  x = np.asarray(x)
  widths = [(0, 0)] * (x.ndim - 1) + [(0, max(0, LENGTH - x.shape[-1]))]
  if copies:
    widths[0] = (0, max(0, COPIES - len(x)))
  return np.pad(x, widths)


def batch_of(ids, prompt_len, counted=None, valid=None, steps=None):
  """Returns a Batch of padded rows; counted and steps are [B, answer slots]."""
  length, start = ids.shape[1], int(prompt_len)
  valid = np.ones(ids.shape, bool) if valid is None else valid
  answer = np.zeros(ids.shape, bool)
  answer[:, start:] = True
  batch = Batch(pad(ids), pad(valid), pad(answer), pad(answer))
  widen = lambda x: pad(np.pad(x, ((0, 0), (length - x.shape[1], 0))))
  if counted is not None:
    batch = batch._replace(counted=widen(np.asarray(counted, bool)))
  return batch._replace(steps=None if steps is None else widen(steps))


def at_slots(batch, x):
  """Returns values [..., B, slots] at the answer slots, [..., B, L]."""
  found = np.zeros((*x.shape[:-1], batch.tokens.shape[1]), x.dtype)
  found[..., batch.answer] = x.reshape(*x.shape[:-2], -1)
  return found


@functools.partial(jax.jit, static_argnames='guidance')
def _rows(network, answers, queries, cotangent, guidance):
  def of(params):
    policy = dataclasses.replace(network, params=params)
    return row_bounds.log_probs((policy,), answers, queries, CHUNK, guidance)[0]

  if guidance:  # no recorded gradient
    return of(network.params), None
  found, pull = jax.vjp(of, network.params)
  return found, pull(cotangent)[0]


def log_probs(network, batch, queries, cotangent=None, guidance=0.0):
  """Returns log-probabilities [n, B, L], and the gradient for a cotangent.

  Copies that score a token become rows of one batch, so that one program
  computes all cases.
  """
  copy, row = np.nonzero(np.array(queries.scored).any(axis=2))
  more = ((0, -len(row) % ROWS), (0, 0))
  of_copies = lambda x: np.pad(np.array(x)[copy, row], more)
  found = np.zeros(queries.scored.shape, np.float32)
  cotangent = found if cotangent is None else cotangent
  flat = RowQueries(
    of_copies(queries.masked)[None],
    of_copies(queries.scored)[None],
    np.ones((1, len(row) + more[0][1]), np.float32),
  )
  answers = Answers(*(np.pad(x[row], more) for x in policy_loss.answers(batch)))
  with jax.default_matmul_precision('highest'):
    values, gradient = _rows(
      network, answers, flat, of_copies(cotangent)[None], guidance
    )
  found[copy, row] = values[0, : len(row)]
  return found, gradient


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


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.value_and_grad, argnums=2, has_aux=True)
def _loss(name, s, new, probs, queries, batch, advantages):
  probs = probs._replace(new=new)
  return policy_loss.loss(name, s, probs, queries, batch, advantages)


def loss(name, s, probs, queries, batch, advantages, pads=True):
  """Returns value, metrics and the derivative by `probs.new`, [n, B, L].

  With `pads`, copies that score nothing are added, so that cases of one method
  share a compiled function.
  """
  number = len(queries.masked)
  if pads:
    more = ((0, max(0, COPIES - number)), (0, 0))
    queries = RowQueries(
      *(pad(x, copies=True) for x in queries[:2]), np.pad(queries.weight, more)
    )
    probs = LogProbs(*(x if x is None else pad(x, copies=True) for x in probs))
  (value, metrics), derivative = _loss(
    name, s, probs.new, probs, queries, batch, advantages
  )
  return float(value), metrics, np.array(derivative)[:number]


def token_queries(batch, scored):
  """Returns one copy whose tokens have the weight 1, for recorded values."""
  ones = np.ones((1, len(scored)), np.float32)
  return RowQueries(batch.answer[None], scored[None], ones)


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
  return Units(score, 0 * ones, None, 1.0, ones > 0, advantages, ones)
