"""Train step and evaluation step, pure functions of arrays."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from maskdiff.distributed import compiler
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.distributed.mesh import BATCH_AXES
from maskdiff.model import transformer
from maskdiff.model.trainable import join, trainable
from maskdiff.model.transformer import TransformerConfig, bind
from maskdiff.objectives import table
from maskdiff.objectives.canvas import ObjectiveConfig, divisor
from maskdiff.objectives.schedule import Schedule
from maskdiff.objectives.time_density import TimeDensity, Weight
from maskdiff.training import ema as ema_lib
from maskdiff.training import guard as guard_lib
from maskdiff.training import train_state
from maskdiff.training.guard import GuardConfig
from maskdiff.training.train_state import TrainState

# Losses are also summed by the mask ratio of the row, in equal buckets.
RATIO_BUCKETS = 5


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """Static settings of the train and evaluation steps.

  OptimizerConfig has the settings of the optimizer.
  """

  model: TransformerConfig
  objective: ObjectiveConfig
  length: int  # L
  microbatches: int
  guard: GuardConfig
  steps: int = 1  # of the training
  ema_decay: float = 0.0  # of the moving average; 0: the run keeps none


def step_config(config):
  """Returns the StepConfig of a run's config."""
  return StepConfig(
    model=transformer.from_config(config),
    objective=objective_config(config),
    length=config.data.length,
    microbatches=config.train.microbatches,
    guard=GuardConfig(config.guard.spike_sigmas),
    steps=config.train.steps,
    ema_decay=config.train.ema_decay,
  )


def objective_config(config):
  """Returns the ObjectiveConfig of a run's config."""
  values = {**config.objective, **config.tokens}
  values['schedule'] = Schedule(
    values['schedule'], values.pop('schedule_power')
  )
  values['time_density'] = TimeDensity(
    values['time_density'],
    values.pop('bell_mean'),
    values.pop('bell_width'),
    values.pop('bell_uniform_share'),
    tuple(map(float, values.pop('time_interval'))),
  )
  values['weight'] = Weight(values['weight'], values.pop('weight_power'))
  # These are the settings of the last phase; phases.py has those of others.
  del values['block_plan'], values['anneal_steps']
  return ObjectiveConfig(**values)


class LossSums(NamedTuple):
  """Sums over the rows of a batch; sums of several batches add up.

  Attributes:
    num_predicted: float32, number of positions that carry a loss.
    num_tokens: float32, number of tokens that may carry a loss.
    ratio_count: [RATIO_BUCKETS] float32, `num_predicted` by mask ratio.
    ratio_nll: [RATIO_BUCKETS] float32, unweighted nll in nats by mask ratio.
    total: float32, the summed loss, which has the gradient.
    divisor: float32, its divisor; see config.objective.denominator.
    weighted_nll: float32, sum of weight x nll in nats, without the weights of
      denominator=row and without the term of confidence_weight.
    next_nll: float32, unweighted nll of the autoregressive loss in nats; None
      without this loss, and then so is `next_count`.
    next_count: float32, number of positions that carry it.
    window_count: [D] float32, `num_predicted` by position in a window of D
      tokens; None without windows, and then so is `window_nll`.
    window_nll: [D] float32, unweighted nll in nats by position in a window.
  """

  num_predicted: jax.Array
  num_tokens: jax.Array
  ratio_count: jax.Array
  ratio_nll: jax.Array
  total: jax.Array
  divisor: jax.Array
  weighted_nll: jax.Array
  next_nll: jax.Array | None = None
  next_count: jax.Array | None = None
  window_count: jax.Array | None = None
  window_nll: jax.Array | None = None

  @property
  def loss(self):
    """The loss that is trained; NaN if all tokens are prompts or padding."""
    return self.total / self.divisor

  @property
  def nats_per_token(self):
    """`weighted_nll` with the denominator `token`; NaN as for `loss`."""
    return self.weighted_nll / self.num_tokens


class StepMetrics(NamedTuple):
  """Metrics of one train step.

  Attributes:
    sums: LossSums of the batch.
    grad_norm: float32, norm of the gradient before clipping.
    param_norm: float32, norm of the trained parameters after the update.
    skipped: bool, whether the guard refused the update.
    skipped_before: int32, number of skipped updates in all earlier steps.
    skipped_in_a_row: int32, number of consecutive skipped updates up to and
      including this step.
  """

  sums: LossSums
  grad_norm: jax.Array
  param_norm: jax.Array
  skipped: jax.Array
  skipped_before: jax.Array
  skipped_in_a_row: jax.Array


def train_step(c, optimizer, state, rows, key, gradients=None):
  """Makes one optimizer update, unless the guard refuses it.

  The guard also refuses a batch in which all tokens are prompts or padding,
  because its loss is not a number.

  Args:
    c: StepConfig.
    optimizer: optax.GradientTransformation.
    state: TrainState.
    rows: data.rows.Rows of [B, L], the global batch of clean tokens.
    key: PRNG key of the run, folded with the step number.
    gradients: (StepConfig, TrainState, batch, key of the step) -> (gradients of
      the summed loss by trainable(params), sums), for a stage with another
      loss. `sums` has the fields `loss` and `divisor`; the gradients are
      divided by `divisor`. Default: `batch_gradients`.

  Returns:
    The next TrainState, and StepMetrics.
  """
  key = jax.random.fold_in(key, state.step)
  if gradients:
    gradients, sums = gradients(c, state, rows, key)
  else:
    gradients, sums = batch_gradients(
      c, state.params, rows, key, state.step / c.steps
    )
  with jax.named_scope('part(optimizer)'):
    gradients = jax.tree.map(lambda g: g / sums.divisor, gradients)
    grad_norm = optax.tree.norm(gradients)
    trained = trainable(c.model, state.params)
    ok, guard = guard_lib.judge(c.guard, state.guard, sums.loss, grad_norm)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    trained, opt_state = jax.tree.map(
      lambda new, old: jnp.where(ok, new, old),
      (optax.apply_updates(trained, updates), opt_state),
      (trained, state.opt_state),
    )
    params = join(state.params, trained)
    ema = None
    if state.ema is not None:
      ema = ema_lib.update(c.ema_decay, state.ema, params, ok)
    param_norm = optax.tree.norm(trained)
  metrics = StepMetrics(
    sums=sums,
    grad_norm=grad_norm,
    param_norm=param_norm,
    skipped=~ok,
    skipped_before=state.guard['skipped'],
    skipped_in_a_row=guard['in_a_row'],
  )
  return TrainState(state.step + 1, params, opt_state, guard, ema), metrics


def batch_gradients(c, params, rows, key, progress=0.0):
  """Returns the gradient of the summed loss, accumulated over microbatches.

  Args:
    c: StepConfig.
    params: parameter tree.
    rows: data.rows.Rows of [B, L], the global batch.
    key: PRNG key of this step.
    progress: share of the training that is done, float32 scalar in [0, 1].

  Returns:
    A tree like trainable(params), and the LossSums of the batch.
  """
  batch = rows.tokens.shape[0]
  trained = trainable(c.model, params)

  def loss(trained, numbers, rows):
    joined = join(params, trained)
    sums = loss_sums(c, joined, rows, numbers, key, batch, progress)
    return sums.total, sums

  gradient = jax.grad(loss, has_aux=True)

  def accumulate(carry, microbatch):
    return jax.tree.map(jnp.add, carry, gradient(trained, *microbatch)), ()

  numbers = jnp.arange(batch, dtype=jnp.int32)
  if c.microbatches == 1:
    return gradient(trained, numbers, rows)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(gradient, trained, numbers, rows),
  )
  with jax.named_scope('part(gradient sum over microbatches)'):
    sums, _ = jax.lax.scan(
      accumulate, zeros, split_rows((numbers, rows), c.microbatches)
    )
  return sums


def eval_step(c, params, rows, key):
  """Returns the LossSums of one batch of held-out text under fixed noise.

  Args:
    c: StepConfig from `evaluation.eval_config`.
    params: parameter tree.
    rows: data.rows.Rows of [B, L].
    key: PRNG key of this batch, the same at every evaluation.
  """
  batch = rows.tokens.shape[0]
  numbers = jnp.arange(batch, dtype=jnp.int32)
  return loss_sums(c, params, rows, numbers, key, batch)


def loss_sums(c, params, rows, numbers, key, batch, progress=0.0):
  """Makes a canvas from some rows of a global batch and sums the losses.

  Args:
    c: StepConfig.
    params: parameter tree.
    rows: data.rows.Rows of [b, L].
    numbers: [b] int32, row numbers in the global batch.
    key: PRNG key of this step.
    batch: number of rows of the global batch.
    progress: see `batch_gradients`.

  Returns:
    LossSums. Only `total` has a gradient.
  """
  canvas = table.make_canvas(c.objective, rows, numbers, key, batch, progress)
  total, nll = table.loss(c.objective, bind(c.model, params), canvas)
  return summarize(c.objective, canvas, total, nll)


@jax.named_scope('part(metrics)')
def summarize(c, canvas, total, nll):
  """Returns the LossSums of a canvas.

  Args:
    c: ObjectiveConfig.
    canvas: Canvas of b rows.
    total: float32 scalar, from `table.loss`.
    nll: from `table.loss`, nats; 0 where there is no loss.
  """
  next_nll = next_count = None
  weighted_nll = total
  if c.denominator == 'row' or c.confidence_weight:
    weighted_nll = (canvas.all_weights * nll).sum()
  if canvas.next_weights is not None:
    nll, of_next = jnp.split(nll, [canvas.weights.shape[1]], axis=1)
    next_nll = of_next.sum()
    next_count = (canvas.next_weights != 0).sum().astype(jnp.float32)
  predicted = (canvas.weights != 0).astype(jnp.float32)
  window_count = window_nll = None
  if canvas.window_length > 1:
    window_count, window_nll = (
      x.reshape(len(x), -1, canvas.window_length).sum(axis=(0, 1))
      for x in (predicted, nll)
    )
  bucket = jnp.minimum(
    (canvas.mask_ratio * RATIO_BUCKETS).astype(jnp.int32), RATIO_BUCKETS - 1
  )

  def by_bucket(x):
    parts = x.reshape(*bucket.shape, -1).sum(axis=2)
    return jnp.zeros(RATIO_BUCKETS).at[bucket].add(parts)

  return LossSums(
    total=total,
    divisor=divisor(c, canvas).sum(),
    weighted_nll=weighted_nll,
    num_tokens=canvas.num_tokens.sum(),
    num_predicted=predicted.sum(),
    ratio_nll=by_bucket(nll),
    ratio_count=by_bucket(predicted),
    next_nll=next_nll,
    next_count=next_count,
    window_count=window_count,
    window_nll=window_nll,
  )


def split_rows(tree, parts):
  """Splits the leading axis of every leaf into `parts` microbatches.

  Each device keeps its own rows, so that no data moves between devices. The
  two rows of an antithetic pair (`sample_times`) stay in one microbatch if the
  size of the microbatch allows. Every device then masks about half of its
  tokens in every microbatch.

  Args:
    tree: arrays [B, ...].
    parts: number M of microbatches, a divisor of B.

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
    spec = P(None, BATCH_AXES, *['sequence'] * bool(rest))
    return jax.lax.with_sharding_constraint(x, spec)

  return jax.tree.map(split, tree)


def compile_train_step(c, optimizer, mesh, gradients=None, batch=None):
  """Returns `train_step` jitted with shardings; the state is donated.

  Args:
    c: StepConfig.
    optimizer: from make_optimizer.
    mesh: device mesh.
    gradients: see `train_step`.
    batch: sharding of the batch, or a tree of shardings; by default that of
      tokens [B, L].

  Returns:
    Function of (TrainState, batch, key).
  """
  ema = c.ema_decay > 0
  states = train_state.shardings(c.model, optimizer, mesh, ema)
  replicated = mesh_lib.replicated(mesh)
  batch = mesh_lib.batch_sharding(mesh) if batch is None else batch
  return jax.jit(
    functools.partial(train_step, c, optimizer, gradients=gradients),
    in_shardings=(states, batch, replicated),
    out_shardings=(states, replicated),
    donate_argnums=0,
    compiler_options=compiler.options(mesh),
  )
