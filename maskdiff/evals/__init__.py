"""Evaluation tasks for a trained model.

scored    lines scored by likelihood: bound, choices, greedy
answered  lines answered by the sampler
puzzles   puzzles that need no download: addition, sudoku, countdown, reversal
word_problems  problems from templates, with worked answers
heldout   questions made from the held-out text of a run
harness   a model of lm-eval
"""
