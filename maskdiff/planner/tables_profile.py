"""The table of a profile for a terminal."""

from maskdiff.monitoring import terminal
from maskdiff.planner.comparison import IDLE, OVERLAP

# Parts below this share of the step are one line of the text.
SMALL = 0.002


def format_table(result):
  """Returns the result of `comparison.compare` as text for a terminal."""
  step, estimated = result['step_s'], result['estimated_s']
  small = [r for r in result['rows'] if _is_small(r, step)]
  rows = [r for r in result['rows'] if r not in small]
  if small:
    rows.append(
      {
        'part': f'{len(small)} parts below {SMALL:.1%} of the step',
        'measured_s': sum(r['measured_s'] for r in small),
        'estimated_s': estimated and sum(r['estimated_s'] for r in small),
      }
    )
  rows.append({'part': 'step', 'measured_s': step, 'estimated_s': estimated})
  head = ['part of the step', 'measured, ms', 'share']
  if estimated is not None:
    head[1:1] = ['estimated, ms']
    head.append('measured / estimated')
  cells = [head] + [_cells(r, step, estimated) for r in rows]
  facts = result['facts']
  last = facts['first_step'] + facts['steps'] - 1
  text = [
    f'steps {facts["first_step"]} to {last}, '
    f'mean of {result["devices"]} x {facts["device_kind"]}',
    terminal.table(cells),
    '\n'.join(_lines(result)),
  ]
  return '\n\n'.join(t for t in text if t)


def _is_small(row, step):
  return max(row['measured_s'], row['estimated_s'] or 0.0) < SMALL * step and (
    row['part'] not in (IDLE, OVERLAP)
  )


def _cells(row, step, estimated):
  m, e = row['measured_s'], row['estimated_s']
  cells = [row['part'][-60:], f'{m * 1e3:.3f}', f'{m / step:.1%}']
  if estimated is not None:
    cells[1:1] = [f'{e * 1e3:.3f}' if e else '']
    cells.append(f'{m / e:.2f}' if e else '')
  return cells


def _lines(result):
  """Returns the lines below the table."""
  lines = []
  if result['period_s']:
    lines.append(
      f'from the start of a step to the next: {result["period_s"] * 1e3:.3f} ms'
    )
  if result['programs']:
    lines.append(f'other programs, per step: {_programs(result)}')
  if result['mfu']:
    line = f'MFU {result["mfu"]:.1%}'
    if result['mfu_estimated']:
      line += f', estimated {result["mfu_estimated"]:.1%}'
    if done := result['facts']['share_done']:
      line += (
        f'; {result["mfu"] * done:.1%} without the logits that the loss skips'
      )
    lines.append(line)
  if result['estimated_s']:
    lines.append(worst(result))
  return lines + [f'warning: {w}' for w in result['warnings']]


def _programs(result):
  programs = sorted(result['programs'].items(), key=lambda p: -p[1])
  small = [s for _, s in programs if s < SMALL * result['step_s']]
  named = programs[: len(programs) - len(small)]
  if small:
    named.append((f'{len(small)} small ones', sum(small)))
  return ', '.join(f'{name} {seconds * 1e3:.3f} ms' for name, seconds in named)


def worst(result):
  """Returns a sentence on the row with the largest error of the estimate."""
  error = lambda r: r['measured_s'] - r['estimated_s']
  rows = [r for r in result['rows'] if r['part'] != OVERLAP]
  r = max(rows, key=lambda r: abs(error(r)))
  more = 'more' if error(r) > 0 else 'less'
  return (
    f'largest error: {r["part"]} takes {abs(error(r)) * 1e3:.3f} ms {more} '
    f'than estimated, {abs(error(r)) / result["step_s"]:.1%} of the step'
  )
