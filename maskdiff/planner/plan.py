"""What a config takes on TPUs that are not here: memory, time, communication.

The TPU compiler runs on any Linux machine and compiles for a topology by name,
so the very step that train.py runs can be compiled, and its executable priced,
before a pod is rented. Memory is what the compiler allocates for the step, and
for the step of an evaluation beside the state of the training; samples in
passing are not counted. Time is an estimate; hlo_cost.py and chips.py say what
it is made of and what is assumed. It has not been compared with a run on a TPU;
take it to compare configs with. `FIELDS` describes every number.

The loop of the loss runs once per chunk of masked tokens, which the compiler
cannot know; here it is expected to run for the mean mask ratio of the schedule
(half of the tokens, for the linear one) and three standard deviations more,
since the chip with the most masked tokens decides. Where a chip does not hold
pairs of rows at times t and 1 - t, the worst is taken: all tokens.
"""

import itertools
import math
import re

import jax
import numpy as np

from maskdiff import config as config_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.model import transformer
from maskdiff.objectives import table
from maskdiff.objectives.table import OBJECTIVES
from maskdiff.planner import hlo, hlo_cost, report
from maskdiff.planner.target import (
  compile_denoise,
  compile_evaluation,
  compile_train,
  one_line,
  open_target,
  params_on,
  topology_devices,
)
from maskdiff.sampling import request
from maskdiff.training import step

GIB = 2**30
DAY_S = 24 * 3600

# The keys of a plan, in every mode; None where there is nothing to say.
FIELDS = {
  'mode': 'train or sample',
  'status': 'fits, does not fit, or does not compile',
  'error': 'why it does not compile',
  'topology': 'of one slice',
  'num_slices': 'slices connected by the network of the data centre',
  'chip': 'kind of chip',
  'chips': 'chips of all slices',
  'mesh': 'sizes of the mesh axes',
  'parameters': 'number of parameters',
  'length': 'tokens per row (train), or slots and prompt of a row (sample)',
  'batch': 'rows per step over all chips; prompts at once (sample)',
  'microbatches': 'parts that the batch is computed in',
  'rows_per_chip': 'rows that a chip computes at once; may be a fraction',
  'remat': 'config.model.remat',
  'compile_s': 'seconds that the compilation of the step took here',
  'hbm_arguments_gib': 'state and batch, per chip',
  'hbm_temporaries_gib': 'activations, gradients, buffers, per chip: the sum '
  'of all allocations, of which some never live at the same time',
  'hbm_total_gib': 'HBM in use at the worst moment, per chip',
  'hbm_evaluation_gib': 'HBM in use at the worst moment of an evaluation '
  '(train), per chip: the arguments of the train step stay',
  'hbm_capacity_gib': 'what a program may use of a chip',
  'host_gib': 'memory of the host that a chip takes, for what is offloaded',
  'fits': 'whether total and evaluation are within the capacity',
  'levers': 'config keys that would lower the memory, if it does not fit',
  'step_s': 'seconds per train step, or per denoising step over the canvas',
  'window_step_s': 'seconds per denoising step that a cache serves',
  'cycles_s': 'of it: what the compiler has an estimate for',
  'attention_s': 'of it: attention kernels',
  'exposed_ici_s': 'of it: waiting for collectives within a slice',
  'exposed_dcn_s': 'of it: waiting for collectives between slices',
  'exposed_host_s': 'of it: waiting for copies to and from the host',
  'exposed_prefetch_s': 'of it: waiting for copies into on-chip memory',
  'cycles': "the compiler's estimate in clock cycles",
  'tokens_per_s': 'tokens trained on, or generated, over all chips',
  'tokens_per_s_per_chip': 'the same, per chip',
  'model_tflop_per_chip': 'matrix-product TFLOP of a step that count for MFU',
  'mfu': 'model FLOPs utilization in [0, 1]',
  'total_tokens': 'train.steps x train.batch x data.length',
  'days': 'that the tokens take',
  'chip_hours': 'that the tokens take',
  'denoising_steps': 'config.sample.steps',
  'latency_s': 'seconds to fill a canvas in that many steps',
  'loss_chunks': 'trips of the loss loop that are expected',
  'collectives': 'kind, axes, network, dtype, count, sync_count, gb, seconds',
  'operations': 'part, seconds, share, count, op_name; dearest first',
  'warnings': 'what the estimate leaves out',
}


def plan(config, topology, num_slices=1):
  """Plans a training run.

  Args:
    config: ConfigDict with the keys of config.default().
    topology: of one slice, e.g. 'v5p:4x4x4'.
    num_slices: slices of that topology.

  Returns:
    Dict with the keys of FIELDS, JSON-like.

  Raises:
    UserError: config, topology and mesh do not fit each other.
  """
  config_lib.validate(config)
  return _plan_on(config, open_target(config, topology, num_slices))


def _plan_on(config, target):
  """The plan of a valid config."""
  config_lib.validate_mesh(config, target.mesh.shape)
  c, t = step.step_config(config), config.train
  shards = mesh_lib.batch_shards(target.mesh)
  total_tokens = t.steps * t.batch * c.length
  chunks = loss_chunks(config, target.mesh.shape)
  facts = _facts(config, target, 'train') | {
    'length': c.length,
    'batch': t.batch,
    'microbatches': t.microbatches,
    'rows_per_chip': t.batch / t.microbatches / shards,
    'total_tokens': total_tokens,
    'loss_chunks': chunks,
  }
  result = _priced(
    facts,
    target,
    lambda: compile_train(config, target),
    # The loss is the only loop whose trip count depends on data.
    lambda _, functions: (
      chunks if any(f.startswith('cross_entropy.') for f in functions) else None
    ),
    causal=OBJECTIVES[c.objective.name].left_to_right,
  )
  if result['status'] == 'does not fit':
    result['levers'] = report.levers(config, facts, dict(target.mesh.shape))
  if result['fits']:
    result |= _evaluation(config, target, result)
  if result['step_s'] is None:
    return result
  step_tokens, count = t.batch * c.length, facts['chips']
  flops = step_tokens * table.flops_per_token(
    c.objective.name, c.model, c.length
  )
  seconds = t.steps * result['step_s']
  return result | {
    'tokens_per_s': step_tokens / result['step_s'],
    'tokens_per_s_per_chip': step_tokens / result['step_s'] / count,
    'model_tflop_per_chip': flops / count / 1e12,
    'mfu': flops / count / result['step_s'] / target.chip.peak_flops,
    'days': seconds / DAY_S,
    'chip_hours': seconds / 3600 * count,
  }


def sample_plan(
  config,
  topology,
  prompts,
  prompt_tokens,
  num_slices=1,
  tensor=1,
  dtype='float32',
):
  """Plans sampling: every prompt gets config.sample.gen_length tokens.

  Memory is that of a step over the canvas, the cache included if there is one.
  Where a sampler chooses among shapes, as with a prefix cache or a lookahead,
  the largest is priced: an upper bound.

  Args:
    config: ConfigDict with the keys of config.default().
    topology: of one slice, e.g. 'v5e:2x4'.
    prompts: how many are answered at once.
    prompt_tokens: length of each.
    num_slices: slices of that topology.
    tensor: chips that share every layer; the others split the rows.
    dtype: of the weights.

  Returns:
    Dict with the keys of FIELDS, JSON-like.

  Raises:
    UserError: config, topology and mesh do not fit each other.
  """
  if prompts < 1 or prompt_tokens < 0:
    raise UserError('--prompts must be positive, --prompt_tokens not negative')
  config_lib.validate(config)
  # As `run.load` lays out a model that samples, whatever it was trained on.
  config = config.copy_and_resolve_references()
  config.mesh.update(replica=num_slices, fsdp=-1, sequence=1, tensor=tensor)
  target = open_target(config, topology, num_slices)
  steps, slots = request.sampler_config(config).steps, config.sample.gen_length
  length = prompt_tokens + slots
  shards = mesh_lib.batch_shards(target.mesh)
  split = prompts % shards == 0  # else every chip computes all rows
  facts = _facts(config, target, 'sample') | {
    'length': length,
    'batch': prompts,
    'microbatches': 1,
    'rows_per_chip': prompts / shards if split else float(prompts),
    'denoising_steps': steps,
  }

  def priced(window):
    return _priced(
      facts,
      target,
      lambda: compile_denoise(config, target, prompts, length, dtype, window),
      None,
      causal=OBJECTIVES[config.objective.name].left_to_right,
    )

  result = priced(window=False)
  if result['status'] == 'does not fit':
    result['levers'] = ['fewer --prompts', 'a larger --topology']
  if result['step_s'] is None:
    return result
  served, s = 0, config.sample
  if s.cache != 'none':
    served = priced(window=True)
    if served['step_s'] is None:
      return result | {k: served[k] for k in ('status', 'fits', 'error')}
    result['window_step_s'] = served['step_s']
    blocks = -(-slots // min(s.block_length, slots))
    in_block = steps // blocks
    served = steps - blocks * (-(-in_block // s.refresh) if s.refresh else 1)
  latency = (steps - served) * result['step_s']
  latency += served * (result['window_step_s'] or 0)
  count = facts['chips']
  return result | {
    'latency_s': latency,
    'tokens_per_s': prompts * slots / latency,
    'tokens_per_s_per_chip': prompts * slots / latency / count,
  }


def _facts(config, target, mode):
  """What is known without compiling."""
  sizes = target.mesh.shape
  parameters, _ = transformer.num_params(step.step_config(config).model)
  return dict.fromkeys(FIELDS) | {
    'mode': mode,
    'topology': target.topology,
    'num_slices': target.machine.num_slices,
    'chip': target.chip.name,
    'chips': target.mesh.size,
    'mesh': ','.join(f'{a}={sizes[a]}' for a in mesh_lib.AXES),
    'parameters': parameters,
    'remat': config.model.remat,
    'hbm_capacity_gib': target.chip.hbm_gib,
    'fits': False,
    'levers': [],
    'collectives': [],
    'operations': [],
    'warnings': [],
  }


def _priced(facts, target, compile_it, expected_trips, causal):
  """The facts with the memory and the time of what `compile_it` returns."""
  compiled, failure = _attempt(compile_it)
  if failure:
    return facts | failure
  memory = compiled.executable.memory_analysis()
  total = _peak_bytes(memory)
  fits = total / GIB <= target.chip.hbm_gib
  module = hlo.parse(compiled.executable.as_text())
  cost = hlo_cost.price(module, target.machine, expected_trips, causal)
  return (
    facts
    | {
      'status': 'fits' if fits else 'does not fit',
      'fits': fits,
      'compile_s': compiled.seconds,
      'hbm_arguments_gib': memory.argument_size_in_bytes / GIB,
      'hbm_temporaries_gib': memory.temp_size_in_bytes / GIB,
      'hbm_total_gib': total / GIB,
      'host_gib': memory.host_temp_size_in_bytes / GIB,
    }
    | report.costs(cost)
  )


def _evaluation(config, target, fitting):
  """What an evaluation changes in the plan of a train step that fits."""
  compiled, failure = _attempt(lambda: compile_evaluation(config, target))
  if failure.get('error'):
    error = f'the step of an evaluation: {failure["error"]}'
    return failure | {'error': error, 'fits': False}
  total = failure.get('hbm_total_gib')
  if compiled:
    total = _peak_bytes(compiled.executable.memory_analysis()) / GIB
  if total is not None:
    # Both programs have the parameters among their arguments.
    params = jax.tree.leaves(
      params_on(step.step_config(config).model, target.mesh)
    )
    shared = sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in params
    )
    total += fitting['hbm_arguments_gib'] - shared / GIB
  if compiled and total <= target.chip.hbm_gib:
    return {'hbm_evaluation_gib': total}
  return {
    'status': 'does not fit',
    'fits': False,
    'hbm_evaluation_gib': total,
    'levers': report.evaluation_levers(
      config, fitting, dict(target.mesh.shape)
    ),
  }


def _attempt(compile_it):
  """A Compiled and {}, or None and what a plan says of the failure."""
  try:
    return compile_it(), {}
  except jax.errors.JaxRuntimeError as error:
    # Other memories than HBM run out too, on-chip memory above all.
    if 'RESOURCE_EXHAUSTED' in str(error) and 'hbm' in str(error).lower():
      needed = needed_gib(str(error))
      return None, {'status': 'does not fit', 'hbm_total_gib': needed}
    return None, {'status': 'does not compile', 'error': one_line(error)}


def _peak_bytes(memory):
  """HBM at the worst moment of a program, from its memory_analysis()."""
  allocated = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  # What the compiler itself compares with the chip before it accepts a
  # program. It counts memory of the host too, where something is offloaded.
  return min(memory.peak_memory_in_bytes or allocated, allocated)


def loss_chunks(config, sizes):
  """Trips of the loss loop on the slowest device, per microbatch.

  Args:
    config: ConfigDict.
    sizes: dict from mesh axis to its size.
  """
  o, t = config.objective, config.train
  share, variance = 1.0, 0.0  # of a token's carrying a loss
  if not OBJECTIVES[o.name].left_to_right:
    schedule = step.step_config(config).objective.schedule
    times = (np.arange(1000) + 0.5) / 1000  # eps is too small to matter
    ratio = schedule.mask_ratio(times)
    share = float(np.mean(ratio))
    # Of the masks at given times.
    variance = float(np.mean(ratio * (1 - ratio)))
    # A pair of rows has times t and 1 - t, which for the linear schedule mask
    # one row's worth of tokens. Otherwise a chip's share depends on its times,
    # and one of many has the worst.
    pairs = (
      o.time_sampling == 'antithetic'
      and o.schedule == 'linear'
      and t.batch / t.microbatches / sizes['replica'] / sizes['fsdp'] % 2 == 0
    )
    if not pairs:
      share, variance = 1.0, 0.0
  rows = t.batch / t.microbatches / sizes['replica'] / sizes['fsdp']
  tokens = rows * config.data.length / sizes['sequence'] / sizes['tensor']
  chunk = min(o.loss_chunk_tokens, math.ceil(tokens))
  most = min(tokens, tokens * share + 3 * math.sqrt(tokens * variance))
  return math.ceil(round(most / chunk, 6))


def needed_gib(message):
  """The GiB of HBM that an out-of-memory message names, or None."""
  match = re.search(r'Used ([\d.]+)([KMGT]) of', message) or re.search(
    r'required for [^(]*\(([\d.]+)([KMGT])\)', message
  )
  if not match:
    return None
  return float(match[1]) * 1024.0 ** ('KMGT'.index(match[2]) - 2)


def sweep(config, topology, rows, remats, meshes, num_slices=1, say=print):
  """Plans every combination, one after the other, and ranks what fits.

  The batches of the config are kept to the nearest that the mesh divides, and
  the number of microbatches follows from the rows that a chip computes at once.
  More rows are not tried where fewer did not fit or did not compile.

  Args:
    config: ConfigDict with the keys of config.default().
    topology: of one slice.
    rows: list of int, rows per chip at once.
    remats: list of values of config.model.remat.
    meshes: list of dicts from mesh axis to size; others as in the config.
    num_slices: slices of that topology.
    say: called with a line about each candidate.

  Returns:
    List of plans: what fits by tokens/s per chip, then the rest.

  Raises:
    UserError: the topology, a value of remat or a mesh axis is unknown.
  """
  topology_devices(topology, num_slices)
  # All of them before the first minutes of compiling.
  for remat in remats:
    if remat not in config_lib.CHOICES['model.remat']:
      raise UserError(
        f'remat {remat!r} is unknown; choose of '
        + ', '.join(config_lib.CHOICES['model.remat'])
      )
  for axis in itertools.chain(*meshes):
    if axis not in mesh_lib.AXES:
      raise UserError(
        f'{axis!r} is not a mesh axis; choose of {", ".join(mesh_lib.AXES)}'
      )
  plans = []
  for sizes, remat in itertools.product(meshes, remats):
    for count in sorted(rows):
      result = _candidate(config, topology, num_slices, count, remat, sizes)
      plans.append(result)
      say(report.sweep_line(result))
      jax.clear_caches()
      if not result['fits']:
        break
  by_speed = lambda p: (not p['fits'], -(p['tokens_per_s_per_chip'] or 0))
  return sorted(plans, key=by_speed)


def _candidate(config, topology, num_slices, rows, remat, sizes):
  """The plan of one combination; what goes wrong is part of the result."""
  config = config.copy_and_resolve_references()
  config.model.remat = remat
  config_lib.validate(config)
  for axis, size in sizes.items():
    config.mesh[axis] = size
  failed = dict.fromkeys(FIELDS) | {
    'mode': 'train',
    'status': 'does not compile',
    'fits': False,
    'topology': topology,
    'num_slices': num_slices,
    'mesh': ','.join(f'{a}={config.mesh[a]}' for a in mesh_lib.AXES),
    'rows_per_chip': float(rows),
    'remat': remat,
  }
  try:
    target = open_target(config, topology, num_slices)
    at_once = rows * mesh_lib.batch_shards(target.mesh)
    parts = max(1, round(config.train.batch / at_once))
    config.train.microbatches = parts
    config.train.batch = parts * at_once
    config.eval.batch = _nearest(config.eval.batch, target.mesh)
    config_lib.validate(config)
    return _plan_on(config, target)
  except ValueError as error:  # UserError, or JAX about shapes
    return failed | {'error': one_line(error)}


def _nearest(batch, mesh):
  """The even batch closest to this one whose rows split over the mesh."""
  unit = math.lcm(mesh_lib.batch_shards(mesh), 2)
  return max(1, round(batch / unit)) * unit
