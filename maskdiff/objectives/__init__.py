"""Training objectives: clean tokens to inputs, targets and loss weights.

- table: all objectives and their traits; `make_canvas`, `flops_per_token`.
- canvas: the Canvas that an objective makes, and its loss.
- masked_diffusion: masks a random share of each row.
- autoregressive: predicts each token from the tokens before it.
- schedule: noise schedules and the sampling of times.
"""
