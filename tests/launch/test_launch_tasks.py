"""launch/tasks.py writes questions and tries rewards."""

import json
import os
import pathlib

import forked

from maskdiff.rl import tasks

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = """
def length(question, text):
  return {'total': len(text) / 10, 'empty': not text}

def broken(question, text):
  return text.index(question['none'])
"""


def launch(*flags):
  return forked.run(
    ['launch/tasks.py', *flags],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )


def test_questions_are_written_and_scored(tmp_path):
  out = tmp_path / 'sudoku.jsonl'
  flags = ('--task=sudoku', '--num=5', f'--out={out}', '--reward=default')
  done = launch(*flags)
  assert done.returncode == 0, done.stderr
  lines = [json.loads(line) for line in out.read_text().splitlines()]
  expected = tasks.get('sudoku').draw(0, 5, False)
  assert lines == [{**q, 'text': q['prompt'] + q['answer']} for q in expected]
  scored, written = done.stderr.splitlines()[-2:]
  assert scored == (
    'right answers: reward 1.000, cells 1.000, correct 1.000; errors: none'
  )
  assert written == f'{out}: 5 lines'


def test_reward_of_the_user_is_tried(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(PROGRAM)
  done = launch('--task=sudoku', '--num=3', f'--reward={path}:length')
  assert done.returncode == 0, done.stderr
  assert done.stderr.splitlines()[-1] == (
    'right answers: reward 1.600, empty 0.000; errors: none'
  )
  done = launch('--task=sudoku', f'--reward={path}:broken')
  assert (done.returncode, done.stdout) == (2, '')
  line = done.stderr.splitlines()[-1]
  assert "mine.py:broken' of the right answer to" in line
  assert "raised (line 6, KeyError: 'none')" in line


def test_flags_without_a_result_are_one_line():
  done = launch('--task=sudoku')
  assert done.returncode == 2
  assert done.stderr == 'error: give --out, --reward or both\n'
