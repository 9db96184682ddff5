"""Completes texts with the sampler: settings in, answers and their cost out."""

import dataclasses
from typing import NamedTuple

import jax

from maskdiff import config as config_lib
from maskdiff.errors import UserError
from maskdiff.evals.scored import accuracy
from maskdiff.interop import load
from maskdiff.sampling import layouts, refill, sampler
from maskdiff.sampling.request import describe, sampler_config


class Model(NamedTuple):
  """What `run.load` gives."""

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
    """Name of the dtype of the weights; of several, one after the other."""
    names = {x.dtype.name for x in jax.tree.leaves(self.params)}
    return ', '.join(sorted(names))


class Answers(NamedTuple):
  """Of a list of texts."""

  tokens: list  # of token lists, cut before their first eos
  forwards: int  # forward passes of a row, in all; two a step with guidance
  slots: int  # tokens that were filled in, in all


def complete(model, c, prompts, suffixes, slots, seeds, batch):
  """Fills in what stands between prompts and suffixes.

  Args:
    model: Model.
    c: SamplerConfig; its gen_length is that of the longest answer.
    prompts: list of token lists, one may be empty.
    suffixes: list of token lists, empty where an answer ends its row.
    slots: list of int, tokens to fill in for each.
    seeds: list of int.
    batch: rows in progress at once.

  Returns:
    Answers.

  Raises:
    UserError: a row is longer than the model's context; see sampler.generate.
  """
  rows = [
    [*prompt, *[None] * n, *suffix]
    for prompt, n, suffix in zip(prompts, slots, suffixes, strict=True)
  ]
  request = layouts.lay_out(rows, seeds)
  layouts.check_context(model.config.data.length, request.valid)
  network = model.network
  tokens, forwards = [None] * len(rows), 0
  with jax.set_mesh(model.mesh):
    for found in refill.answers(network, c, request, batch):
      if found.broken:
        raise sampler.broken_error([found.row])
      slot = request.fill[found.row]
      eos_id = network.eos_id
      keep = slot & layouts.cut(found.tokens[None], slot[None], eos_id)[0]
      tokens[found.row] = found.tokens[keep].tolist()
      forwards += found.forwards
  return Answers(tokens, forwards, sum(slots))


def ask(model, values, lines, correct, seed, batch):
  """Lets the sampler answer lines, and counts what is right.

  An answer after which the row ends has room for the longest right answer of
  all lines and an eos: the number of slots says nothing of its length. One
  with text after it has as many slots as the right answer has tokens, and steps
  of its own, see request.SamplerConfig.own_blocks.

  Args:
    model: Model.
    values: as for config.with_settings; gen_length is that of the most slots.
    lines: list of dicts with text as `prompt`, `answer` and perhaps `suffix`
      and `way`.
    correct: function from a line and a text to a bool.
    seed: of the first line; the next has seed + 1.
    batch: lines that are answered together.

  Raises:
    UserError: see config.with_settings and `complete`; or gen_length is given.

  Returns:
    list of dicts, a line each; and a dict with the accuracy, that of each way,
    the forward passes per token and the settings of the sampler.
  """
  if 'gen_length' in values:
    raise UserError('sampler setting gen_length: the task sets it')
  encode = model.tokenizer.encode
  prompts = [encode(line['prompt']) for line in lines]
  suffixes = [encode(line.get('suffix', '')) for line in lines]
  lengths = [len(encode(line['answer'])) for line in lines]
  slots = [
    n if suffix else max(lengths) + 1
    for n, suffix in zip(lengths, suffixes, strict=True)
  ]
  config = config_lib.with_settings(
    model.config, {**values, 'gen_length': max(slots)}
  )
  c = sampler_config(config)
  if any(suffixes):
    steps = c.steps if 'steps' in values else 0
    c = dataclasses.replace(c, steps=steps, own_blocks=True)
  seeds = [seed + i for i in range(len(lines))]
  answers = complete(model, c, prompts, suffixes, slots, seeds, batch)
  rows = []
  for line, tokens in zip(lines, answers.tokens, strict=True):
    text = model.tokenizer.decode(tokens)
    rows.append(line | {'text': text, 'correct': correct(line, text)})
  right = [row['correct'] for row in rows]
  total = {'lines': len(rows), **accuracy('accuracy', right)}
  for way in sorted({line['way'] for line in lines if 'way' in line}):
    of_way = [row['correct'] for row in rows if row['way'] == way]
    total |= accuracy(f'accuracy_{way}', of_way)
  total |= {
    'forwards_per_token': answers.forwards / answers.slots,
    'sampler': describe(model.network, c),
  }
  return rows, total
