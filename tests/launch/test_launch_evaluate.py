"""The script that scores lines of text, in a process of its own."""

import json
import os
import pathlib

import forked
import jax
import numpy as np
import pytest
import untrained_run

from maskdiff.interop import load
from maskdiff.likelihood import bounds, queries
from maskdiff.likelihood.estimators import Estimator

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAIRS = [
  {'prompt': 'def read(', 'answer': 'self):'},
  {'prompt': 'return ', 'answer': 'alpha + beta'},
]


@pytest.fixture(scope='module')
def workdir(tokenizer, tmp_path_factory):
  """A run that was saved before its first step."""
  path = tmp_path_factory.mktemp('run')
  untrained_run.save(path, tokenizer)
  return path


def evaluate(workdir, lines, *flags):
  path = workdir / 'data.jsonl'
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return forked.run(
    [
      *('launch/evaluate.py', f'--workdir={workdir}'),
      *(f'--data={path}', *flags),
    ],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )


def rows_of(result):
  assert result.returncode == 0, result.stderr
  return [json.loads(line) for line in result.stdout.splitlines()]


def complaint(result):
  assert (result.returncode, result.stdout) == (2, '')
  return result.stderr.strip().splitlines()[-1]


def by_library(workdir, function, answers, *rest):
  """What a function of bounds.py gives for the run."""
  config, _, params, mesh = load.load(str(workdir))
  with jax.set_mesh(mesh):
    return function(
      load.network(config, params),
      queries.likelihood_config(config, guidance=0.0, tokens_per_call=4096),
      answers,
      *rest,
    )


def answers_of_pairs(tokenizer):
  return bounds.lay_out(
    [tokenizer.encode('def read('), tokenizer.encode('return')],
    [tokenizer.encode('self):'), tokenizer.encode(' alpha + beta')],
  )


def test_bounds_are_printed_as_the_library_gives_them(workdir, tokenizer):
  flags = ('--task=bound', '--samples=32', '--strata=8', '--seed=3')
  *rows, total = rows_of(evaluate(workdir, PAIRS, *flags))
  answers = answers_of_pairs(tokenizer)
  e = Estimator(samples=32, strata=8)
  value, error = by_library(workdir, bounds.bound, answers, e, [3, 4])
  np.testing.assert_allclose([r['nats'] for r in rows], -value, rtol=1e-5)
  np.testing.assert_allclose([r['stderr_nats'] for r in rows], error, rtol=1e-3)
  assert total['tokens'] == answers.answer.sum()
  assert total['nats_per_token'] == pytest.approx(
    -value.sum() / total['tokens']
  )


def test_more_orders_give_the_importance_weighted_bound(workdir, tokenizer):
  flags = ('--task=bound', '--form=multi_sample', '--orders=4', '--seed=3')
  *rows, total = rows_of(evaluate(workdir, PAIRS, *flags))
  answers = answers_of_pairs(tokenizer)
  value, error = by_library(workdir, bounds.multi_sample, answers, 4, [3, 4])
  np.testing.assert_allclose([r['nats'] for r in rows], -value, rtol=1e-5)
  np.testing.assert_allclose([r['stderr_nats'] for r in rows], error, rtol=1e-3)
  assert total['estimator'] == {'form': 'multi_sample', 'orders': 4}


def test_what_follows_an_answer_is_part_of_its_row(workdir, tokenizer):
  """The lines that `launch/puzzles.py --task reversal --heldout` writes."""
  gap = {
    'prompt': '',
    'answer': 'the old farmer of Ghent',
    'suffix': ' is Nils Moreau',
  }
  flags = ('--task=bound', '--form=left_to_right')
  row, total = rows_of(evaluate(workdir, [gap | {'way': 'infill'}], *flags))
  parts = [[tokenizer.encode(gap[key])] for key in gap]
  answers = bounds.lay_out(*parts)
  value, _ = by_library(workdir, bounds.left_to_right, answers)
  assert row['nats'] == pytest.approx(-value[0], rel=1e-5)
  assert row['tokens'] == total['tokens'] == len(parts[1][0])
  assert row['bits_per_byte'] == pytest.approx(row['nats'] / 23 / np.log(2))


def test_an_autoregressive_run_refuses_other_orders_and_what_follows(
  tokenizer, tmp_path
):
  untrained_run.save(tmp_path, tokenizer, objective_name='autoregressive')
  lines = [*PAIRS, PAIRS[0] | {'suffix': ' return'}]
  for task in ('bound', 'greedy'):
    message = complaint(evaluate(tmp_path, lines, f'--task={task}'))
    assert 'data.jsonl:3: text follows the answer' in message
  flags = ('--task=bound', '--form=multi_sample')
  message = complaint(evaluate(tmp_path, PAIRS, *flags))
  assert 'one order only' in message and 'leave out --form' in message


def test_layers_that_devices_share_score_as_on_one_each(workdir):
  flags = ('--task=bound', '--samples=16')
  *rows, total = rows_of(evaluate(workdir, PAIRS, *flags))
  *shared, whole = rows_of(evaluate(workdir, PAIRS, *flags, '--tensor=2'))
  for row, same in zip(rows, shared, strict=True):
    assert row['nats'] == pytest.approx(same['nats'], rel=1e-5)
  assert whole['nats_per_token'] == pytest.approx(
    total['nats_per_token'], rel=1e-5
  )
  assert whole['dtype'] == total['dtype'] == 'float32'
  # Heads that do not split: the flag has come through to the mesh.
  split = evaluate(workdir, PAIRS, *flags, '--tensor=4')
  assert 'not divisible by mesh.tensor = 4' in complaint(split)


def test_weights_in_half_the_memory_score_nearly_the_same(workdir):
  flags = ('--task=bound', '--samples=16', '--dtype=bfloat16')
  *rows, total = rows_of(evaluate(workdir, PAIRS, *flags))
  assert total['dtype'] == 'bfloat16'
  *stored, _ = rows_of(evaluate(workdir, PAIRS, *flags[:2]))
  for row, same in zip(rows, stored, strict=True):
    assert row['nats'] == pytest.approx(same['nats'], rel=0.02)
    assert row['nats'] != same['nats']


def test_a_text_is_an_answer_to_nothing(workdir):
  """Exactly, so that nothing depends on the seeds of lines."""
  text = 'def read(self):'
  lines = [{'text': text}, {'prompt': '', 'answer': text}]
  flags = ('--task=bound', '--form=left_to_right')
  whole, answer, total = rows_of(evaluate(workdir, lines, *flags))
  assert whole['nats'] == pytest.approx(answer['nats'], rel=1e-5)
  assert total['tokens'] == 2 * whole['tokens'] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
  'flags',
  [
    ('--task=choices', '--guidance=0.5', '--form=bernoulli', '--coupled'),
    ('--task=choices', '--form=left_to_right'),
    ('--task=choices', '--orders=2', '--form=multi_sample'),
    ('--task=greedy',),
  ],
  ids=lambda flags: flags[0][7:] + flags[-1][1:],
)
def test_the_other_tasks_and_forms_go_through(workdir, flags):
  line = {'prompt': 'return ', 'choices': ['alpha', 'beta'], 'answer': 1}
  lines = PAIRS if 'greedy' in flags[0] else [line, line]
  *rows, total = rows_of(evaluate(workdir, lines, *flags))
  assert total['lines'] == len(rows) == 2
  assert 0 <= total['accuracy'] <= 1


def test_errors_are_one_line(workdir, tmp_path):
  """Told before anything is computed; the last before the run is looked for."""
  long = [{'prompt': 'x + ' * 32, 'answer': 'y'}]
  message = complaint(evaluate(workdir, long, '--task=bound'))
  assert message.startswith('error: ') and 'data.jsonl:1' in message
  odd = evaluate(tmp_path, PAIRS, '--task=bound', '--samples=20')
  assert 'samples=20' in complaint(odd)


@pytest.mark.parametrize(
  'flags, name',
  [
    ((), '--task'),
    (('--task=loss',), 'task'),
    (('--task=bound', '--samples=0'), 'samples'),
  ],
  ids=['none', 'unknown', 'samples'],
)
def test_a_bad_flag_is_named_in_one_line(tmp_path, flags, name):
  result = evaluate(tmp_path, PAIRS, *flags)
  assert len(result.stderr.strip().splitlines()) == 1
  assert name in complaint(result)
