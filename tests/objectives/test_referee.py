"""Losses of a perfect denoiser against the entropy of its source.

The network knows the distribution of the rows exactly, so its loss can be a
bound only if it is at least the entropy, and is tight only if it equals it.
docs/likelihood.md lists the values.
"""

import itertools
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from maskdiff.objectives.schedule import Schedule
from maskdiff.objectives.time_density import TimeDensity, Weight

LENGTH, STATES = 4, 3
UNIFORM, BOUND = TimeDensity(), Weight()
PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'likelihood.md'


@pytest.fixture(scope='module')
def source():
  """[3, 3, 3, 3] float64, the probability of each row of four tokens."""
  p = np.random.default_rng(0).dirichlet(np.full(STATES**LENGTH, 0.15))
  return p.reshape((STATES,) * LENGTH)


def entropy(p):
  p = p[p > 0]
  return -np.sum(p * np.log(p))


def entropy_of(source, positions):
  """Returns the entropy of the tokens at some positions, in nats."""
  others = tuple(i for i in range(LENGTH) if i not in positions)
  return entropy(source.sum(axis=others).reshape(-1))


def expected_loss(source, density=UNIFORM, weight=BOUND, eps=0.0):
  """Returns nats per token, by enumeration of masks on a grid of times.

  The expected nll of a masked token is the entropy of the token given the
  tokens that are not masked.
  """
  u = jnp.asarray((np.arange(20_000) + 0.5) / 20_000, jnp.float32)
  d = density.quantile(u)
  t = np.asarray((1 - eps) * d + eps, np.float64)
  w = np.asarray(weight.at(Schedule(), density, eps, d), np.float64)
  total = 0.0
  for mask in itertools.product([False, True], repeat=LENGTH):
    visible = [i for i in range(LENGTH) if not mask[i]]
    known = entropy_of(source, visible)
    nll = sum(
      entropy_of(source, [*visible, i]) - known
      for i in range(LENGTH)
      if mask[i]
    )
    k = sum(mask)
    total += np.mean(w * t**k * (1 - t) ** (LENGTH - k)) * nll
  return total / LENGTH


LOSSES = {
  'weights of the bound, uniform times': dict(),
  'the same, times from 0.1': dict(eps=0.1),
  'cross entropy without weights': dict(weight=Weight('power')),
  'bell-shaped times around 1/2': dict(density=TimeDensity('bell')),
  'the same with importance weights': dict(
    density=TimeDensity('bell', width=0.2, uniform_share=0.2),
    weight=Weight('importance'),
  ),
  'bell-shaped times around 1/4': dict(density=TimeDensity('bell', mean=0.25)),
  'times up to 1/2': dict(density=TimeDensity(interval=(0.0, 0.5))),
}
EQUAL = (
  'weights of the bound, uniform times',
  'the same with importance weights',
)
BELOW = ('bell-shaped times around 1/4', 'times up to 1/2')


def test_page_lists_each_loss_and_the_entropy(source):
  exact = entropy(source.reshape(-1)) / LENGTH
  page = PAGE.read_text()
  assert f'| entropy | {exact:.3f} |' in page
  for name, arguments in LOSSES.items():
    loss = expected_loss(source, **arguments)
    assert f'| {name} | {loss:.3f} |' in page, (name, loss)
    if name in EQUAL:
      assert loss == pytest.approx(exact, rel=2e-3)
    else:
      assert (loss < 0.98 * exact) == (name in BELOW), name
      assert (loss > 1.01 * exact) == (name not in BELOW), name


@pytest.mark.parametrize('bits', [1, 2, 8])
def test_joint_loss_of_coupled_parts_is_below_the_entropy(bits):
  """One token of `bits` parts that are all 0 or all 1, with equal chance.

  A loss that predicts the masked parts of a token jointly, with the weight of
  separate predictions 1/t, is ln 2 only if all parts are masked, which has the
  probability t^bits. Separate predictions of the parts cost ln 2 each.
  """
  t = (np.arange(100_000) + 0.5) / 100_000
  joint = np.mean(t**bits / t) * np.log(2)
  assert joint == pytest.approx(np.log(2) / bits, rel=1e-4)
  separate = np.mean(bits * t * t ** (bits - 1) / t) * np.log(2)
  assert separate == pytest.approx(np.log(2), rel=1e-4)


def test_estimated_partition_function_is_below_the_entropy(source):
  """A model p(x) exp(-E(x)) / Z whose Z is a mean over K samples from p.

  The mean of log Z over samples is below log Z, so the reported negative
  log-likelihood is below the true one. Here p exp(-E) / Z is the source itself,
  and the reported value falls below the entropy of the source.
  """
  exact = entropy(source.reshape(-1))
  target = source.reshape(-1)
  target = (target + 1e-9) / (target + 1e-9).sum()
  base = np.full(len(target), 1 / len(target))
  ratio = target / base  # exp(-E), with Z = 1
  assert np.sum(base * ratio) == pytest.approx(1)
  rng = np.random.default_rng(0)
  for k in (1, 4, 16):
    drawn = ratio[rng.integers(0, len(base), (20_000, k))]
    log_z = np.log(drawn.mean(axis=1)).mean()
    reported = -np.sum(source.reshape(-1) * np.log(target)) + log_z
    assert reported < exact - 0.05
