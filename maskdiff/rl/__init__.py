"""Reinforcement learning: tasks, and the rewards of their answers."""
