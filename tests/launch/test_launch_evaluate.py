"""launch/evaluate.py by likelihood, in its own process."""

import json
import os
import pathlib

import forked
import jax
import numpy as np
import pytest
import untrained_run

from maskdiff.interop import load
from maskdiff.likelihood import bounds, bracket, queries
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


def error_of(result):
  assert (result.returncode, result.stdout) == (2, '')
  return result.stderr.strip().splitlines()[-1]


def by_library(workdir, function, answers, *rest):
  """Returns the result of a function of bounds.py for the run."""
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


@pytest.mark.slow
def test_bounds_match_the_library(workdir, tokenizer):
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


def test_multi_sample_matches_the_library(workdir, tokenizer):
  flags = ('--task=bound', '--form=multi_sample', '--orders=4', '--seed=3')
  *rows, total = rows_of(evaluate(workdir, PAIRS, *flags))
  answers = answers_of_pairs(tokenizer)
  value, error = by_library(workdir, bounds.multi_sample, answers, 4, [3, 4])
  np.testing.assert_allclose([r['nats'] for r in rows], -value, rtol=1e-5)
  np.testing.assert_allclose([r['stderr_nats'] for r in rows], error, rtol=1e-3)
  assert total['estimator'] == {'form': 'multi_sample', 'orders': 4}


def test_bracket_matches_the_library(workdir, tokenizer):
  flags = ('--task=bound', '--form=two_sided', '--orders=4', '--seed=3')
  *rows, total = rows_of(evaluate(workdir, PAIRS, *flags))
  answers = answers_of_pairs(tokenizer)
  lower, upper, effective = by_library(
    workdir, bracket.bracket, answers, 4, [3, 4]
  )
  for key, values in {
    'nats': -lower.log_likelihood,
    'nats_at_least': -upper.log_likelihood,
    'stderr_nats_at_least': upper.stderr,
    'effective_orders': effective,
  }.items():
    np.testing.assert_allclose([r[key] for r in rows], values, rtol=1e-3)
  at_least = total['nats_per_token_at_least']
  assert at_least == pytest.approx(
    -upper.log_likelihood.sum() / total['tokens'], rel=1e-3
  )
  assert at_least < total['nats_per_token']
  assert total['estimator'] == {'form': 'two_sided', 'orders': 4}
  message = error_of(
    evaluate(workdir, PAIRS, '--task=greedy', '--form=two_sided')
  )
  assert 'two_sided is for --task bound' in message


def test_a_suffix_is_part_of_the_row(workdir, tokenizer):
  """Lines have the form of `launch/puzzles.py --task reversal --heldout`."""
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


@pytest.mark.slow
def test_an_autoregressive_run_refuses_other_orders_and_suffixes(
  tokenizer, tmp_path
):
  untrained_run.save(tmp_path, tokenizer, objective_name='autoregressive')
  lines = [*PAIRS, PAIRS[0] | {'suffix': ' return'}]
  for task in ('bound', 'greedy'):
    message = error_of(evaluate(tmp_path, lines, f'--task={task}'))
    assert 'data.jsonl:3: text follows the answer' in message
  flags = ('--task=bound', '--form=multi_sample')
  message = error_of(evaluate(tmp_path, PAIRS, *flags))
  assert 'one order only' in message and 'leave out --form' in message


@pytest.mark.slow
def test_tensor_parallel_scores_match(workdir):
  flags = ('--task=bound', '--samples=16')
  *rows, total = rows_of(evaluate(workdir, PAIRS, *flags))
  *shared, whole = rows_of(evaluate(workdir, PAIRS, *flags, '--tensor=2'))
  for row, same in zip(rows, shared, strict=True):
    assert row['nats'] == pytest.approx(same['nats'], rel=1e-5)
  assert whole['nats_per_token'] == pytest.approx(
    total['nats_per_token'], rel=1e-5
  )
  assert whole['dtype'] == total['dtype'] == 'float32'
  # Four does not divide the heads, so the flag has reached the mesh.
  split = evaluate(workdir, PAIRS, *flags, '--tensor=4')
  assert 'not divisible by mesh.tensor = 4' in error_of(split)


@pytest.mark.slow
def test_bfloat16_scores_are_close(workdir):
  flags = ('--task=bound', '--samples=16', '--dtype=bfloat16')
  *rows, total = rows_of(evaluate(workdir, PAIRS, *flags))
  assert total['dtype'] == 'bfloat16'
  *stored, _ = rows_of(evaluate(workdir, PAIRS, *flags[:2]))
  for row, same in zip(rows, stored, strict=True):
    assert row['nats'] == pytest.approx(same['nats'], rel=0.02)
    assert row['nats'] != same['nats']


def test_a_text_is_scored_as_an_answer_without_prompt(workdir):
  """Uses the exact chain rule, which does not depend on seeds."""
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
def test_other_tasks_and_forms_run(workdir, flags):
  line = {'prompt': 'return ', 'choices': ['alpha', 'beta'], 'answer': 1}
  lines = PAIRS if 'greedy' in flags[0] else [line, line]
  *rows, total = rows_of(evaluate(workdir, lines, *flags))
  assert total['lines'] == len(rows) == 2
  assert 0 <= total['accuracy'] <= 1


def test_rope_scaling_is_for_rows_longer_than_the_training_rows(workdir):
  lines = [{'prompt': 'x = 1\n' * 20, 'answer': 'self):'}]
  *_, total = rows_of(
    evaluate(workdir, lines, '--task=bound', '--rope_scaling=32,128')
  )
  assert total['rope_scaling'] == [32, 128]


def test_errors_are_one_line(workdir, tmp_path):
  """Errors come before any computation; that of --samples before loading."""
  long = [{'prompt': 'x + ' * 32, 'answer': 'y'}]
  message = error_of(evaluate(workdir, long, '--task=bound'))
  assert message.startswith('error: ') and 'data.jsonl:1' in message
  odd = evaluate(tmp_path, PAIRS, '--task=bound', '--samples=20')
  assert 'samples=20' in error_of(odd)


@pytest.mark.parametrize(
  'flags, name',
  [
    ((), '--task'),
    (('--task=loss',), 'task'),
    (('--task=bound', '--samples=0'), 'samples'),
  ],
  ids=['none', 'unknown', 'samples'],
)
def test_a_bad_flag_is_one_line_with_its_name(tmp_path, flags, name):
  result = evaluate(tmp_path, PAIRS, *flags)
  assert len(result.stderr.strip().splitlines()) == 1
  assert name in error_of(result)
