"""The worked example of docs/idea.md has the numbers that the package computes.

Its tables are printed by benchmarks/worked_example.py with exact fractions.
Here the loss, likelihood and sampler of the package use the two denoisers in
place of the network, and must reproduce the numbers of the page.
"""

import dataclasses
import itertools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled

from maskdiff import config
from maskdiff.data.rows import Rows
from maskdiff.likelihood import bounds, estimators, queries
from maskdiff.likelihood.queries import LikelihoodConfig
from maskdiff.model.network import Network
from maskdiff.objectives import canvas as canvas_lib
from maskdiff.objectives import masked_diffusion
from maskdiff.sampling import layouts, passes
from maskdiff.training import step

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / 'docs' / 'idea.md').read_text()
TEXT = ' '.join(PAGE.split())
EXAMPLE = runpy.run_path(str(ROOT / 'benchmarks' / 'worked_example.py'))

LANGUAGE = {
  'the cat sat down': 1 / 2,
  'the dog sat down': 1 / 4,
  'the dog ran away': 1 / 4,
}
SENTENCES = list(LANGUAGE)
MASK, FIRST = 4, 5  # ids of words follow those of special tokens
WORDS = sorted({word for s in SENTENCES for word in s.split()})
VOCAB, L = FIRST + len(WORDS), 4
encode = lambda text: [
  MASK if word == '_' else FIRST + WORDS.index(word) for word in text.split()
]
IDS = np.array([encode(s) for s in SENTENCES])
CHANCES = np.array(list(LANGUAGE.values()))
SEES = {
  'exact': [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]],
  'neighbours': [[1], [0, 2], [1, 3], [2]],
}
NEVER = -1e4  # log-probability of impossible tokens; finite: 0 x NEVER = 0


class Denoiser:
  """Replaces the network; its hidden states are log-probabilities."""

  def __init__(self, name, params):
    self.sees = SEES[name]

  def __call__(self, tokens, labels):
    canvas = tokens[:, None, :L]
    fits = (canvas == IDS) | (canvas == MASK)  # [B, sentences, L]
    words = jax.nn.one_hot(IDS, VOCAB)
    rows = []
    for i, seen in enumerate(self.sees):
      w = CHANCES * fits[:, :, jnp.array(seen)].all(axis=2)
      p = w @ words[:, i] / w.sum(axis=1, keepdims=True)
      rows.append(jnp.where(p > 0, jnp.log(p), NEVER))
    log_p = jnp.stack(rows, axis=1)
    return jnp.pad(log_p, ((0, 0), (0, tokens.shape[1] - L), (0, 0)))

  def vocabulary(self):
    return jnp.eye(VOCAB)

  def logits(self, hidden):
    return hidden


def table_with(head):
  """Returns the rows of the page's table with this heading, lists of text."""
  lines = PAGE.splitlines()
  cells = lambda line: [c.strip(' *`') for c in line.strip('|').split('|')]
  start = next(
    i for i, line in enumerate(lines) if f'| {head} |' in line and '|' in line
  )
  body = itertools.takewhile(lambda line: line[:1] == '|', lines[start + 2 :])
  return [cells(line) for line in body]


SHOWN = table_with('shown')[:-1]
OF_SENTENCES = table_with('bound, exact')
BOUND = {  # of each sentence, by denoiser
  'exact': [float(row[3]) for row in OF_SENTENCES],
  'neighbours': [float(row[5]) for row in OF_SENTENCES],
}
close = lambda x: pytest.approx(x, abs=6e-5)  # the page has 4 decimals


@pytest.mark.parametrize('name', EXAMPLE['TABLES'])
def test_page_has_the_tables_of_the_script(name):
  assert EXAMPLE['TABLES'][name]() in PAGE


HIDDEN = (np.arange(16)[:, None] >> np.arange(L) & 1).astype(bool)
# Gauss's rule over [0, 1]: exact for polynomials up to degree 7.
POINTS, SHARES = (x / 2 for x in np.polynomial.legendre.leggauss(4))
POINTS += 0.5


@pytest.fixture(scope='module', params=SEES)
def every(request):
  """Name of a denoiser, and [sentence, time, mask] nll [L] and weights [L] of
  the objective for every mask of every sentence at some times."""
  c = config.default()
  c.tokens.mask_id = MASK
  c = dataclasses.replace(step.step_config(c).objective, eps=0.0)
  shape = (len(IDS), len(POINTS), len(HIDDEN), L)
  flat = lambda x: jnp.array(np.broadcast_to(x, shape).reshape(-1, L))

  @jax.jit
  def compute():
    canvas = masked_diffusion.corrupt(
      c,
      Rows(flat(IDS[:, None, None])),
      flat(POINTS[:, None, None])[:, 0],
      flat(np.where(HIDDEN, 0.0, 1 - 2.0**-24)),
      flat(L)[:, 0],
    )
    _, nll = canvas_lib.canvas_loss(c, Denoiser(request.param, None), canvas)
    return nll.reshape(shape), canvas.weights.reshape(shape)

  return request.param, *map(np.asarray, compute())


def test_nll_of_masked_words_equals_the_page(every):
  """The nll of the objective, summed over the masked words of every mask."""
  name, nll, _ = every
  costs = nll[SENTENCES.index('the dog sat down'), 0].sum(axis=1)
  cost = dict(zip(map(tuple, HIDDEN), costs, strict=True))
  column = 2 + list(SEES).index(name)
  assert len(SHOWN) == 16
  for row in SHOWN:
    mask = tuple(word == '_' for word in row[0].split())
    assert cost.pop(mask) == close(float(row[column])), row[0]
  assert not cost


def test_expected_loss_is_the_bound_on_the_page(every):
  """Masks are enumerated and times integrated exactly: the probability of a
  mask times 1/t is a polynomial of degree 3."""
  name, nll, weights = every
  t, l = POINTS[:, None], HIDDEN.sum(axis=1)
  probability = t**l * (1 - t) ** (L - l)
  losses = (nll * weights).sum(axis=3)
  expected = np.einsum('t,tm,stm->s', SHARES, probability, losses)
  assert list(expected) == close(BOUND[name][:3])


def network_of(name):
  """Returns a Network; `Denoiser` replaces its module."""
  return Network(
    config=name,
    params={},
    objective='masked_diffusion',
    predict_mask=False,
    mask_id=MASK,
    bos_id=1,
  )


class Name(str):
  """Replaces the config of a model; only its vocabulary size is read."""

  vocab_size = VOCAB


@pytest.fixture
def scored(monkeypatch):
  """Returns a function from a denoiser's name to arguments for bounds.py."""
  monkeypatch.setattr(queries, 'bind', Denoiser)
  c = LikelihoodConfig(
    context=L,
    guidance=0.0,
    tokens_per_call=256,
    loss_chunk_tokens=64,
  )
  whole = np.ones(IDS.shape, bool)
  return lambda name: (
    network_of(Name(name)),
    c,
    queries.Answers(IDS, whole, whole),
  )


@pytest.mark.parametrize('name', SEES)
def test_likelihoods_of_orders_equal_the_page(name, scored):
  """The likelihood is the mean over all orders; the bound is the mean of the
  logarithms."""
  orders = np.array(list(itertools.permutations(range(L))))
  values = bounds.chain_rule(*scored(name), [orders] * 3)
  by_words = {
    tuple(WORDS.index(w) for w in row[0].split(', ')): float(row[3])
    for row in table_with('order')[:-1]
  }
  assert len(by_words) == 6
  for i, row in enumerate(OF_SENTENCES[:-1]):
    assert -values[i].mean() == close(BOUND[name][i])
    own = -np.log(np.exp(values[i]).mean())
    assert own == close(float(row[4] if name == 'neighbours' else row[2]))
  if name == 'neighbours':
    for order, value in zip(orders, values[1], strict=True):
      in_doubt = tuple(IDS[1, i] - FIRST for i in order if i > 0)
      assert -value == close(by_words[in_doubt])


@pytest.mark.parametrize('form', estimators.FORMS)
def test_estimates_agree_with_the_bound(form, scored):
  estimator = estimators.Estimator(form, 4096, 16)
  found = bounds.bound(*scored('neighbours'), estimator, seeds=[0, 1, 2])
  errors = -found.log_likelihood - BOUND['neighbours'][:3]
  assert (np.abs(errors) < 4 * found.stderr).all()
  assert (found.stderr < 0.04).all()


def test_means_over_the_language_equal_the_page():
  *rows, mean = OF_SENTENCES
  columns = np.array([[float(x) for x in row[2:]] for row in rows])
  for of_page, computed in zip(mean[2:], CHANCES @ columns, strict=True):
    assert float(of_page) == pytest.approx(computed, abs=1.1e-4)
  entropy = -(CHANCES * np.log(CHANCES)).sum()
  assert float(mean[2]) == close(entropy)
  assert f'{entropy / L:.4f} per token' in TEXT
  own, bound = float(mean[4]), float(mean[5])
  assert own > entropy and bound > own
  assert f'The neighbours network loses {own - entropy:.4f}' in TEXT


def test_words_are_committed_in_the_order_of_the_page(monkeypatch):
  monkeypatch.setattr(passes, 'bind', Denoiser)
  c = dict(
    steps=L,
    block_length=L,
    temperature=0.0,
    remasking='low_confidence',
  )
  request = layouts.continue_prompts([[]], L)
  carry = sampled.complete(network_of('exact'), c, request)
  canvases = sampled.trace(network_of('exact'), c, request)[:, 0].tolist()
  rows = table_with('most probable word')
  assert len(rows) == len(canvases) - 1 == L
  for number, (row, before) in enumerate(zip(rows, canvases, strict=False), 1):
    _, canvas, word, probability = row
    assert before == encode(canvas)
    (at,) = np.flatnonzero(carry.filled_at[0] == number)
    assert carry.canvas[0, at] == encode(word)[0]
    numerator, _, denominator = probability.partition('/')
    expected = int(numerator) / int(denominator or 1)
    assert carry.confidence[0, at] == pytest.approx(expected, abs=1e-5)


def test_noise_of_the_loss_equals_the_page():
  """7.6% for 8 rows of 128 tokens that are equally hard."""
  c = config.default()
  c.objective.random_length_fraction = 0.0
  c.objective.time_sampling = 'iid'  # no effect if tokens are equally hard
  c = step.step_config(c).objective
  rows, length, draws = 8, 128, 1000
  tokens = jnp.full((rows, length), 9)

  @jax.jit
  @jax.vmap
  def loss(key):
    canvas = masked_diffusion.make_canvas(
      c, Rows(tokens), jnp.arange(rows), key, rows
    )
    return canvas.weights.sum() / canvas.num_tokens.sum()

  found = np.asarray(loss(jax.random.split(jax.random.key(0), draws)))
  spread = lambda tokens: ((np.log(1 / c.eps) - 1) / tokens) ** 0.5
  assert found.mean() == pytest.approx(1, abs=0.01)
  assert found.std() == pytest.approx(spread(rows * length), rel=0.1)
  assert f'{spread(rows * length):.1%} for 8 rows of 128' in TEXT
  assert f'{6 * spread(rows * length):.2f} nats' in TEXT
  assert f'{spread(1280 * 4096):.2%} for the 1,280 rows of 4,096' in TEXT
