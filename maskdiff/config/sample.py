"""Config keys of the sampler.

Each key except `prompts` is also a setting of the sampler and a flag of
launch/sample.py. Requests of one batch may differ in the settings with
per_request=True, the fields of sampling.settings.Settings. A new value of such
a setting compiles nothing. The other settings shape the compiled program: they
are the fields of sampling.settings.SamplerConfig.
"""

from maskdiff.config.key import Key, require

KEYS = {
  'prompts': Key(
    ('',), 'Prompts that every evaluation continues; (): no samples.'
  ),
  'gen_length': Key(
    64, 'Tokens to add to a prompt.', minimum=1, per_request=True
  ),
  'block_length': Key(
    64, 'Tokens per block. Blocks are filled from left to right.', minimum=1
  ),
  'steps': Key(
    64,
    'Denoising steps in total, divided equally among the blocks.',
    minimum=1,
    per_request=True,
  ),
  'temperature': Key(
    0.0,
    'Sampling temperature. 0: take the most probable token.',
    minimum=0,
    per_request=True,
  ),
  'top_k': Key(
    0,
    'Sample among the k most probable tokens. 0: all.',
    minimum=0,
    per_request=True,
  ),
  'top_p': Key(
    1.0,
    'Nucleus sampling: the smallest set of tokens with this total '
    'probability. 1: all.',
    above=0,
    maximum=1,
    per_request=True,
  ),
  'remasking': Key(
    'low_confidence',
    'Remasking rule: which predictions a denoising step commits. '
    'longest_prefix, cumulative_prefix and speculative commit from left to '
    'right, for networks trained with sdlm: while the tokens are confident, or '
    'while the network itself confirms them. With these networks threshold and '
    'factor commit any tokens of a window. ancestral '
    "and first_hitting sample the model's own distribution at temperature 1, "
    'ancestral in the limit of many steps.',
    (
      'low_confidence',
      'random',
      'threshold',
      'quota_and_threshold',
      'factor',
      'ancestral',
      'first_hitting',
      'longest_prefix',
      'cumulative_prefix',
      'speculative',
    ),
  ),
  'schedule': Key(
    'linear',
    'How the number of masked tokens falls over the denoising steps. '
    'Not used by remasking=threshold, factor and first_hitting.',
    ('linear', 'cosine'),
  ),
  'confidence': Key(
    'probability',
    'Score by which predictions are ranked: probability of the token, entropy '
    'of the slot, or margin between the two most probable tokens.',
    ('probability', 'entropy', 'margin'),
  ),
  'threshold': Key(
    0.9,
    'remasking=threshold and quota_and_threshold commit every prediction with '
    'at least this confidence. longest_prefix commits predictions while each '
    'exceeds it, cumulative_prefix while their product is at least this. At 1 '
    'these two commit one token per step.',
    minimum=0,
    per_request=True,
  ),
  'factor': Key(
    1.0,
    'remasking=factor commits the n most confident predictions while the n-th '
    'has at least 1 - factor / (n + 1).',
    minimum=0,
    per_request=True,
  ),
  'guidance': Key(
    0.0,
    'Scale of classifier-free guidance. A scale above 0 doubles the forward '
    'passes. 0: off.',
    minimum=0,
    maximum=1000,  # the logits must not overflow
    per_request=True,
  ),
  'stop_at_eos': Key(
    False,
    'End an answer at its first eos; sample no token after it.',
    per_request=True,
  ),
  'logits_eos_inf': Key(False, 'Never predict eos.', per_request=True),
  'confidence_eos_eot_inf': Key(
    False,
    'Commit eos and end of turn last. Needs eot_id.',
    per_request=True,
  ),
  'eot_id': Key(
    -1, 'Id of the end-of-turn token. -1: none.', minimum=-1, per_request=True
  ),
  'cache': Key(
    'none',
    'KV cache of the tokens before the block (prefix), or of all tokens '
    'outside the block (dual). The first step of a block computes it. The '
    'cache is an approximation unless refresh is 1. For autoregressive '
    'networks, prefix is an exact cache.',
    ('none', 'prefix', 'dual'),
  ),
  'refresh': Key(
    0,
    'Recompute the cache after this many steps of a block. 0: only at the '
    'first step of a block.',
    minimum=0,
  ),
  'lookahead': Key(
    -1,
    'Blocks of mask tokens after the current block that the network sees. '
    '-1: all. With 0 or more, the network cannot see the maximum length of '
    'the answer.',
    minimum=-1,
    maximum=1_000_000,
  ),
}
# Settings of the sampler: everything except the prompts of evaluations.
SETTINGS = {name: key for name, key in KEYS.items() if name != 'prompts'}
PER_REQUEST = tuple(n for n, key in SETTINGS.items() if key.per_request)


def block_length(c):
  """Returns the tokens per block of the sampler, for a run's config."""
  if c.objective.name == 'block_diffusion':
    return min(c.sample.block_length, c.objective.block_length)
  return c.sample.block_length


# Remasking rules of networks that predict windows: from left to right, and all
# of them.
PREFIX_RULES = ('longest_prefix', 'cumulative_prefix', 'speculative')
WINDOW_RULES = (*PREFIX_RULES, 'threshold', 'factor')


def fit_rule(c, given=()):
  """Sets the remasking rule of a network with windows or a drafter.

  Args:
    c: ConfigDict, changed in place if its rule is the default and its objective
      is sdlm or drafting, which the default does not fit.
    given: dotted keys that flags have set; they keep their values.
  """
  is_default = c.sample.remasking == KEYS['remasking'].default
  if is_default and 'sample.remasking' not in given:
    c.sample.remasking = {
      'sdlm': 'longest_prefix',
      'drafting': 'speculative',
    }.get(c.objective.name, c.sample.remasking)


def check_prefix_rule(remasking, threshold, windows, drafts, prefix=''):
  """Raises UserError unless a remasking rule fits the windows of a network.

  Args:
    remasking: name of the rule.
    threshold: largest value of the setting.
    windows: whether the network predicts windows of tokens.
    drafts: whether the network has a drafter.
    prefix: of the names of the settings, such as 'config.sample.'.
  """
  require(
    remasking in WINDOW_RULES or not windows,
    f'{prefix}remasking={remasking} is for blocks of slots, and a network '
    'trained with objective sdlm fills windows; set '
    f'{prefix}remasking={", ".join(WINDOW_RULES[:-1])} or {WINDOW_RULES[-1]}',
  )
  require(
    remasking == 'speculative' or not drafts,
    f'{prefix}remasking={remasking} does not use the drafter; set {prefix}'
    'remasking=speculative, or sample the network without it: the model that '
    'the drafter was trained for, or an export of this one',
  )
  require(
    remasking != 'speculative' or windows or drafts,
    f'{prefix}remasking=speculative verifies tokens that a network trained '
    f'with objective sdlm or drafting guesses; set {prefix}remasking='
    f'{PREFIX_RULES[0]}',
  )
  require(
    threshold <= 1 or remasking not in PREFIX_RULES[:2],
    f'{prefix}threshold={threshold:g} of {prefix}remasking={remasking} is a '
    f'probability; set {prefix}threshold=1 for one token per step',
  )


def check(c):
  """Raises UserError if keys of this section contradict each other."""
  s, masked_diffusion = c.sample, c.objective.name == 'masked_diffusion'
  require(
    all(isinstance(prompt, str) for prompt in s.prompts),
    f'config.sample.prompts={s.prompts}: must be strings',
  )
  for key, off in (('top_k', 0), ('top_p', 1)):
    require(
      s.temperature > 0 or s[key] == off,
      f'config.sample.{key}={s[key]} has no effect at temperature 0: set '
      'config.sample.temperature above 0',
    )
  require(
    s.eot_id < c.model.vocab_size,
    f'config.sample.eot_id={s.eot_id} is outside the vocabulary of '
    f'config.model.vocab_size={c.model.vocab_size}; -1 for none',
  )
  require(
    not s.confidence_eos_eot_inf or s.eot_id >= 0,
    'config.sample.confidence_eos_eot_inf=True needs an end-of-turn token: set '
    'config.sample.eot_id to its id, or to the id of eos if the tokenizer has '
    'none',
  )
  require(
    not s.refresh or s.cache != 'none',
    f'config.sample.refresh={s.refresh} recomputes a cache: set '
    'config.sample.cache too',
  )
  for key, off in (('guidance', 0), ('refresh', 0), ('lookahead', -1)):
    require(
      s[key] == off or masked_diffusion,
      f'config.sample.{key}={s[key]} needs '
      "config.objective.name='masked_diffusion'",
    )
  require(
    s.cache != 'dual' or masked_diffusion,
    'config.sample.cache=dual caches the tokens after a block, which a network '
    f"trained with config.objective.name='{c.objective.name}' does not see; "
    'set config.sample.cache=prefix',
  )
  windows, drafts = (c.objective.name == name for name in ('sdlm', 'drafting'))
  check_prefix_rule(s.remasking, s.threshold, windows, drafts, 'config.sample.')
  size, whole = block_length(c), c.objective.block_length
  require(
    c.objective.name != 'block_diffusion' or whole % size == 0,
    f'config.sample.block_length={size} does not divide the blocks of '
    f'config.objective.block_length={whole} that the network sees; set '
    f'--config.sample.block_length={whole}',
  )
  blocks = -(-s.gen_length // min(size, s.gen_length))
  require(
    s.steps % blocks == 0,
    f'config.sample.steps={s.steps} cannot be divided equally among {blocks} '
    f'blocks; choose a multiple of {blocks}',
  )
