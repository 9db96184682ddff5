"""Policy optimization and preference learning: tasks and rewards.

- tasks: questions, and their rewards
- rewards: functions of a question and a text; published_rewards, extraction,
  maths and arithmetic: their parts
- reward_pool, reward_worker: rewards in processes with limits
"""
