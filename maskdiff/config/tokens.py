"""Config keys of the special tokens."""

from maskdiff.config.key import Key, require

KEYS = {
  'mask_id': Key(4, 'Id of the mask token.'),
  'bos_id': Key(
    1,
    'Id of the bos token, the first input of a row of the autoregressive '
    'objective and of sdlm. -1: none, for sdlm.',
  ),
  'eos_id': Key(2, 'Id of the token that ends a document (eos).'),
}


def check(c):
  """Raises UserError if keys of this section contradict each other."""
  for name, value in c.tokens.items():
    if name == 'bos_id' and value == -1 and c.objective.name == 'sdlm':
      continue
    require(
      0 <= value < c.model.vocab_size,
      f'config.tokens.{name}={value} is outside the vocabulary of '
      f'config.model.vocab_size={c.model.vocab_size}',
    )
