"""The denominators of the loss, against dLLM's and LLaDA's fine-tuning."""

import dataclasses
import functools

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from objective_cases import CONFIG, TINY, loss, make_canvas, strong_params

from maskdiff.data.rows import Rows
from maskdiff.model import transformer
from maskdiff.objectives import masked_diffusion, table
from maskdiff.objectives.canvas import canvas_loss, divisor
from maskdiff.objectives.schedule import Schedule
from maskdiff.objectives.time_density import Weight
from maskdiff.training import evaluation, step

DENOMINATORS = ('token', 'row', 'batch')
# The names of dLLM.
PUBLISHED = {'token': 'token', 'row': 'sequence', 'batch': 'batch'}
IGNORED = -100
GOLDEN_MASK = {'model_a': 510, 'model_b': 297}


@functools.cache
def arrays():
  with np.load(golden_models.GOLDEN / 'sft_dllm.npz') as file:
    return dict(file)


@functools.partial(jax.jit, static_argnums=(0, 1))
def losses(c, config, params, canvas):
  """Returns {denominator: (loss, norm of the gradient)}."""

  def one(params, name):
    of = dataclasses.replace(c, denominator=name)
    total, _ = canvas_loss(of, transformer.bind(config, params), canvas)
    return total / divisor(of, canvas).sum()

  found = {n: jax.value_and_grad(one)(params, n) for n in DENOMINATORS}
  return {n: (value, optax.tree.norm(g)) for n, (value, g) in found.items()}


def published_canvas(c, golden, labels, schedule, weight):
  """Returns our Canvas with dLLM's weights, which are ours times a number.

  dLLM adds 1e-6 to the denominator of the weight, and does not scale the
  weights of nonlinear schedules or of cross entropy without weights.
  """
  answer = labels != IGNORED
  c = dataclasses.replace(c, schedule=Schedule(schedule))
  if weight == 'uniform':
    c = dataclasses.replace(c, weight=Weight('power'))
  rows = Rows(jnp.asarray(golden['input_ids']), answer=jnp.asarray(answer))
  u = (golden['t'] - c.eps) / (1 - c.eps)
  length = answer.shape[1]
  canvas = masked_diffusion.corrupt(
    c, rows, u, golden['u'], np.full(len(answer), length)
  )
  p = np.asarray(canvas.mask_ratio, np.float64)
  expected = np.ones_like(p)
  if weight == 'scheduler':
    expected = c.schedule.weight(golden['t'])[:, None] * p / (p + 1e-6)
  masked = np.asarray(canvas.weights) != 0
  ratio = (expected / np.where(masked, canvas.weights, np.nan))[masked]
  np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
  return dataclasses.replace(canvas, weights=jnp.float32(masked * expected))


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, shift',
  [
    ('model_a', ''),
    ('model_a', '_shift'),
    ('model_b', ''),
    ('model_b', '_shift'),
  ],
)
def test_losses_and_gradients_are_those_of_dllm(name, shift):
  """Three denominators, two label sets, two weights and two schedules."""
  golden = {
    key.removeprefix(f'{name}.'): value
    for key, value in arrays().items()
    if key.startswith(f'{name}.')
  }
  config, params = golden_models.load(name)
  config = dataclasses.replace(config, predict_next=bool(shift))
  c = dataclasses.replace(CONFIG, predict_mask=True, mask_id=GOLDEN_MASK[name])
  labels = {
    '': golden['labels_eos_trained'],
    '_nopad': golden['labels_padding_ignored'],
  }
  cases = [
    ('scheduler', 'linear', ''),
    ('scheduler', 'linear', '_nopad'),
    ('scheduler', 'cosine', ''),
    ('uniform', 'linear', ''),
    ('uniform', 'cosine', ''),
  ]
  compared = 0
  for weight, schedule, padding in cases:
    canvas = published_canvas(c, golden, labels[padding], schedule, weight)
    found = losses(c, config, params, canvas)
    for ours, theirs in PUBLISHED.items():
      case = f'{weight}_{theirs}{shift}_{schedule}{padding}'
      value, norm = found[ours]
      np.testing.assert_allclose(
        value, golden[f'{case}.loss'], rtol=1e-5, err_msg=case
      )
      if f'{case}.gradnorm_total' in golden:
        expected = golden[f'{case}.gradnorm_total']
        np.testing.assert_allclose(norm, expected, rtol=1e-4, err_msg=case)
      compared += 1
  assert compared == 15


@pytest.mark.slow
@pytest.mark.parametrize('name', ['model_a', 'model_b'])
def test_losses_of_dllm_with_bos_and_of_d1(name):
  """A bos before rows without a prompt; d1 counts padding as answers."""
  config, params = golden_models.load(name)
  c = dataclasses.replace(CONFIG, predict_mask=True, mask_id=GOLDEN_MASK[name])
  golden = {
    case: {
      key.removeprefix(f'{name}.{case}.'): value
      for key, value in arrays().items()
      if key.startswith(f'{name}.{case}.')
    }
    for case in ('bos', 'd1sft')
  }
  tokens = arrays()[f'{name}.input_ids']
  case = golden['bos']
  case['input_ids'] = np.insert(tokens, 0, case['bos_id'], axis=1)
  labels = np.insert(tokens, 0, IGNORED, axis=1)
  canvas = published_canvas(c, case, labels, 'linear', 'scheduler')
  shifted = dataclasses.replace(config, predict_next=True)
  value, _ = losses(c, shifted, params, canvas)['token']
  np.testing.assert_allclose(value, case['loss'], rtol=1e-5)

  case = golden['d1sft']
  length = tokens.shape[1]
  answer = np.arange(length) >= case['prompt_lengths'][:, None]
  u = (case['t'] - c.eps) / (1 - c.eps)
  rows = Rows(jnp.asarray(tokens), answer=jnp.asarray(answer))
  canvas = masked_diffusion.corrupt(
    c, rows, u, case['u'], np.full(len(tokens), length)
  )
  np.testing.assert_array_equal(canvas.inputs, case['noisy'])
  value, norm = losses(c, config, params, canvas)['token']
  np.testing.assert_allclose(value, case['loss'], rtol=1e-5)
  np.testing.assert_allclose(norm, case['gradnorm_total'], rtol=1e-4)


ROWS = Rows(
  jnp.asarray(np.random.default_rng(0).integers(0, 3, (8, 4)), jnp.int32),
  answer=jnp.asarray(
    [[0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]] * 2, bool
  ),
)


@pytest.mark.slow
@pytest.mark.parametrize(  # drafters have the denominator token only
  'name', [name for name, o in table.OBJECTIVES.items() if not o.drafts]
)
def test_rows_without_an_answer_change_no_loss(name):
  """They count in no denominator; a batch of them has no loss."""
  params, key = strong_params(TINY), jax.random.key(3)
  c = dataclasses.replace(CONFIG, name=name)
  canvas = make_canvas(c, ROWS, jnp.arange(8), key, 8)
  answer = np.asarray(ROWS.answer).any(axis=1)
  some = jax.tree.map(lambda x: x[answer], canvas)
  value, expected = (losses(c, TINY, params, x) for x in (canvas, some))
  for found, wanted in zip(
    jax.tree.leaves(value), jax.tree.leaves(expected), strict=True
  ):
    assert found > 0
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
  prompts = ROWS._replace(answer=jnp.zeros((8, 4), bool))
  empty = make_canvas(c, prompts, jnp.arange(8), key, 8)
  for denominator in DENOMINATORS:
    of = dataclasses.replace(c, denominator=denominator)
    assert divisor(of, empty).sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize('denominator', DENOMINATORS)
def test_loss_of_a_batch_is_its_definition(denominator):
  c = dataclasses.replace(CONFIG, denominator=denominator)
  canvas = make_canvas(c, ROWS, jnp.arange(8), jax.random.key(3), 8)
  total, nll = loss(c, TINY, strong_params(TINY), canvas)
  of_row = np.asarray(canvas.weights * nll, np.float64).sum(axis=1)
  tokens = np.asarray(canvas.num_tokens)
  some = tokens > 0
  expected = {
    'token': of_row.sum() / tokens.sum(),
    'row': (of_row[some] / tokens[some]).mean(),
    'batch': of_row[some].mean(),
  }
  sums = step.summarize(c, canvas, total, nll)
  assert sums.loss == pytest.approx(expected[denominator], rel=1e-6)
  # The metric of the loss is per token with every denominator.
  assert sums.nats_per_token == pytest.approx(expected['token'], rel=1e-6)
  other = step.StepConfig(TINY, c, 4, 1, guard=None)
  assert evaluation.eval_config(other).objective.denominator == 'token'
