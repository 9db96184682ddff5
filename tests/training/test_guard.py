"""The spike guard refuses spikes and values that are not finite."""

import functools

import jax
import numpy as np
import pytest

from maskdiff.training import guard
from maskdiff.training.guard import WINDOW, GuardConfig

judge = jax.jit(guard.judge, static_argnums=0)


def run(steps, sigmas=6.0):
  """Passes (loss, grad_norm) pairs to `judge` one after the other.

  Returns:
    List of bool, whether each update is applied; and the final guard state.
  """
  state, verdicts = guard.init(), []
  for loss, norm in steps:
    ok, state = judge(
      GuardConfig(sigmas), state, np.float32(loss), np.float32(norm)
    )
    verdicts.append(bool(ok))
  return verdicts, jax.tree.map(np.asarray, state)


@functools.cache
def usual(count=WINDOW):
  random = np.random.default_rng(0)
  return list(zip(*random.normal([[5], [1]], 0.1, (2, count)), strict=True))


@pytest.mark.parametrize('sigmas', [0.0, 6.0])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('name', ['loss', 'norm'])
def test_nonfinite_values_are_refused_and_not_recorded(sigmas, bad, name):
  step = (bad, 1.0) if name == 'loss' else (5.0, bad)
  for before in ([], usual(3), usual()):
    verdicts, state = run([*before, step], sigmas)
    assert verdicts == [True] * len(before) + [False]
    assert state['skipped'] == state['in_a_row'] == 1
    _, without = run(before, sigmas)
    for name in ('losses', 'grad_norms', 'seen'):
      np.testing.assert_array_equal(state[name], without[name])


@pytest.mark.parametrize('step', [(50.0, 1.0), (5.0, 50.0)])
def test_spike_is_refused_once_the_window_is_full(
  step,
):
  assert run([*usual(), step])[0][-1] is False
  assert run([*usual()[:-1], step])[0][-1] is True
  assert run([*usual(), step], sigmas=0.0)[0][-1] is True


def test_spike_limit_is_in_standard_deviations():
  losses = np.array([loss for loss, _ in usual()], np.float32)
  limit = losses.mean() + 6 * losses.std()
  assert run([*usual(), (limit - 1e-3, 1.0)])[0][-1]
  assert not run([*usual(), (limit + 1e-3, 1.0)])[0][-1]


def test_low_values_are_not_spikes():
  assert run([*usual(), (-100.0, 0.0)])[0][-1]


def test_one_spike_does_not_hide_the_next():
  spikes = [(500.0, 1.0), (5.0, 1.0), (500.0, 1.0)]
  assert run([*usual(), *spikes])[0][-3:] == [False, True, False]


def test_lasting_change_of_level_is_accepted():
  verdicts, state = run([*usual(), *[(10.0, 1.0)] * 100])
  refused = verdicts[WINDOW:].count(False)
  assert 1 <= refused < 50
  assert all(verdicts[WINDOW + refused :])
  assert state['skipped'] == refused and state['in_a_row'] == 0


def test_window_holds_the_last_values():
  steps = [(n, 2 * n) for n in range(WINDOW + 3)]
  _, state = run(steps, sigmas=0.0)
  last = np.arange(3, WINDOW + 3)
  np.testing.assert_array_equal(np.sort(state['losses']), last)
  np.testing.assert_array_equal(np.sort(state['grad_norms']), 2 * last)


def test_skipped_updates_are_counted():
  verdicts, state = run([(np.nan, 1)] * 3 + [(5, 1)] + [(5, np.inf)] * 2)
  assert verdicts == [False] * 3 + [True] + [False] * 2
  assert (state['skipped'], state['in_a_row']) == (5, 2)
