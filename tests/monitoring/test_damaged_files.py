"""Reports of runs whose files are damaged, and of runs that diverge."""

import json
import os
import random

import made_runs
import mutations
import numpy as np
import pytest
from made_runs import eval_row, train_row

from maskdiff.errors import UserError
from maskdiff.monitoring import curves, history, ledger, report, stage_file
from maskdiff.monitoring.stage_file import Curve

NAN, INFINITY = float('nan'), float('inf')
# Files of a work directory that the report reads, and how often to damage each.
FILES = {
  'metrics.jsonl': 120,
  'ledger.jsonl': 120,
  'stage.json': 100,
  'plan.json': 100,
  'config.json': 40,
  'header.txt': 20,
}
SKIPPED = {
  **{'time': 7.0, 'event': 'skipped', 'step': 7, 'in_a_row': 1},
  **{'loss_nats_per_token': 99.0, 'grad_norm': 1e4, 'samples': [48, 56]},
  'seconds': {},
}
LEDGER = [
  {'time': 0.0, 'event': 'opened', 'seconds': {}},
  {'time': 1.0, 'event': 'started', 'step': 0, 'seconds': {'init': 1.0}},
  SKIPPED,
  {'time': 9.0, 'step': 12, 'seconds': {'step': 6.0, 'compile': 2.0}},
  {'time': 12.0, 'event': 'opened', 'seconds': {}},
  {'time': 13.0, 'event': 'started', 'step': 10, 'seconds': {'restore': 1.0}},
]


@pytest.fixture(autouse=True)
def without_plotly(monkeypatch):
  """Leaves Plotly's 5 MB of JavaScript out of the pages."""
  monkeypatch.setattr(report, 'get_plotlyjs', lambda: '')


@pytest.fixture
def workdir(tmp_path):
  """A small run with all files that the report reads."""
  ratios = [('0.1', 2.0), ('0.9', 4.0)]
  rows = [eval_row(0, 8.0, ratios=ratios) | eval_row(0, 8.0, dataset='web')]
  for step in range(1, 13):
    rows.append(train_row(step, 3 + 6 / step, ratios=ratios, reward=step / 10))
  rows += [eval_row(12, 4.0, ratios=ratios), {'step': 12, 'sample/0': 'text'}]
  path = made_runs.write(tmp_path / 'run', rows, LEDGER)
  (path / 'plan.json').write_text(json.dumps(made_runs.plan()))
  reward = Curve('reward', 'Reward', 'Mean.', 'train/reward', smooth=True)
  stage_file.write(path, 'toy', (*stage_file.PRETRAINING, reward))
  return path


def data_of(runs):
  """Returns the JSON of a report; refuses what browsers refuse."""
  text = report.page(runs, now=0)
  start = text.index('type="application/json">') + len(
    'type="application/json">'
  )
  text = text[start : text.index('</script>', start)]

  def refuse(constant):
    raise AssertionError(f'{constant} in the page')

  return json.loads(text, parse_constant=refuse)


def panel_of(data, name):
  (found,) = (panel for panel in data['panels'] if panel['id'] == name)
  return found


# Damage


def mutated(rng, name, content):
  """Returns the content of a file with damaged bytes or values."""
  if rng.random() < 0.5 or name == 'header.txt':
    return mutations.mutated_bytes(rng, content)
  if not name.endswith('.jsonl'):
    value = mutations.mutated_json(rng, json.loads(content))
    return json.dumps(value).encode()
  lines = content.splitlines()
  for i in rng.sample(range(len(lines)), 3):
    value = mutations.mutated_json(rng, json.loads(lines[i]))
    lines[i] = json.dumps(value).encode()
  return b'\n'.join(lines) + b'\n'


@pytest.mark.slow
@pytest.mark.parametrize('name', FILES)
def test_any_damage_to_a_file_is_skipped_or_a_user_error(workdir, name):
  path, drawn = workdir / name, 0
  content = path.read_bytes()
  for seed in range(FILES[name]):
    path.write_bytes(mutated(random.Random(f'{name} {seed}'), name, content))
    try:
      data_of([history.read_run(workdir)])
      ledger.format_goodput(ledger.goodput(workdir / 'ledger.jsonl'))
      drawn += 1
    except UserError as error:
      assert '\n' not in str(error) and len(str(error)) < 1000
    except Exception as error:
      raise AssertionError(f'{name}, seed {seed}: {error!r}') from error
  assert drawn >= 10  # the damage is not always fatal


def test_two_runs_with_damaged_files_are_compared(workdir, tmp_path):
  with open(workdir / 'metrics.jsonl', 'ab') as f:
    f.write(b'3\n{"step": "4"}\n\xff\n{"step": 13, "train/')
  with open(workdir / 'ledger.jsonl', 'ab') as f:
    f.write(b'{"time": 14.0, "seconds": {"step": NaN}, "step": 12}\n')
  (workdir / 'config.json').write_text('{"train": {"steps": "12"}, "seed": 3')
  other = made_runs.write(tmp_path / 'other', [train_row(2, 8.0)])
  config = json.loads((other / 'config.json').read_text())
  config['train'] |= {'steps': '12', 'batch': 10**400}
  (other / 'config.json').write_text(json.dumps(config))
  runs = history.read_runs([workdir, other])
  assert runs[0].warnings[:2] == (
    f'{workdir}/metrics.jsonl: 3 damaged lines are skipped',
    f'{workdir}/ledger.jsonl: 1 damaged line is skipped',
  )
  assert runs[0].warnings[2].startswith('the config is left out: ')
  assert runs[1].warnings == (
    f'{other}/config.json: wrong types of train.batch, train.steps; defaults '
    'are shown',
  )
  data = data_of(runs)
  assert [run['warnings'] for run in data['runs']] == [
    list(run.warnings) for run in runs
  ]
  assert len(panel_of(data, 'training')['figure']['data']) == 3


@pytest.mark.parametrize('name', FILES)
def test_fifos_and_folders_do_not_block_a_report(workdir, name):
  for make in (os.mkfifo, os.mkdir):
    path = workdir / name
    path.rename(workdir / 'before') if path.is_file() else path.rmdir()
    make(path)
    try:
      run = history.read_run(workdir)
      assert 'not a regular file' in ' '.join(run.warnings)
      data_of([run])
    except UserError as error:
      assert 'not a regular file' in str(error)
    if path.is_fifo():
      path.unlink()
      path.mkdir()


@pytest.mark.parametrize('name', ['config.json', 'header.txt'])
def test_a_report_does_not_show_files_outside_the_run(workdir, name):
  private = workdir.parent / 'private'
  private.write_text('{"train": {"batch": 31337}}')
  path = workdir / name
  path.unlink(missing_ok=True)
  path.symlink_to(private)
  run = history.read_run(workdir)
  assert '31337' not in str(run)
  assert 'is not a file of this folder' in ' '.join(run.warnings)


def test_run_without_a_good_row_is_one_line(workdir):
  (workdir / 'metrics.jsonl').write_text('3\n[]\n')
  message = r'no rows of metrics \(.*: 2 damaged lines are skipped\)'
  with pytest.raises(UserError, match=message):
    history.read_run(workdir)


def test_odd_names_of_metrics_are_left_out():
  row = train_row(2, 8.0) | {
    **{'sample/x': 'a', 'sample/-1': 'a', 'sample/' + '9' * 50: 'a'},
    **{'sample/0': ['a'], 'sample/\u0663': 'a', 'sample/1': 'text'},
    **{f'train{history.RATIO}{x}': 1.0 for x in ('', 'x', 'nan', '2', '0.5')},
    **{
      f'train{history.WINDOW_POSITION}{x}': 1.0
      for x in ('', '0', '-1', '1.5', '\u0663', '9' * 50, '4')
    },
  }
  run = history.Run('run', 'run', [row], {})
  assert history.samples(run) == {1: [(2, 'text')]}
  found = history.by_part(run, 'train', history.RATIO)
  assert found == (2, [(0.5, 1.0)])
  found = history.by_part(run, 'train', history.WINDOW_POSITION)
  assert found == (2, [(4, 1.0)])


# stage.json, plan.json and header.txt

GOOD = dict(id='a', title='A', note='', key='train/reward')


@pytest.mark.parametrize(
  'change, message',
  [
    ({'reduce': 'sum'}, "reduce='sum'"),
    ({'reduce': ['last']}, "reduce=\\['last'\\]"),
    ({'scale': '2'}, "scale='2'"),
    ({'scale': NAN}, 'scale=nan'),
    ({'scale': 10**400}, 'scale=1000'),
    ({'smooth': 1}, 'smooth=1'),
    ({'from_zero': None}, 'from_zero=None'),
    ({'title': 3}, 'title=3'),
    ({'key': ['a']}, "key=\\['a'\\]"),
    ({'id': 'goodput'}, "two panels have the id 'goodput'"),
    ({'id': 'a b'}, "id='a b'"),
    ({'id': '<b>'}, "id='<b>'"),
    ({'colour': 'red'}, 'colour'),
  ],
)
def test_panel_of_a_wrong_form_is_one_line(workdir, change, message):
  stage = {'name': 'toy', 'panels': ['training', GOOD | change]}
  (workdir / 'stage.json').write_text(json.dumps(stage))
  with pytest.raises(UserError, match=message) as error:
    stage_file.read_panels(workdir)
  assert '\n' not in str(error.value) and 'delete the file' in str(error.value)


def test_stage_does_not_write_what_cannot_be_read(workdir):
  before = (workdir / 'stage.json').read_text()
  curve = Curve(**GOOD)
  for panels in (
    (Curve(**GOOD | {'id': 'goodput'}),),
    (curve, Curve(**GOOD | {'title': 'B'})),
  ):
    with pytest.raises(UserError, match='two panels have the id'):
      stage_file.write(workdir, 'toy', panels)
  assert (workdir / 'stage.json').read_text() == before


@pytest.mark.parametrize(
  'text',
  [
    '[' * 100_000,
    '\x00',
    '{"panels": {"a": 1}}',
    '{"panels": [[]]}',
    '{"panels": [3]}',
    json.dumps({'panels': [GOOD, GOOD | {'title': 'B'}]}),
    json.dumps({'panels': ['training'] * 1000}),
    '"' + 'x' * (2 << 20) + '"',
  ],
)
def test_stage_file_of_a_wrong_form_is_one_line(workdir, text):
  (workdir / 'stage.json').write_text(text)
  with pytest.raises(UserError, match='cannot read the panels in') as error:
    stage_file.read_panels(workdir)
  assert len(str(error.value)) < 500 and '\n' not in str(error.value)


@pytest.mark.parametrize(
  'change',
  [{'step_s': '1'}, {'step_s': NAN}, {'chips': 1.5}, {'topology': None}],
)
def test_plan_with_a_wrong_value_is_one_line(workdir, change):
  (workdir / 'plan.json').write_text(json.dumps(made_runs.plan(**change)))
  with pytest.raises(UserError, match=f'is not a plan, since {[*change][0]}'):
    history.read_run(workdir)


@pytest.mark.parametrize(
  'header', ['total  many', 'total  \u0663', 'total  ,', 'total', 'total 1 2']
)
def test_header_without_a_number_of_parameters(workdir, header):
  (workdir / 'header.txt').write_text(header)
  (run,) = data_of([history.read_run(workdir)])['runs']
  assert run['header'] == header
  assert 'parameters' not in dict(run['facts'])


def test_large_header_is_left_out(workdir):
  os.truncate(workdir / 'header.txt', 1 << 40)
  run = history.read_run(workdir)
  assert run.header == '' and 'the header is left out' in run.warnings[0]


def test_texts_of_files_cannot_inject_html(workdir):
  evil = '</script><script>alert(1)</script>\u2028<img src=x onerror=alert(1)>'
  stage_file.write(
    workdir, 'toy', (Curve('a', evil, evil, 'train/reward'), 'training')
  )
  (workdir / 'header.txt').write_text(evil)
  with open(workdir / 'metrics.jsonl', 'a') as f:
    f.write(json.dumps({'step': 12, 'sample/0': evil}) + '\n')
    row = {'step': 12, f'eval/{evil}/loss_nats_per_token': 3.0}
    f.write(json.dumps(row) + '\n')
  run = history.read_run(workdir)
  text = report.page([run])
  assert 'alert(1)' in text and '<script>alert' not in text
  assert '<img src=x' not in text and '\u2028' not in text
  data = data_of([run])
  assert panel_of(data, 'a')['title'] == evil
  assert data['samples'][0]['texts'][0][-1][1] == evil
  assert data['runs'][0]['header'] == evil


# Diverged runs


def diverged(tmp_path, losses, evaluation=4.0, name='run'):
  """Returns a Run with these training losses, and metrics that follow them."""
  ratio = lambda x: [('0.1', x), ('0.9', x)]
  rows = [eval_row(0, 8.0, ratios=ratio(8.0))]
  for step, loss in enumerate(losses, 1):
    rows.append(train_row(step, loss, ratios=ratio(loss)))
  rows.append(eval_row(len(losses), evaluation, ratios=ratio(evaluation)))
  return history.read_run(made_runs.write(tmp_path / name, rows))


def test_page_of_a_run_with_only_nan_is_complete(tmp_path):
  data = data_of([diverged(tmp_path, [NAN] * 20, evaluation=NAN)])
  for name in ('training', 'grad_norm'):
    panel = panel_of(data, name)
    assert panel['figure']['data'] == [] and panel['range'] is None
    assert (
      panel['not_drawn'] == 'Not finite, so not drawn: 20 of 20 values of run.'
    )
  heldout = panel_of(data, 'heldout')
  assert heldout['figure']['data'][0]['y'] == [8.0]
  assert '1 of 2 values of run' in heldout['not_drawn']
  assert '2 of 2 values' in panel_of(data, 'by_ratio')['not_drawn']
  assert '40 of 40' in panel_of(data, 'training_by_ratio')['not_drawn']
  facts = dict(data['runs'][0]['facts'])
  assert facts['held-out, nats/token'] == 'not finite'
  assert facts['training, nats/token'] == 'not finite'
  assert panel_of(data, 'learning_rate')['not_drawn'] == ''


@pytest.mark.parametrize('bad', [NAN, INFINITY, None, 10**400, 'nan'])
def test_finite_values_of_a_run_with_some_nan_are_drawn(tmp_path, bad):
  losses = [3.0, bad, 3.0, bad, 3.0]
  rows = [train_row(i, 3.0) for i in range(1, 6)]
  for row, loss in zip(rows, losses, strict=True):
    row['train/loss_nats_per_token'] = loss
  run = history.read_run(made_runs.write(tmp_path / 'run', rows))
  data = data_of([run])
  panel = panel_of(data, 'training')
  assert panel['figure']['data'][0]['x'] == [1, 3, 5]
  assert panel['figure']['data'][0]['y'] == [3, 3, 3]
  assert '2 of 5 values' in panel['not_drawn']
  assert dict(data['runs'][0]['facts'])['training, nats/token'] == '3.000'


def test_sentence_names_the_runs_that_diverge(tmp_path):
  runs = [
    diverged(tmp_path, [3.0] * 4, name='good'),
    diverged(tmp_path, [3.0, NAN, NAN, NAN], name='<b>'),
  ]
  panel = panel_of(data_of(runs), 'training')
  assert panel['not_drawn'] == 'Not finite, so not drawn: 3 of 4 values of <b>.'


def test_spike_does_not_change_the_moving_average_after_it(tmp_path):
  losses = [3.0] * 20 + [1e38] + [3.0] * 29
  panel = panel_of(data_of([diverged(tmp_path, losses)]), 'training')
  bold = panel['figure']['data'][1]['y']
  assert bold[:18] == [3.0] * 18 and bold[23:] == [3.0] * 27


@pytest.mark.parametrize('extreme', [1e308, -1e308, 1e100, 1e-320, 0, -3])
def test_extreme_values_leave_the_page_strict(tmp_path, extreme):
  rows = [
    {key: extreme if key != 'step' else value for key, value in row.items()}
    for row in [train_row(1, 3.0), eval_row(1, 3.0), train_row(2, 3.0)]
  ]
  run = history.read_run(made_runs.write(tmp_path / 'run', rows))
  with np.errstate(over='raise', invalid='raise'):
    data_of([run])


def test_skipped_updates_without_finite_loss_are_listed(tmp_path):
  """The ledger has NaN, or null as strict JSON wants."""
  rows = [train_row(2, 8.0, skipped_updates=2)]
  good = [SKIPPED | {'loss_nats_per_token': x} for x in (NAN, None)]
  bad = [
    {'loss_nats_per_token': '3'},
    {'grad_norm': [1]},
    {'grad_norm': 10**400},
    {'loss_other': 3.0},
  ]
  bad = [SKIPPED | change for change in bad]
  bad.append({k: x for k, x in SKIPPED.items() if k != 'grad_norm'})
  run = history.read_run(
    made_runs.write(tmp_path / 'run', rows, LEDGER + good + bad)
  )
  (card,) = data_of([run])['runs']
  assert len(card['skipped']) == 3
  assert card['skipped'][1] == card['skipped'][2]
  assert 'loss nan nats/token, gradient norm 1e+04' in card['skipped'][2]
  assert curves.panels([run])
