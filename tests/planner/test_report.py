"""Tables, advice and the picture of a plan, from a plan made up."""

import re
import sys

import pytest

from maskdiff import config
from maskdiff.errors import UserError
from maskdiff.planner import hlo_cost, plan, report


def a_plan(**values):
  """A train plan that compiled."""
  return dict.fromkeys(plan.FIELDS) | {
    'mode': 'train',
    'status': 'fits',
    'fits': True,
    'topology': 'v5p:4x4x4',
    'num_slices': 2,
    'chip': 'v5p',
    'chips': 128,
    'mesh': 'replica=2,fsdp=64,sequence=1,tensor=1',
    'parameters': 8_015_581_184,
    'length': 4096,
    'batch': 1280,
    'microbatches': 5,
    'rows_per_chip': 2.0,
    'remat': 'minimal',
    'compile_s': 60.0,
    'hbm_arguments_gib': 1.4,
    'hbm_temporaries_gib': 65.0,
    'hbm_total_gib': 66.4,
    'hbm_evaluation_gib': 3.25,
    'hbm_capacity_gib': 95.74,
    'host_gib': 3.5,
    'levers': [],
    'step_s': 2.0,
    'cycles_s': 1.5,
    'attention_s': 0.3,
    'exposed_ici_s': 0.15,
    'exposed_dcn_s': 0.05,
    'exposed_host_s': 0.0,
    'exposed_prefetch_s': 0.0,
    'cycles': 1.5 * 1.75e9,
    'tokens_per_s': 1e6,
    'tokens_per_s_per_chip': 1e6 / 128,
    'model_tflop_per_chip': 100.0,
    'mfu': 0.55,
    'total_tokens': 10**12,
    'days': 11.57,
    'chip_hours': 35_556.0,
    'loss_chunks': 8,
    'collectives': [
      {
        'kind': 'all-gather',
        'axes': 'fsdp',
        'network': 'ici',
        'dtype': 'bf16',
        'count': 450.0,
        'sync_count': 66.0,
        'gb': 29.5,
        'seconds': 0.12,
      }
    ],
    'operations': [
      {
        'part': 'mlp gate/up forward',
        'seconds': 0.6,
        'share': 0.3,
        'count': 64.0,
        'op_name': 'jit(f)/bld,df->blf/dot_general',
      }
    ],
    'warnings': [],
    **values,
  }


def test_the_table_has_every_headline_number():
  text = report.format_table(a_plan(warnings=['something is left out']))
  for expected in (
    '2 x v5p:4x4x4, 128 chips',
    '8,015,581,184',
    '65.00 GiB temporaries; 3.50 GiB of the host',
    '66.40 GiB of 95.74 GiB at the worst moment: FITS',
    '3.25 GiB of 95.74 GiB in an evaluation: FITS',
    '2.0000 s estimated = 1.5000 compiled + 0.3000 attention kernels '
    '+ 0.1500 collectives + 0.0500 collectives between slices',
    '1,000,000 tokens/s, 7,812 per chip, MFU 55.0%',
    '1,000,000,000,000 tokens',
    '11.6 days, 35,556 chip-hours',
    '66 of 450',
    'mlp gate/up forward',
    'warning: something is left out',
  ):
    assert expected in text
  assert 'host copies' not in text


def test_the_table_of_a_plan_that_does_not_fit():
  text = report.format_table(
    a_plan(
      status='does not fit',
      fits=False,
      hbm_total_gib=101.2,
      hbm_evaluation_gib=None,
      hbm_arguments_gib=None,
      step_s=None,
      collectives=[],
      operations=[],
      levers=['one', 'two'],
    )
  )
  assert '101.20 GiB of 95.74 GiB at the worst moment: DOES NOT FIT' in text
  assert 'to make it fit  one' in text
  assert 'days' not in text
  assert 'evaluation' not in text


def test_the_table_says_which_of_step_and_evaluation_does_not_fit():
  p = a_plan(
    status='does not fit',
    fits=False,
    hbm_evaluation_gib=99.0,
    levers=['--config.eval.batch=8'],
  )
  text = report.format_table(p)
  assert '66.40 GiB of 95.74 GiB at the worst moment: FITS' in text
  assert '99.00 GiB of 95.74 GiB in an evaluation: DOES NOT FIT' in text
  assert re.search('to make it fit +--config.eval.batch=8', text)
  text = report.format_table(p | {'hbm_evaluation_gib': None})
  assert 'more than there is of 95.74 GiB in an evaluation: DOES' in text
  problem = 'evaluation does not fit, lower config.eval.batch'
  assert report.sweep_line(p).endswith(f'{problem}, 99.00 GiB')
  assert report.format_sweep([p]).endswith(problem)


def test_the_table_of_a_plan_that_does_not_compile():
  text = report.format_table(
    a_plan(
      status='does not compile',
      error='the reason',
      hbm_arguments_gib=None,
      hbm_total_gib=None,
      step_s=None,
      collectives=[],
      operations=[],
    )
  )
  assert 'DOES NOT COMPILE  the reason' in text
  assert 'GiB' not in text


def test_a_sweep_is_a_line_each():
  lines = report.format_sweep(
    [
      a_plan(),
      a_plan(
        status='does not fit',
        tokens_per_s_per_chip=None,
        mfu=None,
        step_s=None,
      ),
      a_plan(
        status='does not compile',
        error='why',
        tokens_per_s_per_chip=None,
        mfu=None,
        hbm_total_gib=None,
        microbatches=None,
      ),
    ]
  ).splitlines()
  assert len(lines) == 4
  assert lines[1].split()[:3] == ['7,812', '55.0%', '66.40']
  assert lines[2].endswith('does not fit')
  assert lines[3].endswith('why')


def evaluation_levers(**values):
  c = config.default()
  c.update_from_flattened_dict(values)
  sizes = {'replica': 1, 'fsdp': 8, 'sequence': 1, 'tensor': 1}
  return report.evaluation_levers(c, {'num_slices': 1}, sizes)


@pytest.mark.parametrize(
  'batch, batches, lever',
  [
    (32, 8, '--config.eval.batch=16 --config.eval.batches=16: 2 rows'),
    (40, 8, '--config.eval.batch=16 --config.eval.batches=20: 2 rows'),
    (24, 3, '--config.eval.batch=8 --config.eval.batches=9: 1 rows'),
  ],
)
def test_an_evaluation_may_have_smaller_batches_that_the_chips_divide(
  batch, batches, lever
):
  first, *rest = evaluation_levers(
    **{'eval.batch': batch, 'eval.batches': batches}
  )
  assert first.startswith(lever)
  assert not any('eval.batch' in r or 'remat' in r for r in rest)


def test_a_batch_of_a_row_a_chip_is_the_smallest():
  assert not any(
    'eval.batch' in lever for lever in evaluation_levers(**{'eval.batch': 8})
  )


def levers(sizes=None, rows=4.0, slices=1, **values):
  c = config.default()
  c.update_from_flattened_dict(values)
  sizes = {'replica': 1, 'fsdp': 8, 'sequence': 1, 'tensor': 1} | (sizes or {})
  facts = {'rows_per_chip': rows, 'num_slices': slices}
  return ' | '.join(report.levers(c, facts, sizes))


def test_levers_name_keys_with_values_that_would_do():
  found = levers(
    **{
      'model.remat': 'minimal',
      'model.vocab_size': 128_000,
      'objective.loss_chunk_tokens': 1024,
    }
  )
  # 32 rows on 8 chips: 4 at once; two microbatches leave 2.
  assert '--config.train.microbatches=2: 2 rows per chip' in found
  assert 'full: keep less of each layer' in found
  assert '--config.objective.loss_chunk_tokens=512: logits of 0.24' in found
  assert '--config.mesh.tensor=2' in found
  assert 'replica' not in found


def test_levers_that_would_not_help_are_left_out():
  found = levers({'fsdp': 1, 'replica': 8}, rows=1.0)
  assert 'microbatches' not in found
  assert 'remat' not in found  # it is full
  assert 'loss_chunk_tokens' not in found  # the vocabulary is small
  assert 'tensor' not in found
  assert '--config.mesh.replica=1' in found


def test_costs_add_up_operations_of_a_part():
  cost = hlo_cost.Cost(total_s=4.0, cycles=10.0, unresolved=['jit(f)/while'])
  cost.unpriced['mine'] += 2
  for name, seconds in (('a', 1.0), ('b', 0.5)):
    key = f'jit(f)/{name}/bld,df->blf/dot_general', ()
    cost.operations[key] = hlo_cost.Operation(*key, seconds, 3.0)
  cost.exposed_s['host_in'] = 0.25
  found = report.costs(cost)
  assert found['exposed_host_s'] == 0.25
  assert found['operations'] == [
    {
      'part': 'mlp gate/up forward',
      'seconds': 1.5,
      'count': 6.0,
      'op_name': 'jit(f)/a/bld,df->blf/dot_general',
      'share': 0.375,
    }
  ]
  assert found['warnings'] == [
    'the loop jit(f)/while depends on data and is counted once',
    'no estimate, and left out of the time: mine x2',
  ]
  assert found.keys() <= plan.FIELDS.keys()


def test_the_picture_is_written(tmp_path):
  pytest.importorskip('matplotlib')
  report.plot(a_plan(), str(tmp_path / 'plan.png'))
  assert (tmp_path / 'plan.png').read_bytes().startswith(b'\x89PNG')


def test_a_picture_that_cannot_be_written(tmp_path):
  pytest.importorskip('matplotlib')
  with pytest.raises(UserError, match='cannot write'):
    report.plot(a_plan(), str(tmp_path / 'no' / 'plan.png'))
  with pytest.raises(UserError, match='no time to draw'):
    report.plot(a_plan(step_s=None), str(tmp_path / 'plan.png'))


def test_without_matplotlib_the_fix_is_named(monkeypatch):
  for name in ('matplotlib', 'matplotlib.backend_bases'):
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(UserError, match='pip install matplotlib'):
    report.plot(a_plan(), 'plan.png')


def test_a_picture_in_a_format_that_is_unknown():
  pytest.importorskip('matplotlib')
  with pytest.raises(UserError, match=r'plan\.doc.*png'):
    report.check_plot('plan.doc')
