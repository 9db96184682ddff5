"""Config keys of checkpoints."""

from maskdiff.config.key import Key

KEYS = {
  'every_steps': Key(
    1000,
    'Steps between checkpoints. The last step is saved too.',
    minimum=1,
  ),
  'keep': Key(2, 'Number of latest checkpoints to keep.', minimum=1),
  'keep_every_steps': Key(
    0,
    'Also keep every checkpoint whose step is a multiple of this number. '
    '0: off.',
    minimum=0,
  ),
  'max_failures': Key(
    2,
    'Number of consecutive failed saves that a run tolerates. A run of several '
    'processes stops at the first failed save.',
    minimum=0,
  ),
}
