"""What a trained model can do: puzzles, held-out text, and lm-eval's tasks."""
