"""Which row is sample s: a mixture of sources, each in an order of its own.

Everything is arithmetic on the sample index: no table grows with the data, and
any sample can be asked for at any time.

    order = make_order(sizes=(10**9, 10**6), weights=(0.9, 0.1), seed=0)
    source, index = locate(order, np.arange(1280))
"""

import dataclasses
import fractions
import hashlib
import heapq
import math

import numpy as np

# Weights whose common denominator is larger are rounded to this many parts.
MAX_PERIOD = 1 << 16

# Of the permutation. With 12, some of the 5,040 orders of 7 samples come more
# often than others; with 24, 400,000 epochs show no difference.
_ROUNDS = 24


@dataclasses.dataclass(frozen=True)
class Order:
  """A mixture of sources.

  Attributes:
    sizes: samples of each source.
    shares: samples of each source in a period of sum(shares) samples.
    keys: of the shuffles, one for each source.
    source: [period] int64, which source each sample of a period is from.
    rank: [period] int64, how many of that source stand before it.
  """

  sizes: tuple[int, ...]
  shares: tuple[int, ...]
  keys: tuple[int, ...]
  source: np.ndarray
  rank: np.ndarray


def make_order(
  sizes: tuple[int, ...], weights: tuple[float, ...], seed: int
) -> Order:
  """The Order of sources with these sizes and relative weights.

  Weights are taken as the decimal numbers that they print as, so that 0.7 and
  0.3 make a period of 10.

  Raises:
    ValueError: a size or a weight is not positive, or a weight is too small.
  """
  if min(sizes) < 1 or min(weights) <= 0:
    raise ValueError(f'sizes {sizes} and weights {weights} must be positive')
  exact = [fractions.Fraction(str(w)) for w in weights]
  exact = [w / sum(exact) for w in exact]
  period = min(math.lcm(*(w.denominator for w in exact)), MAX_PERIOD)
  shares = _round([w * period for w in exact])
  if min(shares) == 0:
    raise ValueError(
      f'the smallest of the weights {weights} is below 1/{period} of their sum'
    )
  source = np.array(_spread(shares), np.int64)
  rank = np.zeros(period, np.int64)
  for k, share in enumerate(shares):
    rank[source == k] = np.arange(share)
  keys = tuple(_key(f'{seed}/{k}') for k in range(len(sizes)))
  return Order(tuple(sizes), shares, keys, source, rank)


def locate(order: Order, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where samples come from.

  Every source is passed through in epochs, each a new permutation of all its
  samples; sources of a mixture end their epochs at different times.

  Args:
    samples: [M] int64, not negative.

  Returns:
    source [M] int64, and index [M] int64 in [0, sizes[source]).
  """
  periods, at = np.divmod(samples, len(order.source))
  source = order.source[at]
  index = np.empty_like(source)
  for k, size in enumerate(order.sizes):
    mine = source == k
    turn = periods[mine] * order.shares[k] + order.rank[at[mine]]
    epoch, position = np.divmod(turn, size)
    index[mine] = permute(position, size, order.keys[k], epoch)
  return source, index


def permute(
  position: np.ndarray, size: int, key: int, epoch: np.ndarray
) -> np.ndarray:
  """Values at positions of pseudorandom permutations of range(size).

  A Feistel network over pairs (left, right) of numbers below a and b, with
  a * b just above size; results that are not below size are sent through again
  (Black and Rogaway, Ciphers with arbitrary finite domains, 2002).

  Args:
    position: [M] int64 in [0, size).
    size: of the permutation.
    key: which family of permutations.
    epoch: [M] int64, which member of the family.

  Returns:
    [M] int64 in [0, size); for one epoch a bijection.
  """
  a = math.isqrt(size - 1) + 1
  a += a % 2  # cycles of even length, or only even permutations come about
  b = -(-size // a)
  keys = _mix(np.uint64(key) ^ _mix(epoch.astype(np.uint64)))
  out = position.astype(np.uint64)
  again = np.arange(len(out))
  while again.size:
    k = keys[again]
    left, right = np.divmod(out[again], np.uint64(b))
    for r in range(0, _ROUNDS, 2):
      left = (left + _hash(right, k, r)) % np.uint64(a)
      right = (right + _hash(left, k, r + 1)) % np.uint64(b)
    out[again] = left * np.uint64(b) + right
    again = again[out[again] >= size]
  return out.astype(np.int64)


def _hash(values: np.ndarray, keys: np.ndarray, round_number: int):
  # Below 2^63, so that the sum with a half does not wrap around.
  return _mix(values ^ (keys + _ODD[round_number])) >> np.uint64(1)


def _mix(x: np.ndarray) -> np.ndarray:
  """The finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


# Multiples of the golden ratio modulo 2^64, as SplitMix64 steps by.
_ODD = [np.uint64((r + 1) * 0x9E3779B97F4A7C15 % 2**64) for r in range(_ROUNDS)]


def _key(text: str) -> int:
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'little')


def _round(parts: list[fractions.Fraction]) -> tuple[int, ...]:
  """Integers with the same sum, each less than 1 away: largest remainders."""
  whole = [math.floor(p) for p in parts]
  missing = int(sum(parts)) - sum(whole)
  by_remainder = sorted(range(len(parts)), key=lambda k: whole[k] - parts[k])
  for k in by_remainder[:missing]:
    whole[k] += 1
  return tuple(whole)


def _spread(shares: tuple[int, ...]) -> list[int]:
  """Sources in an order whose every prefix has its shares to within 1.

  Item j of a source with share c has the window from floor(j P / c) to
  ceil((j + 1) P / c) of a period P; taking the item with the earliest end meets
  all windows (Baruah, Cohen, Plaxton and Varvel 1996, proportionate progress).
  """
  period = sum(shares)
  waiting = [(0, k, 0) for k in range(len(shares))]
  ready, order = [], []
  for now in range(period):
    while waiting and waiting[0][0] <= now:
      _, k, j = heapq.heappop(waiting)
      heapq.heappush(ready, (-(-(j + 1) * period // shares[k]), k, j))
    _, k, j = heapq.heappop(ready)
    order.append(k)
    if j + 1 < shares[k]:
      heapq.heappush(waiting, ((j + 1) * period // shares[k], k, j + 1))
  return order
