"""Log-likelihood of a part of each row given the rest of it, in nats.

The part that is scored is the row's answer: what follows a prompt, or any other
subset of the positions. The rest is always shown. Bounds, the chain rule in
any order and the greedy check differ only in which tokens of the answer they
hide at a time (estimators.py); queries.py computes them for all rows together.

Noise is keyed by a row's seed: what comes out for a row does not depend on the
rows beside it, beyond float32 rounding. Nothing is normalised by length.

Arguments that all functions here share:

- `network`: model.network.Network.
- `c`: queries.LikelihoodConfig.
- `answers`: queries.Answers, B rows; see `lay_out`.
- `seeds`: [B] int >= 0. Rows of one seed and equally long answers hide the
  same tokens, so that chance matters less to their difference.

Any of them raises a UserError if queries.rows_of refuses the request, or if the
network gives something that is no number.
"""

from typing import NamedTuple

import numpy as np

from maskdiff.errors import UserError
from maskdiff.likelihood import estimators, queries
from maskdiff.objectives.table import OBJECTIVES


class Estimate(NamedTuple):
  log_likelihood: np.ndarray  # [B] float64, nats
  stderr: np.ndarray  # [B] float64, nats; nan where it cannot be told


def lay_out(prompts, answers, suffixes=None):
  """Lays out answers after their prompts.

  Args:
    prompts: list of token lists; one may be empty.
    answers: list of token lists, one for each prompt.
    suffixes: list of token lists, text after each answer, which is shown like
      its prompt; by default nothing.

  Returns:
    queries.Answers; short rows are padded on the right.
  """
  suffixes = [[]] * len(prompts) if suffixes is None else suffixes
  rows = [
    (list(p), list(a), list(s))
    for p, a, s in zip(prompts, answers, suffixes, strict=True)
  ]
  length = max((len(p) + len(a) + len(s) for p, a, s in rows), default=0)
  tokens = np.zeros((len(rows), length), np.int32)
  answer, valid = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
  for i, (p, a, s) in enumerate(rows):
    end = len(p) + len(a) + len(s)
    tokens[i, :end] = p + a + s
    answer[i, len(p) : len(p) + len(a)] = True
    valid[i, :end] = True
  return queries.Answers(tokens, answer, valid)


def bound(network, c, answers, estimator, seeds):
  """The Monte Carlo lower bound on the log-likelihood of each answer.

  Under guidance it is that of the guided model. An autoregressive network
  needs no bound: it gives the log-likelihood itself, with an error of 0.

  Args:
    estimator: estimators.Estimator.

  Returns:
    Estimate; its error is nan if the estimator has a single group.
  """
  rows = queries.rows_of(network, c, answers)
  evaluate = lambda queries_of: queries.evaluate(network, c, rows, queries_of)
  if OBJECTIVES[network.objective].left_to_right:
    exact = evaluate(lambda i: estimators.causal(rows[i].answer.sum()))
    return Estimate(np.array(exact).reshape(-1), np.zeros(len(rows)))
  values = evaluate(
    lambda i: estimators.draw(
      estimator, rows[i].answer.sum(), np.random.default_rng(int(seeds[i]))
    )
  )
  shape = (len(rows), estimator.groups, estimator.samples // estimator.groups)
  return Estimate(*_mean(np.reshape(values, shape).mean(axis=2)))


def chain_rule(network, c, answers, orders=None):
  """Exact log-likelihoods of decoding the answers token by token.

  Each token is predicted with itself and all later ones of the order masked
  (SMDM, evaluate_diff.py, _eval_target_nll_ar: left to right). The mean over
  all A! orders of an answer of A tokens is what `bound` estimates.

  Args:
    orders: for each row [K, A] int, each a permutation of 0..A-1, the tokens of
      the answer as they stand in the row; by default one order, left to right.

  Returns:
    list of [K] float64, nats.

  Raises:
    UserError: an order is no permutation; an autoregressive network is asked
      for another than its own.
  """
  rows = queries.rows_of(network, c, answers)
  sizes = [int(row.answer.sum()) for row in rows]
  evaluate = lambda queries_of: queries.evaluate(network, c, rows, queries_of)
  if OBJECTIVES[network.objective].left_to_right:
    if orders is not None:
      raise UserError('an autoregressive network has one order only')
    return evaluate(lambda i: estimators.causal(sizes[i]))
  if orders is None:
    orders = [np.arange(size)[None] for size in sizes]
  for i, (of_row, size) in enumerate(zip(orders, sizes, strict=True)):
    if not np.array_equal(
      np.sort(of_row, axis=1), np.tile(np.arange(size), (len(of_row), 1))
    ):
      raise UserError(
        f'row {i}: an order must name each of the {size} tokens of the answer '
        'once, from 0 on'
      )
  values = evaluate(lambda i: estimators.chain(orders[i]))
  return [
    v.reshape(-1, size).sum(axis=1)
    for v, size in zip(values, sizes, strict=True)
  ]


def left_to_right(network, c, answers):
  """`chain_rule` from left to right, as an Estimate without error."""
  values = chain_rule(network, c, answers)
  return Estimate(np.array(values).reshape(-1), np.zeros(len(values)))


def multi_sample(network, c, answers, num_orders, seeds):
  """The importance-weighted bound: log of the mean over K random orders.

  Decoding in a random order gives the answer with probability
  E[p(answer decoded in that order)]. The log of a mean over K orders is in
  expectation below the log of that, equal to the bound of `bound` for K = 1,
  and rises with K (Burda et al., arXiv 1509.00519, theorem 1). An order takes
  as many forward passes as the answer has tokens.

  Args:
    num_orders: K.

  Returns:
    Estimate; its error is by the delta method, nan for K = 1.
  """
  if num_orders < 1:
    raise UserError(f'num_orders={num_orders} must be at least 1')
  rows = queries.rows_of(network, c, answers)
  orders = [
    np.random.default_rng(int(seed)).permuted(
      np.tile(np.arange(row.answer.sum()), (num_orders, 1)), axis=1
    )
    for row, seed in zip(rows, seeds, strict=True)
  ]
  values = np.array(chain_rule(network, c, answers, orders))
  peak = values.max(axis=1)
  mean, stderr = _mean(np.exp(values - peak[:, None]))
  return Estimate(peak + np.log(mean), stderr / mean)


def _mean(values):
  """Mean over independent columns, and its standard error; [B, n] to [B]."""
  n = values.shape[1]
  unknown = np.full(len(values), np.nan)
  spread = values.std(axis=1, ddof=1) if n > 1 else unknown
  return values.mean(axis=1), spread / n**0.5


def greedy_matches(network, c, answers):
  """Whether greedy decoding gives the answer, token for token.

  A step commits one token, the most confident (LLaDA, eval_llada.py,
  suffix_greedy_prediction), the lowest position among equals. A row is given
  up at its first wrong token. An autoregressive network decodes left to right.

  Returns:
    [B] bool.
  """
  rows = queries.rows_of(network, c, answers)
  targets = [row.tokens[row.answer] for row in rows]
  causal = OBJECTIVES[network.objective].left_to_right
  right = np.ones(len(rows), bool)
  for size, members in queries.by_length(rows).items():
    masked = {i: np.ones(len(targets[i]), bool) for i in members}
    while masked:
      queried = [
        (i, None, m & (not causal), m.copy()) for i, m in masked.items()
      ]
      predicted = queries.predict(network, c, rows, size, queried)
      for i, _, token, log_prob in predicted:
        confidence = np.where(masked[i], log_prob, -np.inf)
        # What an autoregressive network is shown are the right tokens: as long
        # as it predicts those, it would have been shown the same.
        commit = slice(None) if causal else np.argmax(confidence)
        right[i] = (token == targets[i])[commit].all()
        masked[i][commit] = False
        if not right[i] or not masked[i].any():
          del masked[i]
  return right


def corpus(estimate, num_tokens, num_bytes):
  """What the bounds of many answers say of all of them.

  Args:
    estimate: Estimate.
    num_tokens: that were scored, in all.
    num_bytes: of text that they stand for, in all.

  Returns:
    dict of floats, upper bounds: nats per token with its standard error,
    perplexity per token, bits per byte.
  """
  nats = -float(estimate.log_likelihood.sum())
  return {
    'nats_per_token': nats / num_tokens,
    'stderr_nats_per_token': float(
      np.linalg.norm(estimate.stderr) / num_tokens
    ),
    'perplexity': float(np.exp(nats / num_tokens)),
    'bits_per_byte': nats / num_bytes / float(np.log(2)),
  }
