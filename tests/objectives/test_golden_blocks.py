"""Noise, masks and losses of block diffusion in published training code.

Every code normalizes its loss in its own way, so each test states the
normalization and applies it to the weights and the nll of a Canvas.
"""

import dataclasses
import functools

import golden_models
import golden_sdlm
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from golden_models import GOLDEN
from objective_cases import CONFIG
from slow import SLOW

from maskdiff.config import validate
from maskdiff.data.rows import Rows
from maskdiff.errors import UserError
from maskdiff.model import masks, transformer
from maskdiff.objectives import block_diffusion, masked_diffusion
from maskdiff.objectives.canvas import canvas_loss
from maskdiff.objectives.schedule import Schedule
from maskdiff.objectives.time_density import TimeDensity, Weight
from maskdiff.training import evaluation, step

IGNORED = -100  # label of a position without a loss
BLOCK = dataclasses.replace(
  CONFIG, name='block_diffusion', predict_mask=True, mask_id=157
)
# Cross entropy without weights. The constant weight cancels in a mean.
UNWEIGHTED = dataclasses.replace(BLOCK, weight=Weight('power', 0.0))


def golden(name):
  """Returns the arrays of a case such as 'sdar.0', by the rest of the name."""
  with np.load(GOLDEN / 'block_sft.npz') as arrays:
    prefix = f'{name}.'
    return {
      key.removeprefix(prefix): arrays[key]
      for key in arrays
      if key.startswith(prefix)
    }


@functools.cache
def network():
  found = golden_models.block_network(block_length=4)
  return found.config, found.params


def loss_of(c, canvas, scale, gradient=False):
  """Returns the sum over positions of scale * weight * nll, and its gradient.

  Args:
    c: ObjectiveConfig.
    canvas: Canvas.
    scale: normalization of the published code, a number or [B, L].
    gradient: whether to compute the gradient; else it is None.
  """
  config, params = network()
  canvas = dataclasses.replace(canvas, weights=canvas.weights * scale)

  @jax.jit
  def total(params, canvas):
    return canvas_loss(c, transformer.bind(config, params), canvas)[0]

  with jax.default_matmul_precision('highest'):
    if gradient:
      return jax.value_and_grad(total)(params, canvas)
    return total(params, canvas), None


def check(arrays, c, canvas, scale, name='loss'):
  """Compares a loss, and the gradient where the golden file has one."""
  with_gradient = any(key.startswith('gradnorm.') for key in arrays)
  loss, gradients = loss_of(c, canvas, scale, with_gradient)
  assert loss == pytest.approx(arrays[name], rel=1e-5)
  if with_gradient:
    total = arrays['gradnorm_total']
    for key, norm in golden_sdlm.gradient_norms(gradients).items():
      expected = arrays[f'gradnorm.{key}']
      assert norm == pytest.approx(expected, rel=1e-4, abs=1e-6 * total), key


def with_masks(c, arrays, t, masked, tokens=None, doc=None):
  """Returns the Canvas of given masks, [B, L], and times of blocks, [B, K]."""
  tokens = arrays['input_ids'] if tokens is None else tokens
  answer = jnp.asarray(arrays['labels'] != IGNORED)
  doc = jnp.zeros_like(tokens) if doc is None else doc
  c = dataclasses.replace(c, block_length=int(arrays['block_size']))
  rows = Rows(jnp.asarray(tokens), jnp.asarray(doc), answer)
  lengths = jnp.full(len(tokens), tokens.shape[1])
  canvas = block_diffusion.with_masks(
    c, rows, jnp.asarray(t), jnp.asarray(masked), lengths
  )
  return c, canvas


def predicted_from_left(canvas):
  """Returns a Canvas in which a position predicts the token to its right.

  The left neighbour is in the noisy copy, also for the first token of a block.
  The first token of a row is not predicted.
  """
  left = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
  return dataclasses.replace(
    canvas, targets=left(canvas.targets), weights=left(canvas.weights)
  )


# LLaDA 2.0


@pytest.mark.parametrize('case', range(4))
def test_dfactory_is_cross_entropy_without_weights(case):
  """One mask ratio per row; the mean is over the masked tokens of the batch.

  The second and the fourth case predict the next token. The last two add a term
  for confidence; here, the cross entropy is compared.
  """
  arrays = golden(f'dfactory.{case}')
  labels = arrays['labels']
  t = np.repeat(
    arrays['sigma'][:, None], labels.shape[1] // arrays['block_size'], axis=1
  )
  c, canvas = with_masks(UNWEIGHTED, arrays, t, labels != IGNORED)
  length = labels.shape[1]
  np.testing.assert_array_equal(canvas.inputs[:, :length], arrays['noisy'])
  prompt = np.arange(length) < arrays['prompt_lengths'][:, None]
  expected = (arrays['u'] < arrays['sigma'][:, None]) & ~prompt
  np.testing.assert_array_equal(labels != IGNORED, expected)
  # Some labels of the last two cases are not the tokens of the row.
  targets = jnp.where(labels == IGNORED, arrays['input_ids'], labels)
  canvas = dataclasses.replace(canvas, targets=targets)
  if not arrays['same_token_labels']:
    canvas = predicted_from_left(canvas)
  name = 'ce_loss' if 'ce_loss' in arrays else 'loss'
  if name == 'ce_loss':
    arrays = {k: x for k, x in arrays.items() if 'gradnorm' not in k}
  check(arrays, c, canvas, 1 / canvas.weights.sum(), name)


def test_dfactory_adds_the_entropy_of_correct_predictions():
  """Its mean is over the correct predictions, that of maskdiff over the loss.

  In the fourth case, dFactory takes the labels of the cross entropy from the
  right and those of correctness from the same position. maskdiff has one label.
  """
  arrays = golden('dfactory.2')
  labels = arrays['labels']
  masked = labels != IGNORED
  t = np.repeat(arrays['sigma'][:, None], 4, axis=1)
  c, canvas = with_masks(UNWEIGHTED, arrays, t, masked)
  targets = jnp.where(masked, labels, arrays['input_ids'])
  canvas = dataclasses.replace(canvas, targets=targets)
  config, params = network()
  model = transformer.bind(config, params)
  logits = model.logits(model(canvas.inputs, canvas.labels))
  right = masked & (logits[:, : labels.shape[1]].argmax(axis=-1) == labels)
  assert 0 < right.sum() < masked.sum()
  weight = float(arrays['confidence_beta'] * masked.sum() / right.sum())
  c = dataclasses.replace(c, confidence_weight=weight)
  scale = 1 / canvas.weights.sum()
  loss, gradients = loss_of(c, canvas, scale, gradient=True)
  assert loss == pytest.approx(arrays['loss'], rel=1e-5)
  norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(gradients)))
  assert norm == pytest.approx(arrays['gradnorm_total'], rel=1e-4)
  # The metrics have the cross entropy.
  total, nll = canvas_loss(c, model, canvas)
  sums = step.summarize(c, canvas, total, nll)
  found = sums.weighted_nll / canvas.weights.sum()
  assert found == pytest.approx(arrays['ce_loss'], rel=1e-4)
  assert sums.total > 1.1 * sums.weighted_nll


@pytest.mark.parametrize(
  'changes',
  [
    {'objective.name': 'autoregressive'},
    {
      'objective.name': 'block_diffusion',
      'objective.block_length': 4,
      'objective.clean_attention': 'causal',
      'objective.autoregressive_weight': 0.3,
    },
  ],
  ids=['autoregressive', 'joint'],
)
def test_entropy_of_an_autoregressive_loss_is_refused(changes):
  config = tiny.config({'objective.confidence_weight': 2.0, **changes})
  with pytest.raises(UserError, match='without an autoregressive loss; set'):
    validate(config)
  validate(tiny.config(changes))


def test_held_out_bound_has_no_term_for_confidence():
  c = step.step_config(tiny.config({'objective.confidence_weight': 2.0}))
  assert c.objective.confidence_weight == 2
  assert evaluation.eval_config(c).objective.confidence_weight == 0


# SDAR


@pytest.mark.parametrize('case', range(2))
def test_sdar_documents_of_a_row_have_times_of_their_own(case):
  """The loss is the sum of CE / p over the number of labelled tokens.

  SDAR puts the noisy and the clean copy of each document side by side, and
  counts positions and blocks from the start of the document. A Canvas has the
  copies of the whole row, and its blocks are counted from the start of the row.
  The documents therefore begin at multiples of the block here, with padding
  before them.
  """
  arrays = golden(f'sdar.{case}')
  size, labels = int(arrays['block_size']), arrays['labels']
  starts = arrays['position_ids_fixed'] == 0
  wide = -(-(labels.shape[1] + starts.sum(axis=1).max() * size) // size) * size
  shape = len(labels), wide
  tokens, doc = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
  masked, spread = np.zeros(shape, bool), np.full(shape, IGNORED, np.int32)
  t, times = np.ones((len(labels), wide // size), np.float32), 0
  for row in range(len(labels)):
    first = np.flatnonzero(starts[row])
    place = 0
    for number, (a, b) in enumerate(
      zip(first, [*first[1:], None], strict=True)
    ):
      part = slice(a, b)
      count = len(labels[row, part])
      there = slice(place, place + count)
      tokens[row, there] = arrays['input_ids'][row, part]
      spread[row, there] = labels[row, part]
      masked[row, there] = arrays['masked'][row, part]
      doc[row, there] = number
      following = place + -(-count // size) * size
      t[row, place // size : following // size] = arrays['t'][times]
      place, times = following, times + 1
  assert times == arrays['t_per_row'].sum()
  c = dataclasses.replace(BLOCK, attend_within='document')
  arrays['labels'] = spread
  p = np.float32(1 - 1e-3) * t + np.float32(1e-3)
  c, canvas = with_masks(c, arrays, p, masked, tokens, doc)
  weights = np.asarray(canvas.weights)
  np.testing.assert_allclose(
    weights[weights > 0], 1 / arrays['p_mask'], rtol=1e-6
  )
  assert canvas.num_tokens.sum() == (labels != IGNORED).sum()
  check(arrays, c, canvas, 1 / canvas.num_tokens.sum())


# Fast-dLLM v2


@pytest.mark.slow
@pytest.mark.parametrize('case', [0, SLOW(1), SLOW(2)])
def test_fast_dllm_v2_scores_every_token_once(case):
  """Complementary masks, and tokens predicted from the noisy left neighbour.

  The loss is the mean over the labelled tokens of both masks. The first token
  of a row is never scored. maskdiff predicts the first token of a block from
  the clean copy instead; see layers.shift_right.
  """
  arrays = golden(f'fastv2.{case}')
  tokens, labels = arrays['input_ids'], arrays['labels']
  batch, length = tokens.shape
  c = dataclasses.replace(
    UNWEIGHTED,
    complementary_masks=True,
    block_length=int(arrays['block_size']),
  )
  answer = jnp.asarray(labels != IGNORED)
  rows = Rows(jnp.asarray(tokens), jnp.zeros_like(tokens), answer)
  canvas = block_diffusion.corrupt(
    c, rows, arrays['t'], arrays['u'], jnp.full(batch, length)
  )
  masked = np.asarray(canvas.inputs)[:, :length] == c.mask_id
  np.testing.assert_array_equal(masked[::2] ^ masked[1::2], answer)
  # The golden file has all masks first, then their complements.
  order = np.arange(2 * batch).reshape(batch, 2).T.ravel()
  config, params = network()
  with jax.default_matmul_precision('highest'):
    model = transformer.bind(config, params)
    logits = model.logits(model(canvas.inputs, canvas.labels))
  expected = arrays['logits']
  found = np.asarray(logits)[order, :length, : expected.shape[2]]
  np.testing.assert_allclose(found, expected, atol=2e-4)
  canvas = predicted_from_left(canvas)
  scored = answer.at[:, 0].set(False).sum()
  assert (canvas.weights > 0).sum() == scored
  check(arrays, c, canvas, 1 / canvas.weights.sum())


# dLLM


@pytest.mark.parametrize('case', range(2))
def test_dllm_rows_have_one_time(case):
  """The loss is divided by the labelled tokens of the batch, or of each row.

  dLLM adds 1e-6 to the denominator of the weight. maskdiff scales the weights
  of a nonlinear schedule; see docs/conventions.md. Both are undone here.
  """
  arrays = golden(f'dllm_bd.{case}')
  schedule = Schedule('cosine' if arrays['cosine'] else 'linear')
  c = dataclasses.replace(BLOCK, schedule=schedule)
  length = arrays['labels'].shape[1]
  t = np.repeat(arrays['t'][:, None], length // arrays['block_size'], axis=1)
  p = schedule.mask_ratio(arrays['t'])[:, None]
  masked = (arrays['u'] < p) & (arrays['labels'] != IGNORED)
  c, canvas = with_masks(c, arrays, t, masked)
  eps = np.float64(c.eps)
  scale = (1 - schedule.mask_ratio(eps)) / (1 - eps) * p / (p + 1e-6)
  assert bool(arrays['norm']) == bool(arrays['shift'])
  if arrays['norm']:
    scale = scale / np.asarray(canvas.num_tokens)[:, None] / len(p)
  else:
    scale = scale / canvas.num_tokens.sum()
  canvas = dataclasses.replace(canvas, weights=canvas.weights * scale)
  if arrays['shift']:
    canvas = predicted_from_left(canvas)
  check(arrays, c, canvas, 1)


# BD3-LM (block_diffusion.npz)


@functools.cache
def bd3lm():
  with np.load(GOLDEN / 'block_diffusion.npz') as arrays:
    return dict(arrays)


def test_bd3lm_masks():
  names = [name for name in bd3lm() if name.startswith('mask.')]
  assert len(names) == 6
  for name in names:
    length, size = (int(x[1:]) for x in name.removeprefix('mask.').split('_'))
    labels = masks.block_diffusion(np.ones((1, length), bool), size)
    seen = masks.visible(labels, labels)[0]
    np.testing.assert_array_equal(seen, bd3lm()[name], name)


@pytest.mark.parametrize(
  'name, schedule',
  [
    ('loglinear', Schedule('linear')),
    ('square', Schedule('polynomial', 2.0)),
    ('square_root', Schedule('polynomial', 0.5)),
    ('log', Schedule('log')),
  ],
)
def test_bd3lm_schedules(name, schedule):
  t = bd3lm()['noise.t']
  ratio = bd3lm()[f'noise.{name}.move_chance']
  inside = schedule.mask_ratio(t) >= 1e-3  # BD3-LM clips lower ratios
  assert inside.sum() >= len(t) - 1
  np.testing.assert_allclose(
    schedule.mask_ratio(t)[inside], ratio[inside], rtol=1e-6
  )
  scale = bd3lm()[f'noise.{name}.loss_scale']
  np.testing.assert_allclose(-schedule.weight(t)[inside], scale[inside], 1e-5)


def test_bd3lm_cosine_schedule():
  """BD3-LM's has mask ratios from 0.001, and divides by 0.001 more."""
  schedule, eps = Schedule('cosine_bd3lm'), 1e-3
  t, scale, ratio = (
    bd3lm()[f'noise.{name}'].astype(np.float64)
    for name in ('t', 'cosine.loss_scale', 'cosine.move_chance')
  )
  exact = schedule.mask_ratio(t)
  np.testing.assert_allclose(eps + (1 - eps) * exact, ratio, rtol=1e-4)
  weight = (1 - eps) * schedule.weight(t) * exact / (ratio + eps)
  np.testing.assert_allclose(weight, -scale, rtol=1e-4)


@pytest.mark.parametrize('case', range(4))
def test_bd3lm_clipped_times(case):
  """Stratified times within an interval; maskdiff also permutes the strata.

  Times of case 4 are all 1, as the loss of blocks of one token has them; see
  test_blocks_of_one_token_are_the_chain_rule.
  """
  u, t = (bd3lm()[f'sample_t.{case}.{name}'] for name in 'ut')
  setting = bd3lm()[f'sample_t.{case}.setting']
  _, length, size, stratified, start, end = setting
  if stratified:
    u = (np.arange(u.size).reshape(u.shape) + u) / u.size
  times = TimeDensity(interval=(start, end)).quantile(u.astype(np.float64))
  if t.shape[1] == length:
    times = np.repeat(times, int(size), axis=1)
  np.testing.assert_allclose(times, t, atol=1e-6)


def test_bd3lm_noise_differs_at_equality_only():
  """BD3-LM masks a token also if its draw equals the mask ratio."""
  tokens, p, u, noisy = (bd3lm()[f'q_xt.{name}'] for name in ('x', *'pu', 'xt'))
  c = dataclasses.replace(CONFIG, eps=0.0, mask_id=99)
  canvas = masked_diffusion.corrupt(
    c, Rows(jnp.asarray(tokens)), p, u, jnp.full(len(p), p.shape[1])
  )
  equal = u == p
  assert equal.sum() == 2
  np.testing.assert_array_equal(canvas.inputs[~equal], noisy[~equal])
  np.testing.assert_array_equal(canvas.inputs[equal], tokens[equal])
  np.testing.assert_array_equal(noisy[equal], 99)
