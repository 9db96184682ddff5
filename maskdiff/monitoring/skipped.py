"""What to say of updates that the guard skipped; see guard.py."""

import json
import os


def find(step, fetched, first_sample):
  """The skipped updates of a window.

  Args:
    step: the last of the window.
    fetched: what `step.train_step` returned at each step, on the host.
    first_sample: function from a step to the number of the first sample that
      comes after it.

  Returns:
    List of dicts: step, loss (nats per token) and gradient norm, the range of
    its samples (first, end), and how many were skipped in a row up to it.
  """
  return [
    {
      'step': s,
      'loss_nats_per_token': float(
        values['weighted_nll'] / values['num_tokens']
      ),
      'grad_norm': float(values['grad_norm']),
      'samples': (first_sample(s - 1), first_sample(s)),
      'in_a_row': int(values['skipped_in_a_row']),
    }
    for s, values in enumerate(fetched, step - len(fetched) + 1)
    if values['skipped']
  ]


def describe(update):
  """One of `find` as a line."""
  first, end = update['samples']
  return (
    f'step {update["step"]}: update skipped, loss '
    f'{update["loss_nats_per_token"]:.4g} nats/token, gradient norm '
    f'{update["grad_norm"]:.4g}, samples {first} to {end - 1}'
  )


def give_up(workdir, updates, read_texts):
  """Writes the updates of a streak down, with the text of the last one.

  Args:
    workdir: of the run.
    updates: of `find`, those in a row.
    read_texts: None, or on the one host that writes, a function from a range
      of samples to their texts.

  Returns:
    What happened and what can be done, in one line.
  """
  first, last = updates[0], updates[-1]
  path = os.path.join(workdir, f'skipped_to_step_{last["step"]}.json')
  if read_texts:
    with open(path, 'w') as f:
      texts = read_texts(*last['samples'])
      json.dump({'updates': updates, 'texts_of_the_last': texts}, f, indent=2)
  return (
    f'{last["in_a_row"]} updates in a row were skipped, up to step '
    f'{last["step"]}; {path} has their losses and samples, and the text of the '
    'last. To pass over them: --config.data.skip_samples="(('
    f'{first["samples"][0]}, {last["samples"][1]}),)"; to go on from an older '
    'step: launch/checkpoints.py --rollback STEP; otherwise the learning rate '
    'may be too high'
  )
