"""Decodes answers to questions, and counts the work. For speculation.py."""

from typing import NamedTuple

import jax
import numpy as np
from questions import SLOTS  # the file beside this one

from maskdiff import config as config_lib
from maskdiff.sampling import layouts, sampler
from maskdiff.sampling.request import begin
from maskdiff.sampling.settings import sampler_config

CONTEXT = 128  # positions of a row


def requests(questions, settings, rows):
  """Returns Requests of `rows` questions each, all of one shape."""
  found = []
  for i in range(0, len(questions), rows):
    some = questions[i : i + rows]
    canvas = [[*q.prompt, *[None] * len(q.answer)] for q in some]
    request = layouts.lay_out(canvas, settings=settings)
    found.append(layouts.widen(request, CONTEXT))
  return found


class Decoder(NamedTuple):
  """A network with the settings of its sampler."""

  network: object
  config: object  # SamplerConfig
  settings: object  # sampling.settings.Settings

  def decode(self, questions, rows):
    """Returns the last Carry of each batch of `rows` questions."""
    carries = []
    for request in requests(questions, self.settings, rows):
      carry, layout, shapes = begin(self.network, self.config, request)
      # The longest shape alone serves all rows, and compiles fastest.
      run = sampler.run(self.network, self.config, shapes[-1:], carry, layout)
      carries.append(run[0])
    return carries


def decoder(model, values):
  """Returns the Decoder of a Model for sampler settings."""
  values = {'temperature': 0.0, 'gen_length': SLOTS, **values}
  c, settings = sampler_config(config_lib.with_settings(model.config, values))
  return Decoder(model.network, c, settings)


class Answers(NamedTuple):
  """Answers to questions, and their cost."""

  tokens: list  # [number][n] int
  forwards: int  # sum over rows of forward passes
  positions: int  # sum over rows of positions that the passes computed


def answers(decoder, questions, rows):
  """Returns the Answers of a Decoder, in batches of `rows` questions."""
  carries = decoder.decode(questions, rows)
  for carry in carries:
    sampler.check(carry)
  canvas, forwards, positions = (
    np.concatenate([jax.device_get(x) for x in xs])
    for xs in zip(
      *((c.canvas, c.forwards, c.positions) for c in carries), strict=True
    )
  )
  tokens = [
    row[len(q.prompt) :][: len(q.answer)].tolist()
    for row, q in zip(canvas, questions, strict=True)
  ]
  return Answers(tokens, int(forwards.sum()), int(positions.sum()))
