"""SDLM: windows of several tokens, against single windows and published code.

Published code puts the clean copy first, and does not shift it: the anchor of a
window at position a has the token a, and its first target is the token a + 1.
"""

import dataclasses
import pathlib
import runpy

import golden_models
import golden_sdlm
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import GOLDEN
from objective_cases import (
  CONFIG,
  DOC,
  TINY,
  check_rows_do_not_depend_on_devices_or_parts,
  log_probabilities,
  make_canvas,
  packed,
  random_tokens,
  stored,
  strong_params,
)

from maskdiff.data.rows import Rows
from maskdiff.model import masks, splash_masks, transformer
from maskdiff.objectives import sdlm, table
from maskdiff.objectives.canvas import canvas_loss
from maskdiff.objectives.sdlm import Clean
from maskdiff.training import step

SDLM = dataclasses.replace(CONFIG, name='sdlm', window_length=4)
CAUSAL = dataclasses.replace(SDLM, window_attention='causal')
PARAMS = strong_params(TINY)
IGNORED = -100


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN / 'sdlm.npz') as file:
    return dict(file)


def published_order(x, length):
  """Moves the clean copy of [windows ; clean] to the front; x is [..., M]."""
  return np.concatenate([x[..., -length:], x[..., :-length]], axis=-1)


# Published code


def test_published_masks_and_positions(golden):
  for i in range(sum(name.startswith('train_mask') for name in golden) // 6):
    case = lambda name, i=i: golden[f'train_mask.{i}.{name}']
    length, size = int(case('n')), int(case('block_size'))
    starts = jnp.asarray(case('anchors'))[None]
    for causal, name in ((False, 'allowed'), (True, 'allowed_causal_window')):
      labels = masks.concatenate(
        masks.windows(jnp.zeros_like(starts), starts, size, causal),
        masks.causal(jnp.ones((1, length), bool)),
      )
      seen = masks.visible(labels, labels)[0]
      seen = published_order(published_order(seen, length).T, length).T
      np.testing.assert_array_equal(seen, case(name))
      pos = published_order(np.asarray(labels.pos[0]), length)
      np.testing.assert_array_equal(pos, case('position_ids'))


def test_published_training_forward(golden):
  """The loss, also by position in the window, and gradients.

  Published labels of a window reach into the first place of the next window,
  which predicts nothing. The last window has no next one and loses its last
  target; here it keeps it. Published targets end at the first eos, as the
  column `answer` does here.
  """
  mask_id, eos_id, _, size = (int(x) for x in golden['ids'])
  clean = golden['packed.clean']
  length = clean.shape[1]
  c = dataclasses.replace(
    SDLM, window_length=size, mask_id=mask_id, predict_mask=True
  )
  is_eos = clean == eos_id
  before_eos = np.cumsum(is_eos, axis=1) - is_eos == 0
  left = lambda x, last: np.pad(
    x[:, 1:], ((0, 0), (0, 1)), constant_values=last
  )
  clean = Clean(
    jnp.asarray(clean),
    jnp.zeros_like(clean),
    jnp.asarray(left(clean, 0)),
    jnp.asarray(left(before_eos, False)),
  )
  canvas = sdlm.at_starts(c, clean, jnp.asarray(golden['packed.anchors']))
  np.testing.assert_array_equal(
    published_order(canvas.inputs, length), golden['packed.input_ids']
  )
  np.testing.assert_array_equal(
    published_order(canvas.labels.pos, length), golden['packed.position_ids']
  )
  labels = left(golden['packed.labels'], IGNORED)[:, length:]
  scored = np.asarray(canvas.weights) > 0
  published = labels != IGNORED
  np.testing.assert_array_equal(scored[:, :-1], published[:, :-1])
  assert not published[:, -1].any()  # although it may be scored here
  np.testing.assert_array_equal(
    np.asarray(canvas.targets)[published], labels[published]
  )
  canvas = dataclasses.replace(
    canvas, weights=jnp.asarray(published / published.sum(), jnp.float32)
  )
  network = golden_models.window_network(size)

  def loss(params):
    model = transformer.bind(network.config, params)
    total, nll = canvas_loss(c, model, canvas)
    return total, (nll, model.logits(model(canvas.inputs, canvas.labels)))

  with jax.default_matmul_precision('highest'):
    (total, (nll, logits)), gradients = jax.value_and_grad(loss, has_aux=True)(
      network.params
    )
  logits = published_order(np.moveaxis(logits, 1, 2), length)
  expected = np.moveaxis(golden['packed.logits'], 1, 2)
  np.testing.assert_allclose(logits, expected, atol=2e-4)
  assert total == pytest.approx(golden['packed.loss'], rel=1e-5)
  sums = step.summarize(c, canvas, total, nll)
  np.testing.assert_allclose(
    (sums.window_nll / sums.window_count)[:4],
    golden['packed.pos_loss'],
    rtol=1e-5,
  )
  assert sums.window_count.sum() == sums.num_predicted == published.sum()
  norms = golden_sdlm.gradient_norms(gradients)
  total = np.linalg.norm(list(norms.values()))
  for name, norm in norms.items():
    expected = golden[f'packed.gradnorm.{name}']
    assert norm == pytest.approx(expected, rel=1e-4, abs=1e-6 * total), name


# Windows


def log_p_of(canvas):
  return np.asarray(
    log_probabilities(TINY, PARAMS, canvas.inputs, canvas.labels)
  )


def single_windows(c, row, starts, sees_anchor=False):
  """Returns log-probabilities of each window, computed after its prefix only.

  Args:
    c: ObjectiveConfig.
    row: [L] int32, a row of one document.
    starts: first positions of windows.
    sees_anchor: whether a window also sees the clean copy of its anchor.
  """
  found = []
  shifted = np.array([c.bos_id, *row])
  for start in starts:
    inputs = np.full(start + c.window_length, c.mask_id)
    inputs[: start + 1] = shifted[: start + 1]
    pos = np.arange(len(inputs))
    if sees_anchor:
      inputs, pos = (
        np.insert(inputs, start, shifted[start]),
        np.insert(pos, start, start),
      )
    number = start + sees_anchor
    inside = np.arange(len(inputs)) >= number
    block = -2 if c.window_attention == 'causal' else 0
    labels = masks.Labels(
      *(
        jnp.asarray(x, jnp.int32)[None]
        for x in (
          np.zeros(len(inputs)),
          pos,
          np.where(inside, block, -1),
          np.where(inside, number, pos + 1),
        )
      )
    )
    log_p = log_probabilities(TINY, PARAMS, jnp.asarray(inputs)[None], labels)
    found.append(np.asarray(log_p)[0, number:])
  return np.concatenate(found)


@pytest.mark.parametrize('c', [SDLM, CAUSAL], ids=lambda c: c.window_attention)
def test_training_rows_equal_single_windows(c):
  row = random_tokens(1, 8)
  clean = sdlm.clean_copy(c, Rows(row))
  for starts, canvas in (
    ([0, 4], sdlm.at_stride(c, clean)),
    ([1, 2, 7], sdlm.at_starts(c, clean, jnp.array([[1, 2, 7]]))),
  ):
    found = log_p_of(canvas)[0, : len(starts) * c.window_length]
    expected = single_windows(c, np.asarray(row[0]), starts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
  wrong = single_windows(c, np.asarray(row[0]), [1, 2, 7], sees_anchor=True)
  assert abs(wrong - expected).max() > 0.1


def test_masked_rows_show_a_window_at_every_clean_token():
  """The windows of `show_masked`; the last extends beyond the row."""
  row, masked = random_tokens(1, 7), np.array([[0, 0, 1, 1, 1, 0, 1]], bool)
  inputs, labels = sdlm.show_masked(SDLM, row, masked, jnp.ones((1, 7), bool))
  found = np.asarray(log_probabilities(TINY, PARAMS, inputs, labels))[0]
  expected = single_windows(SDLM, np.asarray(row[0]), [1, 5])
  np.testing.assert_allclose(found[1:5], expected[:4], atol=1e-5)
  np.testing.assert_allclose(found[5:9], expected[4:], atol=1e-5)


@pytest.mark.parametrize('c', [SDLM, CAUSAL], ids=lambda c: c.window_attention)
def test_stride_is_a_regime_with_the_same_labels(c):
  clean = sdlm.clean_copy(c, stored(1))
  short = jax.tree.map(lambda x: x[:, :8], clean)
  regime = sdlm.at_stride(c, short)
  general = sdlm.at_starts(c, short, jnp.array([[0, 4]]))
  assert regime.labels.regime and not general.labels.regime
  seen = lambda canvas: masks.visible(canvas.labels, canvas.labels)
  text = np.asarray(regime.labels.doc[0] >= 0)
  np.testing.assert_array_equal(
    seen(regime)[:, text][..., text], seen(general)[:, text][..., text]
  )
  for field in ('inputs', 'targets', 'weights', 'num_tokens'):
    np.testing.assert_array_equal(
      getattr(regime, field), getattr(general, field)
    )
  # Of bidirectional windows, splash computes the mask in the kernel.
  mask = splash_masks.make_mask(regime.labels.regime, 16)
  assert isinstance(mask, splash_masks.BlocksMask) == (c is SDLM)
  row = masks.row(regime.labels.regime, 16)
  np.testing.assert_array_equal(mask[:, :], masks.visible(row, row)[0])


def test_windows_of_one_token_are_autoregression():
  one = dataclasses.replace(SDLM, window_length=1)
  tokens, key = random_tokens(4, 8), jax.random.key(0)
  canvas = make_canvas(one, tokens, jnp.arange(4), key, 4)
  causal = dataclasses.replace(one, name='autoregressive')
  expected = make_canvas(causal, tokens, jnp.arange(4), key, 4)
  jax.tree.map(np.testing.assert_array_equal, canvas, expected)
  # Windows of one token that are computed as windows.
  clean = sdlm.clean_copy(one, Rows(tokens))
  starts = jnp.tile(jnp.arange(8), (4, 1))
  windows = sdlm.at_starts(one, clean, starts)
  np.testing.assert_array_equal(windows.weights, expected.weights)
  np.testing.assert_allclose(
    log_p_of(windows)[:, :8], log_p_of(expected), atol=1e-5
  )


# Anchors


def test_shifts_use_every_window_of_a_row_once():
  """The mean loss over the shifts is that over all windows within the row."""
  length, size = 12, SDLM.window_length
  index = jnp.arange(length, dtype=jnp.int32)[None]  # a token is its position
  clean = sdlm.clean_copy(SDLM, Rows(index))
  found = []
  for shift in range(size):
    canvas = sdlm.at_stride(SDLM, sdlm.shifted(clean, jnp.array([shift])))
    windows = np.asarray(canvas.targets).reshape(-1, size)
    weights = np.asarray(canvas.weights).reshape(-1, size)
    assert ((weights == 1).all(axis=1) | (weights == 0).all(axis=1)).all()
    windows = windows[weights[:, 0] > 0]
    np.testing.assert_array_equal(
      windows - windows[:, :1], [range(size)] * len(windows)
    )
    assert canvas.num_tokens == windows.size
    found += windows[:, 0].tolist()
  assert sorted(found) == list(range(length - size + 1))


def test_random_anchors_are_answers_without_replacement():
  c = dataclasses.replace(SDLM, anchors='random', window_repeats=2.0)
  random = np.random.default_rng(0)
  answer = jnp.asarray(random.random((64, 32)) < 0.6)
  noise = jnp.asarray(random.random((64, 32)), jnp.float32)
  starts = np.asarray(sdlm.random_starts(c, answer, noise))
  assert starts.shape == (64, sdlm.num_windows(c, 32)) == (64, 16)
  counts = np.zeros(32)
  for row, of_row in zip(starts, np.asarray(answer), strict=True):
    found = row[row < 32]
    assert len(set(found)) == len(found) == int(2.0 * of_row.sum()) // 4
    assert of_row[found].all() and (np.diff(row) >= 0).all()
    counts[found] += 1
  assert counts.min() > 0
  every = dataclasses.replace(c, window_repeats=9.0)
  starts = np.asarray(sdlm.random_starts(every, answer, noise))
  np.testing.assert_array_equal((starts < 32).sum(axis=1), answer.sum(axis=1))


def test_targets_end_with_the_document_and_the_answer():
  """Token 3 ends document 0; tokens 1 to 5 and 7 to 9 are answers."""
  doc = jnp.asarray([[0] * 4 + [1] * 6], jnp.int32)
  answer = jnp.asarray([[0, 1, 1, 1, 1, 1, 0, 1, 1, 1]], bool)
  rows = Rows(jnp.zeros((1, 10), jnp.int32), doc, answer)
  c = dataclasses.replace(SDLM, attend_within='document')
  starts = jnp.array([[0, 2, 4, 7, 9, 10]])
  canvas = sdlm.at_starts(c, sdlm.clean_copy(c, rows), starts)
  expected = [
    [0, 0, 0, 0],  # begins in a prompt
    [1, 1, 0, 0],  # to the end of the document
    [1, 1, 0, 0],  # to the end of the answer
    [1, 1, 1, 0],  # to the end of the row
    [1, 0, 0, 0],
    [0, 0, 0, 0],  # beyond the row
  ]
  np.testing.assert_array_equal(canvas.weights.reshape(-1, 4), expected)
  assert canvas.num_tokens == 8
  # A document begins with bos, and a window sees its own document only.
  assert canvas.inputs[0, 2 * 4] == c.bos_id
  seen = masks.visible(canvas.labels, canvas.labels)[0]
  np.testing.assert_array_equal(seen[12][-10:], [0] * 4 + [1] * 3 + [0] * 3)


@pytest.mark.parametrize('anchors', ['stride', 'random'])
def test_predictions_depend_on_their_prefix_only(anchors):
  """Changing a token changes no window before it, and no other document."""
  c = dataclasses.replace(SDLM, anchors=anchors, attend_within='document')
  c = dataclasses.replace(c, window_length=2)
  rows = Rows(packed(1))

  def outputs(tokens):
    canvas = make_canvas(
      c, rows._replace(tokens=tokens), jnp.arange(1), jax.random.key(3), 1
    )
    number = canvas.targets.shape[1]
    return log_p_of(canvas)[0, :number], canvas

  before, canvas = outputs(rows.tokens)
  number = canvas.targets.shape[1]
  pos = np.asarray(canvas.labels.reach)[0, :number]
  shift = int((np.asarray(canvas.labels.doc)[0, number:] < 0).sum())
  changed = 5 + shift  # the place of token 5, in the last document
  after, _ = outputs(rows.tokens.at[0, 5].set(0))
  differs = (abs(after - before) > 1e-6).any(axis=1)
  text = np.asarray(canvas.labels.doc)[0, :number] >= 0
  assert not differs[text & (pos <= changed)].any()
  late = text & (pos > changed)
  assert differs[late].all() and late.any()
  assert (DOC[5:] == DOC[5]).all()


@pytest.mark.parametrize('anchors', ['stride', 'random'])
def test_rows_do_not_depend_on_devices_or_parts(anchors):
  c = dataclasses.replace(SDLM, anchors=anchors)
  check_rows_do_not_depend_on_devices_or_parts(
    lambda tokens, numbers: make_canvas(
      c, tokens, numbers, jax.random.key(1), 64
    )
  )


@pytest.mark.parametrize('c', [SDLM, CAUSAL], ids=lambda c: c.window_attention)
def test_pairs_copies_and_targets_are_those_of_the_labels(c):
  length = 16
  clean = sdlm.clean_copy(c, Rows(random_tokens(1, length)))
  canvas = sdlm.at_stride(c, clean)
  pairs = masks.visible(canvas.labels, canvas.labels).sum()
  objective = table.OBJECTIVES['sdlm']
  assert objective.visible_pairs(c, length) * length**2 == pairs
  assert objective.copies(c, length) * length == canvas.inputs.shape[1]
  assert objective.targets(c, length) * length == canvas.targets.shape[1]
  # With random windows, on average over their positions.
  c = dataclasses.replace(c, anchors='random', window_repeats=2.0)
  starts = jnp.array([[0, 2, 4, 5, 7, 8, 10, 12]])
  canvas = sdlm.at_starts(c, clean, starts)
  pairs = masks.visible(canvas.labels, canvas.labels).sum()
  assert objective.visible_pairs(c, length) * length**2 == pairs
  assert objective.copies(c, length) * length == canvas.inputs.shape[1]
  assert objective.targets(c, length) * length == canvas.targets.shape[1]


def test_flops_of_longer_rows():
  """The figures of docs/speculation.md for configs/8b.py."""
  path = pathlib.Path(__file__).parents[2] / 'configs' / '8b.py'
  config = step.step_config(runpy.run_path(str(path))['get_config']())

  def flops(**changes):
    c = dataclasses.replace(config.objective, **changes)
    return table.flops_per_token(c, config.model, config.length)

  causal = flops(name='autoregressive')
  for size in (4, 16):
    stride = flops(name='sdlm', window_length=size)
    assert stride / causal == pytest.approx(1.94, abs=0.005)
    random = flops(name='sdlm', window_length=size, anchors='random')
    assert random / causal == pytest.approx(3.94, abs=0.005)
  one = flops(name='sdlm', window_length=1)
  assert one == causal
