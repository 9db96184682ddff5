"""Queries of the bound drawn in jit, for batches of rows.

The estimators are those of estimators.py, as functions of JAX arrays. Rows have
one length L, with any number of answer tokens at any positions. Separate
functions draw random numbers and make queries of them, so that other random
numbers can be used, for example one time for several masks.

Letters in shapes: n queries per row; B rows; L positions. A row has A answer
tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RowQueries(NamedTuple):
  """n queries of each row of a batch; each takes one forward pass.

  The value of a query is weight x sum over the scored tokens of log p(token |
  tokens that are not masked).
  """

  masked: jax.Array  # [n, B, L] bool, tokens hidden by the mask token
  scored: jax.Array  # [n, B, L] bool, tokens whose log-probability is computed
  weight: jax.Array  # [n, B] float32; or [n, B, L], if it differs by token


@jax.named_scope('part(noise)')
def draw(e, answer, key, rows):
  """Draws the queries of an Estimator for each row.

  Args:
    e: estimators.Estimator.
    answer: [B, L] bool.
    key: PRNG key.
    rows: [B] int32, as for `random_numbers`.

  Returns:
    RowQueries, n = e.samples. The mean of their values is an unbiased estimate
    of the bound. A row without an answer has values 0.
  """
  times, noise = random_numbers(e, answer.shape[1], key, rows)
  form = bernoulli if e.form == 'bernoulli' else exact_count
  return form(times, noise, answer, e.coupled)


def draw_blocks(e, answer, key, rows, block_length):
  """Draws the queries of an Estimator for each block of each row.

  Args:
    e: see `draw`.
    answer: see `draw`.
    key: see `draw`.
    rows: see `draw`.
    block_length: tokens of a block, counted from position 0; the last block of
      a row may be shorter.

  Returns:
    RowQueries with weights [n, B, L], as from `draw` for each block.
  """
  batch, length = answer.shape
  blocks = -(-length // block_length)
  padded = jnp.pad(answer, ((0, 0), (0, blocks * block_length - length)))
  units = rows[:, None] * blocks + jnp.arange(blocks)
  drawn = draw(e, padded.reshape(-1, block_length), key, units.reshape(-1))
  whole = lambda x: x.reshape(len(x), batch, -1)[..., :length]
  weight = jnp.broadcast_to(drawn.weight[..., None], drawn.masked.shape)
  return RowQueries(whole(drawn.masked), whole(drawn.scored), whole(weight))


def random_numbers(e, length, key, rows):
  """Draws times and noise for the queries of an Estimator.

  Args:
    e: estimators.Estimator.
    length: L.
    key: PRNG key.
    rows: [B] int32, numbers of the rows in the global batch. A row draws its
      noise from (key, number), so the draws do not depend on the other rows of
      the batch or on the mesh. Rows with one number and equal answer positions
      mask the same tokens.

  Returns:
    times: [n, B] float32 in (0, 1], stratified within each group of e.strata.
    noise: [n, B, L] float32 in [0, 1).
    Here n is the number of queries without complements.
  """
  draws = jnp.arange(e.samples // (2 if e.coupled else 1))

  def of_query(i, row):
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, row), i))
    return jax.random.uniform(keys[0]), jax.random.uniform(keys[1], (length,))

  of_rows = jax.vmap(of_query, in_axes=(None, 0))
  u, noise = jax.vmap(of_rows, in_axes=(0, None))(draws, rows)
  return ((draws % e.strata)[:, None] + 1 - u) / e.strata, noise


def bernoulli(times, noise, answer, coupled):
  """Returns queries that mask each answer token with probability t.

  The weight is 1/t. Masks and weights are those of `estimators.bernoulli`.

  Args:
    times: [n, B] float32 in (0, 1].
    noise: [n, B, L] float32; an answer token is masked where noise < t.
    answer: [B, L] bool.
    coupled: follow each query by its complement, with weight 1 / (1 - t).

  Returns:
    RowQueries: n, or 2 n if coupled.
  """
  masked = noise < times[..., None]
  return _queries(masked, answer, 1 / times, 1 / (1 - times), coupled)


def exact_count(times, noise, answer, coupled):
  """Returns queries that mask the l answer tokens of lowest noise.

  The masks and weights are those of `estimators.exact_count` for the ranks of
  the noise: l = ceil(t A), and the weight is A/l. With complements,
  l = ceil(t (A + 1)) - 1 may be 0, and the weights are (A + 1) / l and
  (A + 1) / (A - l).

  Args:
    times: [n, B] float32 in (0, 1].
    noise: [n, B, L] float32.
    answer: [B, L] bool.
    coupled: follow each query by its complement.

  Returns:
    RowQueries: n, or 2 n if coupled.
  """
  size = jnp.sum(answer, axis=-1).astype(jnp.float32)  # [B], A
  total = size + 1 if coupled else size
  count = jnp.ceil(times * total) - (1 if coupled else 0)
  order = jnp.argsort(jnp.where(answer, noise, jnp.inf), axis=-1)
  rank = jnp.argsort(order, axis=-1)
  masked = rank < count[..., None]
  return _queries(
    masked, answer, total / count, total / (size - count), coupled
  )


def causal(answer):
  """Returns the single query of left-to-right networks, which masks nothing.

  Args:
    answer: [B, L] bool.
  """
  scored = answer[None]
  weight = jnp.ones(scored.shape[:2], jnp.float32)
  return RowQueries(jnp.zeros_like(scored), scored, weight)


def _queries(masked, answer, weight, complement_weight, coupled):
  masked = masked & answer
  if coupled:
    masked = jnp.stack([masked, answer & ~masked], axis=1)
    weight = jnp.stack([weight, complement_weight], axis=1)
    masked = masked.reshape(-1, *answer.shape)
    weight = weight.reshape(-1, len(answer))
  # A query that masks nothing has value 0, and its weight may be infinite.
  weight = jnp.where(masked.any(axis=-1), weight, 0)
  return RowQueries(masked, masked, weight)
