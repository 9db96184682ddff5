"""Computes queries of many rows in few compiled calls.

A query is a copy of a row with some answer tokens masked and some scored
(estimators.Queries). Queries of all rows are packed into calls of few compiled
shapes: rows are padded to one of a few lengths, and a call has 1, 4, 16, ...
queries (times the number of batch shards), up to a maximum. Queries of a row
with the same masked tokens are computed once, so that an answer of A tokens
never costs more than 2^A forward passes.

Letters in shapes: B rows, or queries of a call; L positions; A tokens of an
answer; n queries of a row.
"""

import collections
import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.distributed import shares
from maskdiff.distributed.mesh import batch_shards, replicate
from maskdiff.errors import UserError
from maskdiff.likelihood import answer_blocks
from maskdiff.model import vocabulary_loop as loops
from maskdiff.model.cross_entropy import cross_entropy
from maskdiff.model.transformer import bind
from maskdiff.objectives.table import OBJECTIVES, show_masked
from maskdiff.sampling import candidates

SHORTEST = 16  # shortest length of padded rows


@dataclasses.dataclass(frozen=True)
class LikelihoodConfig:
  """Settings of likelihoods.

  Attributes:
    context: largest number of tokens of a row, prompt and answer together.
    guidance: scale w of classifier-free guidance, 0: none. Logits are u +
      (w + 1)(c - u), with the prompt (c) and without (u); LLaDA,
      get_log_likelihood.py.
    tokens_per_call: approximate number of tokens in a call of the largest
      size, which determines its memory.
    loss_chunk_tokens: number of tokens projected onto the vocabulary at once.
      Their logits take loss_chunk_tokens x vocab_size float32 of memory.
  """

  context: int
  guidance: float
  tokens_per_call: int
  loss_chunk_tokens: int


class Answers(NamedTuple):
  """Rows and the part of each to score; bounds.lay_out makes them."""

  tokens: np.ndarray  # [B, L] int32
  answer: np.ndarray  # [B, L] bool, any positions to score
  valid: np.ndarray  # [B, L] bool, False on padding, at either end of a row


class Row(NamedTuple):
  """A row without its padding."""

  tokens: np.ndarray  # [L] int32
  answer: np.ndarray  # [L] bool, A of them True


class Call(NamedTuple):
  """Queries that are computed together, one per row; all arrays are [B, L]."""

  tokens: np.ndarray  # int32
  valid: np.ndarray  # bool, False on padding
  prompt: np.ndarray  # bool, valid and not in the answer
  masked: np.ndarray  # bool, answer tokens hidden by the mask token
  scored: np.ndarray  # bool, answer tokens whose log-probability is computed


def rows_of(network, c, answers):
  """Checks rows and removes their padding.

  Args:
    network: Network.
    c: LikelihoodConfig.
    answers: Answers.

  Returns:
    list of Row.

  Raises:
    UserError: shapes differ; a row has no answer, is longer than the context,
      or contains the mask token or an id outside the vocabulary; an answer is
      on padding; guidance needs masked prompts in training; or text follows an
      answer, and the network does not see it.
  """
  tokens = np.asarray(answers.tokens, np.int32)
  answer = np.asarray(answers.answer, bool)
  valid = np.asarray(answers.valid, bool)
  if tokens.ndim != 2 or not tokens.shape == answer.shape == valid.shape:
    raise UserError(
      f'tokens {tokens.shape}, answer {answer.shape} and valid {valid.shape} '
      'must have one shape [B, L]'
    )
  objective = OBJECTIVES[network.objective]
  if c.guidance and not objective.can_guide:
    raise UserError(
      f'guidance={c.guidance:g} needs a model trained with masked prompts, and '
      f'objective {network.objective} masks none; set guidance=0'
    )
  rows = []
  for i in range(len(tokens)):
    row = Row(tokens[i, valid[i]], answer[i, valid[i]])
    if not row.answer.any() or (answer[i] & ~valid[i]).any():
      raise UserError(f'row {i} has no answer, or its answer is on padding')
    if len(row.tokens) > c.context:
      raise UserError(
        f'row {i}: prompt and answer have {len(row.tokens)} tokens together, '
        f'but training rows had {c.context}; shorten them'
      )
    if network.mask_id in row.tokens:
      position = list(row.tokens).index(network.mask_id)
      raise UserError(
        f'row {i}: token {position} is the mask token, id {network.mask_id}, '
        'which encodes no text; remove it'
      )
    if row.tokens.min() < 0 or row.tokens.max() >= network.config.vocab_size:
      raise UserError(
        f'row {i}: token ids must lie in [0, {network.config.vocab_size})'
      )
    if network.window_length and network.bos_id < 0 and row.answer[0]:
      raise UserError(
        f'row {i} has no prompt, and the model has no bos token to predict the '
        'first token from; give a prompt'
      )
    if answer_blocks.has_unseen_text(network, row.answer):
      raise UserError(
        f'row {i}: text follows the answer, and a network trained with '
        f'objective {network.objective} does not see it; remove it'
      )
    rows.append(row)
  return rows


def padded_length(length):
  """Returns the length that a row is padded to: 16, 24, 32, 48, 64, 96, ...

  The lengths are powers of two, and three quarters of them: 17 lengths up to
  4096. Padding adds less than half to the length of a row of 16 or more tokens.
  """
  size = SHORTEST
  while size < length:
    size *= 2
  smaller = max(SHORTEST, size * 3 // 4)
  return smaller if smaller >= length else size


def by_length(rows, indices):
  """Returns a dict from padded length to those of the indices of its rows."""
  groups = collections.defaultdict(list)
  for i in indices:
    groups[padded_length(len(rows[i].tokens))].append(i)
  return groups


def shared(network, rows, work, progress):
  """Returns `shares.computed` of rows; arguments as for this function."""
  # Forward passes grow with the length, and often with the answer.
  cost = lambda row: padded_length(len(row.tokens)) * int(row.answer.sum())
  content = lambda row: row.tokens.tobytes() + row.answer.tobytes()
  items = [shares.Item(content(row), cost(row)) for row in rows]
  return shares.computed(network.params, items, work, progress)


def evaluate(network, c, rows, queries_of, progress=None):
  """Computes the values of queries, each in one process if all have a copy.

  Args:
    network: Network.
    c: LikelihoodConfig.
    rows: list of Row.
    queries_of: function from the index of a row to its n estimators.Queries.
      It is called once per row, shortly before the row is computed.
    progress: function without arguments, called after each row; or None.

  Returns:
    list of [n] float64: weight x sum over the scored tokens of log p, in nats.

  Raises:
    UserError: a log-probability is not finite.
  """
  work = functools.partial(_evaluate, network, c, rows, queries_of)
  return [np.asarray(v, float) for v in shared(network, rows, work, progress)]


def _evaluate(network, c, rows, queries_of, indices, progress):
  """Returns what `evaluate` does, for some rows."""
  values = {}
  pending = {}  # from the index of a row to its queries and their results

  def distinct_queries(members):
    for i in members:
      queries = queries_of(i)
      _, first, inverse = np.unique(
        np.packbits(queries.masked, axis=1),
        axis=0,
        return_index=True,
        return_inverse=True,
      )
      inverse = inverse.reshape(-1)
      scored = np.zeros((len(first), queries.scored.shape[1]), bool)
      np.logical_or.at(scored, inverse, queries.scored)
      pending[i] = queries, inverse, np.zeros(scored.shape)
      values[i] = np.zeros(len(queries.weight))
      for k in np.flatnonzero(scored.any(axis=1)):
        yield i, k, queries.masked[first[k]], scored[k]

  function = functools.partial(_log_probs, network, c)
  for size, members in by_length(rows, indices).items():
    results = run(function, c, rows, size, distinct_queries(members))
    for i, results_of_row in itertools.groupby(results, lambda r: r[0]):
      queries, inverse, log_probs = pending.pop(i)
      for _, k, (log_prob,) in results_of_row:
        log_probs[k] = log_prob
      check_finite(i, log_probs)
      weight = queries.weight.reshape(len(queries.weight), -1)
      found = np.where(queries.scored, log_probs[inverse], 0)
      values[i] = (weight * found).sum(axis=1)
      if progress:
        progress()
  return [values[i] for i in indices]


def predict(network, c, rows, size, queries):
  """Predicts the most probable tokens at the scored positions.

  Args:
    network: as for `evaluate`.
    c: as for `evaluate`.
    rows: as for `evaluate`.
    size: as for `run`.
    queries: as for `run`.

  Yields:
    (row index, k, [A] int32 tokens, [A] float32 their log-probabilities).

  Raises:
    UserError: a log-probability is not finite.
  """
  function = functools.partial(_predictions, network, c)
  for i, k, (token, log_prob) in run(function, c, rows, size, queries):
    check_finite(i, log_prob)
    yield i, k, token, log_prob


def check_finite(i, log_probs):
  """Raises a UserError if a log-probability of row i is not finite."""
  if not np.isfinite(log_probs).all():
    raise UserError(
      f'row {i}: a log-probability is not finite: the parameters are damaged, '
      'or overflow in config.model.dtype'
    )


def run(function, c, rows, size, queries):
  """Computes queries in calls of up to about c.tokens_per_call tokens.

  Args:
    function: from a Call of length L to a tuple of arrays [B, L].
    c: LikelihoodConfig.
    rows: list of Row.
    size: L, at least the length of every row in `queries`.
    queries: iterable of (row index, k, masked [A], scored [A]). It is read
      lazily, call by call. k identifies the query to the caller.

  Yields:
    (row index, k, tuple of the function's arrays at the A positions of the
    answer), in the order of the queries.
  """
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else batch_shards(mesh)
  max_queries = max(1, c.tokens_per_call // (size * shards)) * shards
  queries = iter(queries)
  in_flight = None  # the call that the devices are computing
  while batch := list(itertools.islice(queries, max_queries)):
    count = shards
    while count < len(batch):
      count *= 4
    call = _call(rows, size, min(count, max_queries), batch)
    finished, in_flight = in_flight, (batch, function(call))
    if finished:
      yield from _results(rows, *finished)
  if in_flight:
    yield from _results(rows, *in_flight)


def _call(rows, size, count, batch):
  call = Call(
    np.zeros((count, size), np.int32),
    *(np.zeros((count, size), bool) for _ in range(4)),
  )
  for r, (i, _, masked, scored) in enumerate(batch):
    tokens, answer = rows[i]
    end = len(tokens)
    call.tokens[r, :end] = tokens
    call.valid[r, :end] = True
    call.prompt[r, :end] = ~answer
    call.masked[r, :end][answer] = masked
    call.scored[r, :end][answer] = scored
  return call


def _results(rows, batch, arrays):
  arrays = jax.device_get(arrays)
  for r, (i, k, *_) in enumerate(batch):
    answer = rows[i].answer
    yield i, k, tuple(a[r, : len(answer)][answer] for a in arrays)


def _states(network, model, c, call):
  """Returns the final hidden states of a Call, [B, L, D].

  The projection onto the vocabulary is linear, so guidance combines hidden
  states instead of logits, which saves a second projection.
  """

  def states(masked):
    shown = show_masked(network, call.tokens, masked, call.valid)
    return model(*shown)[:, : masked.shape[1]]

  conditional = states(call.masked)
  if not c.guidance:
    return conditional
  unconditional = states(call.masked | call.prompt).astype(jnp.float32)
  return candidates.guide(conditional, unconditional, c.guidance).astype(
    conditional.dtype
  )


@functools.partial(jax.jit, static_argnums=1)
def _log_probs(network, c, call):
  """Returns log-probabilities of the scored tokens, 0 elsewhere: ([B, L],)."""
  model = bind(network.config, network.params)
  _, nll = cross_entropy(
    _states(network, model, c, call),
    model.vocabulary(),
    call.tokens,
    call.scored.astype(jnp.float32),
    None if network.predict_mask else network.mask_id,
    c.loss_chunk_tokens,
  )
  return replicate((-nll,))


@functools.partial(jax.jit, static_argnums=1)
def _predictions(network, c, call):
  """Returns the most probable tokens and their log-probabilities, [B, L] each.

  Both are 0 at positions that are not scored. As in the cross entropy, only
  scored positions are projected onto the vocabulary, in chunks.
  """
  model = bind(network.config, network.params)
  states = _states(network, model, c, call)
  states = states.reshape(-1, states.shape[-1])
  scored = call.scored.reshape(-1)

  def body(index, results):
    logits = model.logits(loops.read(states, index))
    if not network.predict_mask:
      logits = candidates.suppress(logits, (network.mask_id,))
    log_prob = logits.max(axis=-1) - jax.nn.logsumexp(logits, axis=-1)
    chunk_results = jnp.argmax(logits, axis=-1).astype(jnp.int32), log_prob
    return tuple(
      loops.write(x, index, new)
      for x, new in zip(results, chunk_results, strict=True)
    )

  start = jnp.zeros(len(scored), jnp.int32), jnp.zeros(len(scored))
  results = loops.over_selected(
    body, start, scored, c.loss_chunk_tokens, part=0, parts=1
  )
  return replicate(tuple(x.reshape(call.scored.shape) for x in results))


def likelihood_config(config, guidance, tokens_per_call):
  """Returns the LikelihoodConfig of a run's config."""
  return LikelihoodConfig(
    context=config.data.length,
    guidance=guidance,
    tokens_per_call=tokens_per_call,
    loss_chunk_tokens=config.objective.loss_chunk_tokens,
  )
