"""Config keys of the evaluations during training."""

from maskdiff.config import train
from maskdiff.config.key import Key

KEYS = {
  'path': Key(
    '',
    'Data whose held-out part is evaluated, in the form of config.data.path. '
    'Empty: the training data.',
  ),
  'every_steps': Key(
    500,
    'Steps between evaluations. The last step is evaluated too.',
    minimum=1,
  ),
  'batch': Key(32, 'Rows per batch, over all devices.', minimum=1),
  'batches': Key(8, 'Batches of each dataset.', minimum=1),
  'answers': Key(
    0,
    'Held-out prompts that launch/finetune.py answers at each evaluation, for '
    'exact match; held-out questions of launch/rl.py. 0: none.',
    minimum=0,
  ),
}


def check(c):
  """Raises UserError if keys of this section contradict each other."""
  train.check_pairs(c, 'eval')
