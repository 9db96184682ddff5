"""Tasks scored by likelihood: reading lines, and results from scores.

A fake score replaces the network: every token costs one nat.
"""

import json

import numpy as np
import pytest

from maskdiff.errors import UserError
from maskdiff.evals import scored as scored_lib
from maskdiff.likelihood.bounds import Estimate, lay_out

BITS = 1 / np.log(2)


@pytest.fixture
def write(tmp_path):
  def write(*values):
    path = tmp_path / 'data.jsonl'
    text = (v if isinstance(v, str) else json.dumps(v) for v in values)
    path.write_text(''.join(line + '\n' for line in text))
    return str(path)

  return write


@pytest.fixture
def scored():
  """Returns the list to which `score` appends its arguments."""
  return []


@pytest.fixture
def score(scored):
  def score(answers, seeds):
    scored.append((*answers, list(seeds)))
    nats = answers.answer.sum(axis=1).astype(float)
    return Estimate(-nats, np.full(len(nats), 0.5))

  return score


def test_bound_reports_nats_and_bits_per_byte(write, score, scored, tokenizer):
  values = [
    {'prompt': 'def read(', 'answer': 'self):'},
    {'prompt': '', 'answer': 'café'},
  ]
  lines = scored_lib.read(write(*values), 'bound')
  rows, total = scored_lib.bound(lines, tokenizer, 64, score)
  counts = [len(tokenizer.encode(v['answer'])) for v in values]
  sizes = [6, 5]  # bytes of UTF-8
  for row, n, size in zip(rows, counts, sizes, strict=True):
    assert row == pytest.approx(
      {
        'nats': n,
        'stderr_nats': 0.5,
        'tokens': n,
        'bits_per_byte': n / size * BITS,
      }
    )
  assert total == pytest.approx(
    {
      'lines': 2,
      'tokens': sum(counts),
      'nats_per_token': 1.0,
      'stderr_nats_per_token': 0.5 * 2**0.5 / sum(counts),
      'perplexity': np.e,
      'bits_per_byte': sum(counts) / sum(sizes) * BITS,
    }
  )
  ((tokens, answer, valid, seeds),) = scored
  assert seeds == [0, 1]
  for i, value in enumerate(values):
    prompt = tokens[i, valid[i] & ~answer[i]]
    assert tokenizer.decode(prompt) == value['prompt']
    assert tokenizer.decode(tokens[i, answer[i]]) == value['answer']


def test_long_text_is_scored_in_pieces(write, score, scored, tokenizer):
  text = 'def read(self):\n  return self.alpha + self.beta\n' * 3
  lines = scored_lib.read(write({'text': text}, {'text': 'x'}), 'bound')
  (row, _), total = scored_lib.bound(lines, tokenizer, 10, score)
  ids = tokenizer.encode(text)
  pieces = -(-len(ids) // 10)
  ((tokens, answer, valid, seeds),) = scored
  assert tokens[:-1][answer[:-1]].tolist() == ids
  assert answer.shape == (pieces + 1, 10)
  assert seeds == list(range(pieces + 1))  # independent noise
  assert row['nats'] == row['tokens'] == len(ids)
  assert row['stderr_nats'] == pytest.approx(0.5 * pieces**0.5)
  assert total['tokens'] == len(ids) + len(tokenizer.encode('x'))


def test_trailing_white_space_of_a_prompt_is_scored(
  write, score, scored, tokenizer
):
  """LLaDA's evaluation also scores it."""
  lines = scored_lib.read(
    write({'prompt': 'return ', 'answer': 'self'}), 'bound'
  )
  (row,), _ = scored_lib.bound(lines, tokenizer, 64, score)
  tokens, answer, _, _ = scored[0]
  assert tokenizer.decode(tokens[0, answer[0]]) == ' self'
  assert row['bits_per_byte'] == pytest.approx(row['nats'] / 5 * BITS)


GAP = {'prompt': 'def ', 'answer': 'read', 'suffix': '(self): café'}


@pytest.mark.parametrize('task', ['bound', 'choices', 'greedy'])
def test_suffix_is_given_and_not_scored(write, score, scored, tokenizer, task):
  """The answer is encoded without the text around it."""
  line, answers = GAP, [' read']
  if task == 'choices':
    line = GAP | {'choices': ['read', 'write'], 'answer': 1}
    answers = [' read', ' write']
  lines = scored_lib.read(write(line), task)

  def matches(answers):
    scored.append((*answers, [0]))
    return answers.answer.any(axis=1)

  function = matches if task == 'greedy' else score
  (row,), _ = scored_lib.TASKS[task](lines, tokenizer, 64, function)
  ((tokens, answer, valid, _),) = scored
  prompt, suffix = tokenizer.encode('def'), tokenizer.encode(GAP['suffix'])
  for i, text in enumerate(answers):
    ids = tokenizer.encode(text)
    assert tokens[i, valid[i]].tolist() == [*prompt, *ids, *suffix]
    assert np.flatnonzero(answer[i]).tolist() == [
      len(prompt) + k for k in range(len(ids))
    ]
  if task == 'bound':
    assert row['tokens'] == row['nats'] == len(ids)
    assert row['bits_per_byte'] == pytest.approx(len(ids) / 5 * BITS)


def test_empty_suffix_equals_no_suffix(write, score, scored, tokenizer):
  lines = scored_lib.read(write(PAIR | {'suffix': ''}, PAIR), 'bound')
  one, other = scored_lib.bound(lines, tokenizer, 64, score)[0]
  assert one == other
  scored_lib.check_no_suffixes(lines)


@pytest.mark.parametrize('task', ['bound', 'greedy'])
def test_suffix_is_refused_for_autoregressive_models(write, task):
  lines = scored_lib.read(write(PAIR, GAP), task)
  message = 'data.jsonl:2: text follows .* remove the suffix'
  with pytest.raises(UserError, match=message):
    scored_lib.check_no_suffixes(lines)


def test_likeliest_choice_in_all_and_per_byte(write, score, scored, tokenizer):
  """At one nat per token, fewest tokens or most bytes per token win."""
  choices = ['x', 'return self']
  counts = [len(tokenizer.encode(c)) for c in choices]
  assert counts[0] < counts[1] < 11
  lines = scored_lib.read(
    write(*({'prompt': 'a', 'choices': choices, 'answer': i} for i in (0, 1))),
    'choices',
  )
  rows, total = scored_lib.choices(lines, tokenizer, 64, score)
  for i in (0, 1):
    assert rows[i] == {
      'log_likelihood_nats': [-n for n in counts],
      'stderr_nats': [0.5, 0.5],
      'choice': 0,
      'choice_per_byte': 1,
      'answer': i,
    }
  assert total == {
    'lines': 2,
    'accuracy': 0.5,
    'stderr_accuracy': 0.5,
    'accuracy_per_byte': 0.5,
    'stderr_accuracy_per_byte': 0.5,
  }
  assert scored[0][3] == [0, 0, 1, 1]  # one seed per line


def test_greedy_matches_are_counted(write, tokenizer):
  lines = scored_lib.read(
    write(*({'prompt': 'a', 'answer': x} for x in ('x', 'self', 'xx'))),
    'greedy',
  )
  matches = lambda answers: answers.answer.sum(axis=1) == 1
  rows, total = scored_lib.greedy(lines, tokenizer, 64, matches)
  expected = [len(tokenizer.encode(x)) == 1 for x in ('x', 'self', 'xx')]
  assert [row['match'] for row in rows] == expected
  assert total['accuracy'] == np.mean(expected)


def test_unknown_standard_errors_are_null(write, tokenizer):
  lines = scored_lib.read(write({'text': 'x'}), 'bound')
  unknown = lambda *_: Estimate(np.array([-1.0]), np.array([np.nan]))
  (row,), total = scored_lib.bound(lines, tokenizer, 64, unknown)
  assert row['stderr_nats'] is None
  assert total['stderr_nats_per_token'] is None


def test_empty_lines_are_skipped(write):
  lines = scored_lib.read(
    write('', {'text': 'a'}, '  ', {'text': 'b'}), 'bound'
  )
  assert [line.where.rpartition(':')[2] for line in lines] == ['2', '4']


PAIR = {'prompt': 'a', 'answer': 'b'}
REFUSED = {
  'not_json': ('bound', '{"text": ', 'data.jsonl:2 is not valid JSON'),
  'nested': ('bound', '{"text": ' + '[' * 100_000, ':2 is nested more than'),
  'long': ('bound', '{"text": "' + 'x' * (4 << 20) + '"}', ':2: the line has'),
  'not_an_object': ('bound', '[1]', ':2: must be a JSON object'),
  'no_answer': ('bound', {'prompt': 'a'}, r':2: bound needs .*answer \(str\)'),
  'number': ('bound', {'text': 3}, r':2: bound needs text \(str\)'),
  'empty_answer': ('bound', PAIR | {'answer': ''}, ':2: answer .* not empty'),
  'empty_text': ('bound', {'text': ''}, ':2: text must be .* not empty'),
  'text_to_decode': ('greedy', {'text': 'a'}, ':2: greedy needs prompt'),
  'suffix_of_a_text': (
    'bound',
    {'text': 'a', 'suffix': 'b'},
    ':2: a line with text .* suffix: write prompt, answer and suffix',
  ),
  'prompt_of_a_text': (
    'bound',
    {'prompt': 'a', 'text': 'b'},
    ':2: a line with text .* prompt: write prompt, answer and suffix',
  ),
  'suffix_no_text': (
    'greedy',
    PAIR | {'suffix': ['b']},
    r':2: greedy needs .*suffix \(str\)',
  ),
  'surrogate_after': (
    'bound',
    '{"prompt": "", "answer": "a", "suffix": "\\ud800"}',
    ':2 has half of a surrogate',
  ),
  'surrogate': ('bound', '{"text": "\\ud800"}', ':2 has half of a surrogate'),
  'choices': (
    'choices',
    {'prompt': 'a', 'choices': 'bc', 'answer': 0},
    r':2: choices needs .*choices \(list\)',
  ),
  'no_choices': (
    'choices',
    {'prompt': 'a', 'choices': [], 'answer': 0},
    ':2: answer 0 must be the index of one of the 0 choices',
  ),
  'empty_choice': (
    'choices',
    {'prompt': 'a', 'choices': ['b', ''], 'answer': 0},
    ':2: choices must be text that is not empty',
  ),
  'letter': (
    'choices',
    {'prompt': 'a', 'choices': ['b', 'c'], 'answer': 'b'},
    r':2: choices needs .*answer \(int\)',
  ),
  'from_one': (
    'choices',
    {'prompt': 'a', 'choices': ['b', 'c'], 'answer': 2},
    ':2: answer 2 must be .* 2 choices, counted from 0',
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_invalid_line_is_named(write, case):
  task, line, message = REFUSED[case]
  good = PAIR if task != 'choices' else PAIR | {'choices': ['b'], 'answer': 0}
  with pytest.raises(UserError, match=message) as error:
    scored_lib.read(write(good, line), task)
  assert '\n' not in str(error.value)


def test_missing_or_empty_file_is_named(write, tmp_path):
  with pytest.raises(UserError, match='cannot read .*none.jsonl'):
    scored_lib.read(str(tmp_path / 'none.jsonl'), 'bound')
  with pytest.raises(UserError, match='data.jsonl.* has no lines'):
    scored_lib.read(write(), 'bound')
  (tmp_path / 'binary').write_bytes(b'\xff\xfe')
  with pytest.raises(UserError, match='binary:1: not UTF-8'):
    scored_lib.read(str(tmp_path / 'binary'), 'bound')


@pytest.mark.parametrize('task', ['bound', 'greedy'])
def test_line_longer_than_the_context_is_named(write, score, tokenizer, task):
  for long in ({'prompt': 'a b c', 'answer': 'd e'}, PAIR | {'suffix': 'c d'}):
    lines = scored_lib.read(write(PAIR, long), task)
    with pytest.raises(UserError, match='data.jsonl:2: .* training rows had 3'):
      scored_lib.TASKS[task](lines, tokenizer, 3, score)


def test_masks_that_do_not_fit_into_memory_are_refused():
  answers = lay_out([[1]] * 3, [[2, 3, 4], [5], [6, 7]])
  scored_lib.check_masks(answers, samples=4096)
  scored_lib.check_masks(answers, orders=4096)
  for flag in ('samples', 'orders'):
    with pytest.raises(UserError, match=f'{flag}=1000000000: 3 answers'):
      scored_lib.check_masks(answers, **{flag: 10**9})
