"""Plans of policy optimization as tables for a terminal."""

from maskdiff.monitoring import terminal

# Heads of the parts of a round, by the names of its programs.
_NAMES = {
  'copy': 'copy for the sampler',
  'sampling': 'denoising step',
  'fixed': 'fixed log-probabilities',
  'training': 'train step',
}


def summary(p):
  """Returns the rows of the first table: machines, memory and time."""
  slices = f'{p["num_slices"]} x ' if p['num_slices'] != 1 else ''
  rows = [
    ('machines', f'{slices}{p["topology"]}, {p["chips"]} chips ({p["mesh"]})'),
    ('parameters', f'{p["parameters"]:,}'),
    (
      'round',
      f'{p["batch"]} answers in rows of {p["length"]} tokens; '
      f'{p["denoising_steps"]} denoising steps; {p["inner_steps"]} train steps '
      f'on {p["copies"]} copies per answer',
    ),
    (
      'train step',
      f'a chip computes {p["rows_per_chip"]:g} rows at once, '
      f'{p["microbatches"]} times; remat {p["remat"]}',
    ),
    *_memory(p),
  ]
  return rows if p['round_s'] is None else rows + _time(p)


def _memory(p):
  parts = (
    ('parameters', p['hbm_parameters_gib']),
    ('optimizer', p['hbm_optimizer_gib']),
    ('reference', p['hbm_reference_gib']),
  )
  held = ' + '.join(f'{gib:.2f} GiB {name}' for name, gib in parts)
  copy = f'{p["hbm_copy_gib"]:.2f} GiB copy for the sampler'
  rows = [('HBM per chip', held), ('', f'{copy}, during sampling')]
  if p['status'] == 'does not compile':
    return [*rows, ('DOES NOT COMPILE', p['error'])]
  total, room = p['hbm_total_gib'], p['hbm_capacity_gib']
  peak = 'more than the capacity' if total is None else f'{total:.2f} GiB'
  rows.append(('', f'{peak} of {room} GiB at the peak: {p["status"].upper()}'))
  heads = ['to make it fit', *[''] * len(p['levers'])]
  return rows + list(zip(heads, p['levers'], strict=False))


def _time(p):
  parts = (
    ('sampling', p['sampling_s']),
    ('fixed log-probabilities', p['fixed_s']),
    ('training', p['training_s']),
  )
  split = ' + '.join(
    f'{seconds:.2f} {name} ({seconds / p["round_s"]:.0%})'
    for name, seconds in parts
    if seconds
  )
  number = lambda x: f'{x:,.0f}' if x >= 100 else f'{x:.3g}'
  total = f'{number(p["days"])} days, {number(p["chip_hours"])} chip-hours'
  return [
    ('time of a round', f'{p["round_s"]:.2f} s estimated = {split}'),
    ('all train steps', total),
  ]


def programs(p):
  """Returns a table of the programs of a round."""
  cell = lambda value, form: '' if value is None else format(value, form)
  rows = [
    ('program', 'buffers GiB', 'peak GiB', 's', 'times', 's per round', '')
  ]
  for x in p['programs']:
    steps = x['runs'] * (p['denoising_steps'] if x['name'] == 'sampling' else 1)
    of_round = None if x['run_s'] is None else x['run_s'] * x['runs']
    rows.append(
      (
        _NAMES[x['name']],
        cell(x['hbm_buffers_gib'], '.2f'),
        cell(x['hbm_total_gib'], '.2f'),
        cell(x['step_s'], '.4f'),
        f'{steps}',
        cell(of_round, '.2f'),
        '' if x['status'] == 'fits' else x['status'],
      )
    )
  return terminal.table(rows)
