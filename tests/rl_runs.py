"""Configs of short runs of policy optimization, and a reward."""

import tiny

from maskdiff.rl import stage_config

REWARD = """
def share(question, text):
  return {'total': text.count('e') / max(1, len(text)), 'correct': 0.0}

def not_finite(question, text):
  return 0.0 if text in ('', question['answer']) else float('nan')
"""
INNER, STEPS = 3, 6


def keys(model, program):
  """Returns the keys of a run of three rounds on one reward.

  Args:
    model: pathlib.Path of the model to start from.
    program: pathlib.Path, to which REWARD is written.
  """
  program.write_text(REWARD)
  return {
    **tiny.TRAIN_KEYS,
    'init_from': str(model),
    'policy.task': 'addition',
    'policy.reward': f'{program}:share',
    'policy.prompts': 4,
    'policy.group': 4,
    'policy.inner_steps': INNER,
    'policy.sampling_dtype': 'float32',
    'policy.reward_workers': 1,
    # The rate does not depend on the steps of a run, so runs share programs.
    'optimizer.schedule': 'piecewise',
    'optimizer.pieces': ((STEPS, 1e-2, 1e-2),),
    'optimizer.weight_decay': 0.0,
    'optimizer.warmup_steps': 0,
    'optimizer.decay_steps': 0,
    'train.steps': STEPS,
    'train.log_every_steps': 1,
    'eval.answers': 4,
    'eval.every_steps': 100,
    'checkpoint.every_steps': 4,
    'checkpoint.keep': 10,
    'data.length': 16,
    'sample.gen_length': 6,
    'sample.block_length': 6,
    'sample.steps': 6,
    'sample.temperature': 1.0,
  }


def completed(keys, **changes):
  """Returns a config; `changes` have _ for the dot of the section."""
  changes = {key.replace('_', '.', 1): value for key, value in changes.items()}
  return stage_config.complete(tiny.config(keys | changes))
