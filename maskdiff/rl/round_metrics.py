"""Metrics of policy optimization: of the rollouts of a round, and of steps."""

import numpy as np

from maskdiff.monitoring.stage_file import Curve
from maskdiff.rl import rollouts

SHOWN = 4  # held-out answers that are written to the metrics
PANELS = (
  Curve(
    'reward',
    'Reward',
    'Mean over the sampled answers.',
    'train/reward',
    smooth=True,
    reduce='mean',
    from_zero=False,
  ),
  Curve(
    'heldout_reward',
    'Held-out reward',
    'Mean over held-out questions.',
    'eval/reward',
    from_zero=False,
  ),
  Curve(
    'answer_tokens',
    'Length of answers',
    'Tokens up to the first eos, mean over the sampled answers.',
    'train/answer_tokens',
    smooth=True,
    reduce='mean',
  ),
  Curve(
    'kl',
    'Divergence from the reference',
    'The estimate of the method, nats.',
    'train/kl',
    smooth=True,
    reduce='mean',
  ),
  Curve(
    'constant_groups',
    'Groups of equal rewards',
    'Share of groups that give no gradient.',
    'train/constant_groups',
    smooth=True,
    reduce='mean',
  ),
)


def of_rewards(rewards, prefix='train/'):
  """Returns the mean reward and the means of its parts, a dict of floats.

  Args:
    rewards: reward_pool.Rewards.
    prefix: of the names.
  """
  return {
    f'{prefix}reward': float(rewards.total.mean()),
    **{
      f'{prefix}reward_{name}' if name != 'correct' else f'{prefix}correct': (
        float(part.mean())
      )
      for name, part in rewards.parts.items()
    },
    f'{prefix}failed_rewards': float(rewards.failed.mean()),
  }


def of_round(config, answers, rewards, group):
  """Returns the metrics of the rollouts of a round, a dict of floats.

  Args:
    config: ConfigDict.
    answers: rollouts.Answers.
    rewards: reward_pool.Rewards.
    group: G.
  """
  eos_id, recordings = config.tokens.eos_id, answers.recordings
  empty = [not rollouts.answer_tokens(r, (eos_id,)) for r in recordings]
  by_group = rewards.total.reshape(-1, group)
  constant = (by_group == by_group[:, :1]).all(axis=1)
  tokens = [rollouts.num_counted(r, eos_id) for r in recordings]
  row = of_rewards(rewards) | {
    'train/constant_groups': float(constant.mean()),
    'train/empty_groups': float(
      np.reshape(empty, (-1, group)).all(axis=1).mean()
    ),
    'train/answer_tokens': float(np.mean(tokens)),
    'train/sampling_forwards': float(answers.forwards),
  }
  if config.sample.confidence == 'probability':
    row['train/sampled_nats_per_token'] = rollouts.sampled_nats(
      recordings, eos_id
    )
  return row


def row(metrics, of_rounds, forwards_per_step):
  """Returns the row of metrics of some steps; see `Stage.row`.

  Means are over the applied updates, and over the rounds that began.

  Args:
    metrics: list of step.StepMetrics.
    of_rounds: list of results of `of_round`, with `fixed_forwards`.
    forwards_per_step: forward passes of a train step, over rows.
  """
  values = {
    name: float(np.mean([r[name] for r in of_rounds if name in r]))
    for name in sorted({name for r in of_rounds for name in r})
    if name not in ('train/sampling_forwards', 'fixed_forwards')
  }
  total = lambda name: float(sum(r[name] for r in of_rounds))
  values |= {
    'train/sampling_forwards': total('train/sampling_forwards'),
    'train/training_forwards': total('fixed_forwards')
    + float(forwards_per_step * len(metrics)),
  }
  return values | of_steps(metrics)


def of_steps(metrics):
  """Returns the means of loss and metrics of some steps, a dict of floats.

  Args:
    metrics: list of step.StepMetrics; skipped updates are left out.
  """
  applied = [m.sums for m in metrics if not m.skipped]
  if not applied:
    return {}
  of = lambda name: [float(sums.metrics[name]) for sums in applied]
  reduce = {'ratio_min': np.min, 'ratio_max': np.max}
  values = {
    f'train/{name}': float(reduce.get(name, np.mean)(of(name)))
    for name in applied[0].metrics
  }
  return values | {
    'train/policy_loss': float(np.mean([s.loss for s in applied]))
  }


def line(row):
  """Returns reward, divergence and ratios of a row of metrics."""
  shown = (
    ('reward', 'train/reward', '.3f'),
    ('correct', 'train/correct', '.1%'),
    ('kl', 'train/kl', '.4f'),
    ('clipped', 'train/clip_fraction', '.1%'),
    ('empty groups', 'train/empty_groups', '.1%'),
    ('lr', 'train/learning_rate', '.2e'),
  )
  return '  '.join(
    f'{name} {row[key]:{form}}'
    for name, key, form in shown
    if key in row and (row[key] or key != 'train/empty_groups')
  )
