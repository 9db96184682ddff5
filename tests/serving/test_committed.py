"""The committed text of an answer, one report of the sampler after another."""

import local_server
import numpy as np
import pytest

from maskdiff.sampling.recording import Recording
from maskdiff.serving.committed import Committed

MASK, EOS, EOT = 258, 257, 256  # ids of published_folders.save_tokenizer


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return local_server.byte_tokenizer(tmp_path_factory.mktemp('model') / 'bytes')


def reports(tokens, order, sizes):
  """Yields Recordings of a row with two tokens of prompt, and whether filled.

  Args:
    tokens: ids of the slots.
    order: indices of the slots in the order in which they are committed.
    sizes: number of slots that are committed before each report.
  """
  fill = np.array([False] * 2 + [True] * len(tokens))
  steps = np.zeros(len(fill), int)
  row = np.array([7, 7] + [MASK] * len(tokens))
  at = 0
  for size in sizes:
    for slot in order[at : at + size]:
      row[2 + slot], steps[2 + slot] = tokens[slot], at + 1
    at += size
    yield Recording(row.copy(), fill, steps.copy(), None), at >= len(tokens)


def texts(tokenizer, tokens, order=None, sizes=None, stop=(), end_ids=(EOS,)):
  """Returns the new text after each report, and the Committed."""
  order = range(len(tokens)) if order is None else order
  committed = Committed(tokenizer, MASK, end_ids, stop)
  found = []
  for report in reports(tokens, order, sizes or [1] * len(tokens)):
    found.append(committed.advance(*report))
    if committed.finish:
      break
  return found, committed


def test_text_is_returned_up_to_the_first_mask(tokenizer):
  tokens = tokenizer.encode('abcd')
  found, committed = texts(tokenizer, tokens, order=[0, 2, 3, 1])
  assert found == ['a', '', '', 'bcd']
  assert (committed.finish, committed.tokens) == ('length', 4)


def test_character_is_returned_when_all_its_bytes_are_committed(tokenizer):
  tokens = tokenizer.encode('é→𝄞')
  assert len(tokens) == 9
  found, _ = texts(tokenizer, tokens)
  assert found == ['', 'é', '', '', '→', '', '', '', '𝄞']


def test_text_equals_that_of_the_tokenizer(tokenizer):
  """Also of bytes that are not UTF-8, and of mask and special tokens."""
  random = np.random.default_rng(0)
  for _ in range(50):
    tokens = random.integers(0, 259, 12).tolist()
    sizes = random.integers(0, 5, 20).tolist() + [12]
    found, committed = texts(
      tokenizer, tokens, random.permutation(12), sizes, end_ids=()
    )
    assert ''.join(found) == tokenizer.decode(tokens)
    assert committed.tokens == 12


@pytest.mark.parametrize('end', [EOS, EOT])
def test_end_token_ends_the_text_without_the_rest(tokenizer, end):
  tokens = [*tokenizer.encode('ab'), end, *tokenizer.encode('cd')]
  found, committed = texts(tokenizer, tokens, end_ids=(EOS, EOT))
  assert found == ['a', 'b', '']
  assert (committed.finish, committed.tokens) == ('stop', 2)
  # The end counts when it is reached, not when it is committed.
  found, _ = texts(tokenizer, tokens, [2, 3, 4, 0, 1], end_ids=(EOS, EOT))
  assert found == ['', '', '', 'a', 'b']


@pytest.mark.parametrize('sizes', [[1] * 9, [9], [4, 5], [5, 4], [2] * 5])
def test_stop_text_ends_the_text_at_its_first_place(tokenizer, sizes):
  """Text and tokens do not depend on the sizes of the reports."""
  tokens = tokenizer.encode('a:b::c::d')
  found, committed = texts(tokenizer, tokens, sizes=sizes, stop=('::', 'd'))
  assert ''.join(found) == 'a:b'
  assert (committed.finish, committed.tokens) == ('stop', 5)


def test_beginning_of_a_stop_text_is_kept_back(tokenizer):
  tokens = tokenizer.encode('a:b:')
  found, committed = texts(tokenizer, tokens, stop=('::',))
  assert found == ['', 'a', ':', 'b:']
  assert committed.finish == 'length'
