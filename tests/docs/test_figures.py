"""The figures of plans are the same in every document.

The documents are the docstrings of configs/ (written from launch/plan.py), the
table of docs/speed.md, a sentence of README.md, and docs/from_laptop_to_pod.md,
which also computes costs.
"""

import copy
import functools
import math
import pathlib
import re
import runpy

import jax
import page_tables
import pytest

from maskdiff.distributed import chips as chips_lib
from maskdiff.model import transformer
from maskdiff.planner import calibration
from maskdiff.planner import plan as plan_lib
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


def number(text):
  return float(text.replace(',', ''))


def percent(cell):
  """Returns the number of a cell such as '76.0% (63% to 80%)'."""
  return number(cell.partition('%')[0])


def rounded(value, like):
  """Formats a value with the decimals and the unit of a given figure."""
  units = {'M': 1e6, 'B': 1e9, 'T': 1e12}
  unit = like[-1] if like[-1] in units else ''
  decimals = len(like.removesuffix(unit).partition('.')[2])
  return f'{value / units.get(unit, 1):,.{decimals}f}{unit}'


def table(text, first):
  """Returns the rows of the table whose first head cell is `first`."""
  lines = text[text.index(f'\n| {first} |') + 1 :].splitlines()
  rows = []
  for line in lines:
    if not line.startswith('|'):
      break
    rows.append(page_tables.cells(line))
  return [rows[0], *rows[2:]]


def every_row(first):
  """Parametrizes a test by the rows of a table of docs/speed.md."""
  rows = table(SPEED, first)[1:]
  return pytest.mark.parametrize('row', rows, ids=lambda row: row[0])


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


def config_on_its_chips(cell):
  """Returns config, row of the table of plans, Chip and number of devices."""
  name, _, machine = cell.partition(':')
  get_config = runpy.run_path(str(ROOT / 'configs' / name))['get_config']
  config = get_config(machine) if machine else get_config()
  plans = table(SPEED, '`configs/`')[1:]
  plan = next(row for row in plans if row[0].split()[0] == cell)
  chip, shape = chips_lib.parse_topology(re.search(TOPOLOGY, plan[1])[0])
  return config, plan, chip, math.prod(shape) * chip.devices


def kernel_times(c, chip, devices=1):
  """Returns the times of the kernels of a step at half of the peak, and by MXU.

  The rows have no masked pairs. There are two products forward and five
  backward.

  Returns:
    Two floats in seconds.
  """
  m = c.model
  width = -(-m.head_dim // 128) * 128
  pairs = c.train.batch / devices * c.data.length**2
  product = 2 * pairs * m.layers * m.heads * width / chip.peak_flops
  forward, backward = (2 if m.remat != 'full' else 4) * product, 5 * product
  by_unit = (forward / 0.66 + backward / 0.73) / min(1, width / chip.mxu_width)
  return 2 * (forward + backward), by_unit


@every_row('`configs/` | kernels at half of the peak, s')
def test_attention_by_the_matrix_unit_follows_from_the_configs(row):
  c, plan, chip, count = config_on_its_chips(row[0])
  half, by_unit = kernel_times(c, chip, count)
  assert row[1:3] == [f'{half:.3f}', f'{by_unit:.3f}']
  change = (by_unit - half) / number(plan[4])
  assert row[3] == f'{change:+.1%}'


def sizes_of_mesh(devices, slices=1, sequence=1):
  sizes = {'replica': slices, 'fsdp': devices // sequence}
  return {**sizes, 'sequence': sequence, 'tensor': 1}


def ceilings(c, chip):
  """Returns the utilizations if products of weights run at the peak.

  Kernels are priced at half of the peak in the first and by MXU in the second.
  """
  c = copy.deepcopy(c)
  c.model.remat = 'none'
  m, tokens = c.model, c.train.batch * c.data.length
  _, inner = transformer.num_params(step_lib.step_config(c).model)
  head = m.vocab_size * m.embed
  pairs = m.layers * c.data.length * m.heads * m.head_dim
  products = 6 * (inner + head / 2) * tokens / chip.peak_flops
  done = (6 * (inner + head) + 12 * pairs) * tokens / chip.peak_flops
  return [done / (products + kernels) for kernels in kernel_times(c, chip)]


@every_row('`configs/` | ceiling')
def test_ceilings_follow_from_the_configs(row):
  c, plan, chip, count = config_on_its_chips(row[0])
  half, by_unit = kernel_times(c, chip, count)
  seconds = c.train.batch * c.data.length / number(plan[5])
  mfu = percent(plan[6]) / 100
  planned = mfu, mfu * seconds / (seconds - half + by_unit)
  cells = [
    (f'{most:.1%}', f'{share:.1%}', f'{share / most:.2f}')
    for most, share in zip(ceilings(c, chip), planned, strict=True)
  ]
  assert row[1:] == [*cells[0], *cells[1]]


@every_row('`configs/` | `mesh.sequence`')
def test_long_rows_are_those_of_the_plans(row):
  c, plan, chip, _ = config_on_its_chips(row[0])
  assert row[1:4] == [str(c.mesh.sequence), *plan[3:5]]
  assert row[5] == plan[6].split()[0]
  if c.mesh.sequence > 1:
    at_most = f'{ceilings(c, chip)[0]:.1%} for {row[0].partition(":")[2]}'
    assert at_most in ' '.join(SPEED.split())


@every_row('`configs/`')
def test_chunks_of_the_loss_are_nearly_full(row):
  """With 6% fewer tokens per chunk the loop would take another trip."""
  c, _, _, devices = config_on_its_chips(row[0].split()[0])
  slices = 2 if ' x v' in row[1] else 1
  sizes = sizes_of_mesh(devices, slices, c.mesh.sequence)
  trips = lambda: plan_lib.loss_chunks(c, sizes)
  now = trips()
  c.objective.loss_chunk_tokens = int(c.objective.loss_chunk_tokens * 0.94)
  assert trips() > now


@every_row('`configs/` | tokens per chunk, before')
def test_trips_of_the_loss_follow_from_the_configs(row):
  c, _, _, chips = config_on_its_chips(row[0])
  chunks, trips = row[1:3], row[3:]
  assert int(chunks[1]) == c.objective.loss_chunk_tokens
  for tokens, count in zip(chunks, trips, strict=True):
    c.objective.loss_chunk_tokens = int(tokens)
    assert plan_lib.loss_chunks(c, sizes_of_mesh(chips)) == int(count)


def test_the_page_has_both_conventions_of_utilization():
  c, plan, _, count = config_on_its_chips('8b.py')
  sizes = sizes_of_mesh(count)
  share = plan_lib.share_done(c, sizes, plan_lib.loss_chunks(c, sizes))
  mfu = percent(plan[6])
  assert (
    f'for `configs/8b.py` {mfu:.1f}%, and {share:.1%} of it, '
    f'{mfu * share:.1f}%, without the logits'
  ) in ' '.join(SPEED.split())


def test_the_step_of_block_diffusion_is_compared_with_two_of_8b():
  steps = {row[0]: row[4] for row in table(SPEED, '`configs/`')[1:]}
  blocks, masked = steps['8b_blocks.py'], steps['8b.py']
  ratio = f'{number(blocks) / 2 / number(masked):.2f}'
  text = ' '.join(SPEED.split())
  assert f'takes {blocks} s, {ratio} of the time of two steps' in text
  assert f'(2 x {masked} s)' in text
  doc = runpy.run_path(str(ROOT / 'configs' / '8b_blocks.py'))['__doc__']
  assert f'{ratio} of the time of two steps' in ' '.join(doc.split())
  c, other = config_of('8b_blocks.py'), config_of('8b.py')
  assert c.train.batch == other.train.batch
  assert c.train.microbatches == 2 * other.train.microbatches


@every_row('`configs/`')
def test_checkpoints_are_less_than_an_hour_apart(row):
  name, machine = re.fullmatch(r'(\w+\.py)(?::(\S+))?.*', row[0]).groups()
  get_config = runpy.run_path(str(ROOT / 'configs' / name))['get_config']
  c = get_config(machine) if machine else get_config()
  assert c.checkpoint.every_steps * number(row[4]) < 3600
  assert c.checkpoint.keep_every_steps % c.checkpoint.every_steps == 0


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
