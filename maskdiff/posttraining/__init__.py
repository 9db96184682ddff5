"""Training after pretraining: conversations to rows, and fine-tuning."""
