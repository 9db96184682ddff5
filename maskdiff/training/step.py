"""The train step and the evaluation step, as pure functions of arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from maskdiff.distributed import compiler
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.distributed.mesh import BATCH_AXES
from maskdiff.model import transformer
from maskdiff.model.transformer import TransformerConfig, bind
from maskdiff.objectives.canvas import ObjectiveConfig, canvas_loss
from maskdiff.objectives.schedule import Schedule
from maskdiff.objectives.table import make_canvas
from maskdiff.training import guard as guard_lib
from maskdiff.training import optimizer as optimizer_lib
from maskdiff.training.guard import GuardConfig

# Rows are also counted by mask ratio, in this many equal buckets.
RATIO_BUCKETS = 5


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['step', 'params', 'opt_state', 'guard'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  step: jax.Array  # int32 scalar, batches done
  params: dict  # float32
  opt_state: tuple  # counts the updates made
  guard: dict  # see guard.py


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """All that the compiled step depends on, apart from the optimizer."""

  model: TransformerConfig
  objective: ObjectiveConfig
  length: int  # L
  microbatches: int
  guard: GuardConfig


def train_step(c, optimizer, state, tokens, key):
  """One update, or none if the guard objects.

  Args:
    c: StepConfig.
    optimizer: optax.GradientTransformation.
    state: TrainState.
    tokens: [B, L] int32, the global batch of clean tokens.
    key: PRNG key of the run; the step's own is folded from it.

  Returns:
    The next TrainState, and a dict of float32 and int32: what `summarize`
    returns, the norms of gradients and parameters, whether the update was
    skipped, and how many were in a row and before.
  """
  key = jax.random.fold_in(key, state.step)
  gradients, sums = batch_gradients(c, state.params, tokens, key)
  with jax.named_scope('part(optimizer)'):
    gradients = jax.tree.map(lambda g: g / sums['num_tokens'], gradients)
    grad_norm = optax.tree.norm(gradients)
    ok, guard = guard_lib.judge(
      c.guard, state.guard, sums['weighted_nll'] / sums['num_tokens'], grad_norm
    )
    updates, opt_state = optimizer.update(
      gradients, state.opt_state, state.params
    )
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(ok, new, old),
      (optax.apply_updates(state.params, updates), opt_state),
      (state.params, state.opt_state),
    )
    param_norm = optax.tree.norm(params)
  metrics = {
    **sums,
    'grad_norm': grad_norm,
    'param_norm': param_norm,
    'skipped': ~ok,
    'skipped_in_a_row': guard['in_a_row'],
    'skipped_before': state.guard['skipped'],
  }
  return TrainState(state.step + 1, params, opt_state, guard), metrics


def batch_gradients(c, params, tokens, key):
  """Gradients of a batch's summed loss, microbatch by microbatch.

  Args:
    c: StepConfig.
    params: parameter tree.
    tokens: [B, L] int32, the global batch.
    key: PRNG key of this step.

  Returns:
    A tree like params, and the sums of `summarize`.
  """
  batch = tokens.shape[0]

  def loss(params, rows, tokens):
    sums = loss_sums(c, params, tokens, rows, key, batch)
    return sums['weighted_nll'], sums

  gradient = jax.grad(loss, has_aux=True)

  def accumulate(carry, microbatch):
    return jax.tree.map(jnp.add, carry, gradient(params, *microbatch)), ()

  rows = jnp.arange(batch, dtype=jnp.int32)
  if c.microbatches == 1:
    return gradient(params, rows, tokens)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(gradient, params, rows, tokens),
  )
  with jax.named_scope('part(gradient sum over microbatches)'):
    sums, _ = jax.lax.scan(
      accumulate, zeros, split_rows((rows, tokens), c.microbatches)
    )
  return sums


def eval_step(c, params, tokens, key):
  """The sums of one batch under fixed noise; see `summarize`.

  Args:
    c: StepConfig; its objective cuts no sequence.
    params: parameter tree.
    tokens: [B, L] int32.
    key: PRNG key of this batch, the same at every evaluation.
  """
  batch = tokens.shape[0]
  rows = jnp.arange(batch, dtype=jnp.int32)
  return loss_sums(c, params, tokens, rows, key, batch)


def loss_sums(c, params, tokens, rows, key, batch):
  """Corrupts some rows of a global batch and sums up their loss.

  Args:
    c: StepConfig.
    params: parameter tree.
    tokens: [b, L] int32.
    rows: [b] int32, their numbers in the global batch.
    key: PRNG key of this step.
    batch: rows of the global batch.

  Returns:
    See `summarize`; `weighted_nll` is the one with a gradient.
  """
  canvas = make_canvas(c.objective, tokens, rows, key, batch)
  total, nll = canvas_loss(c.objective, bind(c.model, params), canvas)
  return summarize(canvas, total, nll)


@jax.named_scope('part(metrics)')
def summarize(canvas, total, nll):
  """What a batch adds to the metrics, as sums, so that batches add up.

  Returns:
    - `weighted_nll`: float32, sum of weight x nll in nats.
    - `num_tokens`: float32, tokens of text.
    - `num_predicted`: float32, positions that carry a loss.
    - `ratio_nll`, `ratio_count`: [RATIO_BUCKETS] float32, unweighted nll and
      number of predicted positions of the rows by mask ratio.
  """
  predicted = canvas.weights != 0
  bucket = jnp.minimum(
    (canvas.mask_ratio * RATIO_BUCKETS).astype(jnp.int32), RATIO_BUCKETS - 1
  )
  by_bucket = lambda x: jnp.zeros(RATIO_BUCKETS).at[bucket].add(x.sum(axis=1))
  return {
    'weighted_nll': total,
    'num_tokens': canvas.num_tokens.sum(),
    'num_predicted': predicted.sum().astype(jnp.float32),
    'ratio_nll': by_bucket(nll),
    'ratio_count': by_bucket(predicted.astype(jnp.float32)),
  }


def split_rows(tree, parts):
  """Splits the leading axis of every leaf into `parts` microbatches.

  Each device keeps its own rows, and the two rows of a pair (`sample_times`)
  stay together where a microbatch has room for pairs, so that no data moves
  and every device has its half of tokens masked in every microbatch.

  Args:
    tree: arrays [B, ...].
    parts: M, divides B.

  Returns:
    arrays [M, B / M, ...].
  """
  mesh = jax.sharding.get_abstract_mesh()

  def split(x):
    shards = 1 if mesh.empty else mesh_lib.batch_shards(mesh)
    group = 2 if x.shape[0] % (2 * parts * shards) == 0 else 1
    rest = x.shape[1:]
    x = x.reshape(-1, parts, group, *rest).swapaxes(0, 1)
    x = x.reshape(parts, -1, *rest)
    if mesh.empty:
      return x
    spec = P(None, BATCH_AXES, *('sequence',) * len(rest))
    return jax.lax.with_sharding_constraint(x, spec)

  return jax.tree.map(split, tree)


def state_shardings(c, optimizer, mesh):
  """The TrainState with a sharding for every array."""
  shapes = transformer.shapes(c)
  params = mesh_lib.param_shardings(mesh, transformer.axes(c), shapes)
  replicated = mesh_lib.replicated(mesh)
  opt_state = optimizer_lib.state_shardings(
    optimizer, shapes, params, replicated
  )
  guard = jax.tree.map(lambda _: replicated, jax.eval_shape(guard_lib.init))
  return TrainState(replicated, params, opt_state, guard)


def init_state(c, optimizer, key):
  """A fresh TrainState for a TransformerConfig; jit it with out_shardings."""
  return start_state(optimizer, transformer.init(c, key))


def start_state(optimizer, params):
  """The TrainState of a training that begins with these parameters."""
  return TrainState(
    jnp.zeros((), jnp.int32), params, optimizer.init(params), guard_lib.init()
  )


def compile_train_step(c, optimizer, mesh):
  """Jits the train step with its shardings; the state is donated."""
  states = state_shardings(c.model, optimizer, mesh)
  replicated = mesh_lib.replicated(mesh)
  return jax.jit(
    functools.partial(train_step, c, optimizer),
    in_shardings=(states, mesh_lib.batch_sharding(mesh), replicated),
    out_shardings=(states, replicated),
    donate_argnums=0,
    compiler_options=compiler.options(mesh),
  )


def step_config(config):
  """The frozen configs that the compiled step depends on."""
  o = config.objective
  return StepConfig(
    model=TransformerConfig(**config.model),
    objective=ObjectiveConfig(
      name=o.name,
      schedule=Schedule(o.schedule, o.schedule_power),
      eps=o.eps,
      time_sampling=o.time_sampling,
      random_length_fraction=o.random_length_fraction,
      attend_within=o.attend_within,
      predict_mask=o.predict_mask,
      mask_id=config.tokens.mask_id,
      bos_id=config.tokens.bos_id,
      eos_id=config.tokens.eos_id,
      loss_chunk_tokens=o.loss_chunk_tokens,
    ),
    length=config.data.length,
    microbatches=config.train.microbatches,
    guard=GuardConfig(config.guard.spike_sigmas),
  )
