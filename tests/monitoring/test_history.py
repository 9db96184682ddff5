"""Reading runs back from their work directories."""

import json

import made_runs
import numpy as np
import pytest
from made_runs import eval_row, train_row

from maskdiff.errors import UserError
from maskdiff.monitoring import history, smoothing


def run(rows, **config):
  return history.Run('run', 'run', rows, config)


def test_run_is_read_from_its_directory(tmp_path):
  skipped = {'event': 'skipped', 'step': 3, 'time': 3.0, 'seconds': {}}
  ledger = [
    {'time': 0.0, 'event': 'opened', 'seconds': {}},
    {'time': 1.0, 'event': 'started', 'step': 0, 'seconds': {'init': 1.0}},
    skipped,
    {'time': 4.0, 'step': 4, 'seconds': {'step': 3.0}},
  ]
  rows = [eval_row(0, 9.0), train_row(4, 8.0)]
  workdir = made_runs.write(tmp_path / 'a', rows, ledger, train__steps=10)
  (found,) = history.read_runs([str(workdir)])
  assert found.name == 'a' and found.rows == rows and found.last_step == 4
  assert found.config['train.steps'] == 10 and not found.causal
  assert found.goodput['goodput'] == 0.75
  assert found.skipped == [skipped]
  assert found.header == 'total  1,234\n' and found.plan is None


def test_incomplete_files_are_read_as_far_as_possible(tmp_path):
  workdir = made_runs.write(tmp_path / 'a', [eval_row(0, 9.0)])
  with open(workdir / 'metrics.jsonl', 'a') as f:
    f.write('{"step": 20, "train/lo')
  (workdir / 'ledger.jsonl').write_text('{"time": 1.0, "ev')
  (workdir / 'config.json').write_text('{"seed": 0, "mod')
  (workdir / 'header.txt').unlink()
  found = history.read_run(workdir)
  assert found.last_step == 0
  assert (found.config, found.header, found.goodput) == ({}, '', None)


def test_invalid_directories_are_refused(tmp_path):
  a = made_runs.write(tmp_path / 'a', [eval_row(0, 9.0)])
  other = made_runs.write(tmp_path / 'other' / 'a', [eval_row(0, 9.0)])
  empty = made_runs.write(tmp_path / 'empty', [])
  for workdirs, message in (
    ([tmp_path / 'none'], 'there is no work directory'),
    ([a, empty], 'has no rows of metrics'),
    ([a, other], "have the same name 'a'"),
    ([a, f'{a}/'], "have the same name 'a'"),
  ):
    with pytest.raises(UserError, match=message) as error:
      history.read_runs([str(w) for w in workdirs])
    assert '\n' not in str(error.value)


def test_plan_of_the_run_overrides_the_given_plan(tmp_path):
  given = tmp_path / 'given.json'
  given.write_text(json.dumps(made_runs.plan(step_s=1.0)))
  a, b = (made_runs.write(tmp_path / x, [eval_row(0, 9.0)]) for x in ('a', 'b'))
  (b / 'plan.json').write_text(json.dumps(made_runs.plan(step_s=2.0)))
  found = history.read_runs([a, b], str(given))
  assert [r.plan['step_s'] for r in found] == [1.0, 2.0]


@pytest.mark.parametrize(
  'text, message',
  [
    (None, 'cannot read the plan'),
    ('{"mode"', 'not valid JSON'),
    ('[{}]', 'is a sweep'),
    ('{"mode": "sample"}', 'not the plan of a training'),
  ],
)
def test_invalid_plan_is_refused(tmp_path, text, message):
  file = tmp_path / 'plan.json'
  if text:
    file.write_text(text)
  with pytest.raises(UserError, match=message):
    history.read_plan(str(file))


def test_series_has_only_finite_values():
  rows = [eval_row(0, 9.0), train_row(2, float('nan')), train_row(4, 7.0)]
  steps, values = history.series(run(rows), 'train/loss_nats_per_token')
  assert (steps.tolist(), values.tolist()) == ([4.0], [7.0])
  steps, values = history.series(run(rows), 'train/mfu')
  assert len(steps) == len(values) == 0


def test_tokens_are_counted_when_the_batch_changes():
  """128 tokens per step up to step 10, then 256."""
  rows = [eval_row(0, 9.0), train_row(4, 8.0), train_row(10, 7.0)]
  rows += [train_row(20, 6.0, batch=16, step_s=0.3)]
  tokens = history.tokens_at(run(rows), [0, 2, 10, 15, 20, 21])
  assert tokens.tolist() == [0, 256, 1280, 2560, 3840, 4096]


def test_tokens_come_from_the_config_without_training_rows():
  config = {'train.batch': 8, 'data.length': 16}
  tokens = history.tokens_at(run([eval_row(0, 9.0)], **config), [0, 10])
  assert tokens.tolist() == [0, 1280]


def test_datasets_have_their_own_bits_per_byte():
  row = eval_row(2, 8.0, bits_per_nat=0.25)
  row |= eval_row(2, 6.0, bits_per_nat=0.5, dataset='data/web')
  row |= eval_row(2, 9.0, bits_per_nat=0.75, dataset='code')
  mixed = run([row])
  assert history.datasets(mixed) == ['', 'code', 'data/web']
  assert [history.bits_per_nat(mixed, d) for d in ('', 'data/web', 'code')] == [
    *(0.25, 0.5, 0.75)
  ]
  assert history.datasets(run([eval_row(0, 9.0)])) == ['']
  assert history.bits_per_nat(run([train_row(1, 8.0)])) is None


def test_loss_by_mask_ratio_is_from_the_newest_row():
  rows = [
    eval_row(0, 9.0, ratios=[('0.1', 9.0)]),
    eval_row(4, 8.0, ratios=[('0.9', 8.5), ('0.1', 7.5)]),
    train_row(6, 8.0),
  ]
  by_ratio = lambda where: history.by_part(run(rows), where, history.RATIO)
  assert by_ratio('eval') == (4, [(0.1, 7.5), (0.9, 8.5)])
  assert by_ratio('train') == (None, [])


def test_samples_are_grouped_by_prompt():
  rows = [
    {'step': 0, 'first_row': 'text'},
    {'step': 0, 'sample/10': 'ten'},
    {'step': 0, 'sample/2': 'two'},
    {'step': 5, 'sample/2': 'two, later'},
  ]
  assert history.samples(run(rows)) == {
    2: [(0, 'two'), (5, 'two, later')],
    10: [(0, 'ten')],
  }
  assert list(history.samples(run(rows))) == [2, 10]


def test_config_differences_are_listed_by_key(tmp_path):
  """Keys missing from an older config.json have the defaults."""
  rows = [eval_row(0, 9.0)]
  a = made_runs.write(tmp_path / 'a', rows, seed=0, sample__prompts=('x',))
  b = made_runs.write(tmp_path / 'b', rows, seed=3, sample__prompts=('x',))
  old = json.loads((b / 'config.json').read_text())
  del old['train']['stall_s']
  (b / 'config.json').write_text(json.dumps(old))
  found = history.read_runs([a, b])
  assert history.differences(found) == {'seed': ['0', '3']}
  assert history.differences(found[:1]) == {}


def test_smooth_is_a_moving_average():
  values = np.array([9.0, 3.0, 6.0, 0.0, 3.0])
  assert smoothing.smooth(values, 1).tolist() == [9.0, 6.0, 3.0, 3.0, 1.5]
  assert smoothing.smooth(values, 0).tolist() == values.tolist()
  line = np.arange(50.0)
  assert np.allclose(smoothing.smooth(line, 4)[:46], line[:46])


def test_thin_reduces_groups_with_the_given_function():
  steps, values = np.arange(1, 8), np.array([1.0, 5, 2, 2, 9, 0, 3])
  for reduce, expected in ((np.max, [5, 9, 3]), (np.mean, [8 / 3, 11 / 3, 3])):
    thinned = smoothing.thin(steps, values, reduce, max_points=3)
    assert thinned[0].tolist() == [3, 6, 7]
    assert np.allclose(thinned[1], expected)
  assert smoothing.thin(steps, values, np.max)[1] is values
