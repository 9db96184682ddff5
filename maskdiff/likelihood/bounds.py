"""Log-likelihood of a part of each row given the rest of the row, in nats.

The scored part is the answer of the row: the text after a prompt, or any other
subset of the positions. The network always sees the rest. Bounds, the chain
rule in any order and the greedy check differ only in which answer tokens are
masked in each forward pass (estimators.py). queries.py computes these passes,
the queries, for all rows together.

Noise is keyed by the seed of a row. The result of a row does not depend on the
other rows, except for float32 rounding. Log-likelihoods are sums over tokens,
not divided by the length.

Arguments that the functions share:

- `network`: model.network.Network.
- `c`: queries.LikelihoodConfig.
- `answers`: queries.Answers, B rows; see `lay_out`.
- `seeds`: [B] int >= 0. Rows with the same seed and equally long answers mask
  the same tokens, which reduces the noise of their difference.
- `progress`: function without arguments, called after each row; or None.

Functions with these arguments raise a UserError if queries.rows_of refuses the
rows, or if a log-probability is not finite.
"""

import functools
from typing import NamedTuple

import numpy as np

from maskdiff.errors import UserError
from maskdiff.likelihood import answer_blocks, estimators, queries
from maskdiff.objectives.table import OBJECTIVES


class Estimate(NamedTuple):
  log_likelihood: np.ndarray  # [B] float64, nats
  stderr: np.ndarray  # [B] float64, nats; nan if unknown


def lay_out(prompts, answers, suffixes=None):
  """Returns the rows prompt + answer + suffix, with the answers to be scored.

  Args:
    prompts: list of token lists, which may be empty.
    answers: list of token lists, one for each prompt.
    suffixes: list of token lists, the text after each answer. Like the prompt,
      it is never masked. By default empty.

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


def bound(network, c, answers, estimator, seeds, progress=None):
  """Estimates the lower bound on the log-likelihood of each answer.

  With guidance, the bound is for the guided model. For a left-to-right
  network the result is the exact log-likelihood, with a standard error of 0.

  Args:
    estimator: estimators.Estimator.

  Returns:
    Estimate; stderr is nan if the estimator has a single group.
  """
  rows = queries.rows_of(network, c, answers)
  evaluate = lambda queries_of: queries.evaluate(
    network, c, rows, queries_of, progress
  )
  if OBJECTIVES[network.objective].likelihood == 'exact':
    return _exact(
      evaluate(
        lambda i: estimators.causal(rows[i].answer.sum(), network.window_length)
      )
    )
  values = evaluate(
    lambda i: estimators.draw_blocks(
      estimator,
      answer_blocks.sizes(network, rows[i].answer),
      np.random.default_rng(int(seeds[i])),
    )
  )
  shape = (len(rows), estimator.groups, estimator.samples // estimator.groups)
  return Estimate(*mean_and_stderr(np.reshape(values, shape).mean(axis=2)))


def chain_rule(network, c, answers, orders=None, progress=None):
  """Computes exact log-likelihoods of decoding answers in given orders.

  Each token is predicted while it and all later tokens of the order are masked
  (SMDM, evaluate_diff.py, _eval_target_nll_ar, for the left-to-right order).
  `bound` estimates the mean over all orders of an answer of A tokens.

  Args:
    orders: for each row [K, A] int, permutations of 0..A-1, the tokens of the
      answer from left to right; by default one order, left to right. A network
      trained on blocks fills them from left to right, in any order within.

  Returns:
    list of [K] float64, nats.

  Raises:
    UserError: an order is not a permutation, or not one by blocks; or orders
      are given for a left-to-right network.
  """
  rows = queries.rows_of(network, c, answers)
  blocks = [answer_blocks.sizes(network, row.answer) for row in rows]
  sizes = [int(row.answer.sum()) for row in rows]
  evaluate = lambda queries_of: queries.evaluate(
    network, c, rows, queries_of, progress
  )
  if OBJECTIVES[network.objective].left_to_right:
    if orders is not None:
      raise UserError(
        f'a network trained with objective {network.objective} decodes in one '
        'order only, left to right: leave out orders, and use the exact '
        'log-likelihood'
      )
    values = evaluate(
      lambda i: estimators.causal(sizes[i], network.window_length)
    )
    return [v.sum(keepdims=True) for v in values]
  if orders is None:
    orders = [np.arange(size)[None] for size in sizes]
  for i, (row_orders, size) in enumerate(zip(orders, sizes, strict=True)):
    if not np.array_equal(
      np.sort(row_orders, axis=1),
      np.tile(np.arange(size), (len(row_orders), 1)),
    ):
      raise UserError(
        f'row {i}: an order must name each of the {size} tokens of the answer '
        f'once, 0 to {size - 1}'
      )
    block_of = np.repeat(np.arange(len(blocks[i])), blocks[i])
    if (np.diff(block_of[row_orders], axis=1) < 0).any():
      raise UserError(
        f'row {i}: an order must fill the blocks of {network.block_length} '
        'tokens from left to right, as the network does'
      )
  values = evaluate(lambda i: estimators.chain(orders[i], blocks[i]))
  return [
    v.reshape(len(row_orders), -1).sum(axis=1)
    for v, row_orders in zip(values, orders, strict=True)
  ]


def left_to_right(network, c, answers, progress=None):
  """Returns the log-likelihood of decoding left to right, an exact Estimate."""
  return _exact(chain_rule(network, c, answers, progress=progress))


def whole_windows(network, c, answers, progress=None):
  """Returns the log-likelihood of emitting whole windows, an exact Estimate.

  The model emits the D tokens of a window independently of each other, whether
  it is confident or not. The result is averaged over the offset of the first
  window. It is the objective of SDLM (arXiv 2509.24007, eq. 3), and no bound on
  the likelihood of decoding that commits fewer tokens.

  Raises:
    UserError: the network does not predict windows.
  """
  if not network.window_length:
    raise UserError(
      f'a network trained with objective {network.objective} predicts no '
      'windows of tokens; only networks trained with sdlm have their likelihood'
    )
  rows = queries.rows_of(network, c, answers)
  queries_of = lambda i: estimators.windows(
    rows[i].answer.sum(), network.window_length
  )
  return _exact(queries.evaluate(network, c, rows, queries_of, progress))


def _exact(values):
  """Returns the Estimate of rows whose queries' values have these sums."""
  sums = [v.sum() for v in values]
  return Estimate(np.array(sums, np.float64), np.zeros(len(sums)))


def multi_sample(network, c, answers, num_orders, seeds, progress=None):
  """Estimates the importance-weighted bound from K random orders.

  Decoding in a random order produces the answer with probability E[p(answer |
  order)]. The log of the mean of p over K random orders is, in expectation, a
  lower bound on the log of this probability. For K = 1 this bound equals that
  of `bound`, and it rises with K (Burda et al., arXiv 1509.00519, theorem 1).
  An order takes one forward pass per token of the answer.

  Args:
    num_orders: K.

  Returns:
    Estimate; stderr is computed by the delta method, nan for K = 1.

  Raises:
    UserError: num_orders is below 1; or the network is left-to-right.
  """
  return log_mean(
    np.array(random_orders(network, c, answers, num_orders, seeds, progress))
  )


def random_orders(network, c, answers, num_orders, seeds, progress=None):
  """Computes log-likelihoods of decoding answers in K random orders.

  Arguments and errors as for `multi_sample`.

  Returns:
    list of [K] float64, nats.
  """
  if num_orders < 1:
    raise UserError(f'num_orders={num_orders} must be at least 1')
  rows = queries.rows_of(network, c, answers)

  def draw(row, seed):
    rng = np.random.default_rng(int(seed))
    sizes = answer_blocks.sizes(network, row.answer)
    tokens = np.tile(np.arange(sizes.sum()), (num_orders, 1))
    of_blocks = np.split(tokens, sizes.cumsum()[:-1], axis=1)
    return np.hstack([rng.permuted(x, axis=1) for x in of_blocks])

  orders = [draw(row, seed) for row, seed in zip(rows, seeds, strict=True)]
  return chain_rule(network, c, answers, orders, progress)


def log_mean(log_p):
  """Returns the log of the mean of p as an Estimate.

  Args:
    log_p: [B, K] float64, nats, of K independent draws.
  """
  peak = log_p.max(axis=1)
  mean, stderr = mean_and_stderr(np.exp(log_p - peak[:, None]))
  return Estimate(peak + np.log(mean), stderr / mean)


def mean_and_stderr(values):
  """Returns the mean over n independent columns and its standard error.

  Args:
    values: [B, n].

  Returns:
    Two arrays [B]; the standard error is nan for n = 1.
  """
  n = values.shape[1]
  unknown = np.full(len(values), np.nan)
  deviation = values.std(axis=1, ddof=1) if n > 1 else unknown
  return values.mean(axis=1), deviation / n**0.5


def greedy_matches(network, c, answers, progress=None):
  """Returns whether greedy decoding gives the answer of each row, [B] bool.

  Each step commits the most confident token (LLaDA, eval_llada.py,
  suffix_greedy_prediction), the leftmost on ties. The check of a row ends at
  its first wrong token. A left-to-right network decodes left to right, and a
  network trained on blocks block by block.
  """
  rows = queries.rows_of(network, c, answers)
  matches = _any_order_matches
  if OBJECTIVES[network.objective].left_to_right:
    matches = _left_to_right_matches
  work = functools.partial(matches, network, c, rows)
  return np.array(queries.shared(network, rows, work, progress), bool)


def _any_order_matches(network, c, rows, indices, progress):
  """Returns what `greedy_matches` does, for some rows of a masked network."""
  targets = [row.tokens[row.answer] for row in rows]
  sizes = [answer_blocks.sizes(network, row.answer) for row in rows]
  match = np.ones(len(rows), bool)
  for size, members in queries.by_length(rows, indices).items():
    masked = {i: np.ones(len(targets[i]), bool) for i in members}
    while masked:
      queried = [(i, None, m.copy(), m.copy()) for i, m in masked.items()]
      predicted = queries.predict(network, c, rows, size, queried)
      for i, _, token, log_prob in predicted:
        confidence = np.where(masked[i], log_prob, -np.inf)
        # Blocks advance together, each given the true tokens before it: as long
        # as the predictions are right, greedy decoding sees the same tokens.
        commit = _most_confident(confidence, sizes[i])
        match[i] = (token == targets[i])[commit].all()
        masked[i][commit] = False
        if not match[i] or not masked[i].any():
          del masked[i]
          if progress:
            progress()
  return match[indices]


def _left_to_right_matches(network, c, rows, indices, progress):
  """Returns what `greedy_matches` does, for some rows, left to right."""
  match = np.ones(len(rows), bool)
  for size, members in queries.by_length(rows, indices).items():
    made = {
      i: estimators.causal(rows[i].answer.sum(), network.window_length)
      for i in members
    }
    queried = (
      (i, k, masked, scored)
      for i, (all_masked, all_scored, _) in made.items()
      for k, (masked, scored) in enumerate(
        zip(all_masked, all_scored, strict=True)
      )
    )
    for i, k, token, _ in queries.predict(network, c, rows, size, queried):
      scored = made[i].scored[k]
      target = rows[i].tokens[rows[i].answer]
      match[i] &= (token == target)[scored].all()
      if progress and k == len(made[i].scored) - 1:
        progress()
  return match[indices]


def _most_confident(confidence, sizes):
  """Returns the index of the most confident masked token of each block.

  Args:
    confidence: [A], -inf at tokens that are not masked.
    sizes: tokens of each block, with the sum A.
  """
  ends = np.cumsum(sizes)
  best = [
    start + np.argmax(confidence[start:end])
    for start, end in zip(ends - sizes, ends, strict=True)
  ]
  return np.array([i for i in best if confidence[i] > -np.inf])


def corpus(estimate, num_tokens, num_bytes):
  """Returns the bound of all answers together, per token and per byte.

  Args:
    estimate: Estimate.
    num_tokens: total number of scored tokens.
    num_bytes: total number of bytes of their text.

  Returns:
    dict of floats, upper bounds: nats per token, with the standard error;
    perplexity per token; bits per byte.
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
