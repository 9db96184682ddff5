"""Evaluation tasks that the sampler answers: answers, accuracy and cost."""

import functools
from typing import NamedTuple

import jax

from maskdiff import config as config_lib
from maskdiff.errors import UserError
from maskdiff.evals.scored import accuracy
from maskdiff.sampling import layouts, lengths
from maskdiff.sampling.serve import RowRequest
from maskdiff.sampling.serve_shares import serve_all
from maskdiff.sampling.settings import describe, fit_blocks, sampler_config


class Completions(NamedTuple):
  """The answers to a list of prompts, and their cost."""

  tokens: list  # token lists, each cut before its first eos
  forwards: int  # sum over rows of forward passes; guidance takes two per step
  num_slots: int  # sum over rows


def complete(model, c, requests, batch, progress=None):
  """Samples the slots of requests.

  Args:
    model: Model.
    c: SamplerConfig.
    requests: list of serve.RowRequest; the ids are 0, 1, 2, ...
    batch: number of rows sampled together, by each process that has a copy.
    progress: function without arguments, called after each answer; or None.

  Returns:
    Completions.

  Raises:
    UserError: a row is longer than the model's context, a request is not valid,
      or logits were NaN or infinite.
  """
  length = max(len(request.row) for request in requests)
  layouts.check_context(model.config.data.length, length)
  slots = [request.row.count(None) for request in requests]
  longest = max(*slots, *(r.settings.gen_length for r in requests))
  network = model.network
  c = fit_blocks(network, c, longest)
  tokens, forwards = [None] * len(requests), 0
  with jax.set_mesh(model.mesh):
    for answer in serve_all(network, c, requests, batch, length):
      if answer.error:
        raise UserError(f'request {answer.id}: {answer.error}')
      filled, fill, *_ = answer.recording
      before_eos = layouts.cut(filled, fill, network.eos_id)
      tokens[answer.id] = filled[fill & before_eos].tolist()
      forwards += answer.forwards
      if progress:
        progress()
  return Completions(tokens, forwards, sum(slots))


def with_lengths(model, c, values, prompts, batch, seed=0):
  """Returns requests whose numbers of slots the model predicts.

  Args:
    model: Model that was trained to predict lengths.
    c: SamplerConfig of the values.
    values: dict of sampler settings, see lengths.settings_of.
    prompts: list of token lists.
    batch: number of prompts computed together.
    seed: seed of the first prompt; it grows by 1 per prompt.

  Returns:
    list of serve.RowRequest, for `complete`; list of lengths.Length.

  Raises:
    UserError: see `lengths.predict` and `lengths.settings_of`.
  """
  settings = functools.cache(
    functools.partial(lengths.settings_of, model.config, c, values)
  )
  seeds = range(seed, seed + len(prompts))
  with jax.set_mesh(model.mesh):
    found = lengths.predict(
      model.network,
      c,
      model.config.data.length_tokens,
      prompts,
      seeds,
      [settings(1)] * len(prompts),
      batch,
    )
  requests = [
    RowRequest(i, lengths.row(prompt, x), seeds[i], settings(x.slots))
    for i, (prompt, x) in enumerate(zip(prompts, found, strict=True))
  ]
  return requests, found


def answer_lines(model, settings, lines, correct, seed, batch, progress=None):
  """Samples an answer to each line, and computes the accuracy.

  An answer at the end of its row gets slots for the longest right answer and an
  eos, so that the number of slots does not reveal the length of the answer. An
  answer before a suffix gets as many slots as the right answer has tokens. If
  any line has a suffix, denoising steps are counted per row (gen_length=0 of
  sampling.settings.Settings).

  Args:
    model: Model.
    settings: dict of sampler settings, see config.with_settings. It must not
      contain gen_length, which is the largest number of slots.
    lines: list of dicts with the texts `prompt` and `answer`, and optionally
      `suffix` and `way`.
    correct: function from a line and a text to a bool.
    seed: seed of the first line; it grows by 1 per line.
    batch: number of lines sampled together.
    progress: see `complete`.

  Returns:
    - one dict per line: the line, with its sampled `text` and whether the text
      is `correct`.
    - dict with the accuracy over all lines and per `way`, the forward passes
      per slot, and the settings of the sampler.

  Raises:
    UserError: gen_length is set, or see config.with_settings and `complete`.
  """
  if 'gen_length' in settings:
    raise UserError(
      'sampler setting gen_length: the task sets it; remove the setting'
    )
  encode = model.tokenizer.encode
  prompts = [encode(line['prompt']) for line in lines]
  suffixes = [encode(line.get('suffix', '')) for line in lines]
  lengths = [len(encode(line['answer'])) for line in lines]
  num_slots = [
    n if suffix else max(lengths) + 1
    for n, suffix in zip(lengths, suffixes, strict=True)
  ]
  layouts.check_context(  # before the slots take memory
    model.config.data.length,
    max(
      len(prompt) + n + len(suffix)
      for prompt, n, suffix in zip(prompts, num_slots, suffixes, strict=True)
    ),
  )
  config = config_lib.with_settings(
    model.config, {**settings, 'gen_length': max(num_slots)}
  )
  c, of_rows = sampler_config(config)
  if any(suffixes):
    steps = of_rows.steps if 'steps' in settings else 0
    of_rows = of_rows._replace(steps=steps, gen_length=0)
  requests = [
    RowRequest(i, [*prompt, *[None] * n, *suffix], seed + i, of_rows)
    for i, (prompt, n, suffix) in enumerate(
      zip(prompts, num_slots, suffixes, strict=True)
    )
  ]
  answers = complete(model, c, requests, batch, progress)
  rows = []
  for line, tokens in zip(lines, answers.tokens, strict=True):
    text = model.tokenizer.decode(tokens)
    rows.append(line | {'text': text, 'correct': correct(line, text)})
  total = {
    'lines': len(rows),
    **accuracy('accuracy', [row['correct'] for row in rows]),
  }
  for way in sorted({line['way'] for line in lines if 'way' in line}):
    correct_of_way = [row['correct'] for row in rows if row['way'] == way]
    total |= accuracy(f'accuracy_{way}', correct_of_way)
  total |= {
    'forwards_per_token': answers.forwards / answers.num_slots,
    'sampler': describe(model.network, c, of_rows),
  }
  return rows, total
