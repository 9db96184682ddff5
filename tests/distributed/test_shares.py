"""Evaluation and sampling in two processes, compared with one.

One run of two processes covers all cases, because its start takes seconds.
"""

import functools
import json

import jax
import pytest
import shared_work
import test_processes
import untrained_run

from maskdiff.distributed import mesh, shares


def test_items_are_dealt_by_cost():
  assert shares.divide([1, 9, 5, 5, 2], 2) == [[0, 1, 3], [2, 4]]
  assert shares.divide([3], 3) == [[0], [], []]


@pytest.fixture(scope='module')
def folder(tokenizer, tmp_path_factory):
  path = tmp_path_factory.mktemp('run')
  named = ((2, 212), (4, 213), (16, 265))
  untrained_run.save(path, tokenizer, data_length_tokens=named)
  lines = [{'prompt': x, 'answer': ' y = 1'} for x in shared_work.TEXTS]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (path / 'lines.jsonl').write_text(text)
  (path / 'lines.jsonl.txt').write_text('\n'.join(shared_work.TEXTS) + '\n')
  return path


@pytest.fixture(scope='module')
def one(folder):
  """Returns the results of one process, on one of its devices."""
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    make_mesh = functools.partial(mesh.make_mesh, devices=devices)
    patch.setattr(mesh, 'make_mesh', make_mesh)
    arguments = folder / 'lines.jsonl', folder / 'one.jsonl'
    return shared_work.results(str(folder), *map(str, arguments))


@pytest.fixture(scope='module')
def two(folder):
  """Returns the outputs of both processes, and the results of each."""
  script = test_processes.ROOT / 'tests' / 'shared_work.py'
  arguments = folder, folder / 'lines.jsonl', folder / 'two.jsonl'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(test_processes, 'DEVICES', 2)
    ended = test_processes.start(script, *arguments)
  assert all(out for out, _, _ in ended), ended[0][1][-4000:]
  return ended, [json.loads(out) for out, _, _ in ended]


def assert_same_library(found, expected):
  for name in ('greedy', 'answers', 'lengths'):
    assert found[name] == json.loads(json.dumps(expected[name])), name
  for values, of_one in zip(
    found['log_likelihoods'], expected['log_likelihoods'], strict=True
  ):
    assert values == pytest.approx(of_one, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_two_processes_have_the_results_of_one(one, two):
  for found in two[1]:
    assert_same_library(found['library'], one['library'])
    if one['harness']:
      assert found['harness'] == pytest.approx(one['harness'], rel=1e-5)


@pytest.mark.slow
def test_each_process_computes_its_share(two):
  names = [name for _, name, _ in shared_work.SHARED]
  for found, share in zip(two[1], (3, 2), strict=True):
    assert found['counts'] == dict.fromkeys(names, share)


@pytest.mark.slow
def test_a_model_over_both_processes_has_the_results_of_one(one, two):
  """All devices compute every row, so that both processes start all rows."""
  for found in two[1]:
    assert_same_library(found['spread'], one['library'])
    assert set(found['counts of spread'].values()) == {5}


@pytest.mark.slow
def test_only_process_0_writes_and_in_order(folder, one, two):
  assert (folder / 'two.jsonl').read_text() == (
    (folder / 'one.jsonl').read_text()
  )
  first, second = (found['evaluate'] for found in two[1])
  assert second == ''
  rows, expected = (
    [json.loads(line) for line in text.splitlines()]
    for text in (first, one['evaluate'])
  )
  assert len(rows) == 6
  for row, of_one in zip(rows, expected, strict=True):
    assert row.keys() == of_one.keys()
    for name, value in row.items():
      if isinstance(value, float):
        assert value == pytest.approx(of_one[name], rel=1e-5), name
      else:
        assert value == of_one[name], name


@pytest.mark.slow
def test_an_error_in_one_process_is_that_of_all(two):
  """The last error is that of different items, and ends both processes."""
  for i, (_, err, status) in enumerate(two[0]):
    assert two[1][i]['error'] == 'the text of process 1 is too long'
    assert status == 2
    (line,) = [x for x in err.splitlines() if x.startswith('error: ')]
    assert 'the processes differ: the input is' in line
