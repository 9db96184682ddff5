"""The train step is the same function on every mesh and in microbatches."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compiled import compilations

from maskdiff.data.rows import Rows
from maskdiff.distributed import mesh
from maskdiff.model import transformer
from maskdiff.objectives import masked_diffusion, table
from maskdiff.objectives.canvas import ObjectiveConfig
from maskdiff.objectives.schedule import Schedule
from maskdiff.objectives.time_density import TimeDensity, Weight
from maskdiff.training import ema, guard, optimizer, step
from maskdiff.training import train_state as state_lib
from maskdiff.training.guard import GuardConfig
from maskdiff.training.optimizer import OptimizerConfig

BATCH, LENGTH, STEPS, LONG = 32, 16, 3, 60
MODEL = tiny.model(
  vocab_size=32, heads=4, kv_heads=2, tie_embeddings=True, remat='full'
)
OBJECTIVE = ObjectiveConfig(
  name='masked_diffusion',
  schedule=Schedule(),
  eps=1e-3,
  time_sampling='antithetic',
  time_density=TimeDensity(),
  weight=Weight(),
  uniform_after=1.0,
  random_length_fraction=0.2,
  block_length=4,
  attend_within='row',
  predict_mask=False,
  mask_id=4,
  bos_id=1,
  eos_id=2,
  loss_chunk_tokens=16,
)
GUARD = GuardConfig(spike_sigmas=0.0)
DECAY = 0.24  # of the average; the second of STEPS steps ends its warmup
# A tenth of the tokens end a document.
CONFINED = dataclasses.replace(OBJECTIVE, attend_within='document', eos_id=10)
OPTIMIZER = OptimizerConfig(
  schedule='wsd',
  learning_rate=1e-2,
  final_learning_rate=1e-3,
  warmup_steps=0,
  decay_steps=10,
  pieces=(),
  b1=0.9,
  b2=0.95,
  eps=1e-5,  # smaller, rounding of tiny gradients would cause full steps
  weight_decay=0.1,
  clip_norm=1.0,
  moments='float32',
)
MUON = dataclasses.replace(OPTIMIZER, name='muon')
MESHES = {
  'one_device': dict(fsdp=1),
  'fsdp8': dict(fsdp=8),
  'replica2_fsdp2_tensor2': dict(replica=2, fsdp=2, tensor=2),
  'fsdp2_sequence2_tensor2': dict(fsdp=2, sequence=2, tensor=2),
}
OTHERS = [
  ('one_device', 4),
  ('fsdp8', 1),
  ('replica2_fsdp2_tensor2', 4),
  ('fsdp2_sequence2_tensor2', 4),
]
KEY = 7


def make_mesh(name):
  sizes = MESHES[name]
  devices = jax.devices()[: np.prod(list(sizes.values()))]
  return mesh.make_mesh(**sizes, devices=devices)


def make_tokens():
  """Makes text with structure to learn: few different tokens."""
  random = np.random.default_rng(0)
  return random.choice([9, 10, 11], (BATCH, LENGTH), p=[0.8, 0.1, 0.1]).astype(
    np.int32
  )


def per_row(denominator, canvas):
  """Returns a Canvas whose loss per token is the loss with a denominator."""
  if denominator == 'token':
    return canvas
  count = np.asarray(canvas.num_tokens)
  scale = 1 / np.maximum(count, 1) if denominator == 'row' else 1
  return dataclasses.replace(
    canvas,
    weights=canvas.weights * np.reshape(scale, (-1, 1)),
    num_tokens=jnp.float32(count > 0),
  )


def make_rows():
  """Returns Rows with documents of random lengths, padding and prompts."""
  random = np.random.default_rng(3)
  doc = np.cumsum(random.random((BATCH, LENGTH)) < 0.2, axis=1)
  doc[doc % 4 == 3] = -1
  answer = random.random(doc.shape) < 0.6
  answer[5] = False
  return Rows(make_tokens(), doc.astype(np.int32), answer)


def initial_params(std=0.2):
  random = np.random.default_rng(1)
  draw = lambda x: (std * random.normal(size=x.shape)).astype(np.float32)
  return jax.tree.map(draw, transformer.shapes(MODEL))


def gradients_on(mesh_name, model, objective, microbatches, progress=0.0):
  """Returns the gradients of `make_rows` on a mesh, and their LossSums."""
  c = step.StepConfig(model, objective, LENGTH, microbatches, GuardConfig(0.0))
  m = make_mesh(mesh_name)
  tx = optimizer.make_optimizer(OPTIMIZER, 100, transformer.axes(model))
  with jax.set_mesh(m):
    shardings = state_lib.shardings(model, tx, m).params
    params = jax.device_put(initial_params(std=1.0), shardings)
    rows = jax.device_put(make_rows(), mesh.batch_sharding(m))
    compute = jax.jit(functools.partial(step.batch_gradients, c))
    found = compute(params, rows, jax.random.key(KEY), progress)
    return jax.tree.map(np.asarray, found)


def assert_close(gradients, expected):
  """Asserts that the gradients of one device and of a mesh are equal."""
  for a, b in zip(
    jax.tree.leaves(expected), jax.tree.leaves(gradients), strict=True
  ):
    assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(a)


def initial_state(tx, std=0.2):
  params = initial_params(std)
  zeros = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(tx.init, params)
  )
  return state_lib.TrainState(
    np.zeros((), np.int32), params, zeros, guard.init()
  )


def with_average(state):
  average = jax.tree.map(np.copy, state.params)
  return dataclasses.replace(
    state, ema=ema.Ema(average, np.zeros((), np.int32))
  )


@dataclasses.dataclass
class Run:
  """Results of every step of a training."""

  metrics: list  # of StepMetrics
  params: list  # of trees
  averages: list  # of trees
  donated: list  # whether all buffers of the old state were deleted
  compilations: list  # number of programs compiled


@functools.cache
def run(
  mesh_name,
  microbatches,
  steps=STEPS,
  objective=OBJECTIVE,
  std=0.2,
  optimizer_config=OPTIMIZER,
):
  """Trains from the same parameters on the same batch."""
  m = make_mesh(mesh_name)
  tx = optimizer.make_optimizer(optimizer_config, 100, transformer.axes(MODEL))
  c = step.StepConfig(
    *(MODEL, objective, LENGTH, microbatches, GUARD, steps), ema_decay=DECAY
  )
  out = Run([], [], [], [], [])
  with jax.set_mesh(m):
    state = jax.device_put(
      with_average(initial_state(tx, std)),
      state_lib.shardings(MODEL, tx, m, ema=True),
    )
    update = step.compile_train_step(c, tx, m)
    rows = jax.device_put(Rows(make_tokens()), mesh.batch_sharding(m))
    for _ in range(steps):
      before, old = len(compilations), jax.tree.leaves(state)
      state, metrics = update(state, rows, jax.random.key(KEY))
      jax.block_until_ready(state)
      out.compilations.append(len(compilations) - before)
      out.donated.append(all(x.is_deleted() for x in old))
      out.metrics.append(jax.tree.map(np.asarray, metrics))
      # Copies, because an array with a NumPy view cannot be donated.
      out.params.append(jax.tree.map(np.array, state.params))
      out.averages.append(jax.tree.map(np.array, state.ema.params))
  assert state.step == steps
  return out


WITH_MUON = dict(optimizer_config=MUON)


def muon_run():
  """A run with Muon on one device, as long as `reference`."""
  return run('one_device', 4, LONG, **WITH_MUON)


def of_each_step(name, metrics):
  return np.array([operator.attrgetter(name)(m) for m in metrics[:STEPS]])


@pytest.fixture(scope='module')
def reference():
  """A run on one device without microbatches, longer than the other runs."""
  return run('one_device', 1, LONG)


# The step itself


@functools.cache
def canvas_of(c, key, step, make=lambda: Rows(make_tokens())):
  draw = jax.jit(functools.partial(table.make_canvas, c), static_argnums=3)
  key = jax.random.fold_in(jax.random.key(key), step)
  return draw(make(), jnp.arange(BATCH), key, BATCH)


@jax.jit
def dense_loss(params, canvas):
  """Returns loss in nats per token, and gradient, from all logits."""

  def loss(params):
    network = transformer.bind(dataclasses.replace(MODEL, remat='none'), params)
    logits = network.logits(network(canvas.inputs, canvas.labels))
    logits = logits.at[..., OBJECTIVE.mask_id].set(-jnp.inf)
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, canvas.targets[..., None], axis=-1)
    return (canvas.weights * nll[..., 0]).sum() / canvas.num_tokens.sum()

  return jax.value_and_grad(loss)(params)


def test_init_state_has_step_0_and_zero_moments():
  tx = optimizer.make_optimizer(OPTIMIZER, 100, transformer.axes(MODEL))
  init = functools.partial(state_lib.init, MODEL, tx)
  describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  state = jax.eval_shape(init, jax.random.key(0))
  assert describe(state) == describe(initial_state(tx))


def test_first_step_has_the_dense_loss_and_gradient(reference):
  value, gradient = dense_loss(initial_params(), canvas_of(OBJECTIVE, KEY, 0))
  first = reference.metrics[0]
  np.testing.assert_allclose(first.sums.loss, value, rtol=1e-5)
  norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
  np.testing.assert_allclose(first.grad_norm, norm, rtol=1e-4)


def test_noise_differs_between_steps(reference):
  """The batch is constant, so only the noise differs between steps."""
  for name in ('sums.num_predicted', 'sums.num_tokens'):
    assert len(set(of_each_step(name, reference.metrics))) == STEPS


def test_mask_ratio_counts_add_up(reference):
  for metrics in reference.metrics:
    assert metrics.sums.ratio_count.sum() == metrics.sums.num_predicted


def test_rows_are_counted_by_mask_ratio():
  canvas = canvas_of(OBJECTIVE, KEY, 0)
  rows = jnp.arange(BATCH)
  nll = jnp.where(canvas.weights != 0, 1.0 + rows[:, None], 0)
  sums = step.summarize(OBJECTIVE, canvas, jnp.sum(canvas.weights * nll), nll)
  count, total = np.zeros(5), np.zeros(5)
  for r in range(BATCH):
    bucket = int(canvas.mask_ratio[r, 0] // 0.2)
    count[bucket] += np.count_nonzero(canvas.weights[r])
    total[bucket] += nll[r].sum()
  np.testing.assert_array_equal(sums.ratio_count, count)
  np.testing.assert_allclose(sums.ratio_nll, total, rtol=1e-6)
  assert sums.num_predicted == count.sum()
  assert sums.num_tokens == canvas.num_tokens.sum()


def test_largest_mask_ratio_is_in_the_last_bucket():
  canvas = masked_diffusion.corrupt(
    OBJECTIVE,
    Rows(jnp.full((1, LENGTH), 9)),
    jnp.array([1 - 2.0**-24]),
    jnp.zeros((1, LENGTH)),
    jnp.array([LENGTH]),
  )
  sums = step.summarize(OBJECTIVE, canvas, 0.0, jnp.ones((1, LENGTH)))
  np.testing.assert_array_equal(sums.ratio_count, [0, 0, 0, 0, LENGTH])


# Meshes and microbatches


@pytest.mark.slow
@pytest.mark.parametrize('other', OTHERS, ids=str)
def test_noise_does_not_depend_on_mesh_or_microbatches(other, reference):
  for name in ('sums.num_predicted', 'sums.num_tokens', 'sums.ratio_count'):
    np.testing.assert_array_equal(
      of_each_step(name, run(*other).metrics),
      of_each_step(name, reference.metrics),
    )


@pytest.mark.parametrize('other', OTHERS, ids=str)
def test_losses_do_not_depend_on_mesh_or_microbatches(other, reference):
  for name in (
    'sums.weighted_nll',
    'grad_norm',
    'param_norm',
    'sums.ratio_nll',
  ):
    np.testing.assert_allclose(
      of_each_step(name, run(*other).metrics),
      of_each_step(name, reference.metrics),
      rtol=2e-5,
      err_msg=name,
    )


@pytest.mark.parametrize('other', OTHERS, ids=str)
def test_updates_do_not_depend_on_mesh_or_microbatches(other, reference):
  """The difference is small compared with the update."""
  assert_same_updates(run(*other), reference, 1e-3)


def assert_same_updates(actual, expected, limit):
  """Compares the updates of STEPS steps by their norms."""

  def compare(path, actual, expected, start):
    update = np.linalg.norm(expected - start)
    assert update > 0
    difference = np.linalg.norm(actual - expected)
    assert difference < limit * update, jax.tree_util.keystr(path)

  jax.tree_util.tree_map_with_path(
    compare,
    actual.params[STEPS - 1],
    expected.params[STEPS - 1],
    initial_params(),
  )


@pytest.mark.parametrize('run_of', [('one_device', 1, LONG), *OTHERS], ids=str)
def test_average_is_that_of_the_parameters_on_every_mesh(run_of):
  """The decays of three updates are 2/11, 0.24 and 0.24."""
  a, b, c = run(*run_of).params[:STEPS]
  expected = jax.tree.map(
    lambda start, *p: (
      2 / 11 * DECAY**2 * start
      + 9 / 11 * DECAY**2 * p[0]
      + (1 - DECAY) * DECAY * p[1]
      + (1 - DECAY) * p[2]
    ),
    *(initial_params(), a, b, c),
  )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
    run(*run_of).averages[STEPS - 1],
    expected,
  )


@pytest.mark.slow
def test_muon_does_not_depend_on_mesh_or_microbatches():
  """The iteration amplifies rounding in the small singular values."""
  one, eight = muon_run(), run('fsdp2_sequence2_tensor2', 1, **WITH_MUON)
  for name in ('sums.weighted_nll', 'grad_norm', 'param_norm'):
    values = [of_each_step(name, r.metrics) for r in (one, eight)]
    np.testing.assert_allclose(*values, rtol=2e-5, err_msg=name)
  assert_same_updates(one, eight, 2e-3)
  for r in (one, eight):
    assert r.compilations[0] > 0 and not any(r.compilations[1:])
    assert all(r.donated)


@pytest.mark.slow
def test_other_times_and_weights_do_not_depend_on_mesh_or_microbatches():
  """Half of the steps have the times and weights of the bound."""
  bell = dataclasses.replace(
    OBJECTIVE,
    time_density=TimeDensity('bell', width=0.2),
    weight=Weight('power', 0.5),
    uniform_after=0.5,
  )
  one, eight = run('one_device', 4, 2, bell), run('fsdp8', 1, 2, bell)
  for name in ('sums.num_predicted', 'sums.ratio_count'):
    values = [of_each_step(name, r.metrics) for r in (one, eight)]
    np.testing.assert_array_equal(*values)
  for name in ('sums.weighted_nll', 'grad_norm', 'param_norm'):
    values = [of_each_step(name, r.metrics) for r in (one, eight)]
    np.testing.assert_allclose(*values, rtol=2e-5, err_msg=name)
  # The second step of two is past the half.
  canvases = [canvas_of(bell, KEY, 0), canvas_of(OBJECTIVE, KEY, 1)]
  for metrics, canvas in zip(one.metrics, canvases, strict=True):
    assert metrics.sums.num_predicted == np.count_nonzero(canvas.weights)


@pytest.mark.slow
def test_packed_documents_loss_does_not_depend_on_the_mesh():
  """The mesh shards the length axis."""
  std = 1.0  # large, so that attention matters to the loss
  params = initial_params(std)
  value, gradient = dense_loss(params, canvas_of(CONFINED, KEY, 0))
  of_rows, _ = dense_loss(params, canvas_of(OBJECTIVE, KEY, 0))
  assert abs(value - of_rows) > 1e-2 * of_rows
  name = 'fsdp2_sequence2_tensor2'
  (metrics,) = run(name, 1, 1, CONFINED, std).metrics
  loss = metrics.sums.loss
  assert np.isfinite(loss)
  np.testing.assert_allclose(loss, value, rtol=1e-5)
  norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))
  np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, microbatches, denominator',
  [
    ('masked_diffusion', 4, 'token'),
    ('autoregressive', 1, 'token'),
    ('masked_diffusion', 4, 'row'),
    ('autoregressive', 2, 'batch'),
  ],
)
def test_rows_with_columns_have_the_gradients_of_one_device(
  name, microbatches, denominator
):
  """The mesh shards both axes of all columns."""
  objective = dataclasses.replace(CONFINED, name=name, denominator=denominator)
  c = step.StepConfig(MODEL, objective, LENGTH, microbatches, GUARD)
  params, rows = initial_params(std=1.0), make_rows()
  canvas = canvas_of(objective, KEY, 0, make_rows)
  value, expected = dense_loss(params, per_row(denominator, canvas))
  assert 0 < canvas.num_tokens.sum() < 0.6 * BATCH * LENGTH
  m = make_mesh('fsdp2_sequence2_tensor2')
  tx = optimizer.make_optimizer(OPTIMIZER, 100, transformer.axes(MODEL))
  key = jax.random.fold_in(jax.random.key(KEY), 0)
  with jax.set_mesh(m):
    params = jax.device_put(params, state_lib.shardings(MODEL, tx, m).params)
    place = lambda rows: jax.device_put(rows, mesh.batch_sharding(m))
    gradients = jax.jit(functools.partial(step.batch_gradients, c))
    fetch = lambda tree: jax.tree.map(np.asarray, tree)
    found, sums = fetch(gradients(params, place(rows), key))
    assert sums.num_tokens == canvas.num_tokens.sum()
    np.testing.assert_allclose(sums.loss, value, rtol=1e-5)

    def compare(path, actual, expected):
      difference = np.linalg.norm(actual / sums.divisor - expected)
      limit = 1e-4 * np.linalg.norm(expected)
      assert difference < limit, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(compare, found, expected)
    # The guard refuses a batch without an answer.
    prompts = rows._replace(answer=np.zeros((BATCH, LENGTH), bool))
    zeros, sums = fetch(gradients(params, place(prompts), key))
    assert not any(np.any(g) for g in jax.tree.leaves(zeros))
    with np.errstate(invalid='ignore'):
      ok, _ = guard.judge(GUARD, guard.init(), sums.loss, 0.0)
    assert sums.num_tokens == sums.num_predicted == 0 and not ok


ALL = [('one_device', 1, LONG), *OTHERS]


@pytest.mark.parametrize('of', ALL, ids=str)
def test_only_the_first_step_compiles(of):
  first, *later = run(*of).compilations
  assert first > 0
  assert not any(later)


@pytest.mark.parametrize('of', ALL, ids=str)
def test_old_state_is_donated(of):
  assert all(run(*of).donated)


# Microbatches


def splits(batch, parts, mesh_name):
  """Returns row numbers, [parts, shards, rows of a device in a microbatch]."""
  m = make_mesh(mesh_name)
  with jax.set_mesh(m):
    rows = jax.jit(lambda x: step.split_rows(x, parts))(jnp.arange(batch))
  return np.asarray(rows).reshape(parts, mesh.batch_shards(m), -1)


@pytest.mark.parametrize('mesh_name', MESHES)
@pytest.mark.parametrize('parts', [1, 2, 4])
def test_microbatches_keep_pairs_together(parts, mesh_name):
  split = splits(64, parts, mesh_name)
  np.testing.assert_array_equal(np.sort(split.ravel()), np.arange(64))
  pairs = split.reshape(-1, 2)
  np.testing.assert_array_equal(pairs[:, 0] % 2, 0)
  np.testing.assert_array_equal(pairs[:, 1], pairs[:, 0] + 1)


@pytest.mark.parametrize('mesh_name', MESHES)
@pytest.mark.parametrize('batch', [64, 32])
def test_devices_keep_their_rows_in_every_microbatch(batch, mesh_name):
  """With 32 rows, 4 microbatches and 8 devices, pairs do not fit."""
  split = splits(batch, 4, mesh_name)
  shards = split.shape[1]
  owner = split // (batch // shards)
  expected = np.broadcast_to(np.arange(shards)[:, None], owner.shape)
  np.testing.assert_array_equal(owner, expected)


def test_all_arrays_are_split_the_same_way():
  rows, tokens = jnp.arange(16), jnp.arange(64).reshape(16, 4)
  split_rows, split_tokens = step.split_rows((rows, tokens), 4)
  assert split_tokens.shape == (4, 4, 4)
  np.testing.assert_array_equal(split_tokens, tokens[split_rows])


# Skipped updates


@pytest.mark.slow
@pytest.mark.parametrize(
  'mesh_name, microbatches, optimizer_config',
  [
    ('fsdp8', 1, OPTIMIZER),
    ('fsdp8', 4, OPTIMIZER),
    ('replica2_fsdp2_tensor2', 1, OPTIMIZER),
    ('replica2_fsdp2_tensor2', 4, OPTIMIZER),
    ('replica2_fsdp2_tensor2', 1, MUON),
  ],
)
def test_nonfinite_gradient_changes_only_the_step_count(
  mesh_name, microbatches, optimizer_config, monkeypatch
):
  """The steps before and after the skipped step are applied."""
  original = step.batch_gradients

  def poisoned(c, params, rows, *rest):
    gradients, sums = original(c, params, rows, *rest)
    bad = jnp.where(rows.tokens[0, 0] == 31, jnp.nan, 0)
    head = {'norm': gradients['norm'].at[3].add(bad)}
    return gradients | head, sums

  monkeypatch.setattr(step, 'batch_gradients', poisoned)
  m = make_mesh(mesh_name)
  tx = optimizer.make_optimizer(optimizer_config, 100, transformer.axes(MODEL))
  c = step.StepConfig(
    MODEL, OBJECTIVE, LENGTH, microbatches, GUARD, ema_decay=DECAY
  )
  with jax.set_mesh(m):
    update = step.compile_train_step(c, tx, m)
    place = lambda x: jax.device_put(Rows(x), mesh.batch_sharding(m))
    good, bad = make_tokens(), make_tokens()
    bad[0, 0] = 31
    state = jax.device_put(
      with_average(initial_state(tx)),
      state_lib.shardings(MODEL, tx, m, ema=True),
    )
    state, _ = update(state, place(good), jax.random.key(KEY))
    before = jax.tree.map(np.asarray, state)
    state, metrics = jax.block_until_ready(
      update(state, place(bad), jax.random.key(KEY))
    )
    assert metrics.skipped and metrics.skipped_in_a_row == 1
    assert not np.isfinite(metrics.grad_norm)
    assert np.isfinite(metrics.param_norm)
    for old, new in zip(
      jax.tree.leaves((before.params, before.opt_state, before.ema)),
      jax.tree.leaves((state.params, state.opt_state, state.ema)),
      strict=True,
    ):
      np.testing.assert_array_equal(old, new)
    assert state.step == before.step + 1
    state, metrics = jax.block_until_ready(
      update(state, place(good), jax.random.key(KEY))
    )
    assert not metrics.skipped and metrics.skipped_before == 1
    assert state.ema.updates == before.ema.updates + 1 == 2
    assert np.any(np.asarray(state.params['norm']) != before.params['norm'])


# Evaluation and learning


WHOLE_ROWS = step.StepConfig(
  model=MODEL,
  objective=dataclasses.replace(OBJECTIVE, random_length_fraction=0.0),
  length=LENGTH,
  microbatches=1,
  guard=GUARD,
)


@jax.jit
def evaluate(params, key):
  return step.eval_step(WHOLE_ROWS, params, Rows(make_tokens()), key)


def test_evaluation_is_bitwise_repeatable():
  sums = lambda key: evaluate(initial_params(), jax.random.key(key))
  jax.tree.map(np.testing.assert_array_equal, sums(0), sums(0))
  assert sums(0).weighted_nll != sums(1).weighted_nll
  assert sums(0).num_tokens == BATCH * LENGTH


def test_evaluation_equals_the_dense_loss():
  key = jax.random.fold_in(jax.random.key(KEY), 0)
  sums = evaluate(initial_params(), key)
  canvas = canvas_of(WHOLE_ROWS.objective, KEY, 0)
  np.testing.assert_allclose(
    sums.loss,
    dense_loss(initial_params(), canvas)[0],
    rtol=1e-5,
  )


def test_training_reduces_the_loss_of_a_constant_batch(reference):
  def bound(params):
    sums = evaluate(params, jax.random.key(1))
    return sums.loss

  entropy = -(0.8 * np.log(0.8) + 0.2 * np.log(0.1))  # per token of this text
  assert bound(initial_params()) > np.log(16)
  assert bound(reference.params[-1]) < 1.5 * entropy
  assert bound(muon_run().params[-1]) < 1.5 * entropy
