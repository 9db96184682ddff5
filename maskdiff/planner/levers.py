"""Advice for a plan that does not fit: config keys that lower the memory."""

import math

from maskdiff import config as config_lib


def levers(config, plan, sizes):
  """Returns config keys that lower the memory of a train step, best first.

  Args:
    config: ConfigDict.
    plan: dict; `rows_per_chip` and `num_slices` are read.
    sizes: dict from mesh axis to its size.

  Returns:
    List of str: a flag and its effect in each.
  """
  t, lines = config.train, []
  if plan['rows_per_chip'] > 1:
    shards = _shards(sizes)
    more = next(
      m
      for m in range(t.microbatches + 1, t.batch + 1)
      if t.batch % (m * shards) == 0
    )
    lines.append(
      f'--config.train.microbatches={more}: '
      f'{t.batch / more / shards:g} rows per chip at once'
    )
  choices = config_lib.CHOICES['model.remat']  # the first needs most memory
  if less := choices[choices.index(config.model.remat) + 1 :]:
    lines.append(
      f'--config.model.remat={"|".join(less)}: keep fewer arrays of each layer '
      'and recompute the others'
    )
  return lines + _common_levers(config, plan, sizes)


def evaluation_levers(config, plan, sizes):
  """Returns config keys that lower the memory of an evaluation, best first.

  Arguments and result as for `levers`.
  """
  e, shards, lines = config.eval, _shards(sizes), []
  unit = shards
  if config.objective.time_sampling == 'antithetic':  # see config.validate
    unit = math.lcm(shards, 2)
  if e.batch > unit:
    less = max(1, e.batch // (2 * unit)) * unit
    lines.append(
      f'--config.eval.batch={less} '
      f'--config.eval.batches={math.ceil(e.batch * e.batches / less)}: '
      f'{less / shards:g} rows per chip at once, as many rows in total'
    )
  return lines + _common_levers(config, plan, sizes)


def policy_levers(config, plan, sizes, programs):
  """Returns config keys that lower the memory of a round, best first.

  Args:
    config: ConfigDict.
    plan: dict; `rows_per_chip` and `num_slices` are read.
    sizes: dict from mesh axis to its size.
    programs: the key `programs` of a plan.

  Returns:
    List of str: a flag and its effect in each.
  """
  lines, p = [], config.policy
  over = {x['name'] for x in programs if x['status'] == 'does not fit'}
  if 'sampling' in over:
    rows, shards = p.sampling_rows or config.train.batch, _shards(sizes)
    if rows > shards:
      less = max(1, rows // (2 * shards)) * shards
      lines.append(
        f'--config.policy.sampling_rows={less}: {less / shards:g} rows per '
        'chip at once'
      )
  if over & {'copy', 'sampling'}:
    if p.sampling_dtype == 'float32':
      lines.append(
        '--config.policy.sampling_dtype=bfloat16: half of the copy that samples'
      )
    lines += _tensor_lever(config, sizes)
  if plan['hbm_reference_gib'] and p.reference_dtype == 'float32':
    lines.append(
      '--config.policy.reference_dtype=bfloat16: half of the reference'
    )
  if config.optimizer.moments == 'float32' and not config.lora.rank:
    lines.append(
      '--config.optimizer.moments=bfloat16: 4 bytes less per parameter'
    )
  if over & {'fixed', 'training'}:
    return list(dict.fromkeys(lines + levers(config, plan, sizes)))
  return [*lines, 'a larger --topology: split the state over more chips']


def _shards(sizes):
  return sizes['replica'] * sizes['fsdp']


def _tensor_lever(config, sizes):
  if sizes['fsdp'] == 1 or config.model.kv_heads % (2 * sizes['tensor']):
    return []
  return [
    f'--config.mesh.tensor={2 * sizes["tensor"]} --config.mesh.fsdp=-1: '
    'split heads, mlp and vocabulary'
  ]


def _common_levers(config, plan, sizes):
  """Returns config keys that lower the memory of training and evaluation."""
  o, vocab, lines = config.objective, config.model.vocab_size, []
  chunk_gib = 4 * o.loss_chunk_tokens * vocab / 2**30
  if chunk_gib > 0.1:
    lines.append(
      f'--config.objective.loss_chunk_tokens={o.loss_chunk_tokens // 2}: '
      f'logits of {chunk_gib / 2:.2f} instead of {chunk_gib:.2f} GiB'
    )
  if config.train.ema_decay:
    lines.append(
      '--config.train.ema_decay=0: keep no moving average of the weights, 4 '
      'bytes less per parameter'
    )
  if sizes['replica'] > plan['num_slices']:
    lines.append(
      f'--config.mesh.replica={plan["num_slices"]} --config.mesh.fsdp=-1: '
      'split the state over all chips of a slice'
    )
  lines += _tensor_lever(config, sizes)
  return [*lines, 'a larger --topology: split the state over more chips']
