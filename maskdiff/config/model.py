"""Config keys of the network."""

from maskdiff.config.key import Key, are_numbers, require
from maskdiff.errors import UserError

KEYS = {
  'vocab_size': Key(4096, 'Vocabulary size V.', minimum=1),
  'embed': Key(256, 'Embedding dimension D.', minimum=1),
  'layers': Key(4, 'Number of layers N.', minimum=1),
  'heads': Key(4, 'Number of attention heads H.', minimum=1),
  'kv_heads': Key(
    4,
    'Number of key and value heads G, a divisor of heads. Fewer than heads: '
    'grouped-query attention.',
    minimum=1,
  ),
  'head_dim': Key(64, 'Dimension K of a head; even.', minimum=1),
  'mlp': Key(704, 'Hidden dimension F of the feed-forward layers.', minimum=1),
  'tie_embeddings': Key(
    True, 'Use one matrix for the input embedding and the output head.'
  ),
  'rope_theta': Key(
    500_000.0, 'Base of the rotary embedding wavelengths.', above=0
  ),
  'norm_eps': Key(
    1e-5, 'Added to the mean square in RMS normalization.', above=0
  ),
  'dtype': Key(
    'bfloat16',
    'Dtype of activations. Parameters are float32.',
    ('float32', 'bfloat16'),
  ),
  'remat': Key(
    'full',
    'Rematerialization: the activations of a layer that are stored for the '
    'backward pass, from all (none) to its input only (full).',
    ('none', 'minimal', 'attention', 'attended', 'offload', 'full'),
  ),
  'attention': Key(
    'auto',
    'Attention kernel. splash needs a TPU, cudnn an NVIDIA GPU.',
    ('auto', 'xla', 'splash', 'cudnn'),
  ),
  'quantization': Key(
    'none',
    'int8: matrix products of the layers, and their gradients by activations, '
    'have operands of 8 bits, rounded anew in each step.',
    ('none', 'int8'),
  ),
  'qkv_bias': Key(
    False, 'Add biases to queries, keys and values, as in Qwen2.'
  ),
  'qk_norm': Key(
    False, 'Normalize queries and keys in each head (RMS norm), as in Qwen3.'
  ),
  'zero_outputs': Key(
    False,
    'Initialize the output projections of attention and feed-forward layers '
    'to 0, so that every layer starts as the identity.',
  ),
  'predict_next': Key(
    False,
    'The output at a position predicts the token of the next position, as in '
    'Dream and other networks converted from autoregressive models.',
  ),
  'rope_scaling': Key(
    (),
    'RoPE scaling. (tokens of a training row, tokens of the longest row): '
    'diffusion-aware NTK, for rows longer than those of the training. (factor, '
    'low_freq_factor, high_freq_factor, original context length): that of '
    'Llama 3.1. (): none.',
  ),
}


def check(c):
  """Raises UserError if keys of this section contradict each other."""
  m = c.model
  require(
    m.heads % m.kv_heads == 0,
    f'config.model.heads={m.heads} is not a multiple of '
    f'config.model.kv_heads={m.kv_heads}',
  )
  require(
    m.head_dim % 2 == 0,
    f'config.model.head_dim={m.head_dim} must be even: rotary embeddings '
    'rotate pairs of dimensions',
  )
  require(
    not m.predict_next
    or c.objective.name in ('masked_diffusion', 'block_diffusion'),
    'config.model.predict_next=True is for '
    "config.objective.name='masked_diffusion' or 'block_diffusion': the "
    f'objective {c.objective.name} predicts the next token already; set '
    '--config.model.predict_next=False',
  )
  require(
    len(m.rope_scaling) in (0, 2, 4)
    and are_numbers(m.rope_scaling)
    and all(x > 0 for x in m.rope_scaling),
    f'config.model.rope_scaling={m.rope_scaling}: must be (), (tokens of a '
    'training row, tokens of the longest row) or '
    "Llama 3.1's (factor, low_freq_factor, high_freq_factor, length)",
  )
  if len(m.rope_scaling) == 2:
    _check_ntk(c)


def _check_ntk(c):
  """Raises UserError if the NTK scaling does not fit the config."""
  trained, longest = c.model.rope_scaling
  name = f'config.model.rope_scaling=({trained}, {longest})'
  require(
    4 <= trained < longest and {type(trained), type(longest)} == {int},
    f'{name}: must be two integers, tokens of a training row (at least 4) and '
    'tokens of the longest row, which are more',
  )
  require(
    c.data.length <= longest,
    f'{name} is for rows of at most {longest} tokens, but config.data.length='
    f'{c.data.length}; set --config.model.rope_scaling="({trained}, '
    f'{c.data.length})"',
  )
  require(
    c.objective.name == 'masked_diffusion',
    f'{name} counts relative positions on both sides of a token, for '
    "bidirectional attention: set config.objective.name='masked_diffusion', "
    f'not {c.objective.name!r}, or --config.model.rope_scaling="()"',
  )
  require(
    c.model.rope_theta > 1,
    f'{name} needs config.model.rope_theta above 1, not {c.model.rope_theta}',
  )


def scale_rows(c, scaling):
  """Sets the NTK scaling of a trained model, and the length of its rows.

  Args:
    c: ConfigDict of the model, changed in place.
    scaling: tokens of a training row and of the longest row, two integers or
      texts; None or () changes nothing.

  Raises:
    UserError: the numbers are not valid; or the model has Llama 3.1's scaling,
      or an NTK scaling from other training rows.
  """
  if not scaling:
    return
  shown = ','.join(map(str, scaling))
  try:
    trained, longest = map(int, scaling)
  except ValueError as error:
    raise UserError(
      f'rope_scaling={shown}: must be two integers, tokens of a training row '
      'and tokens of the longest row, such as 4096,16384'
    ) from error
  stored = tuple(c.model.rope_scaling)
  require(
    extends(stored, (trained, longest)),
    f'rope_scaling={shown}: the model has config.model.rope_scaling={stored}, '
    'and only the second of two numbers can change',
  )
  c.model.rope_scaling = (trained, longest)
  c.data.length = longest
  check(c)


def extends(stored, scaling):
  """Returns whether a model with the scaling `stored` may get `scaling`."""
  return len(scaling) == 2 and (
    not stored or (len(stored) == 2 and stored[0] == scaling[0])
  )
