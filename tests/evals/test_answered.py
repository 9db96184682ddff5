"""Lines answered by the sampler. A fake network has memorized the answers."""

import dataclasses
import functools
import pathlib
import sys

import fake_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdiff import config as config_lib
from maskdiff.distributed import mesh
from maskdiff.errors import UserError
from maskdiff.evals import answered, puzzles
from maskdiff.interop import load
from maskdiff.serving.asked import Chat

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'benchmarks'))

import lengths  # noqa: E402


def recall(rows, tokens, valid):
  """Returns logits of the memorized row that has most of the given tokens.

  Args:
    rows: [R, 64] int32, the memorized rows.
    tokens: [B, L] int32; 4 is the mask token.
    valid: [B, L] bool.
  """
  size = min(rows.shape[1], tokens.shape[1])
  memorized, given = rows[None, :, :size], tokens[:, None, :size]
  wrong = (given != memorized) & (given != 4) & valid[:, None, :size]
  best = wrong.sum(axis=2).argmin(axis=1)
  return jax.nn.one_hot(rows[best], 4096)[:, : tokens.shape[1]] * 9


@pytest.fixture
def model(tokenizer, monkeypatch):
  """Returns a function from lines to a model that has memorized them."""
  fake_networks.put_in(monkeypatch)

  def network(config, params):
    return fake_networks.network(recall, params, eos_id=tokenizer.eos_id)

  monkeypatch.setattr(load, 'network', network)
  config = config_lib.default()
  config.data.length = 64

  def memorize(lines):
    rows = [
      tokenizer.encode(line['prompt'])
      + tokenizer.encode(line['answer'])
      + tokenizer.encode(line.get('suffix', ''))
      for line in lines
    ]
    table = np.full((len(rows), 64), tokenizer.eos_id, np.int32)
    for i, row in enumerate(rows):
      table[i, : len(row)] = row
    return load.Model(
      config, tokenizer, jnp.asarray(table), mesh.make_mesh(fsdp=8)
    )

  return memorize


def answer(model, settings, name, lines, batch=8):
  correct = functools.partial(puzzles.correct, name)
  return answered.answer_lines(
    model, settings, lines, correct, seed=0, batch=batch
  )


def test_memorized_answers_are_right(model):
  lines = puzzles.make('addition', 0, 10)
  rows, total = answer(model(lines), {}, 'addition', lines)
  assert [row['text'] for row in rows] == [x['answer'] for x in lines]
  assert all(row['correct'] for row in rows)
  assert (total['lines'], total['accuracy']) == (10, 1.0)
  # Three digits and an eos take one denoising step each.
  assert total['forwards_per_token'] == 1.0
  assert total['sampler']['steps'] == total['sampler']['gen_length'] == 4


def test_accuracy_is_the_share_of_right_answers(model):
  lines = puzzles.make('addition', 0, 10)
  changed = [dict(x, answer='999') if i < 3 else x for i, x in enumerate(lines)]
  rows, total = answer(model(changed), {}, 'addition', lines)
  assert [row['correct'] for row in rows] == [i >= 3 for i in range(10)]
  assert total['accuracy'] == 0.7


@pytest.mark.parametrize(
  'settings, forwards',
  [
    ({'steps': '1'}, 1),
    ({'remasking': 'threshold', 'threshold': '0.5'}, 1),
    ({'block_length': '2'}, 4),
    ({'block_length': 2, 'steps': 2}, 2),
  ],
  ids=str,
)
def test_settings_reach_the_sampler(model, settings, forwards):
  lines = puzzles.make('addition', 0, 10)
  _, total = answer(model(lines), settings, 'addition', lines)
  assert total['accuracy'] == 1.0
  assert total['forwards_per_token'] == forwards / 4
  for key, value in settings.items():
    assert str(total['sampler'][key]) == str(value)


def test_accuracy_per_way_and_infilling(model):
  lines = puzzles.make('reversal', 0, 30)
  memorized = [line for line in lines if line['way'] != 'reversed']
  rows, total = answer(model(memorized), {}, 'reversal', lines)
  assert total['accuracy_told'] == total['accuracy_infill'] == 1.0
  assert total['accuracy_reversed'] < 0.5
  infilled = next(row for row in rows if row['way'] == 'infill')
  assert infilled['text'] == infilled['answer']


@pytest.mark.slow
def test_batch_size_does_not_change_answers(model):
  lines = puzzles.make('addition', 0, 10)
  memorized = model(lines)
  settings = {'temperature': '1.5'}
  rows, _ = answer(memorized, settings, 'addition', lines, batch=4)
  assert answer(memorized, settings, 'addition', lines, batch=10)[0] == rows
  assert not all(row['correct'] for row in rows)


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'stpes': '3'}, "'stpes': choose among block_length"),
    ({'prompts': 'x'}, "'prompts': choose among"),
    ({'steps': 'many'}, "steps='many': must be int"),
    ({'stop_at_eos': '1'}, "stop_at_eos='1': must be bool"),
    ({'remasking': 'best'}, "sample.remasking='best': choose one of"),
    ({'block_length': '2', 'steps': '3'}, 'steps=3 cannot be divided equally'),
    ({'gen_length': '9'}, 'gen_length: the task sets it'),
  ],
  ids=str,
)
def test_invalid_setting_is_named(model, settings, message):
  lines = puzzles.make('addition', 0, 2)
  with pytest.raises(UserError, match=message):
    answer(model(lines), settings, 'addition', lines)


def test_too_long_row_is_refused(model):
  line = {'prompt': 'x = ' * 64, 'answer': 'y'}
  with pytest.raises(UserError, match='the model was trained on rows of'):
    answer(model([]), {}, 'addition', [line])


NAMED = ((4, 212), (8, 213))
QUESTIONS = [
  {'prompt': 'one', 'answer': 'a'},
  {'prompt': 'two', 'answer': ' b b b b b'},
  {'prompt': 'three', 'answer': 'c'},
]


def measured(model, tokenizer, length, known=(), values=None):
  """Returns the line of benchmarks/lengths.py of a model that is wrong once.

  It has memorized ` c c` as the third answer, and the first length for it.
  """
  encode = lambda messages: tokenizer.encode(messages[0]['content'])
  made = model(QUESTIONS)
  table = np.full((3, 64), tokenizer.eos_id, np.int32)
  for i, question in enumerate(QUESTIONS):
    answer = ' c c' if i == 2 else question['answer']
    name = [known[i % 2][1]] if known else []
    text = [*tokenizer.encode(question['prompt']), *name]
    text += tokenizer.encode(answer)
    table[i, : len(text)] = text
  config = made.config.copy_and_resolve_references()
  config.data.length_tokens = known
  made = dataclasses.replace(made, params=jnp.asarray(table), config=config)
  chat = Chat(encode, (tokenizer.eos_id,))
  return lengths.measure(made, chat, QUESTIONS, length, values or {}, batch=4)


def test_benchmark_of_lengths_counts_errors_and_passes(model, tokenizer):
  sizes = [len(tokenizer.encode(x['answer'])) for x in QUESTIONS]
  wrong = len(tokenizer.encode(' c c'))
  line = measured(model, tokenizer, 8)
  assert line['exact_match'] == pytest.approx(2 / 3)
  assert line['length_error'] == pytest.approx((wrong - sizes[2]) / 3)
  assert line['answer_tokens'] == pytest.approx((sum(sizes[:2]) + wrong) / 3)
  # Slots after the eos are not computed.
  assert 1 <= line['forwards_per_answer'] <= 8
  assert '| 8 | 66.7% ± 27.2% |' in lengths.table([line | {'network': 'x'}])
  one = measured(model, tokenizer, 8, values={'steps': '1'})
  assert one['exact_match'] == line['exact_match']
  assert one['forwards_per_answer'] == 1


def test_benchmark_predicts_lengths(model, tokenizer):
  """Lengths 4, 8, 4 in one step each, after a pass for the length."""
  values = {'steps': '1'}
  line = measured(model, tokenizer, lengths.PREDICTED, NAMED, values)
  assert line['exact_match'] == pytest.approx(2 / 3)
  assert line['forwards_per_answer'] == 2
  # The rows of a given length have its token if it has one.
  given = measured(model, tokenizer, 8, NAMED, values)
  assert given['forwards_per_answer'] == 1
