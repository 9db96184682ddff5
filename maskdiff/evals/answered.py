"""Evaluation tasks that the sampler answers: answers, accuracy and cost."""

from typing import NamedTuple

import jax

from maskdiff import config as config_lib
from maskdiff.errors import UserError
from maskdiff.evals.scored import accuracy
from maskdiff.interop import load
from maskdiff.sampling import layouts, refill, sampler
from maskdiff.sampling.settings import describe, sampler_config


class Model(NamedTuple):
  """A loaded model: the results of `load.load`."""

  config: object  # ConfigDict of the run
  tokenizer: object  # data.tokenizer.Tokenizer
  params: dict
  mesh: jax.sharding.Mesh

  @property
  def network(self):
    """model.network.Network, for sampling and scoring."""
    return load.network(self.config, self.params)

  @property
  def dtype(self):
    """Names of the parameters' dtypes, separated by commas."""
    names = {x.dtype.name for x in jax.tree.leaves(self.params)}
    return ', '.join(sorted(names))


class Completions(NamedTuple):
  """The answers to a list of prompts, and their cost."""

  tokens: list  # token lists, each cut before its first eos
  forwards: int  # sum over rows of forward passes; guidance takes two per step
  num_slots: int  # sum over rows


def complete(model, c, settings, prompts, suffixes, num_slots, seeds, batch):
  """Samples the text between each prompt and its suffix.

  Args:
    model: Model.
    c: SamplerConfig.
    settings: Settings.
    prompts: list of token lists, which may be empty.
    suffixes: list of token lists, the text after each answer, which may be
      empty.
    num_slots: list of int, slots of each answer.
    seeds: list of int.
    batch: number of rows sampled together.

  Returns:
    Completions.

  Raises:
    UserError: a row is longer than the model's context, or see
      sampler.generate.
  """
  rows = [
    [*prompt, *[None] * n, *suffix]
    for prompt, n, suffix in zip(prompts, num_slots, suffixes, strict=True)
  ]
  request = layouts.lay_out(rows, seeds, settings)
  layouts.check_context(model.config.data.length, request.valid)
  network = model.network
  tokens, forwards = [None] * len(rows), 0
  with jax.set_mesh(model.mesh):
    for answer in refill.answers(network, c, request, batch):
      if answer.broken:
        raise sampler.broken_error([answer.row])
      filled, fill, *_ = answer.recording
      before_eos = layouts.cut(filled, fill, network.eos_id)
      tokens[answer.row] = filled[fill & before_eos].tolist()
      forwards += answer.forwards
  return Completions(tokens, forwards, sum(num_slots))


def answer_lines(model, settings, lines, correct, seed, batch):
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
  config = config_lib.with_settings(
    model.config, {**settings, 'gen_length': max(num_slots)}
  )
  c, of_rows = sampler_config(config)
  if any(suffixes):
    steps = of_rows.steps if 'steps' in settings else 0
    of_rows = of_rows._replace(steps=steps, gen_length=0)
  seeds = [seed + i for i in range(len(lines))]
  answers = complete(
    model, c, of_rows, prompts, suffixes, num_slots, seeds, batch
  )
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
