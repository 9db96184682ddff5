"""The figures of plans are the same in every document.

The documents are the docstrings of configs/ (written from launch/plan.py), the
table of docs/speed.md, a sentence of README.md, and docs/from_laptop_to_pod.md,
which also computes costs.
"""

import functools
import pathlib
import re
import runpy

import jax
import pytest
from page_tables import number, percent, table

from maskdiff.model import transformer
from maskdiff.planner import calibration
from maskdiff.training import step as step_lib
from maskdiff.training import train_state
from maskdiff.training.optimizer import OptimizerConfig, make_optimizer

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / 'docs' / 'from_laptop_to_pod.md').read_text()
README = (ROOT / 'README.md').read_text()
SPEED = (ROOT / 'docs' / 'speed.md').read_text()
TOPOLOGY = r'(?:v\w+|tpu7x):[\dx]+'
SAID = re.compile(
  rf'(?:(?P<machine>[\w-]+), )?(?P<topology>{TOPOLOGY}): '
  r'(?P<hbm>[\d.]+) of (?P<room>[\d.]+) GiB per chip'
  r', (?P<step>[\d.]+) s per step, (?P<speed>[\d,]+) tokens/s'
  r', MFU (?P<mfu>\d+)%;'
  r' [\d.]+ \w+ and (?P<hours>[\d,.]+) chip-hours'
)
# The plan behind each column of the page.
PLANNED = {
  '150m.py': ('v5e-1', 'v5e:1x1'),
  '1b.py': ('v5e-8', 'v5e:2x4'),
  '8b.py': ('v5p-128', 'v5p:4x4x4'),
}


def rounded(value, like):
  """Formats a value with the decimals and the unit of a given figure."""
  units = {'M': 1e6, 'B': 1e9, 'T': 1e12}
  unit = like[-1] if like[-1] in units else ''
  decimals = len(like.removesuffix(unit).partition('.')[2])
  return f'{value / units.get(unit, 1):,.{decimals}f}{unit}'


def plans_of(text):
  """{(config, machine, topology): figures} of a table of plans.

  Figures are as in `said`. The machine of a config without one is None.
  """
  found = {}
  for config, where, _, hbm, step, speed, mfu, total, _ in table(
    text, '`configs/`'
  )[1:]:
    topology = re.search(TOPOLOGY, where)[0]
    file, _, machine = config.split()[0].partition(':')
    found[file, machine or None, topology] = {
      **dict(zip(('hbm', 'room'), hbm.split(' of '), strict=True)),
      **dict(step=step, speed=speed, mfu=f'{percent(mfu):.0f}'),
      'hours': total.split(', ', 1)[1],
    }
  return found


def said(config):
  """{(machine, topology): figures} of a config's docstring.

  The first machine of a file is its default.
  """
  doc = runpy.run_path(str(ROOT / 'configs' / config))['__doc__']
  return {
    (found.pop('machine'), found.pop('topology')): found
    for found in (m.groupdict() for m in SAID.finditer(' '.join(doc.split())))
  }


def columns():
  """{config: {row: cell}} of the page's table of steps."""
  (_, *heads), *rows = table(PAGE, '| laptop')
  names = next(cells for name, *cells in rows if name == '`configs/`')
  assert len(heads) == len(names) == 4
  return {
    name: {row[0]: row[i + 1] for row in rows} for i, name in enumerate(names)
  }


def config_of(name, *machine):
  return runpy.run_path(str(ROOT / 'configs' / name))['get_config'](*machine)


def params_of(name):
  return transformer.num_params(step_lib.step_config(config_of(name)).model)[0]


def state_bytes(name):
  config = config_of(name)
  model = step_lib.step_config(config).model
  optimizer = make_optimizer(
    OptimizerConfig(**config.optimizer),
    config.train.steps,
    transformer.axes(model),
  )
  init = functools.partial(train_state.init, model, optimizer)
  state = jax.eval_shape(init, jax.random.key(0))
  arrays = jax.tree.leaves((state.params, state.opt_state))
  return sum(x.size * x.dtype.itemsize for x in arrays)


def test_the_table_of_plans_equals_the_docstrings():
  plans = plans_of(SPEED)
  assert len(plans) == len(table(SPEED, '`configs/`')[1:]) >= 18
  for (config, machine, topology), figures in plans.items():
    shown = said(config)
    default = next(iter(shown))[0]
    found = shown[machine or default, topology]
    assert found == figures, (config, machine, topology)


def test_the_readme_has_the_plan_of_8b():
  plan = next(row for row in table(SPEED, '`configs/`') if row[0] == '8b.py')
  _, _, rows, hbm, step, speed, mfu, *_ = plan
  text = ' '.join(README.split())
  assert f'{step} s per step of {rows} x 4,096 tokens' in text
  assert f'{speed} tokens/s, at {mfu} utilization' in text
  assert f'{hbm} GiB per chip' in text


@pytest.mark.parametrize(
  'page, first',
  [
    ('speed.md', '`configs/`'),
    ('speed.md', 'chips'),
    ('fine_tuning.md', '`configs/sft_8b.py:`'),
  ],
)
def test_every_utilization_of_a_plan_has_its_range(page, first):
  head, *rows = table((ROOT / 'docs' / page).read_text(), first)
  where = next(i for i, name in enumerate(head) if name.endswith('chips'))
  assert rows
  for row in rows:
    cell = row[head.index('MFU')]
    chips = int(re.search(r'(?:^|, )(\d+)(?! x)\b', row[where])[1])
    shown = percent(cell) / 100
    # The range of a plan follows from the utilization before it is rounded.
    assert cell in {
      calibration.cell({'mfu': shown, 'mfu_low': low, 'mfu_high': high})
      for low, high in (
        calibration.band(shown + rest, chips) for rest in (-5e-4, 0, 5e-4)
      )
    }


def test_the_page_has_the_calibration():
  head, *rows = table(SPEED, 'program')
  for row, m in zip(rows, calibration.MEASURED, strict=True):
    assert row == [
      m.program,
      f'{m.chip}, {m.chips}',
      f'{m.tokens:,}',
      f'{m.predicted_s:.3f}',
      f'{m.measured_s:g}',
      f'{m.predicted_s / m.measured_s:.2f}',
      f'{m.mfu:.1%}',
    ]
  text = ' '.join(SPEED.split())
  worst = max(m.predicted_s / m.measured_s for m in calibration.MEASURED)
  assert f'as the worst of the table, by a factor of {worst:.2f}' in text
  low = calibration.PLANNED_S / calibration.BEST_MEASURED_S
  assert f'2.06 / 2.5 = {low:.2f} of the estimate' in text
  assert f'a factor of {calibration.share_left(512):.3f} per doubling' in text


@pytest.mark.parametrize('config', PLANNED)
def test_page_has_the_figures_of_the_plans(config):
  column, plan = columns()[config], said(config)[PLANNED[config]]
  assert column['memory per chip, GiB'] == f'{plan["hbm"]} of {plan["room"]}'
  assert column['step, s'] == plan['step']
  assert column['tokens/s'] == plan['speed']
  assert f'{percent(column["MFU"]):.0f}' == plan['mfu']
  assert column['chip-hours for all tokens'] == plan['hours']
  chips = 1
  for side in PLANNED[config][1].partition(':')[2].split('x'):
    chips *= int(side)
  assert int(column['chips'].split()[0]) == chips


@pytest.mark.parametrize('config', ['tiny.py', *PLANNED])
def test_page_has_the_sizes_of_the_configs(config):
  c, column = config_of(config), columns()[config]
  parameters, tokens = column['parameters'], column['tokens in all']
  assert parameters == rounded(params_of(config), parameters)
  rows = f'{c.train.batch:,} x {c.data.length:,}'
  assert column['rows x tokens per step'] == rows
  read = c.train.steps * c.train.batch * c.data.length
  assert tokens == rounded(read, tokens)


def test_days_and_chip_hours_follow_from_the_plans():
  head, *rows = table(PAGE, 'LLaDA')
  assert len(rows) == 5
  for size, tokens, steps, days, hours, *_ in rows:
    config = f'{size.lower()}.py'
    c, plan = config_of(config), said(config)[PLANNED[config]]
    steps, chips = number(steps), int(columns()[config]['chips'].split()[0])
    of_all = number(plan['hours']) * steps / c.train.steps
    assert hours == rounded(of_all, hours)
    assert days == rounded(of_all / chips / 24, days)
    read = steps * c.train.batch * c.data.length
    # The paper truncates the number of tokens.
    assert number(tokens[:-1]) == pytest.approx(read / 1e9, abs=0.01)


def test_sizes_of_checkpoints_and_rows_and_compile_times_are_right():
  """A checkpoint holds parameters and moments. Rows: 4 bytes per token."""
  sizes = re.findall(r'([\d.]+) GB\b', PAGE)
  for size, config in zip(sizes, PLANNED, strict=True):
    assert size == rounded(1e-9 * state_bytes(config), size)
  tokens = (461.37e9, 37.75e9, 2.3e12)
  for size, n in zip(re.findall(r'([\d.]+) TB\b', PAGE), tokens, strict=True):
    assert size == rounded(4e-12 * n, size)
  times = {row[0]: row[-1] for row in table(SPEED, '`configs/`')[1:]}
  text = ' '.join(PAGE.split())
  assert f'took {times["1b.py"]} (1B) and {times["8b.py"]} (8B)' in text


def test_page_describes_the_changes_of_the_configs():
  chips = {c: int(columns()[c]['chips'].split()[0]) for c in PLANNED}
  text = ' '.join(PAGE.split())
  for config, rows, words in (
    ('1b.py', 2, 'cut into {parts} parts of two rows per chip'),
    ('8b.py', 4, 'Four rows per chip are computed at once, in {parts} parts'),
  ):
    c = config_of(config)
    assert words.format(parts=c.train.microbatches) in text
    assert c.train.batch == rows * chips[config] * c.train.microbatches
    assert f"`config.model.remat='{c.model.remat}'`" in text
    assert c.mesh.fsdp == -1


def test_tiny_run_has_the_same_figures_as_in_the_readme():
  text = ' '.join(README.split())
  bound, bits, entropy = re.search(
    r'([\d.]+) nats per token \(([\d.]+) bits per byte\).*?against ([\d.]+)',
    ' '.join(PAGE.split()),
  ).groups()
  assert f'is {bound} nats per token ({bits} bits per byte)' in text
  assert f'against {entropy}' in text
