"""Checks of a config."""

import math

from maskdiff.config.keys import check_keys, lookup, suggestion
from maskdiff.errors import UserError

# What the weights of a trained model may be cast to when it is loaded.
WEIGHTS = ('float32', 'bfloat16')


CHOICES = {
  'model.dtype': ('float32', 'bfloat16'),
  'optimizer.moments': ('float32', 'bfloat16'),
  'model.remat': (
    'none',
    'minimal',
    'attention',
    'attended',
    'offload',
    'full',
  ),
  'model.attention': ('auto', 'xla', 'splash', 'cudnn'),
  'objective.name': ('masked_diffusion', 'autoregressive'),
  'objective.schedule': ('linear', 'cosine', 'polynomial'),
  'objective.time_sampling': ('antithetic', 'stratified', 'iid'),
  'objective.attend_within': ('row', 'document'),
  'data.verify': ('sample', 'all'),
  'optimizer.schedule': ('wsd', 'cosine', 'piecewise'),
  'sample.remasking': (
    'low_confidence',
    'random',
    'threshold',
    'factor',
    'ancestral',
    'first_hitting',
  ),
  'sample.schedule': ('linear', 'cosine'),
  'sample.confidence': ('probability', 'entropy', 'margin'),
  'sample.cache': ('none', 'prefix', 'dual'),
}


POSITIVE = (
  'model.vocab_size model.embed model.layers model.heads model.kv_heads '
  'model.head_dim model.mlp model.rope_theta model.norm_eps '
  'objective.eps objective.schedule_power objective.loss_chunk_tokens '
  'optimizer.clip_norm data.length '
  'train.steps train.batch train.microbatches train.log_every_steps '
  'eval.every_steps eval.batch eval.batches '
  'sample.gen_length sample.block_length sample.steps '
  'checkpoint.every_steps checkpoint.keep '
  'train.heartbeat_s guard.max_in_a_row'
).split()


NOT_NEGATIVE = (
  'optimizer.learning_rate optimizer.final_learning_rate '
  'optimizer.warmup_steps optimizer.decay_steps optimizer.weight_decay '
  'optimizer.eps data.max_damaged_rows sample.temperature '
  'sample.top_k sample.threshold sample.factor sample.guidance '
  'sample.refresh '
  'train.stall_s guard.spike_sigmas checkpoint.keep_every_steps '
  'checkpoint.max_failures'
).split()


def validate(c):
  """Checks what the types cannot, before anything is compiled.

  What depends on the machine (devices) and on files (tokenizer, data) is
  checked where they are opened.

  Raises:
    UserError: names the keys and the fix.
  """

  def require(condition, message):
    if not condition:
      raise UserError(message)

  check_keys(c)
  for key, choices in CHOICES.items():
    value = lookup(c, key)
    require(
      value in choices,
      f'config.{key}={value!r}: choose one of {", ".join(choices)}'
      + suggestion(value, choices),
    )
  for key in POSITIVE:
    require(
      lookup(c, key) > 0, f'config.{key}={lookup(c, key)}: must be positive'
    )
  for key in NOT_NEGATIVE:
    require(
      lookup(c, key) >= 0,
      f'config.{key}={lookup(c, key)}: must not be negative',
    )
  for key in ('optimizer.b1', 'optimizer.b2'):
    require(
      0 <= lookup(c, key) < 1,
      f'config.{key}={lookup(c, key)}: must be in [0, 1)',
    )
  require(
    all(isinstance(prompt, str) for prompt in c.sample.prompts),
    f'config.sample.prompts={c.sample.prompts}: must be strings',
  )
  m, t, o, e = c.model, c.train, c.optimizer, c.objective
  require(
    m.heads % m.kv_heads == 0,
    f'config.model.heads={m.heads} is not a multiple of '
    f'config.model.kv_heads={m.kv_heads}',
  )
  require(
    m.head_dim % 2 == 0,
    f'config.model.head_dim={m.head_dim} must be even: rotary positions turn '
    'pairs',
  )
  for name, value in c.tokens.items():
    require(
      0 <= value < m.vocab_size,
      f'config.tokens.{name}={value} is outside the vocabulary of '
      f'config.model.vocab_size={m.vocab_size}',
    )
  require(
    t.batch % t.microbatches == 0,
    f'config.train.batch={t.batch} is not divisible by '
    f'config.train.microbatches={t.microbatches}',
  )
  for section in ('train', 'eval'):
    batch = c[section].batch
    require(
      e.time_sampling != 'antithetic' or batch % 2 == 0,
      f'config.{section}.batch={batch} must be even: antithetic time sampling '
      'draws times for pairs of rows',
    )
  require(
    not m.predict_next or e.name == 'masked_diffusion',
    'config.model.predict_next=True is for '
    "config.objective.name='masked_diffusion': an autoregressive row is "
    'shifted already',
  )
  require(
    len(m.rope_scaling) in (0, 4) and all(x > 0 for x in m.rope_scaling),
    f"config.model.rope_scaling={m.rope_scaling}: must be () or Llama 3.1's "
    '(factor, low_freq_factor, high_freq_factor, length)',
  )
  require(e.eps < 1, f'config.objective.eps={e.eps} must be below 1')
  require(
    0 <= e.random_length_fraction <= 1,
    f'config.objective.random_length_fraction={e.random_length_fraction} must '
    'lie in [0, 1]',
  )
  skip = c.data.skip_samples
  pairs = all(isinstance(r, tuple) and len(r) == 2 for r in skip)
  bounds = [n for pair in skip for n in pair] if pairs else []
  require(
    pairs
    and all(isinstance(n, int) and n >= 0 for n in bounds)
    and bounds == sorted(set(bounds)),
    f'config.data.skip_samples={skip}: must be (first, end) pairs of sample '
    'numbers, ascending and apart, as in ((128, 256), (512, 544))',
  )
  warmup = o.warmup_steps + (o.decay_steps if o.schedule == 'wsd' else 0)
  require(
    o.schedule == 'piecewise' or warmup <= t.steps,
    f'config.optimizer: warmup and decay take {warmup} steps, more than '
    f'config.train.steps={t.steps}; shorten them',
  )
  require(
    o.schedule != 'cosine' or o.warmup_steps < t.steps,
    f'config.optimizer.warmup_steps={o.warmup_steps} leaves no step of '
    f'config.train.steps={t.steps} for the cosine',
  )
  if o.schedule == 'piecewise':
    triples = all(isinstance(p, tuple) and len(p) == 3 for p in o.pieces)
    ends = [piece[0] for piece in o.pieces] if triples else []
    require(
      ends and ends == sorted(ends) and ends[-1] == t.steps,
      'config.optimizer.pieces must be (last step, first rate, last rate) in '
      f'order, and end at config.train.steps={t.steps}',
    )
  s = c.sample
  require(0 < s.top_p <= 1, f'config.sample.top_p={s.top_p} must lie in (0, 1]')
  for key, off in (('top_k', 0), ('top_p', 1)):
    require(
      s.temperature > 0 or s[key] == off,
      f'config.sample.{key}={s[key]} chooses among tokens to draw from: set '
      'config.sample.temperature above 0',
    )
  require(
    -1 <= s.eot_id < m.vocab_size,
    f'config.sample.eot_id={s.eot_id} is outside the vocabulary of '
    f'config.model.vocab_size={m.vocab_size}; -1 for none',
  )
  require(
    not s.guidance or e.name == 'masked_diffusion',
    f'config.sample.guidance={s.guidance} needs '
    "config.objective.name='masked_diffusion'",
  )
  require(
    s.lookahead >= -1,
    f'config.sample.lookahead={s.lookahead} must be a number of blocks, or -1 '
    'for all',
  )
  require(
    not s.refresh or s.cache != 'none',
    f'config.sample.refresh={s.refresh} is how often a cache is made anew: set '
    'config.sample.cache too',
  )
  require(
    s.cache == 'none' or not m.predict_next,
    f'config.sample.cache={s.cache} is not for config.model.predict_next=True: '
    'the first prediction of a block would stand to the left of it; set '
    'config.sample.cache=none',
  )
  for key, off in (('cache', 'none'), ('lookahead', -1)):
    require(
      s[key] == off or e.name == 'masked_diffusion',
      f'config.sample.{key}={s[key]} needs '
      "config.objective.name='masked_diffusion'",
    )
  blocks = -(-s.gen_length // min(s.block_length, s.gen_length))
  require(
    s.steps % blocks == 0,
    f'config.sample.steps={s.steps} cannot be shared equally by {blocks} '
    f'blocks; choose a multiple of {blocks}',
  )


def validate_mesh(c, sizes):
  """Checks that batches split over the devices of a mesh.

  Args:
    c: the config.
    sizes: dict from mesh axis to its size.

  Raises:
    UserError: names the key and values that would do.
  """
  shards = sizes['replica'] * sizes['fsdp']
  for section, parts in (('train', c.train.microbatches), ('eval', 1)):
    batch, unit = c[section].batch, shards * parts
    if batch % unit:
      if c.objective.time_sampling == 'antithetic':
        unit = math.lcm(unit, 2)
      near = max(1, round(batch / unit)) * unit
      over = f'{shards} devices' + (
        f' x {parts} microbatches' if parts > 1 else ''
      )
      raise UserError(
        f'config.{section}.batch={batch} is not divisible by the mesh '
        f'({over}); --config.{section}.batch={near} is'
      )
  if c.data.length % sizes['sequence']:
    raise UserError(
      f'config.data.length={c.data.length} is not divisible by '
      f'config.mesh.sequence={sizes["sequence"]}'
    )
