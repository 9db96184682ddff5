"""Networks that predict windows: caches, gaps, self-speculation, serving."""

import dataclasses
import functools

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled
from slow import SLOW
from window_cases import LIKELIHOOD, NETWORK, PROMPT, SIZE, laid_out

from maskdiff.errors import UserError
from maskdiff.likelihood import bounds
from maskdiff.model import masks, transformer
from maskdiff.sampling import candidates, layouts, passes, speculation
from maskdiff.sampling.serve import RowRequest, serve
from maskdiff.sampling.settings import split

# Prompts of the noisy affine sequence that `model_sdlm` was trained on.
PROMPTS = [[45, 50, 67, 75, 37, 26], [61, 43, 46, 47], [65, 43, 55, 39, 61, 36]]
ENCODE = lambda text: [30 + ord(letter) % 40 for letter in text]
CONTINUED = layouts.continue_prompts(PROMPTS, 14)
GAPS = layouts.fill_gaps(
  ['ab{{5}}cde{{3}}', 'a{{2}}bcdefghijk{{1}}n{{9}}'], ENCODE
)
PREFIX = dict(block_length=1, remasking='longest_prefix', threshold=0.3)
ONE_BY_ONE = PREFIX | dict(threshold=1.0)
SPECULATIVE = dict(block_length=1, remasking='speculative')
SUBSET = dict(
  block_length=1, remasking='threshold', threshold=np.array([0.5, 0.7])
)


@pytest.fixture(autouse=True)
def one_shape(monkeypatch):
  """Compiles the passes for one length only."""
  monkeypatch.setattr(passes, 'MAX_SHAPES', 1)


@pytest.mark.parametrize('values', [SPECULATIVE, SUBSET, SLOW(PREFIX)])
def test_cache_changes_no_token(values):
  network, request = golden_models.window_network(4), GAPS
  plain = sampled.complete(network, values, request)
  cached = sampled.complete(network, values | dict(cache='prefix'), request)
  for field in ('canvas', 'filled_at', 'forwards'):
    np.testing.assert_array_equal(getattr(cached, field), getattr(plain, field))
  np.testing.assert_allclose(cached.confidence, plain.confidence, atol=1e-5)
  assert np.sum(cached.positions) < np.sum(plain.positions)
  assert (np.asarray(plain.forwards) < request.fill.sum(axis=1)).any()


@pytest.mark.parametrize('size', [4, SLOW(2), SLOW(8)])
def test_speculation_equals_one_token_per_step(size):
  network = golden_models.window_network(size)
  request = CONTINUED
  expected = sampled.complete(network, ONE_BY_ONE, request)
  found = sampled.complete(network, SPECULATIVE, request)
  np.testing.assert_array_equal(found.canvas, expected.canvas)
  np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-5)
  assert (np.asarray(expected.forwards) == 14).all()
  assert (np.asarray(found.forwards) < 14).all()


def test_threshold_of_zero_commits_whole_windows():
  network, request = golden_models.window_network(4), CONTINUED
  values = PREFIX | dict(threshold=np.array([0.0, 0.3, 1.0]))
  carry = sampled.complete(network, values, request)
  assert carry.forwards[0] == 4  # 4 + 4 + 4 + 2 tokens
  assert 4 < carry.forwards[1] < carry.forwards[2] == 14


@functools.partial(jax.jit, static_argnums=2)
def window_logits(network, tokens, size, start, window):
  """Returns the logits of a window after the first tokens of a row.

  Args:
    network: Network without bos.
    tokens: [L] int32.
    size: D.
    start: number of tokens before the window.
    window: [D] int32, its inputs.
  """
  pos = np.arange(len(tokens))  # the network sees tokens at 1 + pos
  inside = np.repeat([False, True], [len(pos), size])
  labels = masks.Labels(
    doc=jnp.append(jnp.where(pos < start - 1, 0, -1), jnp.zeros(size, int)),
    pos=jnp.append(pos + 1, start + jnp.arange(size)),
    block=jnp.where(inside, 0, -1),
    reach=jnp.append(pos + 2, jnp.full(size, start)),
  )
  model = transformer.bind(network.config, network.params)
  hidden = model(
    jnp.append(tokens, window)[None], jax.tree.map(lambda x: x[None], labels)
  )
  return model.logits(hidden)[0, -size:]


def fill_subsets(network, row, threshold):
  """Returns a filled row, and the step of each slot, one window at a time."""
  row, steps, size = list(row), [0] * len(row), network.window_length
  gaps = [token is None for token in row]
  for step in range(1, len(row)):
    if None not in row:
      break
    start = row.index(None)
    end = start + size
    run = [*gaps[start:end], False].index(False)
    shown = [row[start + i] if i < run else None for i in range(size - 1)]
    mask = lambda x: [
      network.mask_id if token is None else token for token in x
    ]
    logits = window_logits(
      network,
      np.array(mask(row)),
      size,
      start,
      np.array([row[start - 1], *mask(shown)]),
    )
    p = np.asarray(jax.nn.softmax(logits))
    slots = [i for i in range(run) if row[start + i] is None]
    best = max(slots, key=lambda i: p[i].max())
    for i in slots:
      if i == best or p[i].max() >= threshold:
        row[start + i], steps[start + i] = int(p[i].argmax()), step
  return row, steps


def test_any_subset_of_a_window_is_shown_to_the_next():
  """The sampler equals one window at a time, also before given tokens."""
  network, request = golden_models.window_network(4), GAPS
  carry = sampled.complete(network, SUBSET, request)
  filled_at = np.asarray(carry.filled_at)
  for i, threshold in enumerate(SUBSET['threshold']):
    n = request.valid[i].sum()
    row = np.where(request.fill[i], None, request.canvas[i])[:n]
    row, steps = fill_subsets(network, row.tolist(), threshold)
    assert row == carry.canvas[i, :n].tolist()
    assert steps == filled_at[i, :n].tolist()
  # A later slot of a run is filled before an earlier one.
  neighbours = request.fill[:, 1:] & request.fill[:, :-1]
  assert (neighbours & (np.diff(filled_at) < 0)).any()


# Distributions


@pytest.fixture(scope='module')
def probability():
  """Returns the probability of each of ANSWERS, decoded one by one."""
  found = bounds.left_to_right(NETWORK, LIKELIHOOD, laid_out())
  return np.exp(found.log_likelihood)


def chi_square(values, probability, rows=4096):
  """Returns the statistic of sampled answers, of 63 degrees of freedom."""
  request = layouts.continue_prompts([PROMPT] * rows, 3)
  values = values | dict(temperature=1.0)
  carry = sampled.complete(NETWORK, values, request)
  found = np.asarray(carry.canvas)[:, 2:]
  counts = np.bincount(found @ [16, 4, 1], minlength=64)
  expected = rows * probability
  return ((counts - expected) ** 2 / expected).sum(), carry


# The 0.1% and 99.9% quantiles.
LOW, HIGH = 33.0, 103.5


def test_speculative_sampling_has_the_distribution_of_single_steps(
  probability,
):
  assert probability.sum() == pytest.approx(1, abs=1e-5)
  statistic, carry = chi_square(SPECULATIVE | dict(cache='prefix'), probability)
  assert LOW < statistic < HIGH
  assert np.mean(carry.forwards) < 2.9
  # Control: tokens that are drawn independently.
  statistic, _ = chi_square(PREFIX | dict(threshold=0.0), probability)
  assert statistic > 2 * HIGH


@pytest.mark.slow
def test_rule_of_published_code_has_this_distribution_too(
  probability, monkeypatch
):
  """It draws from p, and accepts if the draft has the same token.

  Either way the result is the draw from p. It accepts less often.
  """
  ours = chi_square(SPECULATIVE, probability)[1]

  def accept(settings, draft, logits, target, token_keys, accept_keys):
    del settings, logits, accept_keys
    drawn = candidates.best(
      target + candidates.gumbel(token_keys, target.shape[1:])
    )
    equal = draft.tokens == drawn[:, :-1]
    number = jnp.cumprod(equal, axis=1).sum(axis=1)
    return number, drawn[jnp.arange(len(drawn)), number]

  monkeypatch.setattr(speculation, '_accept', accept)
  # Another number of rows, so that the program is compiled again.
  statistic, carry = chi_square(SPECULATIVE, probability, rows=4095)
  assert LOW < statistic < HIGH
  assert np.mean(carry.forwards) > np.mean(ours.forwards) + 0.05


# Serving, and refused requests


def test_nothing_is_committed_after_an_eos():
  """Steps commit three tokens, and the first eos is in any place of them."""
  network = dataclasses.replace(NETWORK, eos_id=0)
  request = layouts.continue_prompts([PROMPT] * 16, 7)
  values = PREFIX | dict(threshold=0.0, temperature=1.0)
  plain = sampled.complete(network, values, request)
  stopped = sampled.complete(network, values | dict(stop_at_eos=True), request)
  places = set()
  for tokens, expected, confidence, filled_at in zip(
    *map(np.asarray, (stopped.canvas, plain.canvas)),
    *map(np.asarray, (stopped.confidence, stopped.filled_at)),
    strict=True,
  ):
    answer = expected[len(PROMPT) :].tolist()
    number = len(PROMPT) + (answer.index(0) + 1 if 0 in answer else 7)
    np.testing.assert_array_equal(tokens[:number], expected[:number])
    assert not tokens[number:].any()
    assert np.isnan(confidence[number:]).all()
    assert (filled_at[number:] == filled_at[number - 1]).all()
    places.add((number - 1 - len(PROMPT)) % SIZE)
  assert places == {0, 1, 2}


@pytest.mark.slow
@pytest.mark.parametrize('values', [SPECULATIVE, SUBSET | dict(threshold=0.5)])
def test_served_rows_equal_rows_of_a_batch(values):
  """Rows join while others use their caches; text ends at eos."""
  network = golden_models.window_network(4)
  values = values | dict(temperature=0.7, stop_at_eos=True)
  rows = [
    [*prompt, *[None] * n]
    for prompt, n in zip(
      [*PROMPTS, [71, 76, 60, 37, 66, 5]], (3, 9, 14, 20), strict=True
    )
  ]
  c, settings = split(values | dict(cache='prefix', lookahead=0))
  requests = [RowRequest(i, row, i, settings) for i, row in enumerate(rows)]
  found = {
    answer.id: answer
    for answer in serve(network, c, requests, rows=2, length=32)
  }
  plain = sampled.complete(network, values, layouts.lay_out(rows))
  for i, row in enumerate(rows):
    assert found[i].error is None
    np.testing.assert_array_equal(
      found[i].recording.tokens, plain.canvas[i, : len(row)]
    )
    assert found[i].forwards == plain.forwards[i]


@pytest.mark.parametrize(
  'values, message',
  [
    (dict(remasking='low_confidence'), 'set remasking=longest_prefix, cum'),
    (dict(remasking='first_hitting'), 'speculative, threshold or factor'),
    (PREFIX | dict(threshold=1.5), 'set threshold=1 for one token per step'),
    (PREFIX | dict(threshold=-0.5), 'threshold'),
    (dict(remasking='speculative', block_length=2), 'set block_length=1'),
    (PREFIX | dict(cache='dual'), 'set cache=prefix'),
  ],
)
def test_settings_that_do_not_fit_are_refused(values, message):
  values = dict(block_length=1) | values
  with pytest.raises(UserError, match=message):
    sampled.begin(NETWORK, values, CONTINUED)


def test_other_networks_cannot_verify_drafts():
  causal = dataclasses.replace(
    NETWORK, objective='autoregressive', window_length=0
  )
  with pytest.raises(UserError, match='set remasking=longest_prefix'):
    sampled.begin(causal, SPECULATIVE, CONTINUED)


def test_network_without_bos_needs_a_prompt():
  network = dataclasses.replace(NETWORK, bos_id=-1)
  request = layouts.continue_prompts([[]], 3)
  with pytest.raises(UserError, match='give a prompt'):
    sampled.begin(network, PREFIX, request)
  answers = bounds.lay_out([[]], [[1, 2]])
  with pytest.raises(UserError, match='give a prompt'):
    bounds.left_to_right(network, LIKELIHOOD, answers)
