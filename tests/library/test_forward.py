"""Logits and losses of rows: golden outputs, rows alone, training, enumeration.

Compilations are counted by JAX's own event.
"""

import dataclasses
import itertools
import math

import every_mask
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compilations

import maskdiff
from maskdiff.data.rows import Rows
from maskdiff.errors import UserError
from maskdiff.objectives import masked_diffusion
from maskdiff.objectives.schedule import SCHEDULES
from maskdiff.training import step

KINDS = ('run', 'causal', 'dream', 'golden')
ROWS = [[9, 10, 11, 12, 13], [14, 15], [16, 17, 18]]


@pytest.fixture(params=KINDS)
def model(request):
  return request.getfixturevalue(request.param)


def arrays(name):
  """Returns the golden arrays of model_a in a file, by name."""
  with np.load(golden_models.GOLDEN / f'{name}.npz') as file:
    return {
      key.removeprefix('model_a.'): file[key]
      for key in file
      if key.startswith('model_a.')
    }


# Logits


def test_golden_logits_with_and_without_padding(golden):
  """Padding is on the left, where documents mark it."""
  recorded = arrays('forward')
  found = maskdiff.logits(golden, recorded['plain_ids'])
  np.testing.assert_allclose(found, recorded['plain_logits'], atol=2e-4)
  is_text = recorded['pad_mask'] == 1
  found = maskdiff.logits(golden, recorded['pad_ids'], doc=is_text - 1)
  expected = recorded['pad_logits'][is_text]
  np.testing.assert_allclose(found[is_text], expected, atol=2e-4)
  assert not np.asarray(found)[~is_text].any()


def test_logits_of_a_row_do_not_depend_on_its_batch(model):
  found = np.asarray(maskdiff.logits(model, ROWS))
  assert found.shape == (3, 5, model.config.model.vocab_size)
  for row, of_row in zip(ROWS, found, strict=True):
    (alone,) = maskdiff.logits(model, [row])
    np.testing.assert_allclose(of_row[: len(row)], alone, atol=1e-5)
    assert not of_row[len(row) :].any()


def test_padding_of_an_array_may_have_any_ids(model):
  padded = np.zeros((3, 5), np.int64)
  for i, row in enumerate(ROWS):
    padded[i, : len(row)] = row
  other = np.where(padded == 0, -100, padded)
  lengths = list(map(len, ROWS))
  expected = maskdiff.logits(model, ROWS)
  for array in (padded, other, jnp.asarray(other)):
    found = maskdiff.logits(model, array, lengths=lengths)
    np.testing.assert_array_equal(found, expected)
  doc = np.where(padded == 0, -1, 7)
  found = maskdiff.logits(model, other, doc=doc)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_documents_of_a_row_do_not_see_each_other(model):
  packed, doc = [sum(ROWS, [])], [[3] * 5 + [0] * 2 + [1] * 3]
  (found,) = maskdiff.logits(model, packed, doc=doc)
  starts = itertools.accumulate(map(len, ROWS), initial=0)
  for row, start in zip(ROWS, starts, strict=False):
    (alone,) = maskdiff.logits(model, [row])
    of_row = found[start : start + len(row)]
    np.testing.assert_allclose(of_row, alone, atol=1e-5)


def test_softmax_of_logits_excludes_the_mask_token(run, golden):
  mask_id = run.network.mask_id
  found = np.asarray(maskdiff.logits(run, [[9, mask_id]]))
  assert (found[..., mask_id] == -np.inf).all()
  assert np.isfinite(maskdiff.logits(golden, [[9, 510]])).all()


def test_texts_are_rows(run):
  text = 'def f(x):'
  ids = run.tokenizer.encode(text)
  found = maskdiff.logits(run, [text])
  np.testing.assert_array_equal(found, maskdiff.logits(run, [ids]))


# Loss


@pytest.mark.parametrize('case', ['normal', 'truncated', 'batch_without_mask'])
def test_golden_losses_for_given_masks_and_for_given_noise(golden, case):
  recorded = {
    key.removeprefix(f'pretrain.{case}.'): value
    for key, value in arrays('train_losses').items()
    if key.startswith(f'pretrain.{case}.')
  }
  size = recorded['masked'].shape[1]
  rows, times = recorded['input_ids'][:, :size], recorded['p_mask']
  for draws in ({'masked': recorded['masked']}, {'noise': recorded['u']}):
    for name in ('times', 'mask_ratio'):  # equal for the linear schedule
      found = maskdiff.loss(golden, rows, **{name: times}, **draws)
      np.testing.assert_allclose(found, recorded['loss'], rtol=1e-5)


def test_golden_gradients_for_given_masks(golden):
  recorded = arrays('train_losses')
  of = lambda field: recorded[f'pretrain.normal.{field}']

  @jax.jit
  def gradient(params, rows, masked):
    changed = dataclasses.replace(golden, params=params)
    return maskdiff.loss(changed, rows, times=of('p_mask'), masked=masked)

  found = jax.grad(gradient)(golden.params, of('input_ids'), of('masked'))
  found = golden_models.to_torch(found)
  names = [k for k in recorded if k.startswith('pretrain.normal.grad.')]
  assert len(names) == 6
  for name in names:
    expected = recorded[name]
    atol = 1e-4 * np.abs(expected).max()
    ours = found[name.removeprefix('pretrain.normal.grad.')]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=atol)


def test_golden_losses_of_answers(golden):
  recorded = arrays('train_losses')
  of = lambda field: recorded[f'sft.normal.{field}']
  rows, masked = of('input_ids'), of('masked')
  answer = np.arange(rows.shape[1]) >= of('prompt_lengths')[:, None]
  times = (1 - 1e-3) * of('t') + 1e-3
  found = maskdiff.loss(
    golden, rows, answer=answer, times=times, masked=np.ones_like(masked)
  )
  assert found > of('loss_smdm_global_norm')  # prompts are not masked
  found = maskdiff.loss(golden, rows, answer=answer, times=times, masked=masked)
  expected = of('loss_smdm_global_norm')
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def training_loss(model, rows, key):
  """Returns the loss of a training step for Rows of [B, L]."""
  c = step.step_config(model.config)
  size = len(rows.tokens)
  with jax.set_mesh(model.mesh):
    sums = jax.jit(step.loss_sums, static_argnums=(0, 5))(
      c, model.params, rows, jnp.arange(size), key, size
    )
  return sums.loss


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['run', 'causal'])
def test_loss_under_a_key_is_that_of_training(request, kind):
  model = request.getfixturevalue(kind)
  tokens = np.random.default_rng(0).integers(8, 250, (8, 6)).astype(np.int32)
  key = jax.random.key(5)
  found = maskdiff.loss(model, tokens, key=key)
  expected = training_loss(model, Rows(tokens), key)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  # Rows with padding and prompts: the columns doc and answer.
  lengths = np.array([6, 3, 4, 5, 6, 1, 2, 6])
  valid = np.arange(6) < lengths[:, None]
  answer = valid & (np.arange(6) > 0)
  found = maskdiff.loss(model, tokens, lengths=lengths, answer=answer, key=key)
  doc = np.where(valid, 0, -1).astype(np.int32)
  expected = training_loss(model, Rows(tokens, doc, answer), key)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_loss_of_a_batch_is_the_mean_over_tokens_of_rows_alone(run):
  masked = [[True, False, True, False, True], [False, True]]
  times = [0.5, 0.25]
  found = maskdiff.loss(run, ROWS[:2], times=times, masked=masked)
  total = sum(
    len(row) * maskdiff.loss(run, [row], times=[t], masked=[of_row])
    for row, t, of_row in zip(ROWS, times, masked, strict=False)
  )
  np.testing.assert_allclose(found, total / 7, rtol=1e-5)


def test_loss_of_a_mask_is_the_weighted_cross_entropy_of_the_logits(model):
  row, masked, t = [9, 10, 11, 12], [True, False, True, True], 0.4
  network = model.network
  causal = network.objective == 'autoregressive'
  shown = row if causal else np.where(masked, network.mask_id, row).tolist()
  log_p = jax.nn.log_softmax(maskdiff.logits(model, [shown]))[0]
  nll = -log_p[jnp.arange(4), jnp.array(row)]
  if causal:
    expected, draws = nll.mean(), {}
  else:
    expected = (nll * np.array(masked)).sum() / t / 4
    draws = {'times': [t], 'masked': [masked]}
  found = maskdiff.loss(model, [row], **draws)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_enumerated_losses_equal_the_enumerated_bound(run):
  """The mean loss over all times and masks is the bound of log_likelihood.

  For a mask of l of 3 tokens, the loss under t times the probability of the
  mask is a polynomial in t, which two Gauss-Legendre nodes integrate exactly.
  """
  row, size = [9, 10, 11], 3
  masks = every_mask.subsets(size)[1:]
  counts = masks.sum(axis=1)
  nodes, node_weights = np.polynomial.legendre.leggauss(2)
  mean = 0
  for t, weight in zip((nodes + 1) / 2, node_weights / 2, strict=True):
    for mask, l in zip(masks, counts, strict=True):
      of_mask = maskdiff.loss(run, [row], times=[t], masked=mask[None])
      mean += weight * t**l * (1 - t) ** (size - l) * of_mask
  # l is uniform on 1..3, and a mask is uniform among those of l tokens.
  p = np.array([1 / size / math.comb(size, l) for l in counts])
  bound = maskdiff.log_likelihood(
    run, [[]], [row], masks=[masks], weights=[p * len(masks) * size / counts]
  )
  np.testing.assert_allclose(-size * mean, bound.log_likelihood, rtol=1e-5)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_a_mask_ratio_determines_the_time(run, schedule):
  config = run.config.copy_and_resolve_references()
  config.objective.schedule = schedule
  changed = dataclasses.replace(run, config=config)
  c = step.step_config(config).objective.schedule
  draws = {'masked': [[True, False, True]]}
  by_time = maskdiff.loss(changed, [[9, 10, 11]], times=[0.3], **draws)
  ratio = [float(c.mask_ratio(jnp.float32(0.3)))]
  by_ratio = maskdiff.loss(changed, [[9, 10, 11]], mask_ratio=ratio, **draws)
  np.testing.assert_allclose(by_time, by_ratio, rtol=1e-5)


def test_functions_can_be_called_inside_jit(run):
  """Parameters of the closure are constants; tokens and draws are arguments."""
  rows, masked = (
    np.array(ROWS[:1]),
    np.array([[True, False, True, True, False]]),
  )

  def loss(rows, times, masked, doc):
    return maskdiff.loss(run, rows, times=times, masked=masked, doc=doc)

  arguments = rows, np.array([0.5]), masked, np.zeros_like(rows)
  found = jax.jit(loss)(*arguments)
  np.testing.assert_allclose(found, loss(*arguments), rtol=1e-6)
  with jax.set_mesh(run.mesh):
    found = jax.jit(lambda rows: maskdiff.logits(run, rows))(rows)
  expected = maskdiff.logits(run, rows)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_lengths_can_be_traced(run):
  rows, lengths = np.array([[9, 10, 11], [12, 13, 0]]), np.array([3, 2])
  draws = {'times': [0.5, 0.5], 'masked': np.ones((2, 3), bool)}
  for function in (
    lambda lengths: maskdiff.logits(run, rows, lengths=lengths),
    lambda lengths: maskdiff.loss(run, rows, lengths=lengths, **draws),
  ):
    found = jax.jit(function)(lengths)
    np.testing.assert_allclose(found, function(lengths), atol=1e-5)


@pytest.mark.slow
def test_gradients_have_the_dtype_of_the_parameters(run):
  half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
  gradient = jax.grad(
    lambda params: maskdiff.loss(
      dataclasses.replace(run, params=params),
      ROWS[:1],
      times=[0.5],
      masked=[[True, False, True, False, False]],
    )
  )
  expected, found = gradient(run.params), gradient(half(run.params))
  leaves = jax.tree.leaves(expected)
  for a, b in zip(jax.tree.leaves(found), leaves, strict=True):
    assert (a.dtype, b.dtype) == (jnp.bfloat16, jnp.float32)
    atol = 0.05 * max(float(jnp.abs(x).max()) for x in leaves)
    np.testing.assert_allclose(a.astype(b.dtype), b, rtol=0, atol=atol)


@pytest.mark.parametrize('weight', ['importance', 'power'])
def test_given_times_have_the_weights_of_the_config(run, weight):
  config = run.config.copy_and_resolve_references()
  config.objective.update(time_density='bell', weight=weight, weight_power=0.5)
  changed = dataclasses.replace(run, config=config)
  c = step.objective_config(config)
  u, row = jnp.array([0.3]), np.array([[9, 10, 11]])
  canvas = masked_diffusion.corrupt(
    c, Rows(row), u, jnp.zeros((1, 3)), jnp.array([3])
  )
  t = canvas.mask_ratio[:, 0]  # of the linear schedule
  draws = {'times': t, 'masked': [[True, False, True]]}
  found = maskdiff.loss(changed, row, **draws)
  expected = maskdiff.loss(run, row, **draws) * t * canvas.weights.max()
  np.testing.assert_allclose(found, expected[0], rtol=1e-5)


def test_times_of_blocks_belong_to_their_tokens(run):
  """A row of 6 tokens has a block of 4 and one of 2."""
  config = run.config.copy_and_resolve_references()
  config.objective.update(name='block_diffusion', block_length=4)
  blocks = dataclasses.replace(run, config=config)
  row, masked = [[9, 10, 11, 12, 13, 14]], np.array([[1, 0, 1, 0, 1, 1]], bool)
  loss = lambda times, masked: maskdiff.loss(
    blocks, row, times=times, masked=masked
  )
  first = np.arange(6) < 4
  expected = loss([0.3], masked & first) + loss([0.6], masked & ~first)
  found = loss([[0.3, 0.6]], masked)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  noise = np.where(masked, 0.2, 0.9)
  ratio = [[0.3, 0.6]]
  by_noise = maskdiff.loss(blocks, row, mask_ratio=ratio, noise=noise)
  np.testing.assert_allclose(by_noise, found, rtol=1e-6)
  with pytest.raises(UserError, match='times is float.*give float of shape'):
    loss([[0.3, 0.6, 0.5]], masked)


# Compilations and errors


def test_equal_shapes_compile_once(run):
  gradient = jax.grad(
    lambda params, rows, t: maskdiff.loss(
      dataclasses.replace(run, params=params),
      rows,
      times=t,
      masked=[[True] * 3],
    )
  )

  def call(rows, t, seed):
    maskdiff.logits(run, rows)
    maskdiff.loss(run, rows, times=t, masked=[[True, False, True]])
    maskdiff.loss(run, [*rows, *rows], key=jax.random.key(seed))
    gradient(run.params, rows, t)

  call([[9, 10, 11]], [0.5], 0)
  before = len(compilations)
  assert before
  call([[12, 13, 14]], [0.7], 1)
  assert len(compilations) == before
  size = maskdiff.library.forward._logits._cache_size()
  maskdiff.logits(run, [[9] * 12])  # padded to the same length
  assert maskdiff.library.forward._logits._cache_size() == size


GIVEN = {'times': [0.5], 'masked': [[True, False]]}
TWO = [[9, 10]]


@pytest.mark.parametrize(
  ('rows', 'arguments', 'message'),
  [
    ([[9, 4096]], {}, 'rows: token id 4096 is outside of the vocabulary'),
    ([[9, -1]], {}, 'row: token id -1 is outside of the vocabulary'),
    (np.array([[9, 2**40]]), {}, f'token id {2**40} is outside'),
    (np.array([[9, 2**64 - 1]], np.uint64), {}, 'is outside of the vocab'),
    ([[9] * 33], {}, 'rows have 33 positions, but .* config.data.length=32'),
    ([[9.0, 10.0]], {}, r'row is float64 of shape \[2\]: token ids must be'),
    ([[True]], {}, 'row is bool of shape'),
    ([[[9]]], {}, r'of shape \[1, 1\]: token ids must be integers with 1 axis'),
    ([[9, [10]]], {}, 'row: token ids must be integers'),
    (np.zeros((1, 2, 3), int), {}, 'integers with 2 axes'),
    ('text', {}, "rows='text': give a list, one element per row"),
    ([], {}, 'rows is empty'),
    ([[]], {}, r'rows have shape \(1, 0\): give at least one token'),
    (['\ud800'], {}, 'row .* lone surrogate'),
    (TWO, {'lengths': [2]}, 'lengths: are for rows that are one array'),
    (np.array(TWO), {'lengths': [3]}, r'lengths=\[3\] must lie in \[0, 2\]'),
    (np.array(TWO), {'lengths': [2, 2]}, r'lengths is int64 of shape \[2\]'),
    (np.array(TWO), {'lengths': [0]}, 'rows have no tokens'),
    (TWO, {'doc': [[0]] * 2}, 'doc: give 1 rows of up to 2 values'),
    (TWO, {'doc': np.zeros((1, 2))}, 'doc is float64 of shape'),
  ],
)
def test_bad_rows_are_one_line(run, rows, arguments, message):
  for function, more in ((maskdiff.logits, {}), (maskdiff.loss, GIVEN)):
    message = message.replace('rows: token', 'rows?: token')
    with pytest.raises(maskdiff.UserError, match=message) as error:
      function(run, rows, **arguments, **more)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('rows', 'arguments', 'message'),
  [
    ([[9, 4]], GIVEN, 'rows contain the mask token, id 4: give clean tokens'),
    (TWO, {}, 'give times or mask_ratio, and masked or noise; or a key'),
    (TWO, {'times': [0.5]}, 'and masked or noise'),
    (TWO, {'times': [0.5], 'noise': [[0.1, 1.0]]}, 'noise has the value 1.0'),
    (TWO, {'times': [0.5], 'noise': [[0.1, math.nan]]}, 'noise has the value'),
    (TWO, {**GIVEN, 'noise': [[0.1, 0.2]]}, 'masked or noise'),
    (TWO, {**GIVEN, 'times': [0.0]}, r'times=\[0.0\] must lie in \(0, 1\]'),
    (TWO, {**GIVEN, 'times': [math.nan]}, 'must lie in'),
    (TWO, {**GIVEN, 'times': [0.5, 0.5]}, r'give float of shape \[1\]'),
    (TWO, {**GIVEN, 'masked': [[1, 0]]}, 'masked is int64 .* give bool'),
    (TWO, {**GIVEN, 'answer': [[1, 0]]}, 'answer is int64 .* give bool'),
    (TWO, {**GIVEN, 'key': 0}, 'leave out times and masked'),
    (TWO, {'key': 0}, 'give an even number'),
    (TWO, {'key': -1}, 'key=-1: give one key of jax.random.key, or an'),
    (TWO, {'key': np.zeros(2)}, 'give one key'),
    (TWO, {**GIVEN, 'masked': 5}, 'masked: give 1 rows of up to 2 values'),
  ],
)
def test_bad_draws_are_one_line(run, rows, arguments, message):
  with pytest.raises(maskdiff.UserError, match=message):
    maskdiff.loss(run, rows, **arguments)


def test_masks_are_refused_by_an_autoregressive_model(causal):
  with pytest.raises(maskdiff.UserError, match='has no random draws'):
    maskdiff.loss(causal, TWO, **GIVEN)


def test_rows_without_answers_have_no_loss(run, causal):
  none = {'answer': [[False] * 2]}
  message = 'set `answer` to True'
  with pytest.raises(maskdiff.UserError, match=message):
    maskdiff.loss(run, TWO, **GIVEN, **none)
  loss = lambda params: maskdiff.loss(
    dataclasses.replace(causal, params=params), TWO, **none
  )
  with pytest.raises(maskdiff.UserError, match=message):
    jax.grad(loss)(causal.params)
  assert np.isnan(jax.jit(loss)(causal.params))


def with_windows(causal):
  config = causal.config.copy_and_resolve_references()
  config.objective.update(name='sdlm', window_length=4)
  return dataclasses.replace(causal, config=config)


def test_draw_without_a_window_has_no_loss(causal):
  """A row of four tokens has one window of four, unless it is shifted."""
  model, row, finite = with_windows(causal), [[9, 10, 11, 12]], []
  for key in range(8):
    try:
      finite.append(np.isfinite(maskdiff.loss(model, row, key=key)))
    except maskdiff.UserError as error:
      assert 'give longer rows, more answers or another key' in str(error)
  assert 0 < len(finite) < 8 and all(finite)


def test_loss_of_windows_needs_a_key_and_rows_with_a_window(causal):
  model = with_windows(causal)
  with pytest.raises(maskdiff.UserError, match='windows: give a key'):
    maskdiff.loss(model, ROWS)
  with pytest.raises(maskdiff.UserError, match='shorter than .*=4: give'):
    maskdiff.loss(model, ROWS[1:], key=0)
  with pytest.raises(maskdiff.UserError, match='has no random masks'):
    maskdiff.loss(model, ROWS, masked=[[True] * 5] * 3)
