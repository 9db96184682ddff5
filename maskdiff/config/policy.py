"""Config keys of policy optimization and of preference learning.

launch/preferences.py reads `method`, `settings` and `reference`.
"""

from maskdiff.config.key import Key, require

METHODS = (
  'espo',
  'd1',
  'wd1',
  'coupled_grpo',
  'spg',
  'stable_drl',
  'tracerl',
  'tracerl_blocks',
  'random_masks',
  'justgrpo',
  'reinforce',
  'vrpo',
)
KEYS = {
  'method': Key(
    'espo',
    'Method of policy optimization; docs/rl.md has a table. vrpo is for '
    'launch/preferences.py.',
    METHODS,
  ),
  'settings': Key(
    (),
    'Settings of the method that differ from the published ones, as (name, '
    "value), ..., such as (('clip_low', 0.0), ('times', 4)).",
  ),
  'baseline': Key(
    'published',
    'Subtracted from the rewards of a group. published: that of the method.',
    ('published', 'none', 'group_mean', 'leave_one_out'),
  ),
  'deviation': Key(
    'published',
    'Standard deviation of a group by which advantages are divided.',
    ('published', 'none', 'population', 'sample'),
  ),
  'task': Key(
    'countdown',
    'Task whose questions are answered: a name of docs/rewards.md, FILE.jsonl, '
    'or reasoning_gym:NAME.',
  ),
  'reward': Key(
    '', 'Name of a reward, or FILE.py:FUNCTION. Empty: that of the task.'
  ),
  'reward_workers': Key(2, 'Processes that compute rewards.', minimum=1),
  'reward_timeout_s': Key(
    10.0, 'Limit for the reward of one answer, in seconds.', above=0
  ),
  'chat_template': Key(
    '',
    'Chat template of the prompts: a name, a folder or a *.jinja file. none: '
    'prompts are plain text. Empty: the template of init_from, if it has one.',
  ),
  'prompts': Key(8, 'Prompts per round.', minimum=1),
  'group': Key(8, 'Answers per prompt, G.', minimum=2),
  'inner_steps': Key(
    1,
    'Train steps per round, each on all answers of the round with masks of its '
    'own.',
    minimum=1,
  ),
  'sampling_rows': Key(
    0,
    'Answers sampled at a time. A row whose answer has ended takes the next '
    'prompt. 0: all answers of a round.',
    minimum=0,
  ),
  'sampling_dtype': Key(
    'bfloat16',
    'Dtype of the copy of the parameters that samples the answers.',
    ('float32', 'bfloat16'),
  ),
  'eval_temperature': Key(
    0.0, 'Sampling temperature for held-out questions.', minimum=0
  ),
  'reference': Key(
    '',
    'Hugging Face folder or work directory of the reference network. Empty: '
    'init_from; with adapters, the base without a copy.',
  ),
  'reference_dtype': Key(
    'float32',
    'Dtype in which the reference is stored. bfloat16 halves its memory, and '
    'loses nothing if it was in bfloat16.',
    ('float32', 'bfloat16'),
  ),
  'measure_kl': Key(
    False,
    'Also compute the divergence from the reference if the method does not '
    'need it, as a metric. Costs a forward pass per masked copy.',
  ),
}


def check(c):
  """Raises UserError if a value of this section has the wrong form."""
  pairs = c.policy.settings
  is_pair = lambda x: isinstance(x, tuple) and len(x) == 2 and type(x[0]) is str
  require(
    all(map(is_pair, pairs)),
    f"config.policy.settings={pairs!r}: must be pairs, such as (('clip_low', "
    '0.0),)',
  )
