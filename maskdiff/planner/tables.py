"""Plans as tables for a terminal."""

from maskdiff.monitoring import terminal
from maskdiff.planner import calibration, tables_rl

TOP_OPERATIONS = 10


def format_table(plan):
  """Returns a plan as text for a terminal."""
  text = [terminal.table(_summary(plan))]
  if plan['programs']:
    text.append(tables_rl.programs(plan))
  if plan['collectives']:
    rows = [
      ('collective', 'axes', 'network', 'dtype', 'GB', 'seconds', 'synchronous')
    ]
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
    text.append(terminal.table(rows))
  if plan['operations']:
    name = (
      'part of the train step' if plan['mode'] == 'rl' else 'part of the step'
    )
    rows = [(name, 'ms', 'share', 'count')]
    rows += [
      (
        o['part'][-60:],
        f'{o["seconds"] * 1e3:.2f}',
        f'{o["share"]:.1%}',
        f'{o["count"]:.0f}',
      )
      for o in plan['operations'][:TOP_OPERATIONS]
    ]
    text.append(terminal.table(rows))
  text += [f'warning: {w}' for w in plan['warnings']]
  return '\n\n'.join(text)


def _summary(p):
  if p['mode'] == 'rl':
    return tables_rl.summary(p)
  slices = f'{p["num_slices"]} x ' if p['num_slices'] != 1 else ''
  step = f'{p["batch"]} prompts, canvases of {p["length"]} tokens'
  if p['mode'] == 'train':
    step = (
      f'{p["batch"]} rows of {p["length"]} tokens; a {_unit(p)} computes '
      f'{p["rows_per_chip"]:g} at once, {p["microbatches"]} times; '
      f'remat {p["remat"]}'
    )
  chips = f'{p["chips"]} chips'
  if _unit(p) != 'chip':
    chips += f' with {p["devices"]} devices'
  return [
    ('machines', f'{slices}{p["topology"]}, {chips} ({p["mesh"]})'),
    ('parameters', f'{p["parameters"]:,}'),
    ('step', step),
    *_memory_rows(p),
    *([] if p['step_s'] is None else _time_rows(p)),
  ]


def _unit(p):
  return 'chip' if p['devices'] == p['chips'] else 'device'


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
      parts += f'; {p["host_gib"]:.2f} GiB of host memory'
    rows.append((f'HBM per {_unit(p)}', parts))
  only_evaluation = _only_evaluation_exceeds(p)
  status = 'FITS' if only_evaluation else p['status'].upper()
  rows.append(('', f'{_of_capacity(p, "total")} at the peak: {status}'))
  if only_evaluation or p['hbm_evaluation_gib'] is not None:
    peak = _of_capacity(p, 'evaluation')
    rows.append(('', f'{peak} in an evaluation: {p["status"].upper()}'))
  heads = ['to make it fit', *[''] * len(p['levers'])]
  return rows + list(zip(heads, p['levers'], strict=False))


def _of_capacity(p, program):
  gib = p[f'hbm_{program}_gib']
  peak = 'more than the capacity' if gib is None else f'{gib:.2f} GiB'
  return f'{peak} of {p["hbm_capacity_gib"]} GiB'


def _only_evaluation_exceeds(p):
  """Returns whether the train step fits and the evaluation does not."""
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
  for key, name in (
    ('rows', 'gathers and scatters'),
    ('exposed_ici', 'collectives'),
    ('exposed_dcn', 'collectives between slices'),
    ('exposed_host', 'host copies'),
    ('exposed_prefetch', 'prefetches'),
  ):
    if p[f'{key}_s'] >= 5e-5:
      step += f' + {p[f"{key}_s"]:.4f} {name}'
  speed = (
    f'{p["tokens_per_s"]:,.0f} tokens/s, '
    f'{p["tokens_per_s_per_chip"]:,.0f} per chip'
  )
  if train:
    speed += f', MFU {calibration.cell(p)}'
    if p['mfu_done'] is not None:
      speed += f', {p["mfu_done"]:.1%} without the logits that the loss skips'
    total = (
      f'{p["total_tokens"]:,} tokens',
      f'{_number(p["days"])} days, {_number(p["chip_hours"])} chip-hours',
    )
  else:
    total = (
      f'{p["denoising_steps"]} steps',
      f'{p["latency_s"]:.2f} s for all prompts',
    )
  name = 'train step' if train else 'denoising step'
  rows = [(name, step), *_attention_row(p), ('speed', speed), total]
  if p['window_step_s'] is not None:
    cached = f'{p["window_step_s"]:.4f} s estimated'
    rows.insert(-2, ('step with a cache', cached))
  return rows


def _attention_row(p):
  """Returns the step with attention priced by the MXU, if it has kernels."""
  if not p['attention_s']:
    return []
  seconds = p['attention_mxu_s']
  step = p['step_s'] - p['attention_s'] + seconds
  text = (
    f'{step:.4f} s if kernels take {seconds:.4f} s, by the width of the MXU'
  )
  if p['mfu']:
    text += f' (MFU {p["mfu"] * p["step_s"] / step:.1%})'
  return [('', text)]


def _number(x):
  return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


def sweep_line(p):
  """Returns one plan of a sweep as a line of text."""
  name = f'{p["rows_per_chip"]:g} rows, remat {p["remat"]}, {p["mesh"]}'
  if p['status'] == 'does not compile':
    return f'{name}: does not compile ({p["error"]})'
  evaluation = _only_evaluation_exceeds(p)
  total = p['hbm_evaluation_gib' if evaluation else 'hbm_total_gib']
  memory = '' if total is None else f', {total:.2f} GiB'
  if p['status'] != 'fits':
    return f'{name}: {_problem(p)}{memory}'
  return (
    f'{name}: {p["tokens_per_s_per_chip"]:,.0f} tokens/s/chip, '
    f'MFU {calibration.cell(p)}{memory}'
  )


def _problem(p):
  if _only_evaluation_exceeds(p):
    return 'evaluation does not fit, lower config.eval.batch'
  return p['error'] or p['status']


def format_sweep(plans):
  """Returns the plans of a sweep as a table, in the given order."""
  rows = [
    ('tokens/s/chip', 'MFU', 'HBM GiB', 'rows', 'parts', 'remat', 'mesh', '')
  ]
  cell = lambda value, form: '' if value is None else format(value, form)
  rows += [
    (
      cell(p['tokens_per_s_per_chip'], ',.0f'),
      '' if p['mfu'] is None else calibration.cell(p),
      cell(p['hbm_total_gib'], '.2f'),
      f'{p["rows_per_chip"]:g}',
      cell(p['microbatches'], 'd'),
      p['remat'],
      p['mesh'],
      '' if p['status'] == 'fits' else _problem(p),
    )
    for p in plans
  ]
  return terminal.table(rows)
