"""Tables of docs/speed.md follow from the configs and the table of plans."""

import copy
import json
import math
import pathlib
import re
import runpy

from page_tables import every_row, number, percent, table

from maskdiff.distributed import chips as chips_lib
from maskdiff.model import transformer
from maskdiff.planner import plan as plan_lib
from maskdiff.training import step as step_lib

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
PROOF = ROOT / 'benchmarks' / 'results' / 'proof'
SPEED = (ROOT / 'docs' / 'speed.md').read_text()
TOPOLOGY = r'(?:v\w+|tpu7x):[\dx]+'


def config_on_its_chips(cell):
  """Returns config, row of the table of plans, Chip and number of devices."""
  name, _, machine = cell.partition(':')
  get_config = runpy.run_path(str(CONFIGS / name))['get_config']
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


@every_row(SPEED, '`configs/` | kernels at half of the peak, s')
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


@every_row(SPEED, '`configs/` | ceiling')
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


@every_row(SPEED, '`configs/` | `mesh.sequence`')
def test_long_rows_are_those_of_the_plans(row):
  c, plan, chip, _ = config_on_its_chips(row[0])
  assert row[1:4] == [str(c.mesh.sequence), *plan[3:5]]
  assert row[5] == plan[6].split()[0]
  if c.mesh.sequence > 1:
    at_most = f'{ceilings(c, chip)[0]:.1%} for {row[0].partition(":")[2]}'
    assert at_most in ' '.join(SPEED.split())


@every_row(SPEED, '`configs/`')
def test_chunks_of_the_loss_are_nearly_full(row):
  """With 6% fewer tokens per chunk the loop would take another trip."""
  c, _, _, devices = config_on_its_chips(row[0].split()[0])
  slices = 2 if ' x v' in row[1] else 1
  sizes = sizes_of_mesh(devices, slices, c.mesh.sequence)
  trips = lambda: plan_lib.loss_chunks(c, sizes)
  now = trips()
  c.objective.loss_chunk_tokens = int(c.objective.loss_chunk_tokens * 0.94)
  assert trips() > now


@every_row(SPEED, '`configs/` | tokens per chunk, before')
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
  doc = runpy.run_path(str(CONFIGS / '8b_blocks.py'))['__doc__']
  assert f'{ratio} of the time of two steps' in ' '.join(doc.split())
  get_config = lambda name: runpy.run_path(str(CONFIGS / name))['get_config']
  c, other = (get_config(name)() for name in ('8b_blocks.py', '8b.py'))
  assert c.train.batch == other.train.batch
  assert c.train.microbatches == 2 * other.train.microbatches


@every_row(SPEED, '`configs/`')
def test_checkpoints_are_less_than_an_hour_apart(row):
  name, machine = re.fullmatch(r'(\w+\.py)(?::(\S+))?.*', row[0]).groups()
  get_config = runpy.run_path(str(CONFIGS / name))['get_config']
  c = get_config(machine) if machine else get_config()
  assert c.checkpoint.every_steps * number(row[4]) < 3600
  assert c.checkpoint.keep_every_steps % c.checkpoint.every_steps == 0


@every_row(SPEED, 'steps of `configs/proof.py`')
def test_bounds_with_integers_are_those_of_the_runs(row):
  bounds = [bound_at(name, int(number(row[0]))) for name in ('masked', 'int8')]
  assert row[1:3] == [f'{x:.4f}' for x in bounds]
  assert row[3] == f'{number(row[2]) - number(row[1]):+.4f}'


def bound_at(run, step):
  text = (PROOF / run / 'metrics.jsonl').read_text()
  lines = map(json.loads, text.splitlines())
  key = 'eval/loss_nats_per_token'
  (bound,) = (x[key] for x in lines if x['step'] == step and key in x)
  return bound


def test_runs_with_and_without_integers_have_one_config():
  """The run without is older, and its config lacks newer keys."""
  plain, integers = (
    json.loads((PROOF / name / 'config.json').read_text())
    for name in ('masked', 'int8')
  )
  assert integers['model']['quantization'] == 'int8'
  assert 'quantization' not in plain['model']
  for section in ('model', 'objective', 'optimizer', 'data', 'train'):
    assert plain[section].items() <= integers[section].items()
  assert plain['seed'] == integers['seed']
