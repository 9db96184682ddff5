"""Config keys of the training objective."""

import math

from maskdiff.config.key import Key, are_numbers, require

MAX_ANNEALED_LENGTH = 2**16  # tokens; see model/annealing.py
LEFT_TO_RIGHT = ('autoregressive', 'sdlm', 'drafting')  # without random masks

KEYS = {
  'name': Key(
    'masked_diffusion',
    'Training objective.',
    (
      'masked_diffusion',
      'autoregressive',
      'block_diffusion',
      'sdlm',
      'drafting',
    ),
  ),
  'schedule': Key(
    'linear',
    'Noise schedule: the mask ratio as a function of diffusion time t. cosine: '
    'sin(pi t / 2), as in MD4. polynomial: t to the power of schedule_power. '
    'log and cosine_bd3lm: log2(1 + t) and 1 - cos(pi t / 2), as in BD3-LM.',
    ('linear', 'cosine', 'polynomial', 'log', 'cosine_bd3lm'),
  ),
  'schedule_power': Key(
    2.0, 'Exponent of the polynomial noise schedule.', above=0
  ),
  'eps': Key(
    1e-3,
    'Diffusion times are drawn from [eps, 1). Those of the held-out bound are '
    'drawn from [0.001, 1).',
    above=0,
    below=1,
  ),
  'time_sampling': Key(
    'antithetic',
    'How the diffusion times of a batch are drawn.',
    ('antithetic', 'stratified', 'iid'),
  ),
  'time_density': Key(
    'uniform',
    'Density of the diffusion times in training. The held-out bound always '
    'has uniform times.',
    ('uniform', 'bell'),
  ),
  'bell_mean': Key(
    0.5,
    'Mean of the normal distribution of time_density=bell.',
    minimum=0,
    maximum=1,
  ),
  'bell_width': Key(
    0.12,
    'Standard deviation of the normal distribution of time_density=bell, '
    'before it is cut to the interval of times.',
    minimum=0.01,
  ),
  'bell_uniform_share': Key(
    0.0,
    'Share of uniform times, mixed with those of time_density=bell.',
    minimum=0,
    maximum=1,
  ),
  'time_interval': Key(
    (0.0, 1.0), 'First and last diffusion time drawn in training.'
  ),
  'weight': Key(
    'bound',
    'Weight of a masked token in training. bound: as in the bound, 1/t for the '
    'linear schedule. importance: the same divided by the density of the time, '
    'so that the expected loss is the bound. power: 1 / mask_ratio to the '
    'power of weight_power.',
    ('bound', 'importance', 'power'),
  ),
  'weight_power': Key(
    0.0, 'Exponent of weight=power. 0 is cross entropy without weights.'
  ),
  'uniform_after': Key(
    1.0,
    'Share of train.steps after which times are uniform and weights are those '
    'of the bound. 1 never changes them.',
    minimum=0,
    maximum=1,
  ),
  'random_length_fraction': Key(
    0.01, 'Share of rows cut to a random length.', minimum=0, maximum=1
  ),
  'complementary_masks': Key(
    False,
    'Train on every row twice, the second time with the masks exchanged: '
    'tokens that are masked in one copy are not in the other. A step takes '
    'twice the time and memory. The held-out bound has single masks.',
  ),
  'block_length': Key(
    32,
    'Tokens per block of block_diffusion, a divisor of data.length. Other '
    'objectives ignore it.',
    minimum=1,
  ),
  'clean_attention': Key(
    'block',
    'Attention within the clean copy of block_diffusion: to whole blocks, or '
    'causal. A sampler caches the blocks before the current one in this way.',
    ('block', 'causal'),
  ),
  'autoregressive_weight': Key(
    0.0,
    'Weight of an autoregressive loss, which is added to the loss: of the '
    'clean copy of block_diffusion, which needs clean_attention=causal, or of '
    'the network of a drafter. With drafting, 0 trains the drafter only.',
    minimum=0,
  ),
  'position_power': Key(
    1.0,
    'Above 1, block_diffusion masks later tokens of a block more often in '
    'training: the mask ratio of the first position is raised to this power, '
    'that of the last to its inverse. The held-out bound has equal ratios.',
    above=0,
  ),
  'block_plan': Key(
    (),
    'Block lengths that change during the training of block_diffusion, as '
    '(share of train.steps, block length), ...; for example ((0.0, 1), (0.1, '
    '8), (0.5, 32)). The last is block_length, which evaluation and samples '
    'always have. (): block_length during the whole training.',
  ),
  'confidence_weight': Key(
    0.0,
    'Adds the entropy of the predicted distribution, times this weight, to the '
    'loss of a masked token whose most probable token is right, as in the '
    'fine-tuning of LLaDA 2.0. Metrics and the held-out bound leave it out.',
    minimum=0,
  ),
  'anneal_steps': Key(
    0,
    'First steps of masked_diffusion in which attention is annealed from '
    'causal to bidirectional, for a network that was autoregressive. A token '
    'attends to a later token with a probability of step / anneal_steps, drawn '
    'at every step. Evaluation, samples and exports are bidirectional. 0: the '
    'training is bidirectional.',
    minimum=0,
  ),
  'window_length': Key(
    4,
    'Tokens that sdlm predicts at once, D. 1 is the autoregressive objective. '
    'With drafting, the tokens that a pass verifies: the next token and D - 1 '
    'drafts. Other objectives ignore it.',
    minimum=1,
  ),
  'window_attention': Key(
    'bidirectional',
    'Attention within a window of sdlm.',
    ('bidirectional', 'causal'),
  ),
  'anchors': Key(
    'stride',
    'Where the windows of sdlm and drafting begin in training. stride: every D '
    'tokens, after a random shift of the row; a training row of sdlm has 2 x '
    'data.length positions. random: at random answer tokens, as in the '
    'published code.',
    ('stride', 'random'),
  ),
  'window_repeats': Key(
    3.0,
    'Times that anchors=random predicts a token of an answer, on average, '
    'while there are enough anchors.',
    above=0,
  ),
  'draft_decay': Key(
    0.8,
    'Each draft of a window has the weight of the one before times this number '
    'in the loss of drafting, as in Medusa. 1: equal weights.',
    above=0,
    maximum=1,
  ),
  'denominator': Key(
    'token',
    'Divisor of the training loss. token: the answer tokens of the batch. '
    'row: each row is divided by its own answer tokens, then by the rows, as '
    "in LLaDA's fine-tuning. batch: the rows. Rows without an answer do not "
    'count. The held-out bound is per token.',
    ('token', 'row', 'batch'),
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


def check(c):
  """Raises UserError if keys of this section contradict each other."""
  o, length = c.objective, c.data.length
  require(
    o.name != 'block_diffusion' or length % o.block_length == 0,
    f'config.objective.block_length={o.block_length} does not divide '
    f'config.data.length={length}; set --config.objective.block_length='
    f'{math.gcd(o.block_length, length)}',
  )
  _check_block_plan(o, length)
  _check_windows(o, length)
  require(
    not o.complementary_masks or o.name not in LEFT_TO_RIGHT,
    'config.objective.complementary_masks=True needs random masks, and the '
    f'objective {o.name} has none; set '
    '--config.objective.complementary_masks=False',
  )
  require(
    not o.complementary_masks
    or o.name != 'block_diffusion'
    or (o.block_length > 1 and 1 not in dict(o.block_plan).values()),
    'config.objective.complementary_masks=True needs blocks of two or more '
    'tokens: a block of one token is always masked; set '
    '--config.objective.complementary_masks=False',
  )
  require(
    o.clean_attention == 'block'
    or (o.name == 'block_diffusion' and o.block_length < length),
    'config.objective.clean_attention=causal is for block_diffusion with more '
    'than one block; set --config.objective.clean_attention=block',
  )
  require(
    o.autoregressive_weight == 0
    or o.clean_attention == 'causal'
    or o.name == 'drafting',
    f'config.objective.autoregressive_weight={o.autoregressive_weight} is for '
    'drafting, and for block_diffusion with a causal clean copy, which does '
    'not see the predicted tokens; set '
    '--config.objective.clean_attention=causal',
  )
  require(
    o.position_power == 1
    or (o.name == 'block_diffusion' and o.block_length > 1),
    f'config.objective.position_power={o.position_power} is for '
    'block_diffusion with two or more tokens per block; set '
    '--config.objective.position_power=1',
  )
  require(
    o.confidence_weight == 0
    or (o.name not in LEFT_TO_RIGHT and o.autoregressive_weight == 0),
    f'config.objective.confidence_weight={o.confidence_weight} is for masked '
    'tokens, without an autoregressive loss; set '
    '--config.objective.confidence_weight=0',
  )
  _check_annealing(c)
  interval = o.time_interval
  require(
    len(interval) == 2
    and are_numbers(interval)
    and 0 <= interval[0] < interval[1] <= 1,
    f'config.objective.time_interval={interval}: must be two numbers, start '
    'and end, with 0 <= start < end <= 1',
  )
  require(
    o.time_density != 'bell' or interval[0] <= o.bell_mean <= interval[1],
    f'config.objective.bell_mean={o.bell_mean}: must be within '
    f'config.objective.time_interval={interval}',
  )
  require(
    o.weight != 'importance'
    or o.time_density == 'uniform'
    or o.bell_uniform_share > 0,
    'config.objective.weight=importance divides by the density, and '
    'time_density=bell has times that are hardly ever drawn; set '
    '--config.objective.bell_uniform_share=0.1',
  )
  require(
    o.weight != 'importance' or tuple(interval) == (0, 1),
    'config.objective.weight=importance needs all times; set '
    '--config.objective.time_interval="(0.0, 1.0)"',
  )


def _check_annealing(c):
  """Raises UserError unless anneal_steps fits the config."""
  steps = c.objective.anneal_steps
  if not steps:
    return
  name = f'config.objective.anneal_steps={steps}'
  require(
    c.objective.name == 'masked_diffusion',
    f'{name} is for config.objective.name=masked_diffusion; set '
    '--config.objective.anneal_steps=0',
  )
  require(
    steps <= c.train.steps,
    f'{name} is more than config.train.steps={c.train.steps}, so the training '
    'would end with annealed attention; set '
    f'--config.objective.anneal_steps={c.train.steps}',
  )
  require(
    c.data.length <= MAX_ANNEALED_LENGTH,
    f'{name} is for rows of at most {MAX_ANNEALED_LENGTH} tokens, and '
    f'config.data.length={c.data.length}; set '
    '--config.objective.anneal_steps=0',
  )


def _check_windows(o, length):
  """Raises UserError unless the windows fit the rows."""
  if o.name not in ('sdlm', 'drafting'):
    return
  name = f'config.objective.window_length={o.window_length}'
  require(
    o.window_length <= length,
    f'{name} is longer than the rows of config.data.length={length}; set '
    f'--config.objective.window_length to at most {length}',
  )
  require(
    o.name == 'drafting'
    or o.anchors == 'random'
    or length % o.window_length == 0,
    f'{name} does not divide config.data.length={length}; set '
    '--config.objective.window_length='
    f'{math.gcd(o.window_length, length)}, or '
    '--config.objective.anchors=random',
  )


def _check_block_plan(o, length):
  """Raises UserError unless block_plan is a plan of block lengths."""
  plan = o.block_plan
  if not plan:
    return
  name = f'config.objective.block_plan={plan}'
  require(
    o.name == 'block_diffusion',
    f'{name} is for config.objective.name=block_diffusion; set '
    '--config.objective.block_plan="()"',
  )
  pairs = all(isinstance(p, tuple) and len(p) == 2 for p in plan)
  shares = [p[0] for p in plan] if pairs else []
  require(
    pairs
    and are_numbers(shares)
    and all(type(block) is int and block >= 1 for _, block in plan)
    and shares[0] == 0
    and all(a < b for a, b in zip(shares, (*shares[1:], 1), strict=True)),
    f'{name}: must be (share, block length) pairs whose shares begin with 0 '
    'and ascend below 1, as in ((0.0, 1), (0.1, 8), (0.5, 32))',
  )
  for _, block in plan:
    require(
      length % block == 0,
      f'{name}: the block length {block} does not divide '
      f'config.data.length={length}',
    )
  require(
    plan[-1][1] == o.block_length,
    f'{name} ends with the block length {plan[-1][1]}; set '
    f'--config.objective.block_length={plan[-1][1]}',
  )
