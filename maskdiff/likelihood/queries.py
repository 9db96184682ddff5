"""Packs looks at rows into compiled calls.

A look hides some tokens of a row's answer from the network and asks about some
of them (estimators.Looks). Looks of all rows are packed into calls of few
compiled shapes: rows are padded to one of a few lengths, and a call has 1, 4,
16, ... looks. Looks that hide the same tokens of a row are computed once, so
that an answer of A tokens never costs more than 2^A looks, however many are
drawn.
"""

import collections
import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.distributed.mesh import batch_shards, replicate
from maskdiff.errors import UserError
from maskdiff.model.cross_entropy import cross_entropy
from maskdiff.model.transformer import bind
from maskdiff.objectives.table import OBJECTIVES, show
from maskdiff.sampling import candidates

SHORTEST = 16  # rows are padded to at least this length


@dataclasses.dataclass(frozen=True)
class LikelihoodConfig:
  context: int  # tokens of the longest row, prompt and answer together
  # w of classifier-free guidance, 0 for none: the logits are those without
  # the prompt plus (w + 1) times what the prompt adds (LLaDA,
  # get_log_likelihood.py)
  guidance: float
  tokens_per_call: int  # of the looks of a call, about; sets its memory
  loss_chunk_tokens: int  # memory: this x vocab_size float32


class Answers(NamedTuple):
  """Rows of which a part is scored, the answer."""

  tokens: np.ndarray  # [B, L] int32
  answer: np.ndarray  # [B, L] bool, the positions that are scored, anywhere
  valid: np.ndarray  # [B, L] bool, False on padding, at the ends of a row


class Row(NamedTuple):
  """A row without its padding."""

  tokens: np.ndarray  # [L] int32
  answer: np.ndarray  # [L] bool, A of them True


class Call(NamedTuple):
  """Looks that are computed together, one a row; [B, L] each."""

  tokens: np.ndarray  # int32
  valid: np.ndarray  # bool, False on padding
  prompt: np.ndarray  # bool, valid and not the answer
  masked: np.ndarray  # bool
  scored: np.ndarray  # bool


def rows_of(network, c, answers):
  """Checks a request and takes off its padding.

  Args:
    network: Network.
    c: LikelihoodConfig.
    answers: Answers.

  Returns:
    list of Row.

  Raises:
    UserError: shapes differ; a row has nothing to score, is longer than the
      context, or holds the mask id or one outside the vocabulary; or the
      network cannot give what is asked for.
  """
  tokens = np.asarray(answers.tokens, np.int32)
  answer = np.asarray(answers.answer, bool)
  valid = np.asarray(answers.valid, bool)
  if tokens.ndim != 2 or not tokens.shape == answer.shape == valid.shape:
    raise UserError(
      f'tokens {tokens.shape}, answer {answer.shape} and valid {valid.shape} '
      'must have one shape [B, L]'
    )
  causal = OBJECTIVES[network.objective].left_to_right
  if causal and c.guidance:
    raise UserError(
      f'guidance={c.guidance:g}: it masks the prompt, and an autoregressive '
      'network knows no masks'
    )
  rows = []
  for i in range(len(tokens)):
    row = Row(tokens[i, valid[i]], answer[i, valid[i]])
    if not row.answer.any() or (answer[i] & ~valid[i]).any():
      raise UserError(f'row {i}: there is no answer, or it is on padding')
    if len(row.tokens) > c.context:
      raise UserError(
        f'row {i}: prompt and answer have {len(row.tokens)} tokens, more than '
        f'the {c.context} that the network was trained on'
      )
    if network.mask_id in row.tokens:
      position = list(row.tokens).index(network.mask_id)
      raise UserError(
        f'row {i}: token {position} is the mask, id {network.mask_id}, which '
        'stands for no text'
      )
    if row.tokens.min() < 0 or row.tokens.max() >= network.config.vocab_size:
      raise UserError(
        f'row {i}: token ids must lie in [0, {network.config.vocab_size})'
      )
    if causal and not row.answer[np.argmax(row.answer) :].all():
      raise UserError(
        f'row {i}: an autoregressive network scores the end of a row only'
      )
    rows.append(row)
  return rows


def padded_length(length):
  """The length that a row is padded to: 16, 24, 32, 48, 64, 96, 128, 192...

  Powers of two and three quarters of them: less than half of it is added, and
  there are 17 up to 4096.
  """
  size = SHORTEST
  while size < length:
    size *= 2
  less = max(SHORTEST, size * 3 // 4)
  return less if less >= length else size


def by_length(rows):
  """Groups the numbers of rows by the length that they are padded to."""
  groups = collections.defaultdict(list)
  for i, row in enumerate(rows):
    groups[padded_length(len(row.tokens))].append(i)
  return groups


def evaluate(network, c, rows, queries_of):
  """The values of looks.

  Args:
    network: Network.
    c: LikelihoodConfig.
    rows: list of Row.
    queries_of: function from the number of a row to its estimators.Queries, n
      of them; called once for each row, when the row is computed.

  Returns:
    list of [n] float64: weight x sum over the scored tokens of log p, in nats.

  Raises:
    UserError: the network gives something that is no number.
  """
  values = [None] * len(rows)
  drawn = {}

  def distinct(members):
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
      drawn[i] = queries, inverse, np.zeros(scored.shape)
      values[i] = np.zeros(len(queries.weight))
      for k in np.flatnonzero(scored.any(axis=1)):
        yield i, k, queries.masked[first[k]], scored[k]

  function = functools.partial(_log_probs, network, c)
  for size, members in by_length(rows).items():
    results = run(function, c, rows, size, distinct(members))
    for i, results_of_row in itertools.groupby(results, lambda r: r[0]):
      queries, inverse, log_probs = drawn.pop(i)
      for _, k, (log_prob,) in results_of_row:
        log_probs[k] = log_prob
      check_finite(i, log_probs)
      sums = np.where(queries.scored, log_probs[inverse], 0).sum(axis=1)
      values[i] = queries.weight * sums
  return values


def predict(network, c, rows, size, queries):
  """The most probable tokens at the scored positions.

  Args:
    network: as for `evaluate`.
    c: as for `evaluate`.
    rows: as for `evaluate`.
    size: as for `run`.
    queries: as for `run`.

  Yields:
    (row number, k, [A] int32 tokens, [A] float32 their log-probabilities).

  Raises:
    UserError: the network gives something that is no number.
  """
  function = functools.partial(_predictions, network, c)
  for i, k, (token, log_prob) in run(function, c, rows, size, queries):
    check_finite(i, log_prob)
    yield i, k, token, log_prob


def check_finite(i, log_probs):
  """Raises a UserError unless what was computed for row i are numbers."""
  if not np.isfinite(log_probs).all():
    raise UserError(
      f'row {i}: the network gives a log-probability that is no finite number; '
      'its parameters are damaged, or overflow in config.model.dtype'
    )


def run(function, c, rows, size, queries):
  """Computes looks in calls that are as large as may be.

  Args:
    function: from a Call of length L to a tuple of arrays [B, L].
    c: LikelihoodConfig.
    rows: list of Row.
    size: L, at least the length of the rows that are looked at.
    queries: iterable of (row number, k, masked [A], scored [A]), read as
      needed; k is for the caller.

  Yields:
    (row number, k, the function's arrays at the positions of the answer, [A]
    each) in the order of the looks.
  """
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else batch_shards(mesh)
  most = max(1, c.tokens_per_call // (size * shards)) * shards
  queries = iter(queries)
  waiting = None  # the call that the devices are busy with
  while batch := list(itertools.islice(queries, most)):
    count = shards
    while count < len(batch):
      count *= 4
    call = _call(rows, size, min(count, most), batch)
    previous, waiting = waiting, (batch, function(call))
    if previous:
      yield from _results(rows, *previous)
  if waiting:
    yield from _results(rows, *waiting)


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
  """Final hidden states of a Call, [B, L, D].

  The projection onto the vocabulary is linear, so that guidance may combine
  states in place of logits: it costs no second projection.
  """

  def states(masked):
    shown = jnp.where(masked, network.mask_id, call.tokens)
    return model(*show(network.objective, shown, call.valid, network.bos_id))

  given = states(call.masked)
  if not c.guidance:
    return given
  without = states(call.masked | call.prompt).astype(jnp.float32)
  return candidates.guide(given, without, c.guidance).astype(given.dtype)


@functools.partial(jax.jit, static_argnums=1)
def _log_probs(network, c, call):
  """Log-probability of each asked token, 0 elsewhere: a tuple of [B, L]."""
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
  """The most probable token where asked and its log-probability; 0 elsewhere.

  As in the cross entropy, only asked positions are projected, in chunks.
  """
  model = bind(network.config, network.params)
  states = _states(network, model, c, call)
  states = states.reshape(-1, states.shape[-1])
  scored = call.scored.reshape(-1)
  chunk = min(c.loss_chunk_tokens, len(scored))
  order = jnp.argsort(~scored, stable=True)
  # Out of range: reads give 0, writes are dropped.
  order = jnp.where(jnp.arange(len(order)) < scored.sum(), order, len(order))
  order = jnp.pad(order, (0, -len(order) % chunk), constant_values=len(scored))

  def body(i, found):
    index = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
    logits = model.logits(states.at[index].get(mode='fill', fill_value=0))
    if not network.predict_mask:
      logits = candidates.suppress(logits, (network.mask_id,))
    log_prob = logits.max(axis=-1) - jax.nn.logsumexp(logits, axis=-1)
    here = jnp.argmax(logits, axis=-1).astype(jnp.int32), log_prob
    return tuple(
      f.at[index].set(h, mode='drop') for f, h in zip(found, here, strict=True)
    )

  found = jnp.zeros(len(scored), jnp.int32), jnp.zeros(len(scored))
  found = jax.lax.fori_loop(0, -(-scored.sum() // chunk), body, found)
  return replicate(tuple(f.reshape(call.scored.shape) for f in found))


def likelihood_config(config, guidance, tokens_per_call):
  """The frozen config of likelihoods; see looks.LikelihoodConfig."""
  return LikelihoodConfig(
    context=config.data.length,
    guidance=guidance,
    tokens_per_call=tokens_per_call,
    loss_chunk_tokens=config.objective.loss_chunk_tokens,
  )
