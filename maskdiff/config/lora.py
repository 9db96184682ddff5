"""Config keys of low-rank adapters (LoRA)."""

from maskdiff.config.key import Key, require
from maskdiff.errors import suggestion

TARGETS = (
  'query',
  'key',
  'value',
  'attention_output',
  'gate',
  'up',
  'down',
)

KEYS = {
  'rank': Key(
    0,
    'Rank of low-rank adapters (LoRA). Only the adapters are trained; the '
    'other parameters stay those of init_from. 0: all parameters are trained.',
    minimum=0,
  ),
  'alpha': Key(
    32.0, 'The product of the adapters is multiplied by alpha / rank.', above=0
  ),
  'targets': Key(
    ('all',),
    'Matrices of the layers that have adapters: query, key, value, '
    'attention_output, gate, up, down; or all.',
  ),
  'base_dtype': Key(
    'float32',
    'Dtype in which parameters that are not trained are stored. bfloat16 '
    'halves their memory, and loses nothing if init_from is in bfloat16.',
    ('float32', 'bfloat16'),
  ),
}


def check(c):
  """Raises UserError if keys of this section contradict each other."""
  targets = c.lora.targets
  known = ('all', *TARGETS)
  require(len(targets) > 0, "config.lora.targets=(): name a matrix, or 'all'")
  for target in targets:
    require(
      target in known,
      f'config.lora.targets={targets}: {target!r} matches no matrix; choose '
      f'from {", ".join(known)}' + suggestion(target, known),
    )
  if not c.lora.rank:
    return
  require(
    c.optimizer.name == 'adamw',
    'config.optimizer.name=muon orthogonalizes whole matrices, and adapters '
    'are factors of matrices; set --config.optimizer.name=adamw',
  )
  require(
    c.train.ema_decay == 0,
    f'config.train.ema_decay={c.train.ema_decay} keeps an average of all '
    'parameters, and config.lora.rank trains only adapters; set '
    '--config.train.ema_decay=0',
  )
