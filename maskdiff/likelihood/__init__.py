"""Log-likelihood of a part of each row, given the rest of the row.

- bounds: the functions to call: bounds, exact log-likelihoods, greedy check
- estimators: answer tokens to mask and to score, and their weights
- queries: computes queries of many rows in few compiled calls
- device_queries: the masks and weights of estimators, drawn in jit
- row_bounds: bounds of several networks for the same masks, with gradients
"""
