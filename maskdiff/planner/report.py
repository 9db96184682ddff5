"""Says what a plan found: tables for a terminal, advice, a picture."""

import math
import os

from maskdiff import config as config_lib
from maskdiff.errors import UserError
from maskdiff.monitoring import metrics
from maskdiff.planner.parts import model_part

TOP_OPERATIONS = 10


def costs(cost):
  """The part of a plan that an hlo_cost.Cost gives."""
  parts = {}
  for operation in cost.operations.values():
    name = model_part(operation.op_name, operation.functions)
    part = parts.setdefault(
      name, {'part': name, 'seconds': 0.0, 'count': 0.0, 'op_name': ''}
    )
    if operation.seconds > part['seconds'] or not part['op_name']:
      part['op_name'] = operation.op_name
    part['seconds'] += operation.seconds
    part['count'] += operation.count
  operations = sorted(parts.values(), key=lambda p: -p['seconds'])
  total = cost.total_s or 1.0
  exposed = cost.exposed_s
  return {
    'step_s': cost.total_s,
    'cycles_s': cost.cycles_s,
    'attention_s': cost.kernel_s,
    'exposed_ici_s': exposed['ici'],
    'exposed_dcn_s': exposed['dcn'],
    'exposed_host_s': exposed['host_in'] + exposed['host_out'],
    'exposed_prefetch_s': exposed['prefetch'],
    'cycles': cost.cycles,
    'collectives': [
      {
        'kind': t.kind,
        'axes': t.axes,
        'network': t.network,
        'dtype': t.dtype,
        'count': t.count,
        'sync_count': t.sync_count,
        'gb': t.nbytes / 1e9,
        'seconds': t.seconds,
      }
      for t in sorted(cost.traffic.values(), key=lambda t: -t.seconds)
    ],
    'operations': [o | {'share': o['seconds'] / total} for o in operations],
    'warnings': _warnings(cost),
  }


def _warnings(cost):
  """What the estimate leaves out."""
  found = [
    f'the loop {name} depends on data and is counted once'
    for name in cost.unresolved
  ]
  if cost.unpriced:
    names = ', '.join(f'{n} x{count:g}' for n, count in cost.unpriced.items())
    found.append(f'no estimate, and left out of the time: {names}')
  return found


def levers(config, facts, sizes):
  """Config keys that lower the memory of a train step, the strongest first.

  Args:
    config: ConfigDict.
    facts: a plan; its rows per chip are read.
    sizes: dict from mesh axis to its size.

  Returns:
    List of str.
  """
  t, found = config.train, []
  if facts['rows_per_chip'] > 1:
    shards = sizes['replica'] * sizes['fsdp']
    more = next(
      m
      for m in range(t.microbatches + 1, t.batch + 1)
      if t.batch % (m * shards) == 0
    )
    found.append(
      f'--config.train.microbatches={more}: '
      f'{t.batch / more / shards:g} rows per chip at once'
    )
  choices = config_lib.CHOICES['model.remat']  # from all kept to nothing
  if less := choices[choices.index(config.model.remat) + 1 :]:
    found.append(
      f'--config.model.remat={"|".join(less)}: keep less of each layer, and '
      'compute it again'
    )
  return found + _common_levers(config, facts, sizes)


def evaluation_levers(config, facts, sizes):
  """Config keys that lower the memory of an evaluation, the strongest first.

  Arguments and result as of `levers`.
  """
  e, shards, found = config.eval, sizes['replica'] * sizes['fsdp'], []
  unit = shards
  if config.objective.time_sampling == 'antithetic':  # see config.validate
    unit = math.lcm(shards, 2)
  if e.batch > unit:
    less = max(1, e.batch // (2 * unit)) * unit
    found.append(
      f'--config.eval.batch={less} '
      f'--config.eval.batches={math.ceil(e.batch * e.batches / less)}: '
      f'{less / shards:g} rows per chip at once, no fewer in all'
    )
  return found + _common_levers(config, facts, sizes)


def _common_levers(config, facts, sizes):
  """What lowers the memory of a train step and of an evaluation."""
  o, vocab, found = config.objective, config.model.vocab_size, []
  chunk_gib = 4 * o.loss_chunk_tokens * vocab / 2**30
  if chunk_gib > 0.1:
    found.append(
      f'--config.objective.loss_chunk_tokens={o.loss_chunk_tokens // 2}: '
      f'logits of {chunk_gib / 2:.2f} instead of {chunk_gib:.2f} GiB'
    )
  if sizes['replica'] > facts['num_slices']:
    found.append(
      f'--config.mesh.replica={facts["num_slices"]} --config.mesh.fsdp=-1: '
      'split the state over all chips of a slice'
    )
  if sizes['fsdp'] > 1 and config.model.kv_heads % (2 * sizes['tensor']) == 0:
    found.append(
      f'--config.mesh.tensor={2 * sizes["tensor"]} --config.mesh.fsdp=-1: '
      'split heads, mlp and vocabulary'
    )
  return [*found, 'a larger --topology: parameters and moments are split']


def format_table(plan):
  """A plan as text for a terminal."""
  text = [metrics.table(_summary(plan))]
  if plan['collectives']:
    rows = [('collective', 'axes', 'over', 'type', 'GB', 'seconds', 'in sync')]
    rows += [
      (
        c['kind'],
        c['axes'],
        c['network'],
        c['dtype'],
        f'{c["gb"]:.3f}',
        f'{c["seconds"]:.4f}',
        f'{c["sync_count"]:.0f} of {c["count"]:.0f}',
      )
      for c in plan['collectives']
    ]
    text.append(metrics.table(rows))
  if plan['operations']:
    rows = [('where the time goes', 'ms', 'share', 'times')]
    rows += [
      (
        o['part'][-60:],
        f'{o["seconds"] * 1e3:.2f}',
        f'{o["share"]:.1%}',
        f'{o["count"]:.0f}',
      )
      for o in plan['operations'][:TOP_OPERATIONS]
    ]
    text.append(metrics.table(rows))
  text += [f'warning: {w}' for w in plan['warnings']]
  return '\n\n'.join(text)


def _summary(p):
  slices = f'{p["num_slices"]} x ' if p['num_slices'] != 1 else ''
  step = f'{p["batch"]} prompts, canvases of {p["length"]} tokens'
  if p['mode'] == 'train':
    step = (
      f'{p["batch"]} rows of {p["length"]} tokens; a chip computes '
      f'{p["rows_per_chip"]:g} at once, {p["microbatches"]} times; '
      f'remat {p["remat"]}'
    )
  return [
    ('machines', f'{slices}{p["topology"]}, {p["chips"]} chips ({p["mesh"]})'),
    ('parameters', f'{p["parameters"]:,}'),
    ('step', step),
    *_memory_rows(p),
    *([] if p['step_s'] is None else _time_rows(p)),
  ]


def _memory_rows(p):
  if p['status'] == 'does not compile':
    return [('DOES NOT COMPILE', p['error'])]
  rows = []
  if p['hbm_arguments_gib'] is not None:
    parts = (
      f'{p["hbm_arguments_gib"]:.2f} GiB arguments + '
      f'{p["hbm_temporaries_gib"]:.2f} GiB temporaries'
    )
    if p['host_gib']:
      parts += f'; {p["host_gib"]:.2f} GiB of the host'
    rows.append(('HBM per chip', parts))
  over = _only_evaluation_is_over(p)
  verdict = 'FITS' if over else p['status'].upper()
  rows.append(
    ('', f'{_of_capacity(p, "total")} at the worst moment: {verdict}')
  )
  if over or p['hbm_evaluation_gib'] is not None:
    needed = _of_capacity(p, 'evaluation')
    rows.append(('', f'{needed} in an evaluation: {p["status"].upper()}'))
  heads = ['to make it fit', *[''] * len(p['levers'])]
  return rows + list(zip(heads, p['levers'], strict=False))


def _of_capacity(p, what):
  gib = p[f'hbm_{what}_gib']
  needed = 'more than there is' if gib is None else f'{gib:.2f} GiB'
  return f'{needed} of {p["hbm_capacity_gib"]} GiB'


def _only_evaluation_is_over(p):
  """Whether the memory is short though the step itself has enough."""
  total = p['hbm_total_gib']
  return (
    p['status'] == 'does not fit'
    and p['step_s'] is not None
    and total <= p['hbm_capacity_gib']
  )


def _time_rows(p):
  train = p['mode'] == 'train'
  step = (
    f'{p["step_s"]:.4f} s estimated = {p["cycles_s"]:.4f} compiled + '
    f'{p["attention_s"]:.4f} attention kernels'
  )
  for key, words in (
    ('ici', 'collectives'),
    ('dcn', 'collectives between slices'),
    ('host', 'host copies'),
    ('prefetch', 'prefetches'),
  ):
    if p[f'exposed_{key}_s'] >= 5e-5:
      step += f' + {p[f"exposed_{key}_s"]:.4f} {words}'
  speed = (
    f'{p["tokens_per_s"]:,.0f} tokens/s, '
    f'{p["tokens_per_s_per_chip"]:,.0f} per chip'
  )
  if train:
    speed += f', MFU {p["mfu"]:.1%}'
    whole = (
      f'{p["total_tokens"]:,} tokens',
      f'{_number(p["days"])} days, {_number(p["chip_hours"])} chip-hours',
    )
  else:
    whole = (
      f'{p["denoising_steps"]} steps',
      f'{p["latency_s"]:.2f} s for all prompts',
    )
  name = 'train step' if train else 'denoising step'
  rows = [(name, step), ('speed', speed), whole]
  if p['window_step_s'] is not None:
    served = f'{p["window_step_s"]:.4f} s estimated'
    rows.insert(1, ('step with a cache', served))
  return rows


def _number(x):
  return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


def sweep_line(p):
  """A candidate of a sweep in one line."""
  name = f'{p["rows_per_chip"]:g} rows, remat {p["remat"]}, {p["mesh"]}'
  if p['status'] == 'does not compile':
    return f'{name}: does not compile ({p["error"]})'
  over = _only_evaluation_is_over(p)
  total = p['hbm_evaluation_gib' if over else 'hbm_total_gib']
  memory = '' if total is None else f', {total:.2f} GiB'
  if p['status'] != 'fits':
    return f'{name}: {_problem(p)}{memory}'
  return (
    f'{name}: {p["tokens_per_s_per_chip"]:,.0f} tokens/s/chip, '
    f'MFU {p["mfu"]:.1%}{memory}'
  )


def _problem(p):
  if _only_evaluation_is_over(p):
    return 'evaluation does not fit, lower config.eval.batch'
  return p['error'] or p['status']


def format_sweep(plans):
  """The candidates of a sweep as a table, in the order given."""
  rows = [
    ('tokens/s/chip', 'MFU', 'HBM GiB', 'rows', 'parts', 'remat', 'mesh', '')
  ]
  known = lambda value, form: '' if value is None else format(value, form)
  rows += [
    (
      known(p['tokens_per_s_per_chip'], ',.0f'),
      known(p['mfu'], '.1%'),
      known(p['hbm_total_gib'], '.2f'),
      f'{p["rows_per_chip"]:g}',
      known(p['microbatches'], 'd'),
      p['remat'],
      p['mesh'],
      '' if p['status'] == 'fits' else _problem(p),
    )
    for p in plans
  ]
  return metrics.table(rows)


def check_plot(path):
  """Raises UserError unless matplotlib is here and has the picture's format."""
  try:
    from matplotlib.backend_bases import FigureCanvasBase
  except ImportError as error:
    raise UserError(
      '--plot needs matplotlib: pip install matplotlib'
    ) from error
  known = FigureCanvasBase.get_supported_filetypes()
  suffix = os.path.splitext(path)[1][1:].lower()
  if suffix and suffix not in known:
    raise UserError(
      f'--plot {path!r}: choose a suffix of {", ".join(sorted(known))}'
    )


def plot(plan, path):
  """Draws where the time of a step goes, as a bar per part.

  Args:
    plan: a plan of a program that compiled.
    path: of the picture.

  Raises:
    UserError: see `check_plot`; there is no time to draw, or the file cannot
      be written.
  """
  check_plot(path)
  if plan['step_s'] is None:
    raise UserError('--plot: there is no time to draw, see the status')
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  shown = plan['operations'][:TOP_OPERATIONS]
  rest = sum(o['seconds'] for o in plan['operations'][TOP_OPERATIONS:])
  compute, waiting = '#1f5fbf', '#c0392b'
  bars = [(o['part'][-48:], o['seconds'], compute) for o in shown]
  bars.append(('all other operations', rest, compute))
  bars += [
    (f'waiting: {key}', plan[f'exposed_{key}_s'], waiting)
    for key in ('ici', 'dcn', 'host', 'prefetch')
    if plan[f'exposed_{key}_s'] > 0
  ]
  names, seconds, colors = zip(*bars[::-1], strict=True)
  figure, axes = plt.subplots(figsize=(8, 5), layout='constrained')
  axes.barh(names, [s * 1e3 for s in seconds], color=colors)
  axes.set_xlabel('ms per step, estimated')
  axes.set_title(
    f'{plan["topology"]}, {plan["step_s"]:.3f} s'
    + (f', MFU {plan["mfu"]:.1%}' if plan['mfu'] else ''),
    fontsize=10,
  )
  axes.spines[['top', 'right']].set_visible(False)
  try:
    figure.savefig(path, dpi=150)
  except (OSError, ValueError) as error:
    raise UserError(f'--plot: cannot write {path!r} ({error})') from error
  finally:
    plt.close(figure)
