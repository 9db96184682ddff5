r"""Bounds on rows longer than the training rows, by scaling of the positions.

python benchmarks/long_rows.py [--seeds 3] [--out FILE]
python benchmarks/long_rows.py --workdir runs/tiny --lengths 256 512

The first command trains a network of one layer on rows of 64 tokens, a third of
a minute on one CPU core, and evaluates it on longer ones. A row has noise, a
masked token, and a needle on either side of it at any distance; the token is
that of the needle on the left. The second command evaluates a trained run on
its held-out text. Prints JSON lines: the bound in nats per token without a
scaling, with `config.model.rope_scaling`, whose lengths count both sides of a
token, and with the rule for causal attention, whose lengths count one side.
"""

import argparse
import dataclasses
import functools

import jax
import json_lines  # a file beside this one
import numpy as np
import steps as steps_lib  # another one

from maskdiff import config as config_lib
from maskdiff.data.rows import Rows
from maskdiff.interop import load
from maskdiff.model import ntk
from maskdiff.training import evaluation, inputs, step, train_state

TRAINED, LENGTHS = 64, (128, 256)
STEPS, BATCH, STEPS_PER_CALL = 200, 64, 20
FIRST_ID, KINDS = 5, 8  # of noise, and then as many of needles
KEYS = {
  'model.vocab_size': FIRST_ID + 2 * KINDS,
  'model.embed': 32,
  'model.layers': 1,
  'model.heads': 2,
  'model.kv_heads': 2,
  'model.head_dim': 32,
  'model.mlp': 64,
  'model.rope_theta': 100.0,
  'model.tie_embeddings': False,
  'model.dtype': 'float32',
  'model.remat': 'none',
  'objective.random_length_fraction': 0.0,
  'objective.loss_chunk_tokens': TRAINED * BATCH,
  'optimizer.schedule': 'cosine',
  'optimizer.learning_rate': 1e-2,
  'optimizer.final_learning_rate': 0.0,
  'optimizer.warmup_steps': 20,
  'optimizer.weight_decay': 0.0,
  'data.length': TRAINED,
  'train.steps': STEPS,
  'train.batch': BATCH,
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--workdir', help='a trained run, in place of needles')
  parser.add_argument('--lengths', type=int, nargs='+', default=LENGTHS)
  parser.add_argument('--out', help='file to which lines are appended')
  args = parser.parse_args()
  if args.workdir:
    json_lines.report(on_text(args.workdir, args.lengths), args.out)
    return
  for seed in range(args.seeds):
    lines = on_needles(*train(seed), args.lengths)
    json_lines.report([{'seed': seed, **line} for line in lines], args.out)


def thetas(m, trained, length):
  """Returns the bases of rotary wavelengths to compare, by name."""
  of = functools.partial(ntk.scaled_theta, m.rope_theta, m.head_dim)
  if length == trained:
    return {'none': m.rope_theta}
  return {
    'none': m.rope_theta,
    'two-sided': of(trained, length),
    'one-sided': of(trained / 2, length / 2),
  }


def needles(rng, number, length):
  """Draws Rows whose one answer is the needle on its left."""
  tokens = rng.integers(0, KINDS, (number, length)) + FIRST_ID
  found = rng.integers(0, KINDS, (number, 2)) + FIRST_ID + KINDS
  row, place = np.arange(number), rng.integers(1, length - 1, number)
  left = rng.integers(0, place)
  tokens[row, left] = tokens[row, place] = found[:, 0]
  tokens[row, rng.integers(place + 1, length)] = found[:, 1]
  answer = np.arange(length) == place[:, None]
  return Rows(tokens.astype(np.int32), answer=answer)


def train(seed):
  """Trains a network on rows of needles; returns StepConfig and parameters."""
  config = config_lib.default()
  config.update_from_flattened_dict(KEYS)
  c, tx = steps_lib.setup(config)
  key = jax.random.key(seed)
  state = jax.jit(functools.partial(train_state.init, c.model, tx))(key)

  @jax.jit
  def steps(state, rows):
    update = lambda s, r: (step.train_step(c, tx, s, r, key)[0], None)
    return jax.lax.scan(update, state, rows)[0]

  rng = np.random.default_rng(seed)
  for _ in range(STEPS // STEPS_PER_CALL):
    drawn = [needles(rng, BATCH, TRAINED) for _ in range(STEPS_PER_CALL)]
    state = steps(state, jax.tree.map(lambda *x: np.stack(x), *drawn))
  return c, state.params


def on_needles(c, params, lengths=LENGTHS, batches=8):
  """Returns lines with bounds on rows of needles.

  Args:
    c: StepConfig.
    params: parameter tree.
    lengths: tokens of the rows; those of the training rows come first.
    batches: number of batches of 128 rows.
  """
  lines = []
  for length in (TRAINED, *lengths):
    rng = np.random.default_rng(length)
    rows = [needles(rng, 128, length) for _ in range(batches)]
    lines += compare(c, params, TRAINED, length, rows)
  return lines


def on_text(workdir, lengths):
  """Returns lines with bounds on the held-out text of a run."""
  config, tokenizer, params, mesh = load.load(workdir)
  trained, tokens = config.data.length, config.eval.batch * config.data.length
  lines = []
  with jax.set_mesh(mesh):
    for length in (trained, *lengths):
      config.data.length = length
      config.eval.batch = max(1, tokens // length)
      data = inputs.open_data(config, tokenizer)
      # Longer samples are several of these rows: the same held-out text.
      config.data.path = data[0].directory
      (heldout,) = evaluation.open_heldout(config, data, mesh)
      c = step.step_config(config)
      lines += compare(c, params, trained, length, heldout.batches)
  return lines


def compare(c, params, trained, length, batches):
  """Returns a line with the bound for each base of rotary wavelengths."""
  lines = []
  for name, theta in thetas(c.model, trained, length).items():
    model = dataclasses.replace(c.model, rope_theta=theta)
    scaled = dataclasses.replace(c, model=model)
    found = evaluation.evaluate(scaled, params, batches, 1.0)
    lines.append(
      {
        'length': length,
        'lengths_count': name,
        'rope_theta': round(theta, 1),
        'nats_per_token': round(found.loss_nats_per_token, 4),
        'stderr': round(found.stderr_nats_per_token, 4),
      }
    )
  return lines


def table(lines):
  """Returns a Markdown table of bounds, means over seeds.

  Args:
    lines: lines of results, of one kind of rows.
  """
  names = {'none': 'no scaling', 'two-sided': '2T, here', 'one-sided': 'T'}
  rows = [['tokens of a row', *names.values()], ['---'] * 4]
  for length in sorted({x['length'] for x in lines}):
    of = lambda name, length=length: [
      x['nats_per_token']
      for x in lines
      if (x['length'], x['lengths_count']) == (length, name)
    ]
    means = [f'{np.mean(of(name)):.2f}' if of(name) else '–' for name in names]
    rows.append([str(length), *means])
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


if __name__ == '__main__':
  main()
