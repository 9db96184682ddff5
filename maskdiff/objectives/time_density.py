"""The density of diffusion times in training, and weights that go with it.

The bound is an integral over uniform times. Training may draw other times and
weigh them differently: the held-out bound, which does not depend on either,
says whether the model learns faster. arXiv 2605.13026 draws times from a bell
around 1/2.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from maskdiff.objectives.schedule import module_of

BINS = 1024  # of the tabulated density, on [0, 1]


@dataclasses.dataclass(frozen=True)
class TimeDensity:
  """A density of times on an interval of [0, 1].

  Attributes:
    name: 'uniform' or 'bell', a normal distribution cut to the interval.
    mean, width: mean and standard deviation of the bell before the cut.
    uniform_share: share of the uniform density, mixed with the bell.
    interval: (start, end) of the interval.
  """

  name: str = 'uniform'
  mean: float = 0.5
  width: float = 0.12
  uniform_share: float = 0.0
  interval: tuple = (0.0, 1.0)

  @property
  def is_uniform(self):
    """Whether times are uniform on [0, 1], as in the bound."""
    return self.name == 'uniform' and self.interval == (0.0, 1.0)

  @property
  def is_symmetric(self):
    """Whether quantiles u and 1 - u are times t and 1 - t."""
    centered = self.name == 'uniform' or self.mean == 0.5
    return centered and sum(self.interval) == 1

  def table(self):
    """Returns the probabilities of BINS equal bins of the interval, float64."""
    start, end = self.interval
    middle = start + (end - start) * (np.arange(BINS) + 0.5) / BINS
    uniform = np.full(BINS, 1 / BINS)
    if self.name == 'uniform':
      return uniform
    # Relative to the bin nearest to the mean, which may be far away.
    exponent = -0.5 * ((middle - self.mean) / self.width) ** 2
    bell = np.exp(exponent - exponent.max())
    bell /= bell.sum()
    return self.uniform_share * uniform + (1 - self.uniform_share) * bell

  def quantile(self, u):
    """Maps uniform draws in [0, 1) to times: the inverse of the CDF.

    Strata of u become strata of equal probability. u is an array of JAX or, for
    a result in float64, of NumPy.
    """
    if self.is_uniform:
      return u
    start, end = self.interval
    table = self.table()
    cdf = np.concatenate([[0.0], np.cumsum(table)]) / table.sum()
    edges = start + (end - start) * np.arange(BINS + 1) / BINS
    if isinstance(u, np.ndarray):
      return np.interp(u, cdf, edges)
    t = jnp.interp(u, cdf.astype(np.float32), edges.astype(np.float32))
    return jnp.minimum(t, 1 - 2.0**-24)  # below 1, as u is

  def density(self, t):
    """Returns the density at times of the interval; constant within a bin."""
    start, end = self.interval
    bin_ = ((t - start) / (end - start) * BINS).astype(jnp.int32)
    height = self.table() * BINS / (end - start)
    return jnp.asarray(height, jnp.float32)[jnp.clip(bin_, 0, BINS - 1)]


@dataclasses.dataclass(frozen=True)
class Weight:
  """The weight of a masked token in the training loss.

  Attributes:
    name: 'bound': -alpha'(t) / (1 - alpha(t)), whatever the density of times.
      'importance': this weight divided by the density of times, so that the
      expected loss is the bound. 'power': a power of the mask ratio.
    power: k of the weight 1 / mask_ratio**k; 0 is cross entropy without
      weights.
  """

  name: str = 'bound'
  power: float = 0.0

  def at(self, schedule, density, eps, d):
    """Returns the weights, with an expectation of 1 per token.

    A token is masked with the probability 1 - alpha(t). The expectation of
    this probability times the weight, over the times, is computed from
    the table of the density.

    Args:
      schedule: schedule.Schedule.
      density: TimeDensity.
      eps: times are (1 - eps) d + eps, where d has the density.
      d: draws of the density, an array.
    """
    scale = self._scale(schedule, density, eps, (False,))
    return scale * self._raw(schedule, density, eps, d, False)

  def of_pair(self, schedule, density, eps, d):
    """Returns the weights of a mask and of its complement.

    A token is masked in the complement with the probability alpha(t). The
    weights are the same function of the mask ratio for both masks, and their
    expectation is 1 per token and mask. Ratios of the complement below
    1 - alpha(eps), the lowest of the mask, count as the lowest.

    Args:
      schedule: as for `at`.
      density: as for `at`.
      eps: as for `at`.
      d: as for `at`.
    """
    scale = self._scale(schedule, density, eps, (False, True))
    return tuple(
      scale * self._raw(schedule, density, eps, d, complement)
      for complement in (False, True)
    )

  def _raw(self, schedule, density, eps, d, complement):
    """Returns the weights at draws d of the density, not normalized."""
    t = (1 - eps) * d + eps
    ratio = _ratio(schedule, eps, t, complement)
    if self.name == 'power':
      return ratio**-self.power
    weight = schedule.weight(t)  # -alpha'(t) / ratio
    if complement:
      weight = weight * schedule.mask_ratio(t) / ratio
    if self.name == 'importance':
      return weight / density.density(d)
    return weight

  def _scale(self, schedule, density, eps, complements):
    """Returns 1 / the expected weight of a token before normalization."""
    if self.name == 'importance' or (
      self.name == 'bound' and density.is_uniform
    ):
      # The integral of -alpha' over [eps, 1], in closed form. It is below 1
      # because times start at eps, except for the linear schedule.
      return (1 - eps) / (1 - schedule.mask_ratio(eps))
    u = (np.arange(16 * BINS) + 0.5) / (16 * BINS)
    # In NumPy: a number also under jit, and for devices that only compile.
    d = density.quantile(u)
    expected = [
      np.mean(
        _ratio(schedule, eps, (1 - eps) * d + eps, complement)
        * self._raw(schedule, density, eps, d, complement)
      )
      for complement in complements
    ]
    return 1 / float(np.mean(expected))


def _ratio(schedule, eps, t, complement):
  """Returns the mask ratio, or that of the complement, at times t."""
  ratio = schedule.mask_ratio(t)
  if not complement:
    return ratio
  lowest = float(schedule.mask_ratio(np.array(eps)))  # a number also under jit
  return module_of(t).maximum(1 - ratio, lowest)
