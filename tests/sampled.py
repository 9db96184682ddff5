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
  return list(sampler.trace(*arguments(network, values, request)))


def walk(network, values, request):
  return list(sampler.walk(*arguments(network, values, request)))


def begin(network, values, request, **options):
  return request_lib.begin(*arguments(network, values, request), **options)
