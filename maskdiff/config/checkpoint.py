"""Config keys of the checkpoints."""

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
    'Also keep the checkpoints of all multiples of this step. 0: none.',
    minimum=0,
  ),
  'max_failures': Key(
    2,
    'Failed saves in a row that a run survives. A run of several processes '
    'stops at the first.',
    minimum=0,
  ),
}
