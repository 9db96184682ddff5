"""The train step of adapters: gradients, frozen base, meshes, microbatches."""

import dataclasses
import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_step import GUARD, LENGTH, OBJECTIVE, OPTIMIZER, make_rows

from maskdiff.distributed import mesh
from maskdiff.model import lora, transformer
from maskdiff.model.lora import LoraConfig
from maskdiff.training import optimizer, step
from maskdiff.training import train_state as state_lib

KEY = 5
C = LoraConfig(rank=2, alpha=3.0)
PLAIN = tiny.model(vocab_size=32, heads=4, kv_heads=2, remat='full')
MODEL = dataclasses.replace(PLAIN, lora=C)
BASE16 = dataclasses.replace(
  MODEL, lora=dataclasses.replace(C, base_dtype='bfloat16')
)


def params_of(model, std=0.3):
  random = np.random.default_rng(1)
  draw = lambda x: jnp.asarray(std * random.normal(size=x.shape), x.dtype)
  return jax.tree.map(draw, transformer.shapes(model))


def config_of(model, microbatches=1):
  return step.StepConfig(model, OBJECTIVE, LENGTH, microbatches, GUARD)


def gradients_of(model):
  key = jax.random.key(KEY)
  compute = jax.jit(functools.partial(step.batch_gradients, config_of(model)))
  return compute(params_of(model), make_rows(), key)


@pytest.fixture(scope='module')
def gradients():
  return gradients_of(MODEL)


@pytest.mark.slow
def test_gradients_are_those_of_the_merged_matrix(gradients):
  """The gradient by A is that by W times B, and that by B is A times it."""
  found, sums = gradients
  params = params_of(MODEL)
  key, merged = jax.random.key(KEY), lora.merge(C, params)
  full, expected = jax.jit(
    functools.partial(step.batch_gradients, config_of(PLAIN))
  )(merged, make_rows(), key)
  np.testing.assert_allclose(sums.loss, expected.loss, rtol=1e-5)
  assert set(found) == {'blocks'} and set(found['blocks']) == lora.ADAPTERS
  for matrix in C.matrices:
    w = np.asarray(full['blocks'][matrix])
    a, b = (np.asarray(params['blocks'][f'{matrix}_{s}']) for s in 'ab')
    inputs = a.ndim - 2
    as_matrix = w.reshape(2, np.prod(w.shape[1 : 1 + inputs]), -1)
    for name, shape, value in (
      ('a', a.shape, as_matrix @ b.reshape(2, 2, -1).swapaxes(1, 2)),
      ('b', b.shape, a.reshape(2, -1, 2).swapaxes(1, 2) @ as_matrix),
    ):
      actual = np.asarray(found['blocks'][f'{matrix}_{name}'])
      value = C.scale * value.reshape(shape)
      limit = 1e-4 * np.linalg.norm(value)
      assert np.linalg.norm(actual - value) < limit, (matrix, name)


def make_optimizer(model):
  axes = lora.trained(transformer.axes(model))
  return optimizer.make_optimizer(OPTIMIZER, 100, axes)


def run(model, sizes, microbatches, steps=2):
  """Returns the states before and after some steps, on the host, and losses."""
  devices = jax.devices()[: np.prod(list(sizes.values()))]
  m = mesh.make_mesh(**sizes, devices=devices)
  tx = make_optimizer(model)
  host = lambda tree: jax.tree.map(np.asarray, tree)
  with jax.set_mesh(m):
    start = jax.jit(
      functools.partial(state_lib.from_params, model, tx),
      out_shardings=state_lib.shardings(model, tx, m),
    )(params_of(model))
    first, losses = host(start), []
    c = config_of(model, microbatches)
    train = step.compile_train_step(c, tx, m)
    rows = jax.device_put(make_rows(), mesh.batch_sharding(m))
    state = start
    for _ in range(steps):
      state, metrics = train(state, rows, jax.random.key(KEY))
      losses.append(float(metrics.sums.loss))
  return first, host(state), losses


@pytest.fixture(scope='module')
def one_device():
  return run(BASE16, dict(fsdp=1), 1)


@pytest.mark.slow
def test_only_adapters_change_and_have_optimizer_state(one_device):
  first, last, _ = one_device
  for before, after in zip(
    jax.tree.leaves(lora.base(first.params)),
    jax.tree.leaves(lora.base(last.params)),
    strict=True,
  ):
    assert before.dtype == after.dtype == jnp.bfloat16
    np.testing.assert_array_equal(before, after)
  adapters = lora.trained(last.params)['blocks']
  for name, after in adapters.items():
    assert after.dtype == np.float32
    assert (after != first.params['blocks'][name]).mean() > 0.9, name
  moments = sum(x.size for x in jax.tree.leaves(last.opt_state) if x.ndim)
  assert moments == 2 * transformer.num_adapter_params(MODEL)
  assert moments == 2 * sum(x.size for x in adapters.values())


PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'fine_tuning.md'


@pytest.mark.parametrize(
  'line, keys',
  [
    ('adapters of rank 32, base in bfloat16', {}),
    ('adapters of rank 32, base in float32', {'base_dtype': 'float32'}),
    ('all parameters', {'rank': 0}),
  ],
)
def test_state_of_8b_is_that_of_the_page(line, keys):
  config = runpy.run_path(str(PAGE.parents[1] / 'configs' / 'sft_8b.py'))
  c = config['get_config']()
  c.lora.update(keys)
  model = step.step_config(c).model
  state = jax.eval_shape(
    functools.partial(state_lib.init, model, make_optimizer(model)),
    jax.random.key(0),
  )
  gradients = lora.trained(state.params)
  arrays = jax.tree.leaves((state.params, state.opt_state, gradients))
  size = sum(x.size * x.dtype.itemsize for x in arrays)
  cells = f'{size / 1e9:.1f}', *(f'{size / n / 2**30:.1f}' for n in (8, 4))
  assert f'| {line} | {" | ".join(cells)} |' in PAGE.read_text()


@pytest.mark.slow
def test_a_batch_takes_fewer_flops_than_full_fine_tuning():
  """No gradient by a matrix of the base, or by the head, is computed."""
  flops = {}
  for model in (PLAIN, MODEL):
    model = dataclasses.replace(model, embed=64, mlp=128, vocab_size=512)
    compute = functools.partial(step.batch_gradients, config_of(model))
    shapes = transformer.shapes(model)
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = jax.jit(compute).lower(shapes, make_rows(), key).compile()
    flops[model.lora.rank] = compiled.cost_analysis()['flops']
    assert ('gradient of the head' in compiled.as_text()) == (
      model.lora.rank == 0
    )
  assert flops[2] < 0.85 * flops[0], flops


@pytest.mark.slow
def test_eight_devices_and_microbatches_train_as_one_device(one_device):
  _, expected, losses = one_device
  sizes = dict(fsdp=2, sequence=2, tensor=2)
  _, found, others = run(BASE16, sizes, microbatches=4)
  np.testing.assert_allclose(others, losses, rtol=1e-5)
  for actual, wanted in zip(
    jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True
  ):
    np.testing.assert_allclose(
      np.float32(actual), np.float32(wanted), rtol=2e-4, atol=2e-4
    )
