"""Plans a training run on TPUs without a TPU: memory, time, communication.

The TPU compiler runs on any Linux machine and compiles for a topology by name.
So the train step of launch/pretrain.py can be compiled, and its executable
priced, before a pod is rented.

Memory is what the compiler allocates for the train step, and for an evaluation
step with the train state in memory. Sampling during a run is not counted. Time
is an estimate; hlo_cost.py and chips.py state its parts and assumptions, and
calibration.py compares it with published measurements. No plan has been
compared with its run on a TPU, so use it to compare configs.
`fields.FIELDS` describes every number.

The loss loop runs once per chunk of masked tokens, so its trip count depends on
data. A plan uses the trip count that `loss_chunks` expects.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff import config as config_lib
from maskdiff.data.rows import Rows
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.model import transformer
from maskdiff.objectives.table import (
  OBJECTIVES,
  flops_per_token,
  make_canvas,
)
from maskdiff.planner import calibration, levers, pricing
from maskdiff.planner.parts import part
from maskdiff.planner.target import (
  compile_evaluation,
  compile_train,
  open_target,
  params_on,
)
from maskdiff.training import step

DAY_S = 24 * 3600


def plan(config, topology, num_slices=1):
  """Plans a training run.

  Args:
    config: ConfigDict with the keys of config.default().
    topology: topology of one slice, e.g. 'v5p:4x4x4'.
    num_slices: number of slices.

  Returns:
    Dict with the keys of fields.FIELDS; its values can be written as JSON.

  Raises:
    UserError: config, topology and mesh do not fit each other.
  """
  config_lib.validate(config)
  return plan_on(config, open_target(config, topology, num_slices))


def plan_on(config, target):
  """Plans a training run on a target from `open_target`; see `plan`.

  Args:
    config: ConfigDict that passed config.validate.
    target: target.Target.
  """
  config_lib.validate_mesh(config, target.mesh.shape)
  c, t = step.step_config(config), config.train
  shards = mesh_lib.batch_shards(target.mesh)
  chunks = loss_chunks(config, target.mesh.shape)
  facts = pricing.facts(config, target, 'train') | {
    'length': c.length,
    'batch': t.batch,
    'microbatches': t.microbatches,
    'rows_per_chip': t.batch / t.microbatches / shards,
    'total_tokens': t.steps * t.batch * c.length,
    'loss_chunks': chunks,
  }
  result = pricing.price(
    facts,
    target,
    lambda: compile_train(config, target),
    # The loss is the only loop whose trip count depends on data.
    lambda op_name: chunks if part(op_name) == 'loss' else None,
    regime=training_regime(c.objective, c.length),
  )
  if result['status'] == 'does not fit':
    result['levers'] = levers.levers(config, facts, dict(target.mesh.shape))
  if result['fits']:
    result |= _evaluation(config, target, result)
  if result['step_s'] is None:
    return result
  step_tokens, chips = t.batch * c.length, facts['chips']
  flops = step_tokens * flops_per_token(c.objective, c.model, c.length)
  seconds = t.steps * result['step_s']
  mfu = flops / result['step_s'] / target.peak_flops
  done = share_done(config, target.mesh.shape, chunks)
  low, high = calibration.band(mfu, chips)
  if chips > calibration.CHIPS:
    result['warnings'].append(calibration.WARNING)
  if config.model.quantization == 'int8':
    result['warnings'].append(calibration.INT8_WARNING)
  return result | {
    'tokens_per_s': step_tokens / result['step_s'],
    'tokens_per_s_per_chip': step_tokens / result['step_s'] / chips,
    'model_tflop_per_chip': flops / chips / 1e12,
    'mfu': mfu,
    'mfu_done': done and mfu * done,
    'mfu_low': low,
    'mfu_high': high,
    'days': seconds / DAY_S,
    'chip_hours': seconds / 3600 * chips,
  }


def _evaluation(config, target, plan):
  """Returns changes to a plan that fits, from compiling the evaluation."""
  compiled, failure = pricing.attempt(
    lambda: compile_evaluation(config, target)
  )
  if failure.get('error'):
    error = f'the step of an evaluation: {failure["error"]}'
    return failure | {'error': error, 'fits': False}
  total = failure.get('hbm_total_gib')
  if compiled:
    memory = compiled.executable.memory_analysis()
    total = pricing.peak_bytes(memory) / pricing.GIB
  if total is not None:
    # The parameters are arguments of both programs; count them once.
    params = params_on(step.step_config(config).model, target.mesh)
    total += plan['hbm_arguments_gib'] - pricing.gib_per_chip(params)
  if compiled and total <= target.chip.hbm_gib:
    return {'hbm_evaluation_gib': total}
  return {
    'status': 'does not fit',
    'fits': False,
    'hbm_evaluation_gib': total,
    'levers': levers.evaluation_levers(config, plan, dict(target.mesh.shape)),
  }


def training_regime(c, length):
  """Returns the masks.Regime of the rows that an objective trains on.

  Args:
    c: ObjectiveConfig.
    length: L.
  """
  canvas = jax.eval_shape(
    lambda key: make_canvas(
      c, Rows(jnp.zeros((2, length), jnp.int32)), jnp.arange(2), key, batch=2
    ),
    jax.random.key(0),
  )
  return canvas.labels.regime


def loss_chunks(config, sizes):
  """Returns the expected iterations of the loss loop on the slowest device.

  The device with the most masked tokens is the slowest. Its number of masked
  tokens is taken to be the mean over the schedule plus three standard
  deviations. If each device has pairs of rows, or of blocks, at times t and
  1 - t, its times do not vary. A device with other rows may have any times, and
  the worst case is assumed: all of its tokens are masked.

  Args:
    config: ConfigDict.
    sizes: dict from mesh axis to its size.

  Returns:
    int, per microbatch.
  """
  o = config.objective
  rows, tokens, chunk = _loss_tokens(config, sizes)
  share, variance = _masked_share(config, rows, sizes['sequence'])
  most = min(tokens, tokens * share + 3 * math.sqrt(tokens * variance))
  if o.complementary_masks:
    most = tokens  # every token is masked in one of the two rows
  if o.autoregressive_weight:
    most += tokens * (2 if o.complementary_masks else 1)
  return math.ceil(round(most / chunk, 6))


def _loss_tokens(config, sizes):
  """Returns rows, tokens and tokens per chunk of the loss of a device."""
  t = config.train
  rows = t.batch / t.microbatches / sizes['replica'] / sizes['fsdp']
  parts = sizes['sequence'] * sizes['tensor']
  c = step.step_config(config).objective
  targets = OBJECTIVES[c.name].targets(c, config.data.length)
  tokens = rows * config.data.length * targets / parts
  return (
    rows,
    tokens,
    min(config.objective.loss_chunk_tokens, math.ceil(tokens)),
  )


def share_done(config, sizes, chunks):
  """Returns the share of the model FLOPs that a step computes.

  Model FLOPs count the head for every token, as published figures do. The loss
  skips the chunks without masked tokens.

  Args:
    config: ConfigDict.
    sizes: dict from mesh axis to its size.
    chunks: from `loss_chunks`.

  Returns:
    float; None for objectives with a count of FLOPs of their own.
  """
  o, c = config.objective, step.step_config(config)
  if OBJECTIVES[o.name].flops_per_token:
    return None
  rows, tokens, chunk = _loss_tokens(config, sizes)
  parts = sizes['sequence'] * sizes['tensor']
  if o.autoregressive_weight:
    tokens += rows * c.length / parts
  tokens *= 2 if o.complementary_masks else 1
  skipped = max(0.0, tokens - chunks * chunk)
  per_weight = 4 if transformer.num_adapter_params(c.model) else 6
  skipped *= per_weight * c.model.vocab_size * c.model.embed
  flops = flops_per_token(c.objective, c.model, c.length)
  return 1 - skipped / (flops * rows * c.length / parts)


def _masked_share(config, rows, parts):
  """Returns mean and variance of "this token of a device has a loss".

  The variance of the number of masked tokens, divided by the tokens.

  Args:
    config: ConfigDict.
    rows: rows of a device.
    parts: number of parts into which the mesh splits a row.
  """
  c = step.step_config(config).objective
  objective, length = OBJECTIVES[c.name], config.data.length
  by_blocks = objective.by_blocks and c.block_length < length
  if objective.left_to_right or (by_blocks and c.block_length == 1):
    return 1.0, 0.0
  times = rows * (length // c.block_length) / parts if by_blocks else rows
  # Under the linear schedule a pair has half of its tokens masked on average,
  # if the density of times is symmetric.
  paired = (
    c.time_sampling == 'antithetic'
    and c.schedule.name == 'linear'
    and c.time_density.is_symmetric
    and len(c.position_schedules) == 1
    and times % 2 == 0
  )
  # Without pairs, the share on a device depends on the times of its rows, and
  # among many devices one is likely to have times near 1.
  if not paired and not by_blocks:
    return 1.0, 0.0
  u = (np.arange(1000) + 0.5) / 1000
  # eps is small enough to ignore.
  t = np.asarray(c.time_density.quantile(u))
  ratio = np.mean([s.mask_ratio(t) for s in c.position_schedules], axis=0)
  variance = np.mean(ratio * (1 - ratio))  # given the times
  if not paired:
    variance += c.block_length * np.var(ratio)
  return float(np.mean(ratio)), float(variance)
