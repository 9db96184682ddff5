"""Exponential moving average (EMA) of the parameters.

After update number n of the average, with the parameters p of that update,

    average = decay_n x average + (1 - decay_n) x p
    decay_n = min(decay, (1 + n) / (10 + n)).

The smaller decay of the first updates makes the average forget the parameters
at which it began. It is the warmup of TensorFlow's ExponentialMovingAverage,
with n counted from 1 as in MDLM (github.com/kuleshov-group/mdlm,
models/ema.py). MDLM and MD4 use decay 0.9999.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Ema(NamedTuple):
  """A moving average of the parameters.

  Attributes:
    params: tree like the parameters, float32; the average.
    updates: int32 scalar, number of updates of the average. Refused updates of
      the parameters do not count.
  """

  params: dict
  updates: jax.Array


def start(params):
  """Returns the Ema that begins at these parameters; copies the arrays.

  Call it under jax.jit, so that the average does not share memory with the
  parameters: the train step donates both.
  """
  return Ema(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))


def update(decay, ema, params, ok):
  """Returns the Ema after an update of the parameters.

  Args:
    decay: float in (0, 1), the decay after the warmup.
    ema: Ema.
    params: parameter tree after the update.
    ok: bool scalar. If it is false, the Ema stays as it is.
  """
  n = ema.updates + 1
  # 1 - decay_n without the rounding error of 1 - float32(decay).
  rate = jnp.maximum(jnp.float32(1 - decay), 9 / (10 + n).astype(jnp.float32))
  average = jax.tree.map(
    lambda a, p: jnp.where(ok, a + rate * (p - a), a), ema.params, params
  )
  return Ema(average, jnp.where(ok, n, ema.updates))
