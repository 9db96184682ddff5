"""Log-likelihood of a part of each row, given the rest of the row.

- bounds: bounds, exact log-likelihoods and the greedy check; the functions to
  call
- estimators: which answer tokens to mask and to score, and with which weight
- queries: computes queries of many rows in few compiled calls
"""
