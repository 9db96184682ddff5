"""The order of samples: exact shares of sources, each shuffled in epochs."""

import dataclasses
import fractions
import itertools
import math
import tracemalloc

import numpy as np
import pytest
import scipy.stats

from maskdiff.data import order


def permutation(size, key=0, epoch=0):
  epochs = np.full(size, epoch, np.int64)
  return order.permute(np.arange(size), size, key, epochs)


def permutations(size, key, epochs):
  """Returns the permutations of many epochs, [E, size]."""
  position = np.tile(np.arange(size), len(epochs))
  values = order.permute(position, size, key, np.repeat(epochs, size))
  return values.reshape(len(epochs), size)


def check_uniform(counts):
  """Checks counts by chi-square; the seeds are fixed, so no test is flaky."""
  p = scipy.stats.chisquare(counts).pvalue
  assert p > 1e-3, f'p = {p:.1e} of {len(counts)} counts'


def equal(a, b):
  pairs = zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
  return all(np.array_equal(x, y) for x, y in pairs)


def random_weights(seed):
  """Returns 2 to 8 decimal numbers of 1 to 4 digits."""
  rng = np.random.default_rng(seed)
  digits = rng.integers(1, 5)
  parts = rng.integers(1, 10**digits, rng.integers(2, 9))
  return tuple(float(p) / 10 ** int(digits) for p in parts)


AWKWARD = [
  (1 / 3, 2 / 3),
  (1 / 3, 1 / 7, 1 / 11, 1 / 13),
  (math.pi, math.e, math.sqrt(2)),
  (1e-3 / 7, 1.0),
  (1.0, 2e-5),
  (1e30, 3e30),
  (5e-324, 5e-324, 1e-323),
  tuple(math.sqrt(p) for p in (2, 3, 5, 7, 11, 13, 17, 19)),
]
WEIGHTS = [random_weights(seed) for seed in range(30)] + AWKWARD


@pytest.mark.parametrize('start', range(1, 201, 50))
def test_small_permutations_are_bijections(start):
  for size in range(start, start + 50):
    for key in (0, 1, 2**64 - 1):
      values = permutations(size, key, np.array([0, 1, 2, 1000, 2**40]))
      assert values.dtype == np.int64
      np.testing.assert_array_equal(
        np.sort(values, axis=1), np.tile(np.arange(size), (5, 1))
      )


@pytest.mark.parametrize(
  'size',
  [2**10, 2**16 - 1, 2**16, 2**16 + 1, 3**10, 7**5, 10**5, 251**2, 251 * 252]
  + [10_007, 65_521, 99_991, 251 * 253 + 1, 500_009],
)
def test_large_permutations_are_bijections(size):
  for key, epoch in ((0, 0), (12345, 7)):
    values = permutation(size, key, epoch)
    np.testing.assert_array_equal(np.sort(values), np.arange(size))


@pytest.mark.parametrize('size', [1, 2, 5, 1000, 2**31, 10**12, 2**50 - 1])
def test_permute_is_a_feistel_network(size):
  """The reference uses Python integers, which do not overflow or round."""
  bits, golden = 2**64, 0x9E3779B97F4A7C15

  def mix(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % bits
    x = (x ^ x >> 27) * 0x94D049BB133111EB % bits
    return x ^ x >> 31

  def slow(value, key, epoch):
    a = math.ceil(math.sqrt(size))
    a += a % 2
    b = math.ceil(fractions.Fraction(size, a))
    key = mix(key ^ mix(epoch))
    while True:
      pair = list(divmod(value, b))
      for r in range(24):
        half = mix(pair[1 - r % 2] ^ (key + (r + 1) * golden) % bits) >> 1
        pair[r % 2] = (pair[r % 2] + half) % (a, b)[r % 2]
      value = pair[0] * b + pair[1]
      if value < size:
        return value

  rng = np.random.default_rng(size)
  position = rng.integers(0, size, 40)
  epoch = rng.integers(0, 2**40, 40)
  for key in (0, 2**64 - 1, 0x0123456789ABCDEF):
    expected = [
      slow(p, key, e)
      for p, e in zip(position.tolist(), epoch.tolist(), strict=True)
    ]
    got = order.permute(position, size, key, epoch)
    assert got.tolist() == expected


@pytest.mark.parametrize('size', [1, 2, 3, 10, 101, 4096, 10**6, 2**40])
def test_one_at_a_time_gives_the_same_values(size):
  rng = np.random.default_rng(size)
  position = rng.integers(0, size, 50)
  epoch = rng.integers(0, 1000, 50)
  together = order.permute(position, size, 77, epoch)
  single = [
    order.permute(position[i : i + 1], size, 77, epoch[i : i + 1])[0]
    for i in range(50)
  ]
  assert together.tolist() == single


def test_arguments_are_left_alone():
  position, epoch = np.arange(100), np.zeros(100, np.int64)
  order.permute(position, 100, 1, epoch)
  np.testing.assert_array_equal(position, np.arange(100))
  assert not epoch.any()


def test_no_samples_are_fine():
  nothing = np.zeros(0, np.int64)
  assert order.permute(nothing, 10, 0, nothing).shape == (0,)
  source, index = order.locate(order.make_order((3, 4), (1, 2), 0), nothing)
  assert source.shape == index.shape == (0,)


def test_epochs_and_keys_give_different_permutations():
  seen = {
    tuple(values)
    for key in [*range(16), 2**63, 2**64 - 1]
    for values in permutations(50, key, np.arange(64)).tolist()
  }
  assert len(seen) == 18 * 64


@pytest.mark.parametrize('size', [2, 3, 4, 5, 6])
def test_every_order_of_few_samples_is_equally_likely(size):
  number = {p: n for n, p in enumerate(itertools.permutations(range(size)))}
  orders = permutations(size, 2024, np.arange(20_000)).tolist()
  found = [number[tuple(p)] for p in orders]
  check_uniform(np.bincount(found, minlength=math.factorial(size)))


def test_orders_are_equally_likely_over_keys_too():
  """Even neighbouring keys give independent orders; runs use hashed keys."""
  number = {p: n for n, p in enumerate(itertools.permutations(range(4)))}
  found = [number[tuple(permutation(4, key).tolist())] for key in range(3000)]
  check_uniform(np.bincount(found, minlength=24))


def test_the_first_sample_is_uniform():
  epochs = np.arange(20_000)
  first = order.permute(np.zeros_like(epochs), 1000, 5, epochs)
  check_uniform(np.bincount(first, minlength=1000))


def test_every_sample_is_equally_often_at_every_position():
  values = permutations(13, 6, np.arange(10_000))
  for position in range(13):
    check_uniform(np.bincount(values[:, position], minlength=13))


def test_the_first_two_samples_are_a_uniform_pair():
  values = permutations(20, 7, np.arange(20_000))
  pairs = np.bincount(values[:, 0] * 20 + values[:, 1], minlength=400)
  apart = ~np.eye(20, dtype=bool).ravel()
  assert not pairs[~apart].any()
  check_uniform(pairs[apart])


def test_an_epoch_says_nothing_about_the_next():
  first = permutations(20, 8, np.arange(20_001))[:, 3]
  check_uniform(np.bincount(first[:-1] * 20 + first[1:], minlength=400))


@pytest.mark.parametrize('lag', [1, 2, 3, 316, 317, 318, 50_000])
def test_neighbours_are_far_apart(lag):
  """317 is the number of columns of the Feistel network of this size."""
  size = 100_000
  values = permutation(size, 9)
  correlation = scipy.stats.spearmanr(values[:-lag], values[lag:]).statistic
  assert abs(correlation) < 4 / math.sqrt(size - lag)
  # Distances modulo the size are uniform over 1..size-1.
  steps = (values[lag:] - values[:-lag]) % size
  check_uniform(np.bincount(steps * 100 // size, minlength=100))


def test_positions_epochs_and_keys_do_not_correlate():
  size = 100_000
  values = permutation(size, 9)
  others = [np.arange(size), permutation(size, 9, 1), permutation(size, 10)]
  for other in others:
    correlation = scipy.stats.spearmanr(values, other).statistic
    assert abs(correlation) < 4 / math.sqrt(size)


def test_permutations_are_pinned():
  """If this fails, existing runs cannot resume with the same data."""
  assert permutation(10, 42, 3).tolist() == [3, 6, 2, 0, 9, 1, 5, 7, 8, 4]
  got = order.permute(np.arange(4), 10**12, 2**64 - 1, np.full(4, 10**6))
  pinned = [362558966095, 439439620027, 606471371403, 241254769982]
  assert got.tolist() == pinned


def test_orders_are_pinned():
  """If this fails, existing runs cannot resume with the same data."""
  mixture = order.make_order((10**9, 5), (0.7, 0.3), seed=1)
  source, index = order.locate(mixture, np.arange(10))
  assert source.tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 1]
  first = [200851703, 950964165, 697281885, 49092019, 485782697, 311769153]
  assert index[source == 0].tolist() == [*first, 82641128]
  assert index[source == 1].tolist() == [4, 2, 1]


def test_order_of_sources_is_pinned():
  """If this fails, existing runs cannot resume with the same data."""
  source = order.make_order((1, 1, 1), (0.6, 0.4, 0.5), 0).source
  pinned = '021020120120012'
  assert ''.join(map(str, source)) == pinned


@pytest.mark.parametrize('weights', WEIGHTS)
def test_every_prefix_of_a_mixture_has_the_shares(weights):
  mixture = order.make_order((10,) * len(weights), weights, 0)
  period = sum(mixture.shares)
  samples = np.arange(min(3 * period, 150_000))
  source, _ = order.locate(mixture, samples)
  for k, share in enumerate(mixture.shares):
    off = np.cumsum(source == k) * period - (samples + 1) * share
    assert abs(off).max() < period


@pytest.mark.parametrize('weights', WEIGHTS)
def test_shares_are_the_weights(weights):
  """Short decimals are exact; other weights are rounded to 1/65,536."""
  shares = order.make_order((10,) * len(weights), weights, 0).shares
  period = sum(shares)
  exact = [fractions.Fraction(str(w)) for w in weights]
  off = [
    share - w * period / sum(exact)
    for share, w in zip(shares, exact, strict=True)
  ]
  assert period <= order.MAX_PERIOD
  assert all(abs(o) < 1 for o in off)
  assert max(off) - min(off) <= 1  # the largest remainders are rounded up
  if math.lcm(*((w / sum(exact)).denominator for w in exact)) <= 1 << 16:
    assert not any(off) and math.gcd(*shares) == 1


def test_awkward_weights_reach_the_longest_period():
  """Otherwise the cases above would not test rounding."""
  periods = [len(order.make_order((1,) * len(w), w, 0).source) for w in WEIGHTS]
  assert periods.count(order.MAX_PERIOD) >= 4
  assert min(periods) < 100


def test_sources_of_equal_weight_take_turns():
  mixture = order.make_order((5, 6, 7), (2.5, 2.5, 2.5), 0)
  assert mixture.shares == (1, 1, 1)
  assert mixture.source.tolist() == [0, 1, 2]


def test_one_source_needs_no_table():
  mixture = order.make_order((10**12,), (0.123,), 0)
  assert len(mixture.source) == 1


@pytest.mark.parametrize('seed', range(24))
def test_a_mixture_passes_through_each_source_in_epochs(seed):
  """Each epoch of a source is a permutation of all its samples."""
  rng = np.random.default_rng(seed)
  weights = random_weights(seed)
  sizes = tuple(rng.integers(1, 120, len(weights)).tolist())
  mixture = order.make_order(sizes, weights, seed)
  source, index = order.locate(mixture, np.arange(6000))
  for k, size in enumerate(sizes):
    mine = index[source == k]
    epochs = [
      permutation(size, mixture.keys[k], e)
      for e in range(math.ceil(len(mine) / size))
    ]
    np.testing.assert_array_equal(mine, np.concatenate(epochs)[: len(mine)])


def test_order_of_a_source_does_not_depend_on_other_sources():
  sequences = []
  for sizes, weights in (
    ((7, 40, 9), (1, 2, 3)),
    ((1000, 40), (0.1, 0.9)),
    ((3, 40, 8, 8), (1 / 3, 0.25, 1.5, 9.0)),
  ):
    mixture = order.make_order(sizes, weights, 4)
    source, index = order.locate(mixture, np.arange(10_000))
    sequences.append(index[source == 1][:200].tolist())
  assert sequences[0] == sequences[1] == sequences[2]
  assert len(sequences[0]) == 200


def test_sources_of_equal_size_have_orders_of_their_own():
  mixture = order.make_order((50, 50), (1, 1), 0)
  source, index = order.locate(mixture, np.arange(100))
  assert index[source == 0].tolist() != index[source == 1].tolist()


def test_seeds_give_different_orders():
  orders = set()
  for seed in range(50):
    mixture = order.make_order((50,), (1,), seed)
    orders.add(tuple(order.locate(mixture, np.arange(50))[1].tolist()))
  assert len(orders) == 50


@pytest.mark.parametrize('seed', range(5))
def test_samples_can_be_located_in_any_order(seed):
  rng = np.random.default_rng(seed)
  weights = random_weights(seed)
  sizes = tuple(rng.integers(1, 10**6, len(weights)).tolist())
  mixture = order.make_order(sizes, weights, seed)
  samples = rng.integers(0, 10**7, 40)
  source, index = order.locate(mixture, samples)
  for i in range(40):
    one_source, one_index = order.locate(mixture, samples[i : i + 1])
    assert (one_source[0], one_index[0]) == (source[i], index[i])


def test_only_the_ratio_of_weights_matters():
  base = order.make_order((30, 40), (7, 3), 0)
  for weights in ((0.7, 0.3), (1.4, 0.6), (70.0, 30.0), (7e-9, 3e-9)):
    assert equal(order.make_order((30, 40), weights, 0), base)
  assert base.shares == (7, 3)
  assert not equal(order.make_order((30, 40), (3, 7), 0), base)
  assert not equal(order.make_order((30, 40), (7, 3), 1), base)


@pytest.mark.parametrize(
  'sizes, weights',
  [
    ((5, 0), (1, 1)),
    ((5, -1), (1, 1)),
    ((5, 5), (1, 0)),
    ((5, 5), (1, -0.5)),
    ((5, 5), (1, math.nan)),
    ((5, 5), (math.inf, 1)),
    ((), ()),
  ],
)
def test_sizes_and_weights_must_be_positive(sizes, weights):
  with pytest.raises(ValueError):
    order.make_order(sizes, weights, 0)


@pytest.mark.parametrize('weights', [(1, 1e-6), (1 / 3, 1e-7, 0.1)])
def test_weights_that_are_rounded_away_are_refused(weights):
  with pytest.raises(ValueError, match='smallest of the weights .*1/65536'):
    order.make_order((5,) * len(weights), weights, 0)


@pytest.mark.parametrize('size', [10**9, 2**40, 2**40 - 1, 2**40 + 15])
@pytest.mark.parametrize('first', [0, 10**9, 2**40 - 500, 2**50])
def test_no_table_grows_with_the_data(size, first):
  """The memory of an order does not depend on the number of samples."""
  tracemalloc.start()
  mixture = order.make_order((size, 100, size), (0.5, 0.1, 0.4), 0)
  source, index = order.locate(mixture, np.arange(first, first + 1000))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1 << 20
  for k, share in enumerate((500, 100, 400)):
    mine = index[source == k]
    assert abs(len(mine) - share) <= 1
    assert 0 <= mine.min() <= mine.max() < mixture.sizes[k]
    if k != 1:
      assert len(set(mine.tolist())) == len(mine)  # from at most two epochs
      assert mine.min() < size / 20 and mine.max() > size - size / 20


def test_distant_samples_belong_to_the_right_epoch():
  mixture = order.make_order((1000, 7), (0.9, 0.1), 3)
  samples = 2**50 + np.arange(30)
  source, index = order.locate(mixture, samples)
  for s, k, i in zip(samples.tolist(), source, index, strict=True):
    before = s // 10 * mixture.shares[k]  # whole periods of 10
    before += mixture.source[: s % 10].tolist().count(k)
    epoch, position = divmod(before, mixture.sizes[k])
    assert permutation(mixture.sizes[k], mixture.keys[k], epoch)[position] == i
