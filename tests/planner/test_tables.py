"""Tables of plans."""

import re

from made_plan import made_plan

from maskdiff.planner import tables


def test_table_has_every_headline_number():
  text = tables.format_table(made_plan(warnings=['a cost is left out']))
  for expected in (
    '2 x v5p:4x4x4, 128 chips',
    '8,015,581,184',
    '65.00 GiB temporaries; 3.50 GiB of host memory',
    '66.40 GiB of 95.74 GiB at the peak: FITS',
    '3.25 GiB of 95.74 GiB in an evaluation: FITS',
    '2.0000 s estimated = 1.5000 compiled + 0.3000 attention kernels '
    '+ 0.0100 gathers and scatters + 0.1400 collectives '
    '+ 0.0500 collectives between slices',
    '1.9000 s if kernels take 0.2000 s, by the width of the MXU (MFU 57.9%)',
    '1,000,000 tokens/s, 7,812 per chip, MFU 55.0% (45% to 58%), 53.0% without '
    'the logits that the loss skips',
    '1,000,000,000,000 tokens',
    '11.6 days, 35,556 chip-hours',
    '66 of 450',
    'mlp gate/up forward',
    'warning: a cost is left out',
  ):
    assert expected in text
  assert 'host copies' not in text


def test_table_of_chips_with_two_devices():
  text = tables.format_table(made_plan(devices=256))
  assert '2 x v5p:4x4x4, 128 chips with 256 devices' in text
  assert 'HBM per device' in text
  assert 'a device computes 2 at once' in text


def test_table_of_a_plan_that_does_not_fit():
  text = tables.format_table(
    made_plan(
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
  assert '101.20 GiB of 95.74 GiB at the peak: DOES NOT FIT' in text
  assert 'to make it fit  one' in text
  assert 'days' not in text
  assert 'evaluation' not in text


def test_table_names_the_program_that_does_not_fit():
  p = made_plan(
    status='does not fit',
    fits=False,
    hbm_evaluation_gib=99.0,
    levers=['--config.eval.batch=8'],
  )
  text = tables.format_table(p)
  assert '66.40 GiB of 95.74 GiB at the peak: FITS' in text
  assert '99.00 GiB of 95.74 GiB in an evaluation: DOES NOT FIT' in text
  assert re.search('to make it fit +--config.eval.batch=8', text)
  text = tables.format_table(p | {'hbm_evaluation_gib': None})
  assert 'more than the capacity of 95.74 GiB in an evaluation: DOES' in text
  problem = 'evaluation does not fit, lower config.eval.batch'
  assert tables.sweep_line(p).endswith(f'{problem}, 99.00 GiB')
  assert tables.format_sweep([p]).endswith(problem)


def test_table_of_a_plan_that_does_not_compile():
  text = tables.format_table(
    made_plan(
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


def test_sweep_prints_one_line_per_plan():
  lines = tables.format_sweep(
    [
      made_plan(),
      made_plan(
        status='does not fit',
        tokens_per_s_per_chip=None,
        mfu=None,
        step_s=None,
      ),
      made_plan(
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
  assert lines[1].split()[:5] == ['7,812', '55.0%', '(45%', 'to', '58%)']
  assert lines[2].endswith('does not fit')
  assert lines[3].endswith('why')
