"""Lengths of answers, predicted by the network before it answers.

A network that was fine-tuned on rows of `launch/prepare.py --length_buckets`
has a token for each of a few lengths. It predicts one of them, given the prompt
and one mask; and then an answer with this number of slots, given the prompt and
the token. posttraining/length_tokens.py makes the rows.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from maskdiff.distributed import shares
from maskdiff.distributed.mesh import replicate
from maskdiff.errors import UserError
from maskdiff.sampling import layouts, passes
from maskdiff.sampling.request import begin
from maskdiff.sampling.settings import of_request


class Length(NamedTuple):
  """The predicted length of an answer, and the cost of the prediction."""

  slots: int  # of the answer
  token: int  # names this number
  forwards: int  # forward passes; guidance takes two
  positions: int  # that these passes computed


def check(length_tokens, gen_length=None):
  """Raises UserError unless lengths can be predicted.

  Args:
    length_tokens: config.data.length_tokens of the run.
    gen_length: that of the user, who must not give one; or None.
  """
  if not length_tokens:
    raise UserError(
      'the model was not trained to predict lengths: fine-tune it on rows of '
      'launch/prepare.py --length_buckets, or give the length (gen_length)'
    )
  if gen_length is not None:
    raise UserError(
      f'gen_length={gen_length}: the model predicts the length; give only one '
      'of the two'
    )


def chosen(choice, length_tokens, gen_length, open_length=False):
  """Returns whether a chat predicts lengths.

  Args:
    choice: 'given' or 'predicted'; None: predicted if the network was trained
      to and the user gives no length.
    length_tokens: see `check`.
    gen_length: see `check`.
    open_length: whether answers end where the network predicts eos.

  Raises:
    UserError: lengths cannot be predicted, but are to be.
  """
  if choice == 'predicted':
    check(length_tokens, gen_length)
    if open_length:
      raise UserError('--length=predicted does not go with --open_length')
  default = bool(length_tokens) and gen_length is None and not open_length
  return default if choice is None else choice == 'predicted'


def predict(network, c, length_tokens, prompts, seeds, settings, batch):
  """Predicts the lengths of the answers to prompts, in one pass per batch.

  The most probable length is taken, or one is drawn at the temperature of the
  settings. Lengths for which the row has no room are left out.

  Args:
    network: Network.
    c: SamplerConfig.
    length_tokens: config.data.length_tokens of the run.
    prompts: list of token lists.
    seeds: list of int, one per prompt.
    settings: list of Settings, one per prompt.
    batch: number of prompts computed together.

  Returns:
    list of Length.

  Raises:
    UserError: a row has no room for the shortest length; see `request.begin`.
  """
  guided = any(s.guidance > 0 for s in settings)
  c = dataclasses.replace(c, cache='none', refresh=0, guided=guided)
  length = max(map(len, prompts)) + 1
  context = network.context or math.inf  # 0: unknown
  layouts.check_context(context, length + length_tokens[0][0])
  requests = list(zip(prompts, seeds, settings, strict=True))
  items = [shares.Item(repr(request).encode(), 1) for request in requests]

  def work(indices, _):
    some = zip(*(requests[i] for i in indices), strict=True)
    return _predict(network, c, length_tokens, *some, length, batch)

  return [Length(*x) for x in shares.computed(network.params, items, work)]


def _predict(
  network, c, length_tokens, prompts, seeds, settings, length, batch
):
  """Returns what `predict` does, with rows of a given length."""
  context = network.context or math.inf
  batch = min(batch, len(prompts))
  found = []
  for start in range(0, len(prompts), batch):
    # The last batch is filled up, so that one program computes all batches.
    rows = [min(i, len(prompts) - 1) for i in range(start, start + batch)]
    request = layouts.lay_out(
      [layouts.prompt_row(prompts[i], 1) for i in rows],
      [seeds[i] for i in rows],
      _joined([settings[i]._replace(gen_length=1, steps=1) for i in rows]),
    )
    request = layouts.widen(request, length)
    carry, layout, shapes = begin(network, c, request, num_slots=1)
    logits, positions = jax.device_get(
      _first_slot(network, c, shapes[-1], carry, layout)
    )
    for i, row in enumerate(rows[: len(prompts) - start]):
      room = context - len(prompts[row]) - 1
      slots, token = _choose(
        logits[i], length_tokens, room, settings[row].temperature, seeds[row]
      )
      forwards = 1 + (settings[row].guidance > 0)
      found.append(Length(slots, token, forwards, int(positions[i])))
  return found


def row(prompt, length):
  """Returns the row of a prompt and a predicted length, see layouts.lay_out.

  Args:
    prompt: list of tokens.
    length: Length.
  """
  return layouts.prompt_row([*prompt, length.token], length.slots)


def with_lengths(network, c, length_tokens, texts, settings_of, batch):
  """Returns answers.Texts with as many slots as the network predicts.

  Args:
    network: Network.
    c: SamplerConfig.
    length_tokens: config.data.length_tokens of the run.
    texts: list of answers.Text, prompts with any number of slots.
    settings_of: function from (index of a text, number of slots) to Settings.
    batch: number of prompts computed together.

  Raises:
    UserError: see `predict`.
  """
  prompts = [[t for t in text.row if t is not None] for text in texts]
  found = predict(
    network,
    c,
    length_tokens,
    prompts,
    [text.prompt.seed for text in texts],
    [text.settings for text in texts],
    batch,
  )
  return [
    text._replace(
      row=row(prompt, length),
      settings=settings_of(i, length.slots),
      length=length,
    )
    for i, (text, prompt, length) in enumerate(
      zip(texts, prompts, found, strict=True)
    )
  ]


def settings_of(config, c, values, slots, changes=None):
  """Returns the Settings of an answer with its own number of slots.

  Args:
    config: ConfigDict of the run.
    c: SamplerConfig of the values.
    values: dict of sampler settings, with the gen_length that `steps` is for.
    slots: number of slots of the answer.
    changes: dict, settings that differ from the values. If neither sets
      `steps`, each slot has one step. If only the values set it, each slot has
      as many steps as one of their gen_length.

  Raises:
    UserError: see `settings.of_request`.
  """
  changes = {'gen_length': slots} | (changes or {})
  steps = values.get('steps')
  if steps and 'steps' not in changes:
    blocks = -(-slots // min(c.block_length, slots))
    steps = -(-steps * slots // values['gen_length'])
    changes['steps'] = -(-steps // blocks) * blocks
  if changes.get('temperature') == 0:  # these have no effect then
    changes = {'top_k': 0, 'top_p': 1.0} | changes
  return of_request(config, values, changes)[1]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _first_slot(network, c, shape, carry, layout):
  """Returns logits of the first slot of each row, [B, V], and positions [B]."""
  logits, positions, _ = passes.over_canvas(network, c, shape, carry, layout)
  return replicate((logits[:, 0], positions))


def _joined(settings):
  """Returns Settings with one value per row, of a list of Settings."""
  return type(settings[0])(*map(list, zip(*settings, strict=True)))


def _choose(logits, length_tokens, room, temperature, seed):
  """Returns the (length, token) that the logits of a slot choose."""
  fits = [(n, i) for n, i in length_tokens if n <= room]
  scores = logits[[i for _, i in fits]].astype(np.float64)
  if not np.isfinite(scores).all():
    raise UserError('the logits of the lengths are not finite: the model broke')
  if temperature > 0:
    noise = np.random.default_rng(seed).gumbel(size=len(fits))
    scores = scores / temperature + noise
  return fits[int(scores.argmax())]
