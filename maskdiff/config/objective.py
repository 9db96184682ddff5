"""Config keys of the training objective."""

from maskdiff.config.key import Key

KEYS = {
  'name': Key(
    'masked_diffusion',
    'Training objective.',
    ('masked_diffusion', 'autoregressive'),
  ),
  'schedule': Key(
    'linear',
    'Noise schedule: the mask ratio as a function of diffusion time.',
    ('linear', 'cosine', 'polynomial'),
  ),
  'schedule_power': Key(
    2.0, 'Exponent of the polynomial noise schedule.', above=0
  ),
  'eps': Key(
    1e-3, 'Diffusion times are drawn from [eps, 1).', above=0, below=1
  ),
  'time_sampling': Key(
    'antithetic',
    'How the diffusion times of a batch are drawn.',
    ('antithetic', 'stratified', 'iid'),
  ),
  'random_length_fraction': Key(
    0.01, 'Share of rows cut to a random length.', minimum=0, maximum=1
  ),
  'attend_within': Key(
    'row',
    'Tokens attend to their whole row, or only to their own document.',
    ('row', 'document'),
  ),
  'predict_mask': Key(
    False, 'Keep the mask token in the softmax, as in LLaDA.'
  ),
  'loss_chunk_tokens': Key(
    512,
    'Positions per chunk of the cross entropy. The logits of a chunk take '
    'loss_chunk_tokens x vocab_size x 4 bytes.',
    minimum=1,
  ),
}
