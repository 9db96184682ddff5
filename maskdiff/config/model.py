"""Config keys of the network."""

from maskdiff.config.key import Key, are_numbers, require

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
    'RoPE scaling of Llama 3.1 as (factor, low_freq_factor, high_freq_factor, '
    'original context length); (): none.',
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
    len(m.rope_scaling) in (0, 4)
    and are_numbers(m.rope_scaling)
    and all(x > 0 for x in m.rope_scaling),
    f"config.model.rope_scaling={m.rope_scaling}: must be () or Llama 3.1's "
    '(factor, low_freq_factor, high_freq_factor, length)',
  )
