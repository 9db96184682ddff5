"""Returns and advantages of a value network along the steps of the sampler.

Generalized advantage estimation over denoising steps instead of tokens
(TraceRL; dLLM-RL, train_sdar_value.py). NumPy on the host.
"""

import numpy as np


def returns_and_advantages(
  rewards, values, steps, where, discount=1.0, decay=1.0
):
  """Computes the targets of a value network and the advantages of tokens.

  Rewards r and values V are averaged over the tokens of a step: r*, V*. For a
  token of step i, with the recursions over the steps of its answer:

    return    = r + discount R*[i + 1]
    advantage = r - V + discount V*[i + 1] + discount decay A*[i + 1]

  where R* and A* are the same expressions for r* and V*.

  Args:
    rewards: [B, L] float, rewards of tokens; see `at_last_step` for rewards of
      answers.
    values: [B, L] float, values of tokens.
    steps: [B, L] int, the step at which each token was committed.
    where: [B, L] bool, tokens that carry a loss.
    discount: gamma.
    decay: lambda.

  Returns:
    returns and advantages, [B, L] float64 each, 0 where `where` is False.
  """
  returns, advantages = np.zeros((2, *np.shape(where)))
  for i, row in enumerate(np.asarray(where)):
    # R*, V* and A* of the next step
    next_return = next_value = next_advantage = 0.0
    for step in np.unique(steps[i][row])[::-1]:
      of_step = row & (steps[i] == step)
      r = np.asarray(rewards[i], np.float64)[of_step]
      v = np.asarray(values[i], np.float64)[of_step]
      ahead = discount * (next_value + decay * next_advantage)
      returns[i, of_step] = r + discount * next_return
      advantages[i, of_step] = r - v + ahead
      next_return = returns[i, of_step].mean()
      next_advantage = advantages[i, of_step].mean()
      next_value = v.mean()
  return returns, advantages


def at_last_step(rewards, steps, where):
  """Returns the rewards of answers at the tokens of their last step, [B, L].

  Args:
    rewards: [B] float.
    steps: [B, L] int.
    where: [B, L] bool, tokens that carry a loss.
  """
  last = np.where(where, steps, -1).max(axis=1, keepdims=True)
  is_last = np.asarray(where) & (steps == last)
  return np.where(is_last, np.asarray(rewards)[:, None], 0.0)
