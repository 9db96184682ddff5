"""The sampler, with the settings of the program and of the rows in one dict."""

import numpy as np

from maskdiff.sampling import request as request_lib
from maskdiff.sampling import sampler
from maskdiff.sampling.settings import split


def arguments(network, values, request):
  """Returns the arguments of `sampler.complete`.

  Args:
    network: Network.
    values: dict from keys of config.sample to values, for all rows.
    request: Request.
  """
  c, settings = split(values)
  return network, c, request._replace(settings=settings)


def complete(network, values, request):
  return sampler.complete(*arguments(network, values, request))


def generate(network, values, request):
  return np.asarray(sampler.generate(*arguments(network, values, request)))


def trace(network, values, request):
  """Returns the canvas before every step and after the last, [T + 1, B, L]."""
  carry = complete(network, values, request)
  sampler.check(carry)
  filled_at, canvas = np.asarray(carry.filled_at), np.asarray(carry.canvas)
  return np.stack(
    [
      np.where(filled_at > step, network.mask_id, canvas)
      for step in range(filled_at.max() + 1)
    ]
  )


def begin(network, values, request, **options):
  return request_lib.begin(*arguments(network, values, request), **options)
