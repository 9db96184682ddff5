"""The objective of drafters: windows, weights, loss, and what it trains."""

import dataclasses

import drafter_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from objective_cases import CONFIG, PACKED, make_canvas
from slow import SLOW

from maskdiff import config as config_lib
from maskdiff.data.rows import Rows
from maskdiff.errors import UserError
from maskdiff.model import drafter
from maskdiff.model.trainable import trainable
from maskdiff.model.transformer import bind
from maskdiff.objectives import drafting, table
from maskdiff.training import step as step_lib
from maskdiff.training import train_state
from maskdiff.training.guard import GuardConfig
from maskdiff.training.optimizer import make_optimizer

DRAFTING = dataclasses.replace(
  CONFIG, name='drafting', window_length=4, bos_id=2, draft_decay=0.5
)
TOKENS = jax.random.randint(jax.random.key(3), (8, 12), 0, 3)


def canvas_of(c, rows, key=0, batch=None):
  batch = batch or len(rows.tokens)
  numbers = jnp.arange(len(rows.tokens))
  return make_canvas(c, rows, numbers, jax.random.key(key), batch)


@pytest.mark.parametrize('anchors', ['stride', 'random'])
def test_drafts_stay_within_the_answers_of_a_document(anchors):
  """PACKED has documents of 4, 1 and 5 tokens; the last is no answer."""
  c = dataclasses.replace(
    DRAFTING, anchors=anchors, attend_within='document', draft_decay=1.0
  )
  answer = np.arange(10) < 9
  doc = np.array([0, 0, 0, 0, 1, 2, 2, 2, 2, 2])
  tile = lambda x: jnp.tile(jnp.asarray(x), (64, 1))
  rows = Rows(tile(PACKED.astype(np.int32)), tile(doc), tile(answer))
  canvas = canvas_of(c, rows)
  weights = np.asarray(canvas.weights).reshape(64, -1, 3)
  found = {
    int(start): row.sum()
    for starts, of_row in zip(canvas.starts, weights, strict=True)
    for start, row in zip(starts, of_row, strict=True)
    if start < 10
  }
  # Windows begin after the first token of a document, and end with it.
  drafts = {1: 3, 2: 2, 3: 1, 6: 3, 7: 2, 8: 1}
  none = {4: 0, 5: 0, 9: 0} if anchors == 'stride' else {}
  assert {s: n for s, n in found.items() if s in drafts | none} == drafts | none


def test_a_stride_drafts_every_token_equally_often():
  rows = Rows(jnp.zeros((4096, 64), jnp.int32))
  canvas = canvas_of(DRAFTING, rows)
  starts = np.asarray(canvas.starts)
  assert ((starts[:, 1:] - starts[:, :-1]) == 4).all()
  count = np.bincount(starts[starts < 64], minlength=64)[1:]
  assert np.all(np.abs(count / 1024 - 1) < 0.15)


def test_weights_decay_from_draft_to_draft():
  canvas = canvas_of(DRAFTING, Rows(TOKENS))
  weights = np.asarray(canvas.weights).reshape(8, -1, 3)
  whole = weights[:, :-1]  # no window is cut, except the last of a row
  np.testing.assert_array_equal(
    whole, np.broadcast_to([1, 0.5, 0.25], whole.shape)
  )
  np.testing.assert_allclose(canvas.num_tokens, weights.sum((1, 2)))


def loss_of(kind, c, canvas):
  model = bind(cases.model(kind), cases.params(kind))
  return jax.jit(lambda: table.loss(c, model, canvas))()


@pytest.mark.parametrize('kind', ['medusa', SLOW('mtp'), SLOW('block')])
@pytest.mark.parametrize('weight', [0.5, SLOW(0.0)])
def test_loss_is_the_mean_over_drafts_and_next_tokens(kind, weight):
  c = dataclasses.replace(DRAFTING, autoregressive_weight=weight, mask_id=12)
  canvas = canvas_of(c, Rows(TOKENS))
  total, nll = loss_of(kind, c, canvas)
  model = bind(cases.model(kind), cases.params(kind))
  hidden, states = drafter.windows(
    model, canvas.inputs, canvas.labels, canvas.starts
  )
  log_p = lambda x: np.asarray(
    jax.nn.log_softmax(jnp.where(jnp.arange(13) == 12, -jnp.inf, x))
  )
  drafts, following = (
    log_p(drafter.logits(model, states)),
    log_p(model.logits(hidden)),
  )
  rows = np.arange(8)
  expected = weights = 0
  for w in range(canvas.starts.shape[1]):
    for j in range(3):
      at = np.asarray(canvas.starts)[:, w] + j
      inside = at < 12
      target = np.asarray(TOKENS)[rows, np.minimum(at, 11)]
      of_draft = -drafts[rows, w, j, target]
      expected += 0.5**j * of_draft[inside].sum()
      weights += 0.5**j * inside.sum()
  next_nll = -np.take_along_axis(following, np.asarray(TOKENS)[..., None], 2)
  found = total / canvas.num_tokens.sum()
  scale = drafting.next_weight(c, 12) * 96 / weights
  np.testing.assert_allclose(
    found, expected / weights + scale * next_nll.mean(), rtol=1e-5
  )
  assert scale == pytest.approx(weight, rel=0.2)  # equal but for cut windows
  assert nll.shape[1] == canvas.weights.shape[1] + 12 * (weight > 0)


def step_config(kind, frozen, microbatches=1):
  weight = 0.0 if frozen else 1.0
  return step_lib.StepConfig(
    model=cases.model(kind, frozen=frozen),
    objective=dataclasses.replace(
      DRAFTING, autoregressive_weight=weight, mask_id=12
    ),
    length=12,
    microbatches=microbatches,
    guard=GuardConfig(0.0),
  )


@pytest.mark.parametrize('kind', [SLOW('medusa'), 'mtp', SLOW('block')])
@pytest.mark.parametrize('frozen', [True, SLOW(False)])
def test_step_trains_the_drafter_or_both(kind, frozen):
  """Without a weight of next tokens the network does not change by a bit."""
  c = step_config(kind, frozen)
  optimizer = make_optimizer(
    tiny.OPTIMIZER, 10, trainable(c.model, step_lib.transformer.axes(c.model))
  )
  state = train_state.from_params(c.model, optimizer, cases.params(kind))
  step = jax.jit(lambda s, r, k: step_lib.train_step(c, optimizer, s, r, k))
  after, metrics = step(state, Rows(TOKENS), jax.random.key(0))
  assert not metrics.skipped and np.isfinite(metrics.sums.loss)
  changed = {
    name: max(
      float(jnp.abs(a - b).max())
      for a, b in zip(
        jax.tree.leaves(after.params[name]),
        jax.tree.leaves(state.params[name]),
        strict=True,
      )
    )
    for name in state.params
  }
  assert changed.pop('drafter') > 0
  assert all((x == 0) == frozen for x in changed.values())
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  moments = size(state.opt_state)
  trained = size(trainable(c.model, state.params))
  assert 2 * trained <= moments < 2 * trained + 10


@pytest.mark.slow
@pytest.mark.parametrize('kind', cases.KINDS)
def test_microbatches_change_no_gradient(kind):
  def gradients(parts):
    c = step_config(kind, False, parts)
    return jax.jit(
      lambda params: step_lib.batch_gradients(
        c, params, Rows(TOKENS), jax.random.key(0)
      )
    )(cases.params(kind))

  (whole, sums), (parts, of_parts) = gradients(1), gradients(4)
  np.testing.assert_allclose(of_parts.loss, sums.loss, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4),
    parts,
    whole,
  )


def test_flops_count_the_passes_that_are_trained():
  """Against the FLOPs of the objectives that a case reduces to."""
  c = dataclasses.replace(DRAFTING, window_length=4)
  plain = dataclasses.replace(CONFIG, name='autoregressive')
  causal = table.flops_per_token(plain, cases.PLAIN, 64)
  head = 6 * cases.PLAIN.vocab_size * cases.PLAIN.embed
  drafts = 3 / 4 * head  # three drafts for four tokens
  medusa = table.flops_per_token(c, cases.model('medusa'), 64)
  residuals = 6 / 4 * 3 * cases.PLAIN.embed**2
  forward = (causal - head) / 3
  norms = 7 * cases.PLAIN.embed  # counted by one rule as weights
  assert medusa == pytest.approx(forward + drafts + residuals, abs=2 * norms)
  joint = dataclasses.replace(c, autoregressive_weight=1.0)
  found = table.flops_per_token(joint, cases.model('medusa', frozen=False), 64)
  assert found == pytest.approx(causal + drafts + residuals, abs=6 * norms)
  # No gradient by a vocabulary matrix that is not trained.
  mtp = lambda frozen: table.flops_per_token(
    dataclasses.replace(c, autoregressive_weight=0.0 if frozen else 1.0),
    cases.model('mtp', frozen=frozen),
    64,
  )
  saved = forward * 2 + head + drafts / 3
  assert mtp(False) - mtp(True) == pytest.approx(saved, abs=4 * norms)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'drafter.kind': 'none'}, 'a drafter is trained with objective drafting'),
    ({'objective.name': 'autoregressive'}, 'set both --config.objective.name'),
    ({'objective.window_length': 1}, 'window_length to at least 2'),
    ({'objective.window_length': 99}, 'longer than the rows'),
    ({'drafter.kind': 'mtp'}, 'set --config.drafter.kind=medusa'),
    ({'lora.rank': 4}, 'train one after the other'),
    ({'train.ema_decay': 0.9}, 'set --config.train.ema_decay=0'),
    ({'objective.denominator': 'row'}, 'set --config.objective.denominator='),
    (
      {'sample.remasking': 'low_confidence'},
      'set config.sample.remasking=spec',
    ),
  ],
)
def test_configs_that_do_not_fit_name_the_fix(changes, message):
  drafting = {
    'objective.name': 'drafting',
    'drafter.kind': 'medusa',
    'sample.remasking': 'speculative',
  }
  config_lib.validate(tiny.config(tiny.TRAIN_KEYS | drafting))
  with pytest.raises(UserError, match=message):
    config_lib.validate(tiny.config(tiny.TRAIN_KEYS | drafting | changes))
