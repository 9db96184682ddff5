"""Values in the figures of the report."""

import made_runs
import numpy as np
import pytest
from made_runs import eval_row, train_row

from maskdiff.monitoring import curves, history, traces

RATIOS = [('0.1', 5.0), ('0.5', 6.0), ('0.9', 7.0)]
CAUSAL = {'objective.name': 'autoregressive'}


def make(rows, name='run', config=None, **more):
  return history.Run(name, name, rows, config or {}, **more)


def panel(id, *runs):
  (found,) = [p for p in curves.panels(runs) if p.id == id]
  return found


def ids(*runs):
  return [p.id for p in curves.panels(runs)]


def xy(trace):
  return list(zip(trace.x, trace.y, strict=True))


def test_heldout_bound_has_error_bars_and_both_units():
  a = make([eval_row(0, 9.0, 0.3), train_row(8, 8.0), eval_row(8, 7.0, 0.2)])
  (trace,) = panel('heldout', a).figure.data
  assert xy(trace) == [(0, 9.0), (8, 7.0)]
  assert list(trace.error_y.array) == [0.3, 0.2]
  assert trace.meta['bits'] == 0.5 and trace.meta['run'] == 0
  assert trace.meta['tokens'] == [0, 8 * 128]


def test_run_with_a_single_row_is_drawn():
  found = panel('heldout', make([eval_row(0, 9.0)]))
  (trace,) = found.figure.data
  assert xy(trace) == [(0, 9.0)] and trace.mode == 'markers'
  assert found.range[0] < 8.9 and found.range[1] > 9.1
  assert ids(make([eval_row(0, 9.0)])) == ['heldout']


def test_runs_have_the_same_style_in_all_panels():
  rows = [eval_row(0, 9.0), train_row(4, 8.0), train_row(8, 7.0)]
  ledger = dict(wall_s=1.0, seconds=dict.fromkeys(traces.TIMES, 0.1))
  runs = [make(rows, f'run{i}', goodput=ledger) for i in range(10)]
  styles = {}
  for found in curves.panels(runs):
    if found.id != 'goodput':
      for trace in found.figure.data:
        style = (trace.line.color, trace.line.dash)
        styles.setdefault(trace.meta['run'], set()).add(style)
  assert [len(s) for s in styles.values()] == [1] * 10
  assert len(set.union(*styles.values())) == 10


def test_training_loss_is_faint_and_its_average_bold():
  losses = 5 + np.random.default_rng(0).normal(size=100)
  rows = [train_row(i + 1, float(x)) for i, x in enumerate(losses)]
  faint, bold = panel('training', make(rows)).figure.data
  assert np.allclose(faint.y, losses, rtol=1e-5)
  assert faint.opacity < 1 and bold.opacity is None
  assert np.std(bold.y) < 0.6 * np.std(faint.y)
  assert np.allclose(bold.y[50], losses[48:53].mean(), rtol=1e-5)


def test_first_steps_and_spikes_do_not_set_the_range():
  losses = [40.0, 20.0, *np.linspace(4, 3, 98)]
  rows = [train_row(i + 1, float(x)) for i, x in enumerate(losses)]
  rows[60]['train/step_s'] = 100.0
  found = panel('training', make([eval_row(0, 9.0), *rows]))
  assert found.range[0] == pytest.approx(2.9, abs=0.2)
  assert found.range[1] < 8
  assert found.range_bits == pytest.approx(np.array(found.range) / 2)
  assert panel('step_s', make(rows)).range[1] < 1
  # With few evaluations each of them counts.
  assert (
    panel('heldout', make([eval_row(0, 9.0), eval_row(9, 5.0)])).range[1] > 9
  )


def test_bits_need_an_evaluation():
  found = panel('training', make([train_row(4, 8.0), train_row(8, 7.0)]))
  assert found.range_bits is None
  assert found.figure.data[0].meta['bits'] is None


def test_datasets_of_a_mixture_are_choices():
  row = eval_row(2, 8.0) | eval_row(2, 6.0, dataset='data/web', ratios=RATIOS)
  row |= eval_row(2, 9.0, dataset='code', ratios=RATIOS)
  heldout = panel('heldout', make([row]))
  assert heldout.choices == ['all', 'code', 'data/web']
  drawn = {t.meta['choice']: t.y[0] for t in heldout.figure.data}
  assert drawn == {'all': 8.0, 'code': 9.0, 'data/web': 6.0}
  by_ratio = panel('by_ratio', make([row]))
  assert by_ratio.choices == ['code', 'data/web']
  assert xy(by_ratio.figure.data[0]) == [(0.1, 5.0), (0.5, 6.0), (0.9, 7.0)]


def test_mask_ratios_are_lines_for_one_run_and_choices_for_several():
  rows = [train_row(n, 6.0, ratios=RATIOS) for n in (2, 4)]
  single = panel('training_by_ratio', make(rows))
  assert single.choices == []
  names = [trace.name for trace in single.figure.data]
  assert names == ['ratio 0.1', 'ratio 0.5', 'ratio 0.9']
  assert [trace.y[-1] for trace in single.figure.data] == [5.0, 6.0, 7.0]
  both = panel('training_by_ratio', make(rows, 'a'), make(rows, 'b'))
  assert both.choices == ['0.1', '0.5', '0.9']
  assert len(both.figure.data) == 6


def test_autoregressive_runs_have_no_mask_ratio():
  rows = [
    eval_row(0, 9.0, ratios=[('0.1', 9.0)]),
    train_row(2, 6.0, ratios=[('0.1', 6.0)]),
  ]
  causal = make(rows, 'causal', CAUSAL)
  assert not {'by_ratio', 'training_by_ratio'} & set(ids(causal))
  masked = make([eval_row(0, 9.0, ratios=RATIOS)], 'masked')
  found = panel('by_ratio', masked, causal)
  assert len(found.figure.data) == 1
  assert 'no mask ratio' in found.note
  assert len(panel('heldout', masked, causal).figure.data) == 2


def test_losses_by_position_in_a_window():
  losses = {n: 5.0 + n / 10 for n in (*range(1, 9), 16, 32)}
  at = lambda where: {
    f'{where}{history.WINDOW_POSITION}{n}': x for n, x in losses.items()
  }
  rows = [eval_row(0, 9.0), train_row(2, 6.0) | at('train')]
  rows.append(eval_row(2, 8.0) | at('eval'))
  windows = make(rows, 'windows', {'objective.name': 'sdlm'})
  (trace,) = panel('by_window_position', windows).figure.data
  assert xy(trace) == list(losses.items())
  traces = panel('training_by_window_position', windows).figure.data
  assert [trace.name for trace in traces[::9]] == ['position 1', 'position 32']
  assert [trace.y[0] for trace in traces] == list(losses.values())
  assert len({(t.line.color, t.line.dash) for t in traces}) == len(losses)
  both = panel('training_by_window_position', windows, make(rows, 'b'))
  assert both.choices == [str(n) for n in losses]
  without = make([eval_row(0, 9.0), train_row(2, 6.0)])
  assert not any('window' in id for id in ids(without))


def test_plain_metrics_are_drawn_unchanged():
  rows = [train_row(n, 6.0, mfu=0.25) for n in (2, 4)]
  for id, value in (
    ('learning_rate', 1e-3),
    ('grad_norm', 12.0),
    ('tokens_per_s', 256.0),
    ('mfu', 25.0),
    ('step_s', 0.5),
  ):
    found = panel(id, make(rows))
    assert xy(found.figure.data[-1]) == [(2, value), (4, value)]
    assert found.range[0] == 0 and found.range[1] > value
  assert 'mfu' not in ids(make([train_row(2, 6.0)]))


def test_skipped_updates_are_cumulative():
  rows = [train_row(n, 6.0) for n in (2, 4, 6)]
  assert 'skipped' not in ids(make(rows))
  for row, number in zip(rows, (1, 0, 2), strict=True):
    row['train/skipped_updates'] = number
  (trace,) = panel('skipped', make(rows)).figure.data
  assert xy(trace) == [(2, 1), (4, 1), (6, 3)]


def test_planned_step_time_is_drawn_with_the_measured_one():
  rows = [train_row(n, 6.0) for n in (2, 4)]
  found = panel('step_s', make(rows, plan=made_runs.plan(step_s=0.8)))
  measured, planned = found.figure.data
  assert xy(measured) == [(2, 0.5), (4, 0.5)]
  assert xy(planned) == [(0, 0.8), (4, 0.8)]
  assert measured.line.color == planned.line.color
  assert found.range[1] > 0.8


def test_goodput_bars_are_shares_of_wall_time():
  seconds = dict.fromkeys(traces.TIMES, 0.0) | {'step': 6.0, 'down': 2.0}
  a = make([eval_row(0, 9.0)], 'a', goodput=dict(wall_s=8.0, seconds=seconds))
  more = seconds | {'eval': 8.0}
  b = make([eval_row(0, 9.0)], 'b', goodput=dict(wall_s=16.0, seconds=more))
  none = make([eval_row(0, 9.0)], 'none')
  found = panel('goodput', a, none, b)
  bars = {trace.name: list(trace.x) for trace in found.figure.data}
  assert bars == {'step': [75, 37.5], 'eval': [0, 50], 'down': [25, 12.5]}
  assert list(found.figure.layout.yaxis.ticktext) == ['a', 'b']


def test_long_runs_are_thinned_and_names_escaped():
  rows = [train_row(n, 6.0) for n in range(1, 4001)]
  for trace in panel('training', make(rows, '<b>&')).figure.data:
    assert len(trace.x) == len(trace.y) == len(trace.meta['tokens']) == 1000
    assert trace.name == '&lt;b&gt;&amp;'
