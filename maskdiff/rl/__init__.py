"""Policy optimization and preference learning.

Every method fits one shape. Its `draw` makes masked copies of rows.
`row_bounds.log_probs` computes the tokens of the copies under the policy, the
policy that sampled the answers, and a reference, all with the same masks.
`policy_loss.loss` makes a scalar of them.

- table: all methods and their published settings
- policy_loss: the functions to call
- settings: numbers of a method
- batch: rows with sampled answers
- advantages: rewards to advantages, by group
- copies, trace, spg: masked copies of rows
- units: log-probabilities of answers or tokens, and their ratios
- clipped, weighted: losses
- divergence: estimates of the KL divergence
- values: returns and advantages of a value network
- tasks: questions, and their rewards
- rewards: functions of a question and a text; published_rewards, extraction,
  maths and arithmetic: their parts
- reward_pool, reward_worker: rewards in processes with limits

Training:

- stage, stage_config: the stage of the training loop, and its config
- rounds, rollouts, scoring: sampled answers, and their rewards
- programs, policy_step: compiled programs of a round, and of an inner step
- reference: the network from which the divergence is computed
- round_metrics: metrics
"""
