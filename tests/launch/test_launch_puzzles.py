"""launch/puzzles.py writes puzzles, launch/evaluate.py answers them."""

import json
import os
import pathlib

import forked
import pytest
import untrained_run

from maskdiff.evals import puzzles

ROOT = pathlib.Path(__file__).resolve().parents[2]


def launch(script, *flags):
  return forked.run(
    [f'launch/{script}.py', *flags],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )


def lines_of(text):
  return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope='module')
def workdir(tokenizer, tmp_path_factory):
  path = tmp_path_factory.mktemp('run')
  untrained_run.save(path, tokenizer)
  return path


@pytest.mark.slow
def test_puzzles_are_written_and_answered(workdir, tmp_path):
  out = tmp_path / 'heldout.jsonl'
  flags = ('--task=addition', '--num=5', '--digits=3', '--seed=2')
  written = launch('puzzles', *flags, '--heldout', f'--out={out}')
  assert written.returncode == 0, written.stderr
  lines = lines_of(out.read_text())
  assert lines == puzzles.make('addition', 2, 5, digits=3)

  done = launch(
    'evaluate',
    *(f'--workdir={workdir}', '--task=addition', f'--data={out}'),
    *('--sample=steps=1', '--sample=confidence=margin'),
  )
  assert done.returncode == 0, done.stderr
  *rows, total = lines_of(done.stdout)
  assert [{k: row[k] for k in ('prompt', 'answer')} for row in rows] == lines
  right = [row['text'] == row['answer'] for row in rows]
  assert [row['correct'] for row in rows] == right
  assert total['accuracy'] == sum(right) / 5
  # One step commits four digits and an eos.
  assert total['forwards_per_token'] == 1 / 5
  sampler = total['sampler']
  assert (sampler['steps'], sampler['confidence']) == (1, 'margin')
  assert (total['task'], total['data']) == ('addition', str(out))


def test_training_lines_are_written(tmp_path):
  out = tmp_path / 'text.jsonl'
  done = launch('puzzles', '--task=sudoku', '--num=9', f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert lines_of(out.read_text()) == puzzles.training_lines('sudoku', 0, 9)


@pytest.mark.parametrize(
  'flags, message',
  [
    (('--task=bound',), '--task bound needs --data'),
    (('--task=choices', '--sample=steps=1'), '--sample is for tasks'),
    (('--task=sudoku', '--sample=steps'), "'steps': write KEY=VALUE"),
    (
      ('--task=sudoku', '--data=FILE'),
      "heldout.jsonl:1: '6' is not a right answer",
    ),
  ],
  ids=['no_data', 'sample', 'pair', 'other_lines'],
)
def test_wrong_flags_and_lines_are_one_line(workdir, tmp_path, flags, message):
  data = tmp_path / 'heldout.jsonl'
  data.write_text('{"prompt": "2 x 3 = ", "answer": "6"}\n')
  flags = [f.replace('FILE', str(data)) for f in flags]
  done = launch('evaluate', f'--workdir={workdir}', *flags)
  assert (done.returncode, done.stdout) == (2, '')
  assert message in done.stderr.splitlines()[-1]
