"""A causal clean copy of block diffusion, and its autoregressive loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from objective_cases import (
  CONFIG,
  MASK,
  STORED_ANSWER,
  STORED_DOC,
  TINY,
  log_probabilities,
  loss,
  make_canvas,
  random_tokens,
  stored,
  strong_params,
  without_mask,
)

from maskdiff.config import validate
from maskdiff.data.rows import Rows
from maskdiff.errors import UserError
from maskdiff.model import masks
from maskdiff.model.network import Network
from maskdiff.objectives import table
from maskdiff.training import evaluation, pretraining, step

WEIGHT = 0.3
CAUSAL = dataclasses.replace(
  CONFIG, name='block_diffusion', block_length=4, clean_attention='causal'
)
JOINT = dataclasses.replace(CAUSAL, autoregressive_weight=WEIGHT)


@pytest.fixture(scope='module')
def params():
  return strong_params(TINY)


# Who sees whom


@pytest.mark.parametrize('size', [1, 2, 3, 6])
def test_clean_copy_is_causal(size):
  doc = jnp.array([[0, 0, 0, 0, 1, 1]])
  labels = masks.block_diffusion(jnp.ones((1, 6), bool), size, doc, causal=True)
  seen = np.asarray(masks.visible(labels, labels))[0]
  at = np.tile(np.arange(6), 2)
  noisy = np.arange(12) < 6
  q, k = at[:, None], at[None]
  expected = np.where(
    noisy[None],
    noisy[:, None] & (q // size == k // size),
    np.where(noisy[:, None], k < q // size * size, k <= q),
  )
  same = np.tile(doc[0][:, None] == doc[0], (2, 2))
  np.testing.assert_array_equal(seen, expected & same)


@pytest.mark.parametrize('predict_next', [False, True])
def test_noisy_copy_predicts_as_each_block_after_a_clean_prefix(
  params, predict_next
):
  """`show` takes blocks with a mask token for noisy ones."""
  config = dataclasses.replace(TINY, predict_next=predict_next)
  length, size = 8, CAUSAL.block_length
  tokens = random_tokens(3, length)
  canvas = make_canvas(CAUSAL, tokens, jnp.arange(3), jax.random.key(1), 4)
  log_p = log_probabilities(config, params, canvas.inputs, canvas.labels)
  noisy = np.asarray(canvas.inputs[:, :length])
  network = Network(
    config,
    params,
    CAUSAL.name,
    False,
    MASK,
    2,
    block_length=size,
    clean_attention='causal',
  )
  compared = 0
  for start in range(0, length, size):
    end = start + size
    row = np.concatenate([tokens[:, :start], noisy[:, start:end]], axis=1)
    inputs, labels = table.show(network, row, jnp.ones(row.shape, bool))
    expected = log_probabilities(config, params, inputs, labels)
    masked = row == MASK
    compared += masked.sum()
    np.testing.assert_allclose(
      log_p[:, :end][masked], expected[masked], atol=1e-5
    )
  assert compared == (noisy == MASK).sum() > 6


# The autoregressive loss


@pytest.mark.slow
@pytest.mark.parametrize(
  'within, predict_next', [('row', False), ('document', True)]
)
def test_clean_copy_has_the_loss_of_a_causal_network(
  params, within, predict_next
):
  """Each answer is predicted from the text before it.

  The first token of a row, and of a document if attention stays within it, is
  not predicted. Neither is a token after padding.
  """
  c = dataclasses.replace(JOINT, attend_within=within, block_length=5)
  config = dataclasses.replace(TINY, predict_next=predict_next)
  rows = stored(2)
  length = len(STORED_DOC)
  canvas = make_canvas(c, rows, jnp.arange(2), jax.random.key(0), 2)
  total, nll = loss(c, config, params, canvas)
  text = jnp.asarray(np.tile(STORED_DOC >= 0, (2, 1)))
  labels = masks.causal(
    text, rows.doc if within == 'document' else 0 * rows.doc
  )
  log_p = without_mask(log_probabilities(TINY, params, rows.tokens, labels))
  doc = STORED_DOC if within == 'document' else np.minimum(STORED_DOC, 0)
  expected = np.zeros((2, length))
  for i in range(1, length):
    if STORED_ANSWER[i] and doc[i] >= 0 and doc[i] == doc[i - 1]:
      token = np.asarray(rows.tokens[:, i])
      expected[:, i] = -log_p[np.arange(2), i - 1, token]
  assert (expected > 0).any(axis=0).sum() in (3, 4)
  np.testing.assert_allclose(nll[:, length:], expected, rtol=1e-5, atol=1e-6)
  plain = make_canvas(
    dataclasses.replace(c, autoregressive_weight=0.0),
    rows,
    jnp.arange(2),
    jax.random.key(0),
    2,
  )
  diffusion, of_noisy = loss(c, config, params, plain)
  np.testing.assert_allclose(nll[:, :length], of_noisy, rtol=1e-6)
  expected_total = float(diffusion) + WEIGHT * expected.sum()
  assert float(total) == pytest.approx(expected_total, rel=1e-5)


@pytest.mark.slow
def test_metrics_keep_the_parts_of_the_loss_apart(params):
  rows = Rows(random_tokens(4, 12))
  c = step.StepConfig(TINY, JOINT, 12, 1, None)
  plain = dataclasses.replace(
    c, objective=dataclasses.replace(JOINT, autoregressive_weight=0.0)
  )
  sums = jax.jit(step.loss_sums, static_argnums=(0, 5))
  joint, alone = (
    sums(x, params, rows, jnp.arange(4), jax.random.key(0), 4)
    for x in (c, plain)
  )
  assert not JOINT.is_bound(0) and plain.objective.is_bound(0)
  assert pretraining.loss_name(c) == 'train/objective_nats_per_token'
  parts = pretraining.loss_parts(c, joint)
  of_next = parts['train/autoregressive_nats_per_token']
  diffusion = parts['train/diffusion_nats_per_token']
  assert diffusion == pytest.approx(float(alone.loss), rel=1e-5)
  assert joint.next_count == 4 * 11
  share = 11 / 12  # the first token of a row is not predicted
  assert float(joint.loss) == pytest.approx(
    diffusion + WEIGHT * share * of_next, rel=1e-5
  )
  assert pretraining.loss_parts(plain, alone) == {}
  for field in ('ratio_nll', 'ratio_count', 'num_predicted', 'num_tokens'):
    np.testing.assert_allclose(
      getattr(joint, field), getattr(alone, field), rtol=1e-5
    )


def test_held_out_bound_has_no_autoregressive_part():
  c = step.StepConfig(TINY, JOINT, 12, 1, None)
  objective = evaluation.eval_config(c).objective
  assert objective.is_bound(0)
  assert objective.clean_attention == 'causal'
  rows = Rows(random_tokens(2, 12))
  canvas = jax.eval_shape(
    lambda key: table.make_canvas(objective, rows, jnp.arange(2), key, 2),
    jax.random.key(0),
  )
  assert canvas.next_weights is None


# Config


BLOCKS = {'objective.name': 'block_diffusion', 'objective.block_length': 8}


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'objective.clean_attention': 'causal'}, 'is for block_diffusion'),
    (
      {**BLOCKS, 'objective.autoregressive_weight': 0.3},
      'autoregressive_weight=0.3.*clean_attention=causal',
    ),
  ],
)
def test_config_refuses_a_loss_without_a_causal_copy(changes, message):
  with pytest.raises(UserError, match=message):
    validate(tiny.config(changes))


def test_config_accepts_a_joint_loss():
  joint = {
    'objective.clean_attention': 'causal',
    'objective.autoregressive_weight': 0.3,
  }
  validate(tiny.config({**BLOCKS, **joint}))
