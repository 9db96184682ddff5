"""A round of policy optimization: answers, rewards, advantages.

`sample_round` returns a rollout, a dict of arrays on the mesh:

  tokens, steps  [N, L] int32, the rows, and the step of each sampled token
  slots          [N, 2] int32, first slot of the answer, and the end of the last
  advantages     [N] float32
  log_probs      policy_step.fixed_log_probs, if the inner steps need some
"""

from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from maskdiff.interop import load
from maskdiff.model import lora
from maskdiff.monitoring import terminal
from maskdiff.rl import advantages as advantages_lib
from maskdiff.rl import (
  policy_step,
  programs,
  rollouts,
  round_metrics,
  scoring,
  table,
  trace,
)
from maskdiff.sampling.settings import sampler_config
from maskdiff.training.run_setup import RunSetup


class Opened(NamedTuple):
  """Objects that are constant during a run."""

  config: ConfigDict
  setup: RunSetup
  c: policy_step.PolicyConfig
  questions: scoring.Questions
  programs: programs.Programs
  reference: dict | None  # parameters; None: not needed, or the base


def sample_round(o, number, params):
  """Samples the answers of a round and computes their rewards.

  Args:
    o: Opened.
    number: of the round.
    params: parameter tree of the policy.

  Returns:
    The rollout, a dict of arrays; and its metrics, a dict of floats.

  Raises:
    UserError: the reward failed on all answers, or logits were not finite.
  """
  config, p, group = o.config, o.config.policy, o.config.policy.group
  questions, prompts = o.questions.draw(f'{config.seed}-{number}', p.prompts)
  answers, texts = answer(o, params, number, prompts, group)
  asked = [question for question in questions for _ in range(group)]
  rewards = o.questions.score(asked, texts)
  scoring.require_rewards(o.questions.reward.name, rewards)
  arrays = rollouts.arrays(answers.recordings, config.data.length)
  arrays['advantages'] = _advantages(p, rewards.total)
  rollout = programs.place(o.setup.mesh, arrays)
  _check_copies(o, rollout)
  o.setup.between()
  fixed = _fixed_log_probs(o, params, rollout, number)
  if fixed is not None:
    rollout['log_probs'] = jax.block_until_ready(fixed)
  measured = round_metrics.of_round(config, answers, rewards, group)
  if measured['train/empty_groups'] == 1 and jax.process_index() == 0:
    terminal.warn(
      f'warning: all {len(texts)} answers of round {number} are empty; if this '
      'continues, set --config.sample.logits_eos_inf=True, or start from a '
      'model that answers'
    )
  passes = len(o.c.fixed_steps) * len(o.c.fixed_networks) * o.programs.copies
  measured['fixed_forwards'] = passes * len(texts)
  return rollout, measured


def answer(o, params, number, prompts, group, **changes):
  """Samples answers.

  Args:
    o: Opened.
    params: parameter tree of the policy.
    number: of the round, or 'heldout'.
    prompts: list of token lists.
    group: answers per prompt.
    **changes: settings of the sampler that differ from config.sample.

  Returns:
    rollouts.Answers, and a list of texts.
  """
  config = o.config
  c, settings = sampler_config(config)
  requests = rollouts.requests(
    config.seed,
    number,
    prompts,
    group,
    config.sample.gen_length,
    settings._replace(**changes),
  )
  found = rollouts.sample(
    load.network(config, o.programs.copy(params)),
    c,
    requests,
    config.policy.sampling_rows or config.train.batch,
    config.data.length,
    o.setup.between,
  )
  ends = o.questions.end_ids
  tokens = [rollouts.answer_tokens(r, ends) for r in found.recordings]
  return found, [o.questions.decode(ids) for ids in tokens]


def fits(o, inner, rollout):
  """Returns whether a rollout fits the config, which may have changed.

  With config.data.allow_change, a run continues with other numbers of answers
  or steps. The rest of its last round is then left out.
  """
  c, config = o.c, o.config
  shape = config.train.batch, config.data.length
  fixed = rollout.get('log_probs')
  expected = None
  if c.fixed_steps and c.fixed_networks:
    sizes = len(c.fixed_steps), len(c.fixed_networks), o.programs.copies
    expected = (*sizes, *shape)
  return (
    inner < c.inner_steps
    and rollout['tokens'].shape == shape
    and (None if fixed is None else fixed.shape) == expected
  )


def _advantages(p, rewards):
  """Returns the advantages of all answers of a round, [N] float32."""
  method = table.find(p.method)
  found = advantages_lib.advantages(
    rewards.astype(np.float32),
    p.group,
    method.baseline if p.baseline == 'published' else p.baseline,
    method.deviation if p.deviation == 'published' else p.deviation,
  )
  return np.asarray(found)


def _fixed_log_probs(o, params, rollout, number):
  """Returns `policy_step.fixed_log_probs`; None if none are needed."""
  if not (o.c.fixed_steps and o.c.fixed_networks):
    return None
  base = lora.base(params) if o.reference is None else o.reference
  of = {'old': params, 'reference': base}
  trees = [of[name] for name in o.c.fixed_networks]
  return o.programs.fixed(trees, rollout, np.int32(number))


def _check_copies(o, rollout):
  """Raises UserError if the setting `copies` leaves tokens without a copy."""
  method, s = table.find(o.c.method), o.c.settings
  in_order = method.draw is trace.left_to_right
  if s.copies and (in_order or method.needs_steps):
    rows = o.programs.to_rows(rollout)
    rows = trace.in_order(rows) if in_order else rows
    trace.check_copies(o.c.network, s, rows)
