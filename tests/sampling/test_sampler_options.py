"""Settings of the sampler: eos, guidance, counts, seeds, damaged weights."""

import dataclasses

import fake_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled

from maskdiff.errors import UserError
from maskdiff.sampling import candidates, commit, layouts, remasking
from maskdiff.sampling.request import Request
from maskdiff.sampling.settings import per_row, split

MASK, EOS, EOT, VOCAB = 4, 5, 6, 16
PLAIN = dict(
  steps=8,
  block_length=4,
  temperature=1.0,
  remasking='low_confidence',
  eot_id=EOT,
  gen_length=8,
)
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15], []]


def config(**changes):
  return {**PLAIN, **changes}


def mixing(table, tokens, valid):
  """Returns logits that sum votes of all tokens, weighted by distance."""
  where = jnp.arange(tokens.shape[1])
  near = 0.5 ** jnp.abs(where[:, None] - where)  # [L, L]
  votes = jnp.where(valid[..., None], table[tokens], 0.0)
  return jnp.einsum('ij,bjv->biv', near, votes)


def certain(answer, tokens, valid):
  """Returns logits that give `answer` nearly all probability."""
  return 50.0 * jax.nn.one_hot(answer, VOCAB)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
  fake_networks.put_in(monkeypatch)


@pytest.fixture
def table():
  """Returns params of `mixing`: votes of each token; masks have none."""
  random = np.random.default_rng(0)
  votes = random.normal(size=(VOCAB, VOCAB)) * 3
  votes[:, EOS] = 1
  votes[MASK] = 0
  return jnp.asarray(votes, jnp.float32)


def network_of(function, params):
  return fake_networks.network(function, params, mask_id=MASK, eos_id=EOS)


def complete(c, params, request, function=mixing):
  return sampled.complete(network_of(function, params), c, request)


# A request alone and in a batch


OPTIONS = {
  'threshold': dict(remasking='threshold', threshold=0.4),
  'factor': dict(remasking='factor', factor=0.7, confidence='margin'),
  'ancestral': dict(remasking='ancestral', schedule='cosine'),
  'first_hitting': dict(remasking='first_hitting'),
  'cosine_entropy': dict(schedule='cosine', confidence='entropy', steps=4),
  'nucleus': dict(top_p=0.8, top_k=5),
  'guided': dict(guidance=0.8),
  'eos': dict(stop_at_eos=True, confidence_eos_eot_inf=True, eot_id=EOT),
}
FAST = ('eos',)


def filled_together_and_alone(c, given, texts, seeds, rows):
  """Returns the last Carry; asserts that `rows` sampled alone are the same."""
  encode = lambda text: [7 + ord(letter) % 9 for letter in text]
  request = layouts.fill_gaps(texts, encode, seeds)
  together = complete(c, given, request)
  for row in rows:
    alone = layouts.fill_gaps([texts[row]], encode, [seeds[row]])
    alone = complete(c, given, alone)
    np.testing.assert_array_equal(
      alone.canvas[0], together.canvas[row][request.valid[row]]
    )
    assert alone.forwards[0] == together.forwards[row]
  return together


@pytest.mark.parametrize(
  'options',
  [
    pytest.param(o, marks=() if o in FAST else pytest.mark.slow)
    for o in OPTIONS
  ],
)
def test_request_does_not_depend_on_the_batch(table, options):
  """Rows, prompts, gaps and padding have different lengths."""
  c = config(**OPTIONS[options])
  texts = ['ab{{2}}c{{5}}d', '{{1}}abcdefg', 'hi{{3}}{{1}}', 'a{{8}}b']
  together = filled_together_and_alone(c, table, texts, [3, 4, 5, 6], (0, 2))
  assert int(together.calls) * (2 if c.get('guidance') else 1) >= max(
    together.forwards
  )


@pytest.mark.slow
@pytest.mark.parametrize('steps', [0, 3])
@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_gaps_do_not_depend_on_longer_gaps_in_the_batch(table, options, steps):
  """With gen_length=0, the steps are divided over the slots of each row."""
  own = dict(gen_length=0, steps=steps)
  c = config(**{**options, **own})
  texts = ['ab{{2}}c', 'a{{9}}bc', '{{5}}']
  filled_together_and_alone(c, table, texts, [3, 4, 5], range(3))


@pytest.mark.parametrize(
  'steps, forwards',
  [(0, [2, 9]), (2, [2, 3]), (6, [2, 5]), (60, [2, 9])],
  ids=['one per slot', 'one per block', 'two per block', 'more than slots'],
)
def test_gaps_have_their_own_steps(table, steps, forwards):
  """Two slots take one block of four, nine slots take three blocks."""
  c = config(steps=steps, gen_length=0)
  request = layouts.fill_gaps(['{{2}}', '{{9}}'], lambda text: [])
  assert complete(c, table, request).forwards.tolist() == forwards


# Number of forward passes


def test_quota_takes_one_forward_pass_per_step_or_token(table):
  request = layouts.continue_prompts(PROMPTS, 8)
  for steps, forwards in ((4, 4), (80, 8)):
    carry = complete(config(steps=steps), table, request)
    assert int(carry.calls) == forwards
    assert carry.forwards.tolist() == [forwards] * 4


def test_guidance_takes_two_forward_passes_per_step(table):
  request = layouts.continue_prompts(PROMPTS, 8)
  carry = complete(config(guidance=1.0), table, request)
  assert int(carry.calls) == 8
  assert carry.forwards.tolist() == [16] * 4


@pytest.mark.slow
@pytest.mark.parametrize('rule', ['threshold', 'factor'])
def test_lower_bounds_take_fewer_forward_passes(table, rule):
  request = layouts.continue_prompts(PROMPTS, 8)
  levels = {'threshold': (1.1, 0.25, 0.0), 'factor': (0.0, 2.3, 99.0)}
  forwards = [
    complete(config(remasking=rule, **{rule: x}), table, request).forwards
    for x in levels[rule]
  ]
  forwards = [int(x.sum()) for x in forwards]
  assert forwards[0] == 4 * 8  # 4 rows, one token per pass
  assert forwards[-1] == 4 * 2  # 4 rows, one block per pass
  assert forwards[0] > forwards[1] > forwards[2]


def test_threshold_above_1_equals_low_confidence(table):
  request = layouts.continue_prompts(PROMPTS, 8)
  c = config(remasking='threshold', threshold=1.1, steps=2)
  one_by_one = complete(config(), table, request)
  np.testing.assert_array_equal(
    complete(c, table, request).canvas, one_by_one.canvas
  )


def test_first_hitting_takes_one_forward_pass_per_token(table):
  request = layouts.continue_prompts(PROMPTS, 8)
  c = config(remasking='first_hitting', steps=2)
  assert int(complete(c, table, request).calls) == 8


def test_cosine_schedule_commits_few_tokens_first(table):
  request = layouts.continue_prompts([[7]], 16)
  c = config(steps=4, block_length=16, gen_length=16, schedule='cosine')
  canvases = sampled.trace(network_of(mixing, table), c, request)
  left = [int((canvas == MASK).sum()) for canvas in canvases]
  assert left == [16, 14, 11, 6, 0]  # 16 cos(pi/2 i/4), rounded down


# Guidance


def votes(bias, tokens, valid):
  """Returns logits that count the tokens of the row."""
  seen = jax.nn.one_hot(tokens, VOCAB).sum(axis=1, keepdims=True)
  return jnp.broadcast_to(seen + bias, (*tokens.shape, VOCAB))


def test_guidance_extrapolates_from_the_masked_prompt():
  bias = jnp.zeros(VOCAB).at[9].set(2.5)  # 9 wins without a prompt
  request = layouts.continue_prompts([[7, 7]], 1)
  for guidance, token in ((0.0, 9), (0.2, 9), (0.3, 7)):
    c = config(temperature=0.0, steps=2, guidance=guidance)
    # The logit of 7 is 2 (w + 1); that of 9 is 2.5 with or without the prompt.
    carry = complete(c, bias, request, function=votes)
    assert carry.canvas[0, -1] == token


# The end of text


@pytest.mark.parametrize(
  'rule, block_length, least',
  [('low_confidence', 4, 0.1), ('threshold', 16, 0.0), ('ancestral', 4, 0.1)],
)
def test_stop_at_eos_saves_forward_passes_and_keeps_the_text(
  table, rule, block_length, least
):
  prompts = [[7 + i % 9] * (i % 4) for i in range(32)]
  request = _, fill, valid, *_ = layouts.continue_prompts(prompts, 16)
  c = config(gen_length=16, steps=16, block_length=block_length, remasking=rule)
  whole = complete(c, table, request)
  c |= dict(stop_at_eos=True)
  stopped = complete(c, table, request)
  cut = layouts.cut(whole.canvas, fill, EOS)
  np.testing.assert_array_equal(cut, layouts.cut(stopped.canvas, fill, EOS))
  np.testing.assert_array_equal(
    np.where(cut, whole.canvas, 0), np.where(cut, stopped.canvas, 0)
  )
  assert (np.asarray(stopped.forwards) <= np.asarray(whole.forwards)).all()
  saved = 1 - int(stopped.forwards.sum()) / int(whole.forwards.sum())
  assert saved > least
  assert not stopped.masked.any()
  assert not (np.asarray(stopped.canvas)[valid] == MASK).any()


def test_slots_after_an_eos_become_eos():
  answer = jnp.array([[9, EOS, 9, 9, 9, 9, 9, 9], [9, 9, 9, 9, 9, 9, 9, EOS]])
  request = layouts.continue_prompts([[], []], 8)
  c = config(temperature=0.0, stop_at_eos=True, block_length=2)
  carry = complete(c, answer, request, function=certain)
  assert carry.canvas.tolist() == [[9] + [EOS] * 7, answer[1].tolist()]
  assert carry.forwards.tolist() == [2, 8]
  assert int(carry.calls) == 8


def test_slots_filled_after_an_eos_have_no_confidence():
  answer = jnp.array([[9, EOS, 9, 9, 9, 9, 9, 9]])
  request = layouts.continue_prompts([[]], 8)
  c = config(temperature=0.0, stop_at_eos=True, block_length=2)
  carry = complete(c, answer, request, function=certain)
  confidence = carry.confidence
  assert carry.canvas.tolist() == [[9] + [EOS] * 7]
  assert np.isnan(confidence).tolist() == [[False, False] + [True] * 6]
  assert carry.filled_at.tolist() == [[1, 2] + [2] * 6]


def test_eos_after_a_mask_does_not_stop_a_row(table):
  canvas = jnp.array([[9, MASK, EOS, MASK], [9, 9, EOS, MASK]])
  fill = np.ones((2, 4), bool)
  request = Request(canvas, fill, fill, range(2))
  c = config(gen_length=4, stop_at_eos=True)
  _, layout, _ = sampled.begin(network_of(mixing, table), c, request)
  masked = canvas[:, None] == MASK
  canvas, masked, filled_at = commit.end_at_eos(
    EOS, layout, jnp.array([3, 4]), canvas, masked, 1 - masked[:, 0]
  )
  assert filled_at.tolist() == [[1, 0, 1, 0], [1, 1, 1, 4]]
  assert canvas.tolist() == [[9, MASK, EOS, MASK], [9, 9, EOS, EOS]]
  assert masked[:, 0].tolist() == [[False, True, False, True], [False] * 4]


def test_eos_in_the_prompt_does_not_stop_a_row(table):
  request = layouts.continue_prompts([[EOS, 9]], 8)
  c = config(stop_at_eos=True, logits_eos_inf=True)
  carry = complete(c, table, request)
  assert carry.forwards.tolist() == [8]
  assert not (carry.canvas[0, 2:] == EOS).any()


def test_logits_eos_inf_never_predicts_eos(table):
  request = _, fill, *_ = layouts.continue_prompts([[]] * 50, 8)
  drawn = lambda c: np.asarray(complete(c, table, request).canvas)[fill]
  assert (drawn(config()) == EOS).any()
  assert not (drawn(config(logits_eos_inf=True)) == EOS).any()


@pytest.mark.parametrize('confidence', candidates.CONFIDENCES)
@pytest.mark.parametrize('temperature', [0.0, 0.7])
def test_confidence_eos_eot_inf_commits_eos_and_eot_last(
  confidence, temperature
):
  answer = jnp.array([[EOS, 9, EOT, 9, 9, EOS, 9, 9]])
  c = config(
    block_length=8,
    temperature=temperature,
    confidence=confidence,
    confidence_eos_eot_inf=True,
  )
  request = layouts.continue_prompts([[]], 8)
  canvases = sampled.trace(network_of(certain, answer), c, request)
  assert canvases[5].tolist() == [[MASK, 9, MASK, 9, 9, MASK, 9, 9]]
  assert canvases[8].tolist() == answer.tolist()


def test_eos_is_committed_last_at_a_temperature_unlike_llada(monkeypatch):
  """LLaDA's code suppresses eos in an array that it does not read afterwards.

  Slot 0 predicts eos. Slot 1 predicts another token with lower confidence.
  """
  logits = jnp.zeros((1, 2, VOCAB)).at[0, 0, EOS].set(5).at[0, 1, 9].set(3)
  monkeypatch.setattr(candidates, 'gumbel', lambda keys, shape: jnp.zeros(()))
  c = config(temperature=0.5, confidence_eos_eot_inf=True)
  network = dataclasses.replace(network_of(None, None), predict_mask=True)
  c, settings = split(c)
  keys = jax.random.split(jax.random.key(0), 1)
  token, confidence = commit.predict(
    network, c, per_row(settings, 1), logits, keys
  )
  assert token.tolist() == [[EOS, 9]]
  assert confidence[0, 0] == 0 < confidence[0, 1]

  of_llada = candidates.probability(candidates.suppress(logits, (EOT,)), token)
  assert of_llada[0, 0] > of_llada[0, 1]
  first_committed = lambda confidence: remasking.commit_top(
    confidence, jnp.ones((1, 2), bool), jnp.array([1])
  ).tolist()
  assert first_committed(confidence) == [[False, True]]
  assert first_committed(of_llada) == [[True, False]]


# Damaged weights and masks in prompts


def bad_at_15(bad, tokens, valid):
  has_15 = jnp.any(tokens == 15, axis=1)[:, None, None]
  return jnp.where(
    has_15, bad, certain(jnp.full(tokens.shape, 9), tokens, valid)
  )


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_nan_logits_abandon_only_their_row(bad):
  request = _, fill, *_ = layouts.continue_prompts([[7], [15], [8]], 8)
  carry = complete(config(), bad, request, function=bad_at_15)
  assert carry.broken.tolist() == [False, True, False]
  out = np.asarray(carry.canvas)
  assert (out[1][fill[1]] == MASK).all()
  assert (out[[0, 2]][fill[[0, 2]]] == 9).all()
  for sample in (sampled.generate, sampled.trace):
    with pytest.raises(UserError, match=r'row\(s\) \[1\] were NaN or infinite'):
      sample(network_of(bad_at_15, bad), config(), request)


def test_mask_in_the_prompt_stays(table):
  request = layouts.continue_prompts([[7, MASK, 9]], 8)
  out = np.asarray(complete(config(), table, request).canvas)
  assert out[0, :3].tolist() == [7, MASK, 9]
  assert not (out[0, 3:] == MASK).any()
