"""The benchmark of docs/speculation.md: its data, decoders and tables."""

import pathlib
import runpy
import sys

import pytest

from maskdiff import config as config_lib
from maskdiff.config import sample
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.sampling.settings import DEFAULT

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'benchmarks'))

import copying  # noqa: E402
import decoders  # noqa: E402
import decoding  # noqa: E402
import json_lines  # noqa: E402
import page_parts  # noqa: E402
import speculation  # noqa: E402
import speculation_page as page  # noqa: E402
from questions import Question  # noqa: E402

CONFIG = runpy.run_path(str(ROOT / 'configs' / 'speculation.py'))


def test_a_document_fills_a_row_with_a_line_and_its_copies():
  encode = tokenizer_lib.load(copying.TOKENIZER).encode
  for text in copying.documents(0, 50):
    assert len(encode(text)) == 127  # and the eos
    first, *copies = text.split('\n')
    assert copies == [first] * 3
    assert len(encode(first)) == len(set(first.split())) == 31


def test_questions_are_no_lines_of_documents():
  lines = {text.split('\n')[0] for text in copying.documents(0, 2000)}
  questions = copying.questions(0, 50)
  assert len(lines | {q['prompt'][:-1] for q in questions}) == 2050
  assert all(q['answer'] == q['prompt'] * 2 for q in questions)


@pytest.mark.parametrize('method', decoders.METHODS)
def test_decoders_fit_their_networks(method):
  config = CONFIG['get_config'](method)
  sample.fit_rule(config)
  config_lib.validate(config)
  others = CONFIG['METHODS'].keys() - decoders.METHODS.keys()
  assert not others
  by_name = decoders.METHODS[method].decoders
  drafts = config.objective.name == 'drafting'
  assert decoders.ONE in by_name or drafts
  for values in by_name.values():
    c = config_lib.with_settings(config, values)
    assert c.sample.cache != 'none'


def test_shares_of_equal_tokens_and_answers():
  tokens, whole = speculation.equal(
    [[1, 2], [3, 4, 5, 6]], [[1, 2], [3, 4, 5, 0]]
  )
  assert (tokens, whole) == (5 / 6, 1 / 2)


def test_requests_of_both_tasks_share_a_program():
  questions = [Question([5] * n, [6] * n) for n in (9, 20, 41)]
  first, last = decoding.requests(questions, DEFAULT, 2)
  assert first.canvas.shape == (2, decoding.CONTEXT)
  assert first.fill.sum(axis=1).tolist() == [9, 20]
  assert last.fill.sum(axis=1).tolist() == [41]


def lines(method, decoder, task, tokens_per_pass):
  """Returns made-up lines of a decoder: its answers, and its speed."""
  of = {'method': method, 'decoder': decoder, 'task': task}
  yield of | {
    'part': 'answers',
    'tokens_per_pass': tokens_per_pass,
    'exact_match': 0.5,
    'most_probable': 0.75,
    'equal_one_per_step': 1.0,
  }
  if decoders.is_timed(decoder):
    yield of | {'part': 'speed', 'rows': 1, 'ratio': 1.5}
    yield of | {'part': 'speed', 'rows': 8, 'ratio': 0.5}


def test_tables_show_the_lines_of_both_tasks():
  raw = [
    line
    for task in page.QUALITY
    for decoder, number in (
      ('longest_prefix 0.9', 3.0),
      ('longest_prefix 0.5', 3.5),
      ('speculative', 2.5),
      ('one per step', 1.0),
    )
    for line in lines('sdlm_4', decoder, task, number)
  ]
  raw += lines('sdlm_8', 'speculative', 'corpus', 1.0)
  found = page.by_decoder(raw[::-1])
  first, _, *rows = page.networks_table(found).splitlines()
  assert first.count('tokens/s, 8 rows') == 2
  cells = '2.50 | 75% | 1.50 | 0.50 | 2.50 | 50% | 1.50 | 0.50 | 100% |'
  assert f'| windows of 4 | speculative | {cells}' in rows
  # sdlm_8 lacks a task, and one token per step is shown of the baselines only.
  assert len(rows) == 2
  _, _, *rows = page.thresholds_table(found, ['longest_prefix']).splitlines()
  assert rows == [
    '| windows of 4 | 0.5 | 3.50 | 75% | 3.50 | 50% |',
    '| windows of 4 | 0.9 | 3.00 | 75% | 3.00 | 50% |',
  ]


def test_page_has_the_tables_of_the_raw_lines():
  parts = page.parts(json_lines.read(page.RAW))
  text = page.PAGE.read_text()
  assert page_parts.fill(text, 'speculation_page', parts.__getitem__) == text
