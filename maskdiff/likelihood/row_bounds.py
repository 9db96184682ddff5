"""Bounds of several networks for the same masks, in jit, with gradients.

Policy gradients and preference losses need differences of bounds, such as
between a policy, the policy that sampled the answers, and a reference. If all
networks see the same masks (common random numbers), most of the noise cancels
(ESPO, espo_trainer.py; VRPO, arXiv 2505.19223, which calls this antithetic).
The bound of a row is a function of its network's parameters, and any function
of bounds can be differentiated:

  def loss(params):
    policy = dataclasses.replace(old, params=params)
    of_policy, of_old = row_bounds.bound(
      (policy, old), answers, estimator, key, rows, chunk
    )
    ratio = jnp.exp((of_policy - of_old) / num_tokens)
    ...

A later call with the same key and row numbers draws the same masks, so the
bounds of fixed networks can be computed once and stored.

A scan computes the queries one by one, each for all rows. Its backward pass
repeats the forward pass of the network, so activations exist for one query of
one network at a time. Their memory does not depend on the number of queries.
Only arrays with one number or bool per query and token grow with it: noise,
masks and, with gradients, log-normalizers.

Left-to-right networks have one query, whose value is the log-likelihood itself.

Arguments that the functions share:

- `networks`: K model.network.Network, trained with one objective. JAX computes
  no gradient for the networks whose parameters are not differentiated.
- `answers`: queries.Answers of arrays [B, L]. Answers are not checked in jit:
  they must contain neither the mask token nor padding.
- `chunk`: tokens projected onto the vocabulary at once, as for `token_nll`.

Letters in shapes: K networks; n queries per row; B rows; L positions.
"""

import functools

import jax
import jax.numpy as jnp

from maskdiff.errors import UserError
from maskdiff.likelihood import device_queries
from maskdiff.model.token_nll import LOG_NORMALIZERS, token_nll
from maskdiff.model.transformer import bind
from maskdiff.objectives.table import OBJECTIVES, show_masked
from maskdiff.sampling import candidates


def bound(networks, answers, e, key, rows, chunk):
  """Estimates the lower bounds on the log-likelihood of each answer.

  Args:
    networks: see above.
    answers: see above.
    e: estimators.Estimator.
    key: PRNG key.
    rows: [B] int32, numbers of the rows in the global batch, which key the
      noise (`device_queries.random_numbers`).
    chunk: see above.

  Returns:
    [K, B] float32 nats, sums over the tokens of an answer.

  Raises:
    UserError: the networks were trained with different objectives.
  """
  drawn = draw(networks, e, answers.answer, key, rows)
  return values(networks, answers, drawn, chunk).mean(axis=1)


def draw(networks, e, answer, key, rows):
  """Returns the queries of `bound`, a device_queries.RowQueries.

  Arguments and errors as for `bound`; answer is [B, L] bool. The Estimator has
  no effect for left-to-right networks, which have one query.
  """
  objective = OBJECTIVES[_objective(networks)]
  if objective.likelihood == 'exact':
    return device_queries.causal(answer)
  if objective.by_blocks:
    length = networks[0].block_length
    return device_queries.draw_blocks(e, answer, key, rows, length)
  return device_queries.draw(e, answer, key, rows)


def values(networks, answers, queries, chunk):
  """Returns the value of each query, [K, n, B] float32 nats.

  Args:
    networks: see above.
    answers: see above; the field `answer` is not used.
    queries: device_queries.RowQueries.
    chunk: see above.
  """

  def reduce(log_prob, weight):
    if weight.ndim == 1:
      return weight * log_prob.sum(axis=-1)
    return (weight * log_prob).sum(axis=-1)

  return _scan(networks, answers, queries, chunk, reduce)


def log_probs(networks, answers, queries, chunk, guidance=0.0):
  """Returns log-probabilities of scored tokens, 0 elsewhere, without weights.

  For objectives per token instead of per row: diffu-GRPO (d1), where all answer
  tokens and some of the prompt are masked and the answer is scored; and
  coupled-GRPO (DiffuCoder). They build their own RowQueries.

  Args:
    networks: see above.
    answers: see above; the field `answer` is used by guidance only.
    queries: device_queries.RowQueries.
    chunk: see above.
    guidance: scale of classifier-free guidance, as LikelihoodConfig.guidance;
      it takes a second forward pass, in which the prompt is masked.

  Returns:
    [K, n, B, L] float32 nats.
  """
  return _scan(
    networks, answers, queries, chunk, lambda log_prob, _: log_prob, guidance
  )


def _scan(networks, answers, queries, chunk, reduce, guidance=0.0):
  """Returns reduce(log-probabilities [B, L], weight [B]) as [K, n, ...]."""
  _objective(networks)

  # With saved log-normalizers, the backward pass does not repeat the forward
  # loop of `token_nll`.
  @functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names(LOG_NORMALIZERS),
    prevent_cse=False,  # not needed in a scan
  )
  def of_network(network, query):
    model = bind(network.config, network.params)

    def states(masked):
      shown = show_masked(network, answers.tokens, masked, answers.valid)
      return model(*shown)[:, : masked.shape[1]]

    hidden = states(query.masked)
    if guidance:  # of states, because the projection is linear
      without = states(query.masked | (answers.valid & ~answers.answer))
      guided = candidates.guide(*_as_float32(hidden, without), guidance)
      hidden = guided.astype(hidden.dtype)
    with jax.named_scope('part(loss)'):
      nll = token_nll(
        hidden,
        model.vocabulary(),
        answers.tokens,
        query.scored,
        None if network.predict_mask else network.mask_id,
        chunk,
      )
    return reduce(-nll, query.weight)

  def of_query(carry, query):
    return carry, jnp.stack([of_network(n, query) for n in networks])

  _, results = jax.lax.scan(of_query, (), queries)
  return results.swapaxes(0, 1)


def _as_float32(*arrays):
  return [x.astype(jnp.float32) for x in arrays]


def _objective(networks):
  """Returns the objective of the networks, or raises a UserError."""
  names = {
    f'{network.objective} in blocks of {network.block_length}'
    if network.block_length
    else network.objective
    for network in networks
  }
  if len(names) != 1:
    raise UserError(
      'bounds are compared for networks of one training objective, and these '
      f'have {len(names)} ({", ".join(sorted(names))}); evaluate one at a time'
    )
  return networks[0].objective
