"""Samples from a model: `maskdiff.sample`."""

import dataclasses
import types

import jax
import numpy as np

from maskdiff import config as config_lib
from maskdiff.config.sample import PER_REQUEST, SETTINGS
from maskdiff.errors import UserError, suggestion
from maskdiff.library import arguments
from maskdiff.sampling import answers, layouts, lengths, recording, sampler
from maskdiff.sampling.prompts import Prompt
from maskdiff.sampling.request import begin
from maskdiff.sampling.serve import Answer
from maskdiff.sampling.settings import Settings, of_request

# Rules whose number of steps is the number of slots at most, and not `steps`.
_ONE_STEP_PER_SLOT = ('threshold', 'factor', 'first_hitting')


def sample(
  model,
  prompts,
  *,
  gaps=False,
  seed=0,
  batch=16,
  open_length=False,
  length='given',
  suppress_mask=False,
  gumbel=None,
  uniform=None,
  **settings,
):
  """Continues prompts, or fills gaps, as launch/sample.py does.

  The tokens of a row depend on its own prompt, settings and seed only. At
  temperature 0 the seed has no effect, unless the remasking rule is random.

  Letters in shapes: B prompts; T steps, at least as many as any row takes; N
  slots, the largest number of a row, from left to right; V vocabulary size.

  Args:
    model: Model.
    prompts: list of texts or token lists.
    gaps: fill the gaps of the texts, {{n}} for n tokens. In a token list, None
      is a token to fill.
    seed: seed of the first prompt, which grows by 1 per prompt; or a list with
      one seed per prompt.
    batch: number of rows sampled at once.
    open_length: append blocks until the model predicts eos, or until the row is
      as long as the training rows.
    length: 'given' by gen_length; or 'predicted' by a model that was trained on
      rows of launch/prepare.py --length_buckets.
    suppress_mask: never predict the mask token.
    gumbel: [B, T, N, V] float, Gumbel noise in place of the seed's, for
      drawing tokens at temperatures above 0.
    uniform: [B, T, N] float in [0, 1), numbers of the remasking rules random,
      first_hitting and ancestral in place of the seed's.
    **settings: keys of config.sample, except `prompts`; default: the config of
      the run. Without `steps`, one step per token. A setting that may differ by
      request can be a list, one value per prompt.

  Returns:
    A list with one dict per prompt, as the lines of launch/sample.py --out with
    --trajectory; sampling.answers describes the fields. Without a tokenizer,
    `text` and `answer` are missing.

  Raises:
    UserError: a setting is unknown or not valid; ids are not in the vocabulary;
      a row is longer than the training rows; noise has another shape; or logits
      were NaN or infinite.
  """
  prompts = arguments.texts_of(prompts)
  seeds = arguments.seeds_of(seed, len(prompts))
  arguments.check_whole(batch=batch)
  shared, per_prompt = _split(settings, len(prompts))
  context = model.config.data.length
  predicted = length == 'predicted'
  if length not in ('given', 'predicted'):
    raise UserError(f'length={length!r}: must be given or predicted')
  if predicted:
    lengths.check(model.config.data.length_tokens, settings.get('gen_length'))
    if gaps or open_length or gumbel is not None or uniform is not None:
      raise UserError(
        'length=predicted does not go with gaps, open_length and given noise'
      )
    longest = model.config.data.length_tokens[-1][0]
    shared['gen_length'] = min(longest, context)  # `steps` are for it
  values = _values(model.config, shared | per_prompt[0], gaps, open_length)
  steps = (shared | per_prompt[0]).get('steps')
  c, of_all = of_request(model.config, values, {}, gaps, steps)

  def with_slots(own, slots):
    return lengths.settings_of(model.config, c, values, slots, own)

  texts = []
  for prompt, seed_of, own in zip(prompts, seeds, per_prompt, strict=True):
    row_settings = of_all
    if predicted:
      row_settings = with_slots(own, 1)
    elif own:
      _, row_settings = of_request(model.config, values, own, gaps, steps)
    limit = context if open_length else None
    texts.append(_text(model, prompt, seed_of, gaps, row_settings, limit))
  network = model.network
  if suppress_mask:
    network = dataclasses.replace(network, predict_mask=False)
  if predicted:
    known = model.config.data.length_tokens
    own = lambda i, slots: with_slots(per_prompt[i], slots)
    with jax.set_mesh(model.mesh):
      texts = lengths.with_lengths(network, c, known, texts, own, batch)
  fitted = answers.fit(network, c, texts, of_all)
  s = answers.Sampling(network, fitted, model.tokenizer, context, True)
  # Blocks of at least all slots give the same answers, so a power of two saves
  # compilations.
  power = 1 << (fitted.block_length - 1).bit_length()
  wide = dataclasses.replace(fitted, block_length=min(c.block_length, power))
  longest = max(len(text.row) for text in texts)
  width = answers.padded_length(longest, context)
  with jax.set_mesh(model.mesh):
    if gumbel is None and uniform is None:
      found = answers.filled(s._replace(c=wide), texts, batch, width)
    else:
      found = _with_noise(network, wide, texts, width, gumbel, uniform)
    return [answers.as_dict(s, text, answer) for text, answer in found]


def _split(settings, size):
  """Returns the settings of all prompts, and one dict of settings per prompt.

  Raises:
    UserError: a name is unknown, or a list has another length.
  """
  shared, per_prompt = {}, [{} for _ in range(size)]
  for name, value in settings.items():
    if name not in SETTINGS:
      raise UserError(
        f'unknown setting {name!r}{suggestion(name, SETTINGS)}; settings: '
        f'{", ".join(SETTINGS)}'
      )
    if not isinstance(value, list | tuple) and not getattr(value, 'ndim', 0):
      shared[name] = arguments.python_value(value)
      continue
    if name not in PER_REQUEST:
      raise UserError(
        f'{name}={arguments.shown(value)}: all prompts share one value; '
        f'settings that may differ by prompt: {", ".join(PER_REQUEST)}'
      )
    if len(value) != size:
      raise UserError(
        f'{name}={arguments.shown(value)}: give one value, or {size}, one per '
        'prompt'
      )
    for own, one in zip(per_prompt, value, strict=True):
      own[name] = arguments.python_value(one)
  return shared, per_prompt


def _values(config, settings, gaps, open_length):
  """Returns the settings of the first prompt, a dict for `of_request`."""
  if gaps and 'gen_length' in settings:
    raise UserError('gen_length is for prompts: gaps have their own lengths')
  default = config.data.length if open_length else config.sample.gen_length
  gen_length = settings.get('gen_length', default)
  flags = dict.fromkeys(SETTINGS) | settings | {'open_length': open_length}
  return config_lib.sample_settings(
    types.SimpleNamespace(**flags), config, gen_length, gaps
  )


def _text(model, prompt, seed, gaps, settings, limit):
  """Returns the answers.Text of a prompt.

  Args:
    model: Model.
    prompt: str or token list.
    seed: int.
    gaps: see `sample`.
    settings: Settings.
    limit: see `layouts.prompt_row`.
  """
  context = model.config.data.length
  is_text = isinstance(prompt, str)
  if gaps and is_text:
    encode = lambda part: arguments.ids_of(model, part)
    text = answers.encode_text(
      Prompt(prompt, seed), True, settings, encode, context
    )
  else:
    if gaps and hasattr(prompt, '__iter__'):
      tokens = list(prompt)
      arguments.ids_of(model, [t for t in tokens if t is not None])
    else:
      tokens = arguments.ids_of(model, prompt)
    shown = prompt if is_text else tokens
    # Checked before the row is made, since gen_length may be huge.
    slots = 1 if limit else settings.gen_length
    layouts.check_context(context, len(tokens) + slots)
    if not gaps:
      tokens = layouts.prompt_row(tokens, settings.gen_length, limit)
    elif None not in tokens:
      raise UserError('no gap in a token list: put None where to fill a token')
    text = answers.Text(Prompt(shown, seed), gaps, tokens, settings)
  layouts.check_context(context, len(text.row))
  return text


def _with_noise(network, c, texts, length, gumbel, uniform):
  """Yields each Text with its serve.Answer, sampled with given noise.

  Args:
    network: Network.
    c: SamplerConfig.
    texts: list of Text.
    length: positions of a row.
    gumbel: see `sample`; or None.
    uniform: see `sample`; or None.
  """
  per_row = Settings(*map(list, zip(*(t.settings for t in texts), strict=True)))
  request = layouts.widen(
    layouts.lay_out(
      [t.row for t in texts], [t.prompt.seed for t in texts], per_row
    ),
    length,
  )
  if network.window_length:
    raise UserError(
      f'{"uniform" if gumbel is None else "gumbel"}: steps of a network that '
      'predicts windows have no given noise; leave it out'
    )
  num_slots = max(t.row.count(None) for t in texts)
  carry, layout, shapes = begin(network, c, request, num_slots)
  steps = _num_steps(network, c, layout)
  vocab_size = network.config.vocab_size
  given = {'gumbel': (gumbel, (vocab_size,)), 'uniform': (uniform, ())}
  for name, (noise, rest) in given.items():
    if noise is not None:
      noise = _check_noise(name, noise, len(texts), steps, num_slots, rest)
      layout = layout._replace(**{name: _by_block(layout, noise)})
  carry, _ = sampler.run(network, c, shapes, carry, layout)
  sampler.check(carry)
  recordings = recording.of_rows(carry, layout.fill, layout.valid)
  forwards, positions = jax.device_get((carry.forwards, carry.positions))
  for i, (text, recorded) in enumerate(zip(texts, recordings, strict=True)):
    yield text, Answer(i, recorded, int(forwards[i]), int(positions[i]))


def _by_block(layout, noise):
  """Returns noise of slots [B, T, N, ...] by block, [B, T, blocks, S, ...].

  The first block of a network trained on blocks may have fewer than S slots.
  """
  number = np.cumsum(layout.fill, axis=1) - 1  # of each slot, from the left
  number = np.pad(number, ((0, 0), (0, 1)))  # for places without a slot
  rows = np.arange(len(noise))[:, None, None]
  of_place = number[rows, layout.slots]
  return np.stack([x[:, n] for x, n in zip(noise, of_place, strict=True)])


def _num_steps(network, c, layout):
  """Returns the largest number of denoising steps that a row can take."""
  if c.remasking in _ONE_STEP_PER_SLOT:
    return int(layout.num_slots.sum(axis=1).max())
  # The step of a leading slot does not count among those of its block.
  leading = bool(network.block_length) and network.config.predict_next
  blocks = (layout.num_slots > 0).sum(axis=1)
  return int((blocks * (layout.steps + leading)).max())


def _check_noise(name, noise, rows, steps, slots, rest):
  noise = np.asarray(noise)
  expected = (rows, max(steps, noise.shape[1] if noise.ndim > 1 else 0), slots)
  if noise.shape != (*expected, *rest) or noise.dtype.kind != 'f':
    shape = ', '.join(map(str, (rows, f'at least {steps}', slots, *rest)))
    raise UserError(
      f'{name} is {noise.dtype} of shape {list(noise.shape)}: give float of '
      f'shape [{shape}]: prompts, steps, slots{", vocabulary" * len(rest)}'
    )
  if name == 'uniform':
    arguments.check_in_unit(name, noise)
  elif np.isnan(noise).any():
    raise UserError(f'{name} has values that are not numbers')
  return noise.astype(np.float32)
