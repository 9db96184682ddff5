"""Describes updates that the guard skipped; see training/guard.py."""

import os

from maskdiff.errors import one_line
from maskdiff.files import atomic, json_text
from maskdiff.monitoring.json_lines import finite, is_count

# Keys of an update, and of a line of the ledger, that are not facts.
_OTHER_KEYS = {'time', 'event', 'seconds', 'step', 'grad_norm', 'in_a_row'}


def find(steps, metrics, facts, loss_name):
  """Finds the skipped updates among some steps.

  Args:
    steps: list of step numbers.
    metrics: list of step.StepMetrics on the host, one for each step.
    facts: list of dicts, one for each step; see `Stage.next_batch`.
    loss_name: see `Stage`.

  Returns:
    List of dicts with the step, loss, gradient norm, facts, and number of
    consecutive skipped updates up to this one.
  """
  return [
    {
      **of_batch,
      'step': step,
      loss_name: float(values.sums.loss),
      'grad_norm': float(values.grad_norm),
      'in_a_row': int(values.skipped_in_a_row),
    }
    for step, values, of_batch in zip(steps, metrics, facts, strict=True)
    if values.skipped
  ]


def facts_of(update):
  """Returns the facts in a result of `find` or in its line of the ledger."""
  return {
    name: value
    for name, value in update.items()
    if name not in _OTHER_KEYS and not name.startswith('loss')
  }


def is_update(line):
  """Returns whether a line of the ledger holds a result of `find`."""
  losses = [name for name in line if name.startswith('loss')]
  return (
    line.get('event') == 'skipped'
    and is_count(line.get('step'))
    and len(losses) == 1
    and 'grad_norm' in line
    and all(_is_number(line[name]) for name in (*losses, 'grad_norm'))
  )


def _is_number(value):
  """Returns whether a JSON value is a number. Strict JSON has null for NaN."""
  return value is None or type(value) is float or finite(value) is not None


def describe(update):
  """Formats one result of `find`, or its line of the ledger, as a line."""
  (name,) = (name for name in update if name.startswith('loss'))
  unit = name.removeprefix('loss').replace('_per_', '/').replace('_', ' ')
  loss, grad_norm = (
    float('nan') if x is None else x
    for x in (update[name], update['grad_norm'])
  )
  text = (
    f'step {update["step"]}: update skipped, loss {loss:.4g}{unit}, '
    f'gradient norm {grad_norm:.4g}'
  )
  for name, value in facts_of(update).items():
    match value:
      case [first, end] if is_count(first) and is_count(end):
        value = f'{first} to {end - 1}'
    text += f', {name} {one_line(value)}'
  return text


def give_up(workdir, updates, read_texts, remedy):
  """Writes consecutive skipped updates to a file and returns an error message.

  Args:
    workdir: work directory of the run.
    updates: consecutive results of `find`.
    read_texts: `Stage.read_texts` on the host that writes the file; None on
      other hosts.
    remedy: `Stage.remedy`.

  Returns:
    One line that describes the problem and its remedies.
  """
  first, last = facts_of(updates[0]), facts_of(updates[-1])
  step = updates[-1]['step']
  path = os.path.join(workdir, f'skipped_to_step_{step}.json')
  listed = f'{path} lists their {" and ".join(["losses", *last])}, and the '
  listed += 'texts of the last one'
  if read_texts:
    content = {'updates': updates, 'texts_of_the_last': read_texts(last)}
    try:
      atomic.write(path, json_text.dumps(content, indent=2))
    except OSError as error:
      listed = f'{path} could not be written ({error.strerror or error})'
  advice = remedy(first, last)
  return (
    f'{updates[-1]["in_a_row"]} updates in a row were skipped, up to step '
    f'{step}; {listed}. {advice + "; to" if advice else "To"} resume from '
    'an older step: launch/checkpoints.py --rollback STEP; otherwise the '
    'learning rate may be too high'
  )
