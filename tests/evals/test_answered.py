"""Lines that the sampler answers; in place of a network, what knows them."""

import functools

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


def knows(rows, tokens, valid):
  """Of the rows known by heart the one that fits what is shown.

  A row fits worse by every token that is shown and is another.
  """
  size = min(rows.shape[1], tokens.shape[1])
  known, shown = rows[None, :, :size], tokens[:, None, :size]
  wrong = (shown != known) & (shown != 4) & valid[:, None, :size]
  best = wrong.sum(axis=2).argmin(axis=1)
  return jax.nn.one_hot(rows[best], 4096)[:, : tokens.shape[1]] * 9


@pytest.fixture
def model(tokenizer, monkeypatch):
  """Makes a model that has learned the lines by heart."""
  fake_networks.put_in(monkeypatch)

  def network(config, params):
    return fake_networks.network(knows, params, eos_id=tokenizer.eos_id)

  monkeypatch.setattr(load, 'network', network)
  config = config_lib.default()
  config.data.length = 64

  def learned(lines):
    rows = [
      tokenizer.encode(line['prompt'])
      + tokenizer.encode(line['answer'])
      + tokenizer.encode(line.get('suffix', ''))
      for line in lines
    ]
    table = np.full((len(rows), 64), tokenizer.eos_id, np.int32)
    for i, row in enumerate(rows):
      table[i, : len(row)] = row
    return answered.Model(
      config, tokenizer, jnp.asarray(table), mesh.make_mesh(fsdp=8)
    )

  return learned


def ask(model, values, name, lines, batch=8):
  correct = functools.partial(puzzles.correct, name)
  return answered.ask(model, values, lines, correct, seed=0, batch=batch)


def test_who_knows_the_answers_is_right(model):
  lines = puzzles.make('addition', 0, 10)
  rows, total = ask(model(lines), {}, 'addition', lines)
  assert [row['text'] for row in rows] == [x['answer'] for x in lines]
  assert all(row['correct'] for row in rows)
  assert (total['lines'], total['accuracy']) == (10, 1.0)
  # Three digits and an eos, one a step.
  assert total['forwards_per_token'] == 1.0
  assert total['sampler']['steps'] == total['sampler']['gen_length'] == 4


def test_who_knows_some_is_right_on_those(model):
  lines = puzzles.make('addition', 0, 10)
  learned = [dict(x, answer='999') if i < 3 else x for i, x in enumerate(lines)]
  rows, total = ask(model(learned), {}, 'addition', lines)
  assert [row['correct'] for row in rows] == [i >= 3 for i in range(10)]
  assert total['accuracy'] == 0.7


@pytest.mark.parametrize(
  'values, forwards',
  [
    ({'steps': '1'}, 1),
    ({'remasking': 'threshold', 'threshold': '0.5'}, 1),
    ({'block_length': '2'}, 4),
    ({'block_length': 2, 'steps': 2}, 2),
  ],
  ids=str,
)
def test_settings_reach_the_sampler(model, values, forwards):
  lines = puzzles.make('addition', 0, 10)
  _, total = ask(model(lines), values, 'addition', lines)
  assert total['accuracy'] == 1.0
  assert total['forwards_per_token'] == forwards / 4
  for key, value in values.items():
    assert str(total['sampler'][key]) == str(value)


def test_ways_of_asking_are_told_apart_and_gaps_are_filled(model):
  lines = puzzles.make('reversal', 0, 30)
  told = [line for line in lines if line['way'] != 'reversed']
  rows, total = ask(model(told), {}, 'reversal', lines)
  assert total['accuracy_told'] == total['accuracy_infill'] == 1.0
  assert total['accuracy_reversed'] < 0.5
  gap = next(row for row in rows if row['way'] == 'infill')
  assert gap['text'] == gap['answer']


def test_batches_change_nothing(model):
  lines = puzzles.make('addition', 0, 10)
  made = model(lines)
  values = {'temperature': '1.5'}
  rows, _ = ask(made, values, 'addition', lines, batch=4)
  assert ask(made, values, 'addition', lines, batch=10)[0] == rows
  assert not all(row['correct'] for row in rows)


@pytest.mark.parametrize(
  'values, message',
  [
    ({'stpes': '3'}, "'stpes': choose among block_length"),
    ({'prompts': 'x'}, "'prompts': choose among"),
    ({'steps': 'many'}, "steps='many': must be int"),
    ({'stop_at_eos': '1'}, "stop_at_eos='1': must be bool"),
    ({'remasking': 'best'}, "sample.remasking='best': choose one of"),
    ({'block_length': '2', 'steps': '3'}, 'steps=3 cannot be shared equally'),
    ({'gen_length': '9'}, 'gen_length: the task sets it'),
  ],
  ids=str,
)
def test_settings_that_are_not_possible_are_named(model, values, message):
  lines = puzzles.make('addition', 0, 2)
  with pytest.raises(UserError, match=message):
    ask(model(lines), values, 'addition', lines)


def test_a_row_that_is_too_long_is_named(model):
  line = {'prompt': 'x = ' * 64, 'answer': 'y'}
  with pytest.raises(UserError, match='the model was trained on rows of'):
    ask(model([]), {}, 'addition', [line])


def test_a_setting_is_a_key_and_a_value():
  assert config_lib.parse_pairs(['a=b=c', 'd=']) == {'a': 'b=c', 'd': ''}
  with pytest.raises(UserError, match="'steps': write KEY=VALUE"):
    config_lib.parse_pairs(['steps'])
