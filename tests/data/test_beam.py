"""Preparation with Apache Beam writes the files of a local preparation."""

import builtins
import functools
import random
import sys

import pytest
from test_prepare import contents, plan_of, prepared, refused, write_jsonl

from maskdiff.data import beam


@pytest.fixture(scope='module')
def plan(tmp_path_factory):
  """Returns a plan of several parts."""
  texts = [f'text {n} of many, {n * n}\n' * (n % 9 + 1) for n in range(90)]
  path = write_jsonl(tmp_path_factory.mktemp('corpus') / 'x.jsonl', texts)
  plan = plan_of(path, 2000)
  assert len(plan.parts) > 5
  return plan


@pytest.fixture(scope='module')
def once(plan, tokenizer, tmp_path_factory):
  """Returns the directory of a local preparation."""
  directory = tmp_path_factory.mktemp('once') / 'rows'
  prepared(plan, tokenizer, directory)
  return directory


def in_disorder(make_part, failing=()):
  """Returns a function that makes parts as a cluster may make them.

  Args:
    make_part: function with the arguments of `beam.make_part`.
    failing: numbers of parts that are not made.
  """

  def make_shards(job, tokenizer, todo):
    repeated = random.Random(0).sample(todo * 2, 2 * len(todo))
    for number, part in repeated:
      if number not in failing:
        make_part(job, tokenizer, number, part)
    beam.check(job, tokenizer, todo)

  return make_shards


def test_parts_in_any_order_and_repeated_give_the_same_files(
  plan, tokenizer, once, tmp_path
):
  elsewhere = in_disorder(beam.make_part)
  prepared(plan, tokenizer, tmp_path / 'rows', elsewhere=elsewhere)
  assert contents(tmp_path / 'rows') == contents(once)


def test_workers_that_copy_files_write_the_same_files(
  plan, tokenizer, once, tmp_path, monkeypatch
):
  """Workers that do not see the directory copy files from and to a bucket."""
  created = []

  def create(path):
    created.append(path.name)
    return builtins.open(path, 'wb')

  monkeypatch.setattr(beam, '_open', lambda path: builtins.open(path, 'rb'))
  monkeypatch.setattr(beam, '_create', create)
  elsewhere = in_disorder(beam._make_copied)
  prepared(plan, tokenizer, tmp_path / 'rows', elsewhere=elsewhere)
  assert contents(tmp_path / 'rows') == contents(once)
  assert created[0].endswith('.array_record')
  assert created[1].endswith('.npz')


def test_missing_parts_are_named_and_made_by_the_next_run(
  plan, tokenizer, once, tmp_path
):
  elsewhere = in_disorder(beam.make_part, failing=(3, 4))
  message = refused(plan, tokenizer, tmp_path / 'rows', elsewhere=elsewhere)
  assert 'such as the one with number 3' in message
  lines = []
  prepared(plan, tokenizer, tmp_path / 'rows', lines.append)
  assert f'{len(plan.parts) - 2} of {len(plan.parts)} parts' in lines[0]
  assert contents(tmp_path / 'rows') == contents(once)


def test_error_of_a_worker_is_one_line(tokenizer, tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_text('not JSON\n' * 40)
  elsewhere = in_disorder(beam.make_part)
  out = tmp_path / 'rows'
  message = refused(plan_of(path), tokenizer, out, elsewhere=elsewhere)
  assert message == refused(plan_of(path), tokenizer, tmp_path / 'local')
  assert not list(out.rglob('*.error'))


def test_a_worker_without_the_directory_needs_a_bucket():
  assert beam.bucket_path('/gcs/text/a.jsonl') == 'gs://text/a.jsonl'
  with pytest.raises(beam.UserError, match='does not see /data/a.jsonl'):
    beam.bucket_path('/data/a.jsonl')


def test_missing_beam_is_a_user_error(plan, tokenizer, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  elsewhere = functools.partial(beam.make_shards, '')
  message = refused(plan, tokenizer, tmp_path / 'rows', elsewhere=elsewhere)
  assert 'pip install -r requirements-beam.txt' in message


@pytest.mark.slow
def test_direct_runner_writes_the_same_files(plan, tokenizer, once, tmp_path):
  pytest.importorskip('apache_beam')  # requirements-beam.txt
  options = (
    '--runner=DirectRunner --direct_running_mode=multi_processing '
    '--direct_num_workers=2'
  )
  elsewhere = functools.partial(beam.make_shards, options)
  out = tmp_path / 'rows'
  prepared(plan, tokenizer, out, elsewhere=elsewhere)
  assert contents(out) == contents(once)
