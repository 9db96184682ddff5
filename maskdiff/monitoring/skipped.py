"""Describes updates that the guard skipped; see training/guard.py."""

import json
import os


def find(step, fetched, first_sample):
  """Finds the skipped updates in a window of steps.

  Args:
    step: last step of the window.
    fetched: list of step.StepMetrics on the host, one for each step.
    first_sample: function from a step to the index of the first sample after
      that step.

  Returns:
    List of dicts with the step, loss (nats per token), gradient norm, range of
    sample indices (first, end), and number of consecutive skipped updates up
    to this one.
  """
  return [
    {
      'step': s,
      'loss_nats_per_token': float(values.sums.loss),
      'grad_norm': float(values.grad_norm),
      'samples': (first_sample(s - 1), first_sample(s)),
      'in_a_row': int(values.skipped_in_a_row),
    }
    for s, values in enumerate(fetched, step - len(fetched) + 1)
    if values.skipped
  ]


def describe(update):
  """Formats one result of `find` as a line."""
  first, end = update['samples']
  return (
    f'step {update["step"]}: update skipped, loss '
    f'{update["loss_nats_per_token"]:.4g} nats/token, gradient norm '
    f'{update["grad_norm"]:.4g}, samples {first} to {end - 1}'
  )


def give_up(workdir, updates, read_texts):
  """Writes consecutive skipped updates to a file and returns an error message.

  Args:
    workdir: work directory of the run.
    updates: consecutive results of `find`.
    read_texts: function from a range of samples to their texts, on the host
      that writes the file; None on other hosts.

  Returns:
    One line that describes the problem and its remedies.
  """
  first, last = updates[0], updates[-1]
  path = os.path.join(workdir, f'skipped_to_step_{last["step"]}.json')
  if read_texts:
    with open(path, 'w') as f:
      texts = read_texts(*last['samples'])
      json.dump({'updates': updates, 'texts_of_the_last': texts}, f, indent=2)
  return (
    f'{last["in_a_row"]} updates in a row were skipped, up to step '
    f'{last["step"]}; {path} lists their losses and samples, and the texts of '
    'the last one. To leave these samples out: --config.data.skip_samples="(('
    f'{first["samples"][0]}, {last["samples"][1]}),)"; to resume from an older '
    'step: launch/checkpoints.py --rollback STEP; otherwise the learning rate '
    'may be too high'
  )
