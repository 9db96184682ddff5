"""A small network learns the lengths of answers from two documents."""

import jax
import numpy as np
import pytest
import tiny

from maskdiff.data import packing
from maskdiff.data.documents import Document
from maskdiff.data.rows import Rows
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.interop import load
from maskdiff.model import transformer
from maskdiff.posttraining import chat_tokens, length_tokens
from maskdiff.sampling import lengths
from maskdiff.sampling.settings import sampler_config
from maskdiff.training import step, train_state
from maskdiff.training.optimizer import OptimizerConfig, make_optimizer

NAMED = ((2, 30), (4, 31), (8, 32))
QUESTIONS = range(
  5, 20
)  # tokens; the answer of i has 1 + i % 7 tokens, and eos
EOS, ROW, STEPS = 2, 16, 150


def right_length(i):
  return length_tokens.bucket(NAMED, 2 + i % 7)


def in_two(encoded, length, token):
  return length_tokens.documents(encoded, length, token, EOS)


def in_one(encoded, length, token):
  """Returns one document in which length and answer are learned."""
  _, both = in_two(encoded, length, token)
  answer = both.answer.copy()
  answer[answer.argmax() - 1] = True
  return [chat_tokens.Encoded(both.tokens, answer)]


def rows_of(documents_of):
  """Returns the rows of all questions in a few orders."""
  rng, found = np.random.default_rng(0), []
  for _ in range(64):
    for i in rng.permutation(QUESTIONS):
      text = [1, i, *[21] * (1 + i % 7), EOS]
      encoded = chat_tokens.Encoded(np.array(text), np.arange(len(text)) > 1)
      pair = right_length(i)
      found += [Document('', *e) for e in documents_of(encoded, *pair)]
  layout = packing.Layout('packed')
  (rows, *_) = packing.rows(layout, found, ROW, eos_id=EOS, pad_id=0)
  return rows


def predicted(documents_of):
  """Returns the lengths that a trained network predicts, by question."""
  config = tiny.config(
    tiny.TRAIN_KEYS
    | {
      'model.vocab_size': 40,
      'model.embed': 32,
      'model.layers': 2,
      'model.mlp': 64,
      'objective.attend_within': 'document',
      'objective.random_length_fraction': 0.0,
      'data.length': ROW,
      'data.length_tokens': NAMED,
      'optimizer.learning_rate': 1e-2,
      'train.batch': 64,
      'train.steps': STEPS,
    }
  )
  c = step.step_config(config)
  optimizer = make_optimizer(
    OptimizerConfig(**config.optimizer), STEPS, transformer.axes(c.model)
  )
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  rows = rows_of(documents_of)
  rng = np.random.default_rng(1)
  with jax.set_mesh(mesh):
    state = train_state.init(c.model, optimizer, jax.random.key(0))
    train = jax.jit(
      lambda state, rows, key: step.train_step(c, optimizer, state, rows, key)
    )
    for _ in range(STEPS):
      chosen = rng.choice(len(rows.tokens), 64)
      batch = Rows(*(column[chosen] for column in rows))
      state, _ = train(state, batch, jax.random.key(1))
    sampler, settings = sampler_config(config)
    found = lengths.predict(
      load.network(config, state.params),
      sampler,
      NAMED,
      [[1, i] for i in QUESTIONS],
      QUESTIONS,
      [settings] * len(QUESTIONS),
      batch=len(QUESTIONS),
    )
  return [x.slots for x in found]


@pytest.mark.slow
def test_lengths_are_learned_in_documents_of_their_own():
  """In one document, the network counts positions that sampling lacks."""
  right = [right_length(i)[0] for i in QUESTIONS]
  assert predicted(in_two) == right
  assert np.mean(np.array(predicted(in_one)) == right) < 0.4
