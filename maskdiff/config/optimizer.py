"""Config keys of AdamW, Muon and the learning rate."""

from maskdiff.config.key import Key, are_numbers, require

KEYS = {
  'name': Key(
    'adamw',
    'adamw; or muon, which is Muon for the matrices of the layers and AdamW '
    'for all other parameters. Learning rate and weight decay serve both.',
    ('adamw', 'muon'),
  ),
  'schedule': Key(
    'wsd',
    'Learning-rate schedule: warmup, constant, linear decay (wsd); warmup and '
    'cosine decay (cosine); or the lines of `pieces` (piecewise).',
    ('wsd', 'cosine', 'piecewise'),
  ),
  'learning_rate': Key(4e-4, 'Peak learning rate.', minimum=0),
  'final_learning_rate': Key(
    1e-5, 'Learning rate at the last step.', minimum=0
  ),
  'warmup_steps': Key(100, 'Steps of linear warmup from 0.', minimum=0),
  'decay_steps': Key(
    100, 'Steps of linear decay at the end of wsd.', minimum=0
  ),
  'pieces': Key(
    (),
    'Lines of the piecewise schedule: (last step, first rate, last rate), ...',
  ),
  'b1': Key(0.9, "Decay rate of Adam's first moment.", minimum=0, below=1),
  'b2': Key(0.95, "Decay rate of Adam's second moment.", minimum=0, below=1),
  'eps': Key(
    1e-8, "Added to the square root of Adam's second moment.", minimum=0
  ),
  'muon_momentum': Key(
    0.95, "Decay rate of Muon's momentum.", minimum=0, below=1
  ),
  'weight_decay': Key(0.1, 'Weight decay of matrices.', minimum=0),
  'clip_norm': Key(1.0, 'Gradients are clipped to this norm.', above=0),
  'moments': Key(
    'float32',
    "Dtype in which Adam's two moments and Muon's momentum are stored.",
    ('float32', 'bfloat16'),
  ),
}


def check(c):
  """Raises UserError if keys of this section contradict each other."""
  o, steps = c.optimizer, c.train.steps
  warmup = o.warmup_steps + (o.decay_steps if o.schedule == 'wsd' else 0)
  require(
    o.schedule == 'piecewise' or warmup <= steps,
    f'config.optimizer: warmup and decay take {warmup} steps, more than '
    f'config.train.steps={steps}; set --config.optimizer.warmup_steps='
    f'{steps // 20} --config.optimizer.decay_steps={steps // 3}',
  )
  require(
    o.schedule != 'cosine' or o.warmup_steps < steps,
    f'config.optimizer.warmup_steps={o.warmup_steps} leaves no step of '
    f'config.train.steps={steps} for the cosine; set '
    f'--config.optimizer.warmup_steps={steps // 20}',
  )
  if o.schedule == 'piecewise':
    triples = all(
      isinstance(p, tuple) and len(p) == 3 and are_numbers(p) and min(p) >= 0
      for p in o.pieces
    )
    ends = [piece[0] for piece in o.pieces] if triples else []
    require(
      ends and ends == sorted(ends) and ends[-1] == steps,
      'config.optimizer.pieces must be (last step, first rate, last rate) in '
      f'order, not negative, and end at config.train.steps={steps}',
    )
