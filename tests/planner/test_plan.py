"""Plans without the TPU compiler; tests/launch/test_launch_plan.py uses it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskdiff import config
from maskdiff.data.rows import Rows
from maskdiff.distributed.chips import parse_topology
from maskdiff.errors import UserError
from maskdiff.model import masks
from maskdiff.objectives.table import make_canvas
from maskdiff.planner import (
  hlo_cost,
  plan,
  plan_sample,
  pricing,
  sweep,
  tables,
  target,
)
from maskdiff.planner.fields import FIELDS
from maskdiff.training import evaluation
from maskdiff.training.step import LossSums

SIZES = {'replica': 1, 'fsdp': 8, 'sequence': 1, 'tensor': 1}


def changed(**values):
  c = config.default()
  c.update_from_flattened_dict(values)
  return c


def chunks(sizes=None, **values):
  # 8 devices with 4 rows of 1024 tokens each.
  c = changed(**{'data.length': 1024, 'train.batch': 32, **values})
  return plan.loss_chunks(c, SIZES | (sizes or {}))


def test_loss_chunks_cover_half_of_the_tokens_and_a_margin():
  """2048 of 4096 tokens and a margin of 78, three times sqrt(4096 / 6)."""
  size = lambda tokens: chunks(**{'objective.loss_chunk_tokens': tokens})
  assert size(2126) == 2
  assert size(2127) == 1
  assert size(512) == 5
  assert size(1000) == 3
  assert chunks(**{'train.microbatches': 2}) == 3


@pytest.mark.parametrize(
  'values',
  [
    {'objective.schedule': 'cosine'},
    {'objective.time_sampling': 'iid'},
    {'train.batch': 24},  # 3 rows per chip: one is not in a pair
  ],
)
def test_loss_chunks_without_pairs_cover_all_tokens(values):
  rows = values.get('train.batch', 32) // 8
  assert chunks(**values) == rows * 1024 // 512


def test_loss_chunks_of_autoregression_cover_all_tokens():
  assert chunks(**{'objective.name': 'autoregressive'}) == 8


def chunks_of_blocks(sizes=None, **values):
  # 8 devices with 3 rows of 64 blocks each.
  blocks = {'objective.name': 'block_diffusion', 'objective.block_length': 16}
  return chunks(sizes, **(blocks | {'train.batch': 24} | values))


def test_loss_chunks_of_blocks_in_pairs_cover_half_of_the_tokens():
  """1536 of 3072 tokens and a margin of 67, three times sqrt(3072 / 6)."""
  size = lambda tokens: chunks_of_blocks(
    **{'objective.loss_chunk_tokens': tokens}
  )
  assert (size(1603), size(1604)) == (2, 1)
  # One block per row is masked diffusion: 3 rows are not in pairs.
  assert chunks_of_blocks(**{'objective.block_length': 1024}) == 6


@pytest.mark.parametrize(
  'values, mean, variance',
  [
    ({'objective.time_sampling': 'iid'}, 1 / 2, 1 / 6 + 16 / 12),
    # Mask ratio sin(pi/2 t): its mean is 2/pi, and 1/2 that of its square.
    (
      {'objective.schedule': 'cosine'},
      2 / np.pi,
      2 / np.pi - 1 / 2 + 16 * (1 / 2 - 4 / np.pi**2),
    ),
    # 3 rows of 1 block and 3 of 3 others, on each half of the length.
    ({'objective.block_length': 512}, 1 / 2, 1 / 6),
  ],
)
def test_loss_chunks_of_blocks_without_pairs_have_a_margin_for_times(
  values, mean, variance
):
  most = 3072 * mean + 3 * np.sqrt(3072 * variance)
  size = lambda tokens: chunks_of_blocks(
    **{'objective.loss_chunk_tokens': tokens} | values
  )
  assert size(int(most) - 1) == 2
  assert size(int(most) + 2) == 1


def test_loss_chunks_of_two_masks_and_of_a_clean_copy():
  """3072 tokens in chunks of 512, masked once in two rows; clean in each."""
  both = {'objective.complementary_masks': True}
  assert chunks_of_blocks(**both) == 6
  joint = {
    'objective.clean_attention': 'causal',
    'objective.autoregressive_weight': 0.3,
  }
  assert chunks_of_blocks(**joint) == chunks_of_blocks() + 6
  assert chunks_of_blocks(**joint, **both) == 6 + 12


def test_loss_chunks_of_blocks_of_one_token_cover_all_tokens():
  assert chunks_of_blocks(**{'objective.block_length': 1}) == 6


@pytest.mark.parametrize(
  'values, computed, counted',
  [
    ({}, 5 * 512, 4096),
    ({'objective.loss_chunk_tokens': 4096}, 4096, 4096),
    ({'objective.name': 'autoregressive'}, 4096, 4096),
    ({'objective.complementary_masks': True}, 4096, 2 * 4096),
  ],
)
def test_share_of_the_flops_that_a_step_computes(values, computed, counted):
  """Of 4096 tokens per device; the logits of some chunks are skipped."""
  c = changed(**{'data.length': 1024, 'train.batch': 32, **values})
  m = c.model
  head = 6 * m.vocab_size * m.embed
  layer = 2 * m.heads * m.head_dim + 2 * m.kv_heads * m.head_dim + 3 * m.mlp
  others = 6 * m.layers * m.embed * layer
  pairs = (1024 + 1) / 2 if c.objective.name == 'autoregressive' else 1024
  others += 12 * m.layers * pairs * m.heads * m.head_dim
  others *= 4096 * (2 if c.objective.complementary_masks else 1)
  expected = (others + head * computed) / (others + head * counted)
  found = plan.share_done(c, SIZES, plan.loss_chunks(c, SIZES))
  assert found == pytest.approx(expected, rel=2e-3)


def test_share_of_the_flops_is_unknown_for_drafting():
  assert (
    plan.share_done(changed(**{'objective.name': 'drafting'}), SIZES, 1) is None
  )


@pytest.mark.slow
@pytest.mark.parametrize('block_length, sequence', [(16, 1), (512, 1), (16, 2)])
def test_no_device_masks_more_than_the_expected_tokens(block_length, sequence):
  """Of 300 steps of 8 devices, three standard deviations cover nearly all."""
  c = changed(
    **{
      'objective.name': 'block_diffusion',
      'objective.block_length': block_length,
      'objective.loss_chunk_tokens': 1,
      'data.length': 1024,
      'train.batch': 24,
    }
  )
  objective = plan.step.step_config(c).objective
  rows = Rows(jnp.zeros((24, 1024), jnp.int32))
  count = jax.jit(
    lambda key: (
      (make_canvas(objective, rows, jnp.arange(24), key, 24).weights > 0)
      .reshape(8, 3, sequence, -1)
      .sum(axis=(1, 3))
    )
  )
  counts = np.stack([count(jax.random.key(i)) for i in range(300)])
  expected = plan.loss_chunks(c, SIZES | {'sequence': sequence})
  assert 0.99 < (counts <= expected).mean()
  assert counts.max() > 0.97 * expected


@pytest.mark.parametrize(
  'name, block_length, positions, regime',
  [
    ('masked_diffusion', 32, 64, masks.BIDIRECTIONAL),
    ('autoregressive', 32, 64, masks.CAUSAL),
    ('block_diffusion', 64, 64, masks.BIDIRECTIONAL),
    (
      'block_diffusion',
      32,
      128,
      masks.block_diffusion(jnp.ones((1, 1), bool), 32).regime,
    ),
  ],
)
def test_regime_of_a_plan_is_that_of_the_training_rows(
  name, block_length, positions, regime
):
  c = changed(
    **{'objective.name': name, 'objective.block_length': block_length}
  )
  objective = plan.step.step_config(c).objective
  assert plan.training_regime(objective, 64) == regime
  canvas = jax.eval_shape(
    lambda key: make_canvas(
      objective, Rows(jnp.zeros((2, 64), jnp.int32)), jnp.arange(2), key, 2
    ),
    jax.random.key(0),
  )
  assert canvas.inputs.shape == (2, positions)


@pytest.mark.parametrize(
  'name, regime',
  [
    ('masked_diffusion', masks.BIDIRECTIONAL),
    ('autoregressive', masks.CAUSAL),
    (
      'block_diffusion',
      masks.block_causal(jnp.ones((1, 1), bool), 32).regime,
    ),
  ],
)
def test_regime_of_a_sampling_plan_is_that_of_the_canvas(name, regime):
  c = changed(**{'objective.name': name, 'tokens.mask_id': 3})
  assert plan_sample.sampling_regime(c, 256) == regime


def test_sampling_plan_of_blocks_counts_the_steps_that_begin_a_block(
  cpu_target, monkeypatch
):
  """64 slots after 40 tokens are in 3 blocks of 32: 2 of 63 steps begin one."""
  options = []

  def price(facts, target, compile_program, **values):
    options.append(values)
    return facts | {'status': 'fits', 'fits': True, 'step_s': 1.0}

  monkeypatch.setattr(pricing, 'price', price)
  c = changed(
    **{
      'objective.name': 'block_diffusion',
      'tokens.mask_id': 3,
      'sample.cache': 'prefix',
      'sample.gen_length': 64,
      'sample.steps': 64,
      'sample.block_length': 32,
    }
  )
  plan_sample.plan_sample(c, 'v5e:2x4', 8, 40)
  shares = options[-1]['branch_shares']
  of_window = 'jit(denoising_step)/part(sampling: bookkeeping)/cond'
  assert shares(of_window) == pytest.approx((61 / 63, 2 / 63))
  assert shares('jit(denoising_step)/part(sampling: choice of tokens)') is None


def test_devices_share_the_tokens():
  assert chunks({'fsdp': 4}) == 9
  assert chunks({'fsdp': 4, 'tensor': 2}) == 5
  assert chunks({'fsdp': 4, 'sequence': 2}) == 5
  assert chunks({'fsdp': 4, 'replica': 2}) == 5


def test_chunk_is_at_most_the_tokens_of_a_device():
  assert chunks(**{'objective.loss_chunk_tokens': 100_000}) == 1


@pytest.fixture
def cpu_target(monkeypatch):
  """Replaces the devices of a topology by those of this machine."""

  def open_target(c, topology, num_slices=1):
    chip, _ = parse_topology(topology)
    mesh = plan.mesh_lib.make_mesh(**c.mesh)
    machine = types.SimpleNamespace(chip=chip, num_slices=num_slices)
    return target.Target(topology, mesh, machine)

  monkeypatch.setattr(plan, 'open_target', open_target)
  monkeypatch.setattr(plan_sample, 'open_target', open_target)
  monkeypatch.setattr(sweep, 'open_target', open_target)
  monkeypatch.setattr(sweep, 'topology_devices', lambda *_: [])


def failing(message):
  def compile_train(c, target):
    raise jax.errors.JaxRuntimeError(message)

  return compile_train


def test_step_that_does_not_fit_has_levers(cpu_target, monkeypatch):
  message = 'RESOURCE_EXHAUSTED: space hbm. Used 20.5G of 15.75G hbm.'
  monkeypatch.setattr(plan, 'compile_train', failing(message))
  result = plan.plan(config.default(), 'v5e:2x4')
  assert result.keys() == FIELDS.keys()
  assert (result['status'], result['fits']) == ('does not fit', False)
  assert result['hbm_total_gib'] == 20.5
  assert result['step_s'] is None
  assert any('microbatches=2' in lever for lever in result['levers'])


def test_exhausted_vmem_does_not_compile(cpu_target, monkeypatch):
  message = 'RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.'
  monkeypatch.setattr(plan, 'compile_train', failing(message))
  result = plan.plan(config.default(), 'v5e:2x4')
  assert (result['status'], result['error']) == ('does not compile', message)
  assert result['fits'] is False
  assert result['levers'] == []


GIB = 2**30


def allocated(arguments_gib, peak_gib):
  """Returns a stand-in for target.Compiled with this memory."""
  memory = types.SimpleNamespace(
    argument_size_in_bytes=int(arguments_gib * GIB),
    output_size_in_bytes=0,
    alias_size_in_bytes=0,
    temp_size_in_bytes=100 * GIB,
    generated_code_size_in_bytes=0,
    peak_memory_in_bytes=int(peak_gib * GIB),
    host_temp_size_in_bytes=0,
  )
  executable = types.SimpleNamespace(
    memory_analysis=lambda: memory, as_text=lambda: ''
  )
  return types.SimpleNamespace(executable=executable, seconds=60.0)


def test_failed_cached_step_is_the_status_of_a_sampling_plan(
  cpu_target, monkeypatch
):
  def price(facts, target, compile_program, **options):
    if compile_program():
      return facts | {'status': 'does not compile', 'error': 'no VMEM'}
    return facts | {'status': 'fits', 'fits': True, 'step_s': 1.0}

  monkeypatch.setattr(pricing, 'price', price)
  monkeypatch.setattr(plan_sample, 'compile_denoise', lambda *args: args[-1])
  c = changed(**{'sample.cache': 'dual'})
  result = plan_sample.plan_sample(c, 'v5e:2x4', 8, 16)
  assert (result['status'], result['step_s']) == ('does not compile', None)
  assert 'no VMEM' in tables.format_table(result)


@pytest.fixture
def compiled(cpu_target, monkeypatch):
  """compiled(train, evaluation) sets the results of the two compilations."""
  cost = hlo_cost.Cost(total_s=1.0)
  monkeypatch.setattr(pricing.hlo, 'parse', lambda text: None)
  monkeypatch.setattr(pricing.hlo_cost, 'price', lambda *_: cost)

  def outcome(result):
    calls = []

    def compile_it(c, target):
      calls.append(c)
      if isinstance(result, Exception):
        raise result
      return result

    return compile_it, calls

  def pretend(train, evaluation):
    for name, result in ('train', train), ('evaluation', evaluation):
      compile_it, calls = outcome(result)
      monkeypatch.setattr(plan, f'compile_{name}', compile_it)
    return calls

  return pretend


def wide(**values):
  """Returns a config with 0.9 GiB of parameters and 64 evaluation rows."""
  return changed(
    **{
      'model.embed': 2**13,
      'model.mlp': 2**13,
      'model.layers': 1,
      'model.vocab_size': 4096,
      'model.heads': 1,
      'model.kv_heads': 1,
      'eval.batch': 64,
      **values,
    }
  )


def params_gib(c):
  """Returns GiB of parameters per chip; only matrices are split by eight."""
  m = c.model
  heads = (2 * m.heads + 2 * m.kv_heads) * m.head_dim * m.embed
  matrices = m.vocab_size * m.embed + 3 * m.embed * m.mlp + heads
  return 4 * (matrices / 8 + 3 * m.embed) / GIB


def test_evaluation_counts_the_state_of_the_run(compiled):
  c = wide()
  compiled(allocated(6, 8), allocated(1, 9))
  result = plan.plan(c, 'v5e:2x4')
  assert (result['status'], result['fits']) == ('fits', True)
  assert result['hbm_total_gib'] == 8
  # 6 for the state and 9 for the evaluation; the parameters count once.
  expected = 6 + 9 - params_gib(c)
  assert result['hbm_evaluation_gib'] == pytest.approx(expected, rel=1e-6)
  assert result['compile_s'] == 60


@pytest.mark.parametrize(
  'evaluation',
  [
    allocated(1, 10),
    jax.errors.JaxRuntimeError(
      'RESOURCE_EXHAUSTED: space hbm. Used 10.0G of 15.75G hbm.'
    ),
  ],
)
def test_evaluation_that_does_not_fit_has_levers(compiled, evaluation):
  c = wide()
  compiled(allocated(12, 14), evaluation)
  result = plan.plan(c, 'v5e:2x4')
  assert (result['status'], result['fits']) == ('does not fit', False)
  assert result['hbm_total_gib'] == 14
  expected = 12 + 10 - params_gib(c)
  assert result['hbm_evaluation_gib'] == pytest.approx(expected, rel=1e-6)
  assert result['levers'][0].startswith(
    '--config.eval.batch=32 --config.eval.batches=16: 4 rows per chip'
  )
  assert not any('train.microbatches' in lever for lever in result['levers'])


def test_evaluation_that_does_not_compile_is_named(compiled):
  error = jax.errors.JaxRuntimeError('no such operation')
  compiled(allocated(6, 8), error)
  result = plan.plan(wide(), 'v5e:2x4')
  assert (result['status'], result['fits']) == ('does not compile', False)
  assert result['error'] == 'the step of an evaluation: no such operation'
  assert result['hbm_total_gib'] == 8


def test_evaluation_is_compiled_only_if_the_step_fits(compiled):
  calls = compiled(allocated(6, 20), allocated(1, 2))
  result = plan.plan(wide(), 'v5e:2x4')
  assert (result['status'], calls) == ('does not fit', [])
  assert result['hbm_evaluation_gib'] is None


@pytest.mark.slow
def test_sweep_keeps_the_evaluation_batch(compiled):
  """The size is rounded to the nearest one that the mesh divides."""
  calls = compiled(allocated(6, 8), allocated(1, 2))
  c = wide(**{'eval.batch': 20, 'train.batch': 128})
  sweep.sweep(c, 'v5e:2x4', [1, 4], ['full'], [{}], say=lambda line: None)
  assert [(c.train.batch, c.eval.batch) for c in calls] == [(128, 16)] * 2


def test_planned_evaluation_is_the_one_that_runs(monkeypatch):
  """The arguments are those that evaluation.evaluate passes to the step."""
  c = changed(**{'data.length': 32, 'eval.batch': 16, 'eval.batches': 1})
  c.model.update(embed=16, layers=1, mlp=16)
  mesh = plan.mesh_lib.make_mesh()
  ran = []
  monkeypatch.setattr(
    evaluation, 'jit_eval_step', lambda *args: ran.append(args) or SUMS
  )
  step = plan.step.step_config(c)
  rows = Rows(jnp.zeros((16, 32), jnp.int32))
  rows = jax.device_put(rows, plan.mesh_lib.batch_sharding(mesh))
  shapes = target.params_on(step.model, mesh)
  params = jax.tree.map(
    lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), shapes
  )
  evaluation.evaluate(step, params, [rows], 1.0)
  monkeypatch.setattr(
    target, 'compile_on', lambda function, mesh, *args: ran.append(args)
  )
  target.compile_evaluation(c, types.SimpleNamespace(mesh=mesh))
  (config_ran, *arrays), (config_compiled, *shapes) = ran
  assert config_ran == config_compiled
  described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert described(arrays) == described(shapes)
  # The key has no sharding.
  for x, y in zip(
    jax.tree.leaves(arrays[:2]), jax.tree.leaves(shapes[:2]), strict=True
  ):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_planned_state_has_the_moving_average(monkeypatch):
  """Its arrays have the shapes and dtypes of the parameters."""
  planned = []
  monkeypatch.setattr(
    target, 'compile_on', lambda step, mesh, *args: planned.append((step, args))
  )
  mesh = plan.mesh_lib.make_mesh()
  for decay in (0.0, 0.9):
    c = tiny.config(tiny.TRAIN_KEYS | {'train.ema_decay': decay})
    target.compile_train(c, types.SimpleNamespace(mesh=mesh))
  (_, (without, *_)), (step, (state, *rest)) = planned
  described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert without.ema is None
  assert described(state.ema.params) == described(state.params)
  with jax.set_mesh(mesh):
    step.lower(state, *rest)  # the step takes this state


SUMS = LossSums(
  num_predicted=np.ones(()),
  num_tokens=np.ones(()),
  ratio_count=np.ones(5),
  ratio_nll=np.ones(5),
  total=np.ones(()),
  divisor=np.ones(()),
  weighted_nll=np.ones(()),
)


def run_sweep(monkeypatch, gib, **options):
  """Runs a sweep in which each row per chip gives 1000 tokens/s."""
  tried = []

  def one(c, target):
    rows = c.train.batch // c.train.microbatches // 8
    tried.append((rows, c.model.remat, c.mesh.tensor, c.train.microbatches))
    if c.mesh.tensor == 3:
      raise UserError('3 does not divide 8')
    fits = gib(rows, c.model.remat) <= 16
    return dict.fromkeys(FIELDS) | {
      'status': 'fits' if fits else 'does not fit',
      'fits': fits,
      'rows_per_chip': float(rows),
      'remat': c.model.remat,
      'mesh': f'tensor={c.mesh.tensor}',
      'tokens_per_s_per_chip': 1000.0 * rows if fits else None,
      **dict.fromkeys(
        ('mfu', 'mfu_low', 'mfu_high'), 0.1 * rows if fits else None
      ),
    }

  monkeypatch.setattr(sweep, 'plan_on', one)
  lines = []
  options = {
    'rows': [1, 2, 4, 8],
    'remats': ['full'],
    'meshes': [{}],
    'say': lines.append,
  } | options
  result = sweep.sweep(changed(**{'train.batch': 64}), 'v5e:2x4', **options)
  assert len(lines) == len(result)
  return result, tried


@pytest.mark.slow
def test_sweep_ranks_plans_and_stops_at_the_first_misfit(
  cpu_target, monkeypatch
):
  result, tried = run_sweep(
    monkeypatch,
    lambda rows, remat: rows * (8 if remat == 'none' else 4),
    remats=['none', 'full'],
  )
  order = [(p['status'], p['rows_per_chip'], p['remat']) for p in result]
  assert order == [
    ('fits', 4, 'full'),
    ('fits', 2, 'none'),
    ('fits', 2, 'full'),
    ('fits', 1, 'none'),
    ('fits', 1, 'full'),
    ('does not fit', 4, 'none'),
    ('does not fit', 8, 'full'),
  ]
  # Four rows did not fit, so eight were not tried.
  assert (8, 'none', 1, 1) not in tried
  # The batch stays 64; the number of microbatches follows from the rows.
  assert {(rows, parts) for rows, _, _, parts in tried} == {
    (1, 8),
    (2, 4),
    (4, 2),
    (8, 1),
  }


@pytest.mark.slow
def test_failed_candidate_is_part_of_the_sweep(cpu_target, monkeypatch):
  result, _ = run_sweep(
    monkeypatch, lambda *_: 1, rows=[1], meshes=[{'tensor': 3}, {}]
  )
  assert [p['status'] for p in result] == ['fits', 'does not compile']
  assert result[1].keys() == FIELDS.keys()
  # A mesh that does not fit the devices.
  assert 'is not the number of devices, 8' in result[1]['error']


def test_unknown_mesh_axis_is_refused(cpu_target, monkeypatch):
  with pytest.raises(UserError, match='is not a mesh axis'):
    run_sweep(monkeypatch, lambda *_: 1, meshes=[{'data': 2}])
