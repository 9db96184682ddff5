"""Training after pretraining: conversations, their templates and their rows."""
