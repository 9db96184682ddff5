"""Functions of an inner step in jit: log-probabilities and gradients.

The masks of an inner step are keyed by (seed of the run, round, inner step, row
of the global batch). So the policy at the start of the round, the reference,
and the policy of each inner step see the same masks. The first two do not
change during a round: `fixed_log_probs` computes them once, and the train step
needs no other parameters than its own.

Microbatches divide the rows of a network's passes. The loss is computed of all
log-probabilities of the batch, whatever their number: with several
microbatches, a pass without gradients comes first, and the gradient of the loss
by the log-probabilities is then propagated row by row.

Letters in shapes: K networks; I inner steps; n copies per row; N rows; L
positions.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.distributed.mesh import BATCH_AXES
from maskdiff.likelihood import row_bounds
from maskdiff.model.lora import LoraConfig
from maskdiff.model.network import Network
from maskdiff.model.trainable import join, trainable
from maskdiff.rl import policy_loss, table
from maskdiff.rl.batch import Batch
from maskdiff.rl.settings import Settings
from maskdiff.training.step import split_rows


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """Static settings of inner steps.

  Attributes:
    method: key of table.METHODS.
    settings: Settings.
    network: Network without parameters.
    seed: of the masks.
    inner_steps: I.
    reference: whether log-probabilities of a reference are needed.
    chunk: tokens projected onto the vocabulary at once.
    microbatches: parts of a batch.
  """

  method: str
  settings: Settings
  network: Network
  seed: int
  inner_steps: int
  reference: bool
  chunk: int
  microbatches: int

  @property
  def fixed_steps(self):
    """Inner steps that use stored log-probabilities, a range.

    At the first one, the policy is the one that sampled.
    """
    return range(0 if self.reference else 1, self.inner_steps)

  @property
  def fixed_networks(self):
    """Names of the networks whose log-probabilities are stored."""
    old = ['old'] * (self.inner_steps > 1)
    return (*old, *['reference'] * self.reference)


class PolicyRows(NamedTuple):
  """The batch of an inner step."""

  rows: Batch
  advantages: jax.Array  # [N] float32
  step: jax.Array  # [2] int32, round and inner step
  # [K, n, N, L] float32, see PolicyConfig.fixed_networks; None if there are
  # none.
  fixed: jax.Array | None

  @property
  def tokens(self):
    return self.rows.tokens


class PolicySums(NamedTuple):
  """The loss of an inner step, and the metrics of policy_loss.loss."""

  loss: jax.Array
  metrics: dict

  @property
  def divisor(self):
    return 1.0


def draw(c, rows, step):
  """Returns the masked copies of an inner step, device_queries.RowQueries.

  Args:
    c: PolicyConfig.
    rows: Batch.
    step: [2] int32, round and inner step.
  """
  key = jax.random.key(c.seed)
  key = jax.random.fold_in(jax.random.fold_in(key, step[0]), step[1])
  numbers = jnp.arange(len(rows.tokens), dtype=jnp.int32)
  return policy_loss.draw(c.method, c.network, c.settings, rows, key, numbers)


def fixed_log_probs(c, params, rows, round_number):
  """Computes the log-probabilities that do not change during a round.

  Args:
    c: PolicyConfig.
    params: list of parameter trees, for `c.fixed_networks`; the reference has
      no adapters.
    rows: Batch.
    round_number: int32 scalar.

  Returns:
    [len(c.fixed_steps), K, n, N, L] float32.
  """
  without_adapters = dataclasses.replace(c.network.config, lora=LoraConfig())
  configs = {'old': c.network.config, 'reference': without_adapters}
  networks = [
    dataclasses.replace(c.network, config=configs[name], params=tree)
    for name, tree in zip(c.fixed_networks, params, strict=True)
  ]

  def of_step(inner):
    queries = draw(c, rows, jnp.stack([round_number, inner]))
    return _log_probs(c, networks, rows, queries)

  return jax.lax.map(of_step, jnp.array(c.fixed_steps, jnp.int32))


def choose(c, rows, advantages, fixed, step):
  """Returns the PolicyRows of an inner step.

  Args:
    c: PolicyConfig.
    rows: Batch.
    advantages: [N] float32.
    fixed: from `fixed_log_probs`, or None.
    step: [2] int32, round and inner step.
  """
  if fixed is not None:
    fixed = fixed[jnp.maximum(step[1] - c.fixed_steps.start, 0)]
  return PolicyRows(rows, advantages, step, fixed)


def gradients(c, step_config, state, batch, key):
  """Computes the gradients of an inner step, for `step.train_step`.

  Args:
    c: PolicyConfig.
    step_config: StepConfig.
    state: TrainState.
    batch: PolicyRows.
    key: not used, see `draw`.

  Returns:
    A tree like trainable(params), and PolicySums.
  """
  del key
  rows, queries = batch.rows, draw(c, batch.rows, batch.step)
  trained = trainable(step_config.model, state.params)

  def network(trained):
    return dataclasses.replace(c.network, params=join(state.params, trained))

  loss = lambda new: _loss(c, new, queries, batch)
  if c.microbatches == 1:
    of_params = lambda trained: loss(
      _log_probs(c, [network(trained)], rows, queries)[0]
    )
    return jax.grad(of_params, has_aux=True)(trained)

  new = _log_probs(c, [network(trained)], rows, queries)[0]
  cotangent, sums = jax.grad(loss, has_aux=True)(new)

  def of_part(trained, part):
    found = _part_log_probs(c, [network(trained)], rows, queries, part)[0]
    return (found * cotangent[:, part]).sum()

  def accumulate(total, part):
    return jax.tree.map(jnp.add, total, jax.grad(of_part)(trained, part)), ()

  zeros = jax.tree.map(jnp.zeros_like, trained)
  return jax.lax.scan(accumulate, zeros, _parts(c, rows))[0], sums


def measure(c, params, batch):
  """Returns the PolicySums of a batch, without gradients.

  Args:
    c: PolicyConfig.
    params: parameter tree of the policy.
    batch: PolicyRows.
  """
  queries = draw(c, batch.rows, batch.step)
  network = dataclasses.replace(c.network, params=params)
  new = _log_probs(c, [network], batch.rows, queries)[0]
  return _loss(c, new, queries, batch)[1]


def _loss(c, new, queries, batch):
  """Returns the loss of log-probabilities [n, N, L], and PolicySums."""
  fixed = {}
  if batch.fixed is not None:
    fixed = dict(zip(c.fixed_networks, batch.fixed, strict=True))
  if 'old' in fixed:
    # Another program computed the stored ones: only its own ratios are 1.
    is_first = batch.step[1] == 0
    own = jax.lax.stop_gradient(new)
    fixed['old'] = jnp.where(is_first, own, fixed['old'])
  log_probs = policy_loss.LogProbs(new, **fixed)
  value, metrics = policy_loss.loss(
    c.method, c.settings, log_probs, queries, batch.rows, batch.advantages
  )
  return value, PolicySums(value, metrics)


def _parts(c, rows):
  """Returns the numbers of the rows of each microbatch, [M, N / M] int32."""
  numbers = jnp.arange(len(rows.tokens), dtype=jnp.int32)
  return split_rows(numbers, c.microbatches)


def _log_probs(c, networks, rows, queries):
  """Returns log-probabilities of scored tokens, [K, n, N, L] float32."""
  if c.microbatches == 1:
    answers = policy_loss.answers(rows)
    return row_bounds.log_probs(networks, answers, queries, c.chunk)
  parts = _parts(c, rows)
  found = jax.lax.map(
    lambda part: _part_log_probs(c, networks, rows, queries, part), parts
  )
  found = jnp.moveaxis(found, 0, 2)  # [K, n, M, N / M, L]
  found = found.reshape(*found.shape[:2], -1, found.shape[-1])
  return found[:, :, jnp.argsort(parts.reshape(-1))]


def _part_log_probs(c, networks, rows, queries, part):
  """Returns the log-probabilities of some rows."""
  answers = jax.tree.map(lambda x: x[part], policy_loss.answers(rows))
  queries = jax.tree.map(lambda x: x[:, part], queries)
  return row_bounds.log_probs(networks, answers, queries, c.chunk)


def shardings(c, mesh):
  """Returns the shardings of a PolicyRows, and of `fixed_log_probs`.

  Args:
    c: PolicyConfig.
    mesh: device mesh.
  """
  rows = mesh_lib.batch_sharding(mesh)
  replicated = mesh_lib.replicated(mesh)
  spec = lambda leading: NamedSharding(
    mesh, PartitionSpec(*[None] * leading, BATCH_AXES, 'sequence')
  )
  batch = PolicyRows(
    # Pairs were not sampled, so they have no steps.
    rows=Batch(*[rows] * 4, None if table.find(c.method).pairs else rows),
    advantages=replicated,
    step=replicated,
    fixed=spec(2) if c.fixed_steps and c.fixed_networks else None,
  )
  return batch, spec(3)
