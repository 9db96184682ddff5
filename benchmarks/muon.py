"""Compares Muon with AdamW: time of a train step, and the update on TPUs.

python benchmarks/muon.py [--rounds 15]
python benchmarks/muon.py --config 8b --topology v5p:4x4x4

Without --topology: the train step of configs/tiny.py on this machine, with
either optimizer, and the matrix products of Muon as a share of their peak: the
speed of one large product in the same process. Then the rounding errors of the
iteration in float32, with factors of products rounded to bfloat16 (as TPUs do),
and with all arrays in bfloat16.

With --topology: compiles the optimizer's update alone with the TPU compiler
and prints its estimated time, collectives and memory per chip, for AdamW, for
Muon, and for Muon without the exchange of whole matrices, so that XLA chooses
the collectives. Takes minutes.
"""

import argparse
import contextlib
import os
import pathlib
import runpy
import statistics
import time
from unittest import mock

ARGUMENTS = argparse.ArgumentParser(description=__doc__.split('\n')[0])
ARGUMENTS.add_argument('--rounds', type=int, default=15)
ARGUMENTS.add_argument('--config', default='8b', help='a name in configs/')
ARGUMENTS.add_argument('--topology', help='such as v5p:4x4x4')
ARGS = ARGUMENTS.parse_args()
if ARGS.topology:
  from maskdiff.planner.environment import COMPILER_ENVIRONMENT

  os.environ.update(COMPILER_ENVIRONMENT)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import steps as steps_lib  # noqa: E402  # a file beside this one

from maskdiff.distributed import compiler  # noqa: E402
from maskdiff.distributed import mesh as mesh_lib  # noqa: E402
from maskdiff.model import transformer  # noqa: E402
from maskdiff.planner import hlo, hlo_cost, pricing, target  # noqa: E402
from maskdiff.training import muon, step, train_state  # noqa: E402


def config_of(name):
  """Returns the config of a file in configs/."""
  path = pathlib.Path(__file__).parents[1] / 'configs' / f'{name}.py'
  return runpy.run_path(str(path))['get_config']()


def setup(config, name):
  """Returns StepConfig and optimizer of a config with another optimizer."""
  config.optimizer.name = name
  return steps_lib.setup(config)


def compare_steps(config, rounds):
  """Prints the time of a train step with Muon relative to AdamW."""
  mesh = mesh_lib.make_mesh()
  rows = steps_lib.random_rows(config, mesh)
  key, states, steps = jax.random.key(0), {}, {}
  with jax.set_mesh(mesh):
    for name in ('adamw', 'muon'):
      c, tx = setup(config, name)
      states[name] = steps_lib.start(c, tx, mesh, key)
      steps[name] = step.compile_train_step(c, tx, mesh)
  wall, cpu = ({name: [] for name in steps} for _ in range(2))
  for _ in range(rounds + 1):
    for name in steps:
      began = time.perf_counter(), time.process_time()
      with jax.set_mesh(mesh):
        states[name], metrics = steps[name](states[name], rows, key)
      jax.block_until_ready((states[name], metrics))
      wall[name].append(time.perf_counter() - began[0])
      cpu[name].append(time.process_time() - began[1])
  middle = lambda seconds: {
    n: statistics.median(s[1:]) for n, s in seconds.items()
  }
  wall, cpu = middle(wall), middle(cpu)
  print(
    f'a step with muon takes {wall["muon"] / wall["adamw"]:.2f} of the time of '
    f'a step with adamw, {cpu["muon"] / cpu["adamw"]:.2f} of its CPU time'
  )
  model = step.step_config(config).model
  products = muon.iteration_flops(
    transformer.shapes(model), transformer.axes(model)
  )
  x = jnp.ones((2048, 2048))
  product = jax.jit(lambda x: x @ x)
  jax.block_until_ready(product(x))
  began = time.process_time()
  jax.block_until_ready(product(x))
  peak = 2 * 2048**3 / (time.process_time() - began)
  more = cpu['muon'] - cpu['adamw']
  print(
    f'Newton-Schulz: {products / 1e9:.1f} GFLOP; at the speed of one large '
    f'product they take {products / peak / more:.2f} of the difference'
  )


def compare_precisions():
  """Prints relative errors of the update, against the iteration in float64."""
  random = np.random.default_rng(0)
  m, n = 256, 704
  u, s, vt = np.linalg.svd(random.normal(size=(m, n)), full_matrices=False)
  single = lambda x: np.asarray(x, np.float32)
  half = lambda x: np.asarray(np.asarray(x, jnp.bfloat16), np.float32)
  k = np.arange(1, m + 1.0)
  for spectrum, values in (('random', s), ('1/k', 1 / k), ('1/k^2', 1 / k**2)):
    x = (u * values) @ vt
    same = lambda x: x
    exact = iterate(x, same, same)
    error = lambda y, exact=exact: (
      np.linalg.norm(y - exact) / np.linalg.norm(exact)
    )
    print(
      f'singular values {spectrum}: error in float32 '
      f'{error(iterate(x, single, same)):.1e}, with factors in bfloat16 '
      f'{error(iterate(x, single, half)):.1e}, all in bfloat16 '
      f'{error(iterate(x, half, half)):.1e}'
    )


def iterate(x, store, factor):
  """Newton-Schulz in NumPy, with a rounding of arrays and one of factors."""
  a, b, c = muon.COEFFICIENTS
  x = store(x / np.linalg.norm(x))
  for _ in range(muon.ITERATIONS):
    gram = store(factor(x) @ factor(x).T)
    polynomial = store(b * gram + c * store(factor(gram) @ factor(gram)))
    x = store(a * x + factor(polynomial) @ factor(x))
  return x


def left_to_xla(f, stacks):
  """Replaces muon._map_matrices: no exchange of whole matrices."""
  return [jax.vmap(f)(stack) for stack in stacks]


def compare_updates(config, topology):
  """Prints the estimates of an update on a TPU topology."""
  where = target.open_target(config, topology)
  patch = mock.patch.object(muon, '_map_matrices', left_to_xla)
  for name, optimizer_name, context in (
    ('adamw', 'adamw', contextlib.nullcontext()),
    ('muon', 'muon', contextlib.nullcontext()),
    ('muon, left to XLA', 'muon', patch),
  ):
    c, tx = setup(config, optimizer_name)
    with context:
      compiled = compile_update(c, tx, where.mesh)
    memory = compiled.memory_analysis()
    cost = hlo_cost.price(
      hlo.parse(compiled.as_text()), where.machine, lambda _: None, False
    )
    moved = ', '.join(
      f'{t.kind} {t.dtype} {t.nbytes / 1e9:.2f} GB'
      for t in cost.traffic.values()
      if t.nbytes > 1e6
    )
    print(
      f'{name}: {1e3 * cost.total_s:.1f} ms, including '
      f'{1e3 * cost.exposed_s["ici"]:.1f} wait for collectives '
      f'({moved or "none"}); state, parameters and gradients '
      f'{memory.argument_size_in_bytes / pricing.GIB:.2f} GiB, peak '
      f'{pricing.peak_bytes(memory) / pricing.GIB:.2f} GiB',
      flush=True,
    )


def compile_update(c, optimizer, mesh):
  """Compiles the update of parameters and optimizer state."""
  shapes = transformer.shapes(c.model)
  shardings = train_state.shardings(c.model, optimizer, mesh)

  @jax.named_scope('part(optimizer)')
  def update(params, opt_state, gradients):
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  placed = shardings.params, shardings.opt_state
  jitted = jax.jit(
    update,
    in_shardings=(*placed, shardings.params),
    out_shardings=placed,
    donate_argnums=(0, 1),
    compiler_options=compiler.options(mesh),
  )
  state = jax.eval_shape(optimizer.init, shapes)
  with jax.set_mesh(mesh):
    return jitted.lower(shapes, state, shapes).compile()


def main():
  if ARGS.topology:
    config = config_of(ARGS.config)
    compare_updates(config, ARGS.topology)
  else:
    config = config_of('tiny')
    compare_steps(config, ARGS.rounds)
    compare_precisions()


if __name__ == '__main__':
  main()
