"""Training objectives: what the network sees, and what it predicts.

- table: all objectives and their traits; `make_canvas`, `flops_per_token`.
- canvas: the Canvas that an objective makes, and its loss.
- masked_diffusion: masks a random share of each row.
- autoregressive: predicts each token from the tokens before it.
- schedule: noise schedules and the sampling of times.
"""
