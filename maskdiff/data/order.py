"""Maps a sample number to a row: weighted mixture and shuffling.

The order is computed from the sample number alone. No table grows with the
data, and samples can be located in any order.

    order = make_order(sizes=(10**9, 10**6), weights=(0.9, 0.1), seed=0)
    source, index = locate(order, np.arange(1280))
"""

import dataclasses
import fractions
import hashlib
import heapq
import math

import numpy as np

# Weights with a larger common denominator are rounded to multiples of 1/65536.
MAX_PERIOD = 1 << 16

# Rounds of the Feistel network. With 12 rounds, some of the 5,040 orders of 7
# samples occur more often than others. With 24, 400,000 epochs show no
# difference.
_ROUNDS = 24


@dataclasses.dataclass(frozen=True)
class Order:
  """The order of the samples of a mixture of sources.

  Attributes:
    sizes: number of samples in each source.
    shares: samples of each source in a period of sum(shares) samples.
    keys: key of the shuffle of each source.
    source: [period] int64, the source of each sample of a period.
    rank: [period] int64, number of earlier samples of the period with the same
      source.
  """

  sizes: tuple[int, ...]
  shares: tuple[int, ...]
  keys: tuple[int, ...]
  source: np.ndarray
  rank: np.ndarray


def make_order(
  sizes: tuple[int, ...], weights: tuple[float, ...], seed: int
) -> Order:
  """Returns the Order of sources with these sizes and relative weights.

  Weights are read as decimal numbers, so that 0.7 and 0.3 have a period of 10.

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
  """Returns the source of each sample and its index in the source.

  Each source is read in epochs. An epoch is a new permutation of all samples of
  the source. Sources of a mixture end their epochs at different times.

  Args:
    order: Order.
    samples: [M] int64 sample numbers, not negative.

  Returns:
    source [M] int64, and index [M] int64 in [0, sizes[source]).
  """
  periods, at = np.divmod(samples, len(order.source))
  source = order.source[at]
  index = np.empty_like(source)
  for k, size in enumerate(order.sizes):
    from_k = source == k
    count = periods[from_k] * order.shares[k] + order.rank[at[from_k]]
    epoch, position = np.divmod(count, size)
    index[from_k] = permute(position, size, order.keys[k], epoch)
  return source, index


def permute(
  position: np.ndarray, size: int, key: int, epoch: np.ndarray
) -> np.ndarray:
  """Returns values of pseudorandom permutations of range(size) at positions.

  Each permutation is a Feistel network over pairs (left, right) of numbers
  below a and b, where a * b is just above size. A result that is not below size
  is permuted again (Black and Rogaway, Ciphers with arbitrary finite domains,
  2002).

  Args:
    position: [M] int64 in [0, size).
    size: size of the permutation.
    key: selects a family of permutations, one per epoch.
    epoch: [M] int64, selects the permutation for each position.

  Returns:
    [M] int64 in [0, size). Within an epoch the map is a bijection.
  """
  a = math.isqrt(size - 1) + 1
  # If a and b were both odd, every permutation would be even.
  a += a % 2
  b = -(-size // a)
  keys = _mix(np.uint64(key) ^ _mix(epoch.astype(np.uint64)))
  out = position.astype(np.uint64)
  pending = np.arange(len(out))
  while pending.size:
    k = keys[pending]
    left, right = np.divmod(out[pending], np.uint64(b))
    for r in range(0, _ROUNDS, 2):
      left = (left + _hash(right, k, r)) % np.uint64(a)
      right = (right + _hash(left, k, r + 1)) % np.uint64(b)
    out[pending] = left * np.uint64(b) + right
    pending = pending[out[pending] >= size]
  return out.astype(np.int64)


def _hash(values: np.ndarray, keys: np.ndarray, round_number: int):
  # The result is below 2^63, so that `left + _hash(...)` does not overflow.
  return _mix(values ^ (keys + _ODD[round_number])) >> np.uint64(1)


def _mix(x: np.ndarray) -> np.ndarray:
  """Hashes uint64 with the finalizer of SplitMix64 (Steele et al. 2014)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


# Round constants: multiples of SplitMix64's increment (the golden ratio).
_ODD = [np.uint64((r + 1) * 0x9E3779B97F4A7C15 % 2**64) for r in range(_ROUNDS)]


def _key(text: str) -> int:
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'little')


def _round(parts: list[fractions.Fraction]) -> tuple[int, ...]:
  """Rounds parts to integers with the same sum, by largest remainders."""
  whole = [math.floor(p) for p in parts]
  missing = int(sum(parts)) - sum(whole)
  by_remainder = sorted(range(len(parts)), key=lambda k: whole[k] - parts[k])
  for k in by_remainder[:missing]:
    whole[k] += 1
  return tuple(whole)


def _spread(shares: tuple[int, ...]) -> list[int]:
  """Returns the sources of a period, spread as evenly as possible.

  In every prefix the count of each source is within 1 of its share. Item j of a
  source with share c must be placed between floor(j P / c) and
  ceil((j + 1) P / c) of a period P. Placing the item with the earliest deadline
  meets all deadlines (Baruah, Cohen, Plaxton and Varvel 1996, proportionate
  progress).
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
