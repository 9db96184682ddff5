"""Patterns of tokenizers: published ones are accepted, slow ones refused."""

import random
import time

import pytest
from tokenizers import Regex, pre_tokenizers

from maskdiff.data import split_patterns

# The ends that most published patterns share.
ENDS = r'|\s*[\r\n]+|\s+(?!\S)|\s+'
CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUBLISHED = {
  'gpt-2': split_patterns.GPT2,
  'qwen2, dream': split_patterns.QWEN2,
  'llama 3': (
    CASES
    + r'|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*'
    + ENDS
  ),
  'llada, ling': (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
    r'| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+'
  ),
  'qwen3.5': (
    CASES + r'|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}'
    r'| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*' + ENDS
  ),
  'deepseek v3': (
    r'[!"#$%&' + r"'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    '|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*'
    '|\\s*[\r\n]+|\\s+(?!\\S)|\\s+'
  ),
  'deepseek v3, cjk': '[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+',
  'deepseek v3, numbers': r'\p{N}{1,3}',
  'deepseek coder': r'\s?\p{L}+',
  'falcon': '[0-9][0-9][0-9]',
  **{f'published {i}': p for i, p in enumerate(split_patterns.PUBLISHED)},
}
RUNS = ('a', 'A', ' ', '\n', '1', '.', "'", '\u01c5', '\u0301', '\r\n', ' \n')


def seconds(pattern, text):
  """Returns the CPU time of one split; checks that it keeps the text."""
  split = pre_tokenizers.Split(Regex(pattern), 'isolated')
  start = time.process_time()
  pieces = split.pre_tokenize_str(text)
  assert ''.join(piece for piece, _ in pieces) == text
  return time.process_time() - start


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_pattern_is_accepted_and_linear(name):
  pattern = PUBLISHED[name]
  assert split_patterns.problem(pattern) is None
  for run in RUNS:
    # A quadratic pattern would take minutes.
    assert seconds(pattern, run * (100_000 // len(run)) + 'z') < 5


@pytest.mark.parametrize(
  'pattern, problem',
  [
    ('(a|a)*b', 'repeats a group'),
    ('(?:a|a)+', 'repeats a group'),
    ('(a+)+b', 'repetition without limit within a group'),
    ('(a{2,})', 'repetition without limit within a group'),
    ('a*b', 'more text after a repetition'),
    ('a++b', 'more text after a repetition'),
    ('x|a*a*b', 'more text after a repetition'),
    (r'a+(?!b)', 'more text after a repetition'),
    ('a?' * 40 + 'b', 'more than 64 ways'),
    ('(?:a|b)?' * 40 + 'c', 'more than 64 ways'),
    ('a{0,100}b{0,100}c', 'more than 64 ways'),
    ('a{5000}', 'more than 100 times'),
    ('a**', 'repeats a repetition'),
    ('a{2}{3}', 'repeats a repetition'),
    ('a{1,3}+', 'repeats a repetition'),
    ('a+?', 'repeats a repetition'),
    (r'\s+$', 'unknown part'),
    (r'(?<=a)b', 'unknown part'),
    (r'(a)\1', 'unknown part'),
    (r'\X', 'unknown part'),
    ('[[:alpha:]]', 'unknown part'),
    ('[a&&b]', 'unknown part'),
    ('(?x)a', 'unknown part'),
    ('[a', 'unknown part'),
    ('a)', 'unknown part'),
    ('(a', 'does not end'),
    ('((a))', 'group within a group'),
    ('a|', 'can match nothing'),
    ('(?:a?)b', 'can match nothing'),
    (r'\s*[\r\n]+|\s|\s+', r'does not end with `\\s\+`'),
    (r'\s+(?!\S)|a', r'does not end with `\\s\+`'),
    ('a' * 5000, 'longer than 4,000'),
    ('(' * 4000, 'group within a group'),
  ],
)
def test_pattern_that_could_be_slow_is_refused(pattern, problem):
  with pytest.raises(AssertionError, match=problem):
    assert not split_patterns.problem(pattern), split_patterns.problem(pattern)


def random_pattern(rng):
  """Returns a pattern of the forms that tokenizers have."""
  atoms = ['a', '[ab]', '[^b]', r'\s', ' ', r'[\r\n]', '.', r'\p{L}', '(?!b)']
  atoms += ['(?:a|ab)', '(?i:A|b)', '(?!a)']
  quantifiers = ['', '', '', '?', '*', '+', '{1,3}', '?+', '++', '{2,}']
  sequences = [
    ''.join(
      rng.choice(atoms) + rng.choice(quantifiers)
      for _ in range(rng.randint(1, 4))
    )
    for _ in range(rng.randint(1, 4))
  ]
  return '|'.join(sequences) + rng.choice(('', ENDS, r'|\s+(?!\S)|\s+'))


def test_accepted_patterns_take_linear_time():
  rng = random.Random(0)
  accepted = 0
  while accepted < 20:
    pattern = random_pattern(rng)
    if split_patterns.problem(pattern):
      continue
    accepted += 1
    for run in ('a', 'ab', ' ', ' \n'):
      text = run * (40_000 // len(run)) + '1'
      # The quadratic search of a*b takes 2 s.
      assert seconds(pattern, text) < 0.7, (pattern, run)
