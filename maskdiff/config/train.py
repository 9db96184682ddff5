"""Config keys of the training loop."""

from maskdiff.config.key import Key, require

KEYS = {
  'steps': Key(1000, 'Number of training steps.', minimum=1),
  'epochs': Key(
    0.0,
    'Passes over the training rows, from which launch/finetune.py computes '
    'train.steps; the learning rate decays in the last tenth. 0: train.steps '
    'is given.',
    minimum=0,
  ),
  'batch': Key(
    32, 'Global batch size B: rows per step over all devices.', minimum=1
  ),
  'microbatches': Key(
    1,
    'Gradient accumulation: number of parts of a batch that are computed one '
    'after another, to save memory.',
    minimum=1,
  ),
  'ema_decay': Key(
    0.0,
    'Decay of an exponential moving average of the weights, such as 0.9999. '
    'The average is evaluated and saved beside the weights and takes 4 bytes '
    'per parameter. 0: no average.',
    minimum=0,
    below=1,
  ),
  'log_every_steps': Key(10, 'Steps between rows of metrics.', minimum=1),
  'wandb_project': Key(
    '',
    'Also log metrics and samples to this wandb project, if wandb is '
    'installed. WANDB_MODE=offline stores them on disk for `wandb sync`. '
    'Empty: off.',
  ),
  'stall_s': Key(
    600.0,
    'Seconds after which a step or a batch is reported as stalled.',
    minimum=0,
  ),
  'heartbeat_s': Key(
    10,
    'Seconds without a heartbeat after which a process counts as dead and the '
    'other processes exit.',
    minimum=1,
  ),
}


def check(c):
  """Raises UserError if keys of this section contradict each other."""
  t = c.train
  require(
    t.batch % t.microbatches == 0,
    f'config.train.batch={t.batch} is not divisible by '
    f'config.train.microbatches={t.microbatches}',
  )
  check_pairs(c, 'train')


def check_pairs(c, section):
  """Checks that antithetic time sampling can pair the rows of a batch."""
  batch = c[section].batch
  require(
    c.objective.time_sampling != 'antithetic' or batch % 2 == 0,
    f'config.{section}.batch={batch} must be even: antithetic time sampling '
    'draws times for pairs of rows',
  )
