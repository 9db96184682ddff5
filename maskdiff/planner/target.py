"""Compiles train, evaluation and denoising steps for a TPU topology.

libtpu, the TPU compiler, runs on any Linux machine, without a TPU, and takes a
topology by name. The environment variables of environment.py must be set before
JAX is imported.
"""

import dataclasses
import functools
import importlib.util
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maskdiff.data.rows import Rows
from maskdiff.distributed import chips
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError, one_line
from maskdiff.interop import load
from maskdiff.model import cache as cache_lib
from maskdiff.model import transformer
from maskdiff.model.trainable import trainable
from maskdiff.monitoring import progress
from maskdiff.planner.hlo_collectives import Machine
from maskdiff.sampling import passes, sampler
from maskdiff.sampling.request import Request, begin
from maskdiff.sampling.settings import sampler_config
from maskdiff.training import evaluation, step, train_state
from maskdiff.training.optimizer import OptimizerConfig, make_optimizer


@dataclasses.dataclass(frozen=True)
class Target:
  """The TPUs that a plan is made for."""

  topology: str
  mesh: jax.sharding.Mesh
  machine: Machine

  @property
  def chip(self):
    return self.machine.chip

  @property
  def peak_flops(self):
    """Peak of all devices, FLOP/s."""
    return self.mesh.size * self.chip.peak_flops


@dataclasses.dataclass(frozen=True)
class Compiled:
  executable: jax.stages.Compiled
  seconds: float  # of compilation


def topology_devices(topology, num_slices=1):
  """Returns the devices of a TPU topology, for ahead-of-time compilation.

  Args:
    topology: topology of one slice, e.g. 'v5p:4x4x4'.
    num_slices: number of slices.

  Returns:
    List of JAX devices.

  Raises:
    UserError: libtpu is not installed or refuses the topology.
  """
  chip, shape = chips.parse_topology(topology)
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      'libtpu, the TPU compiler, is not installed: '
      'pip install -r requirements-tpu.txt'
    )
  if num_slices < 1:
    raise UserError(f'--num_slices={num_slices}: must be positive')
  # libtpu assumes hosts of 2x2 chips; smaller slices have smaller hosts.
  host = [2 if size % 2 == 0 else 1 for size in shape[:2]]
  options = {'chips_per_host_bounds': (*host, 1)} if host != [2, 2] else {}
  if num_slices > 1:
    options['num_slices'] = num_slices
  # By default libtpu compiles for a torus without wrap-around links.
  wrap = [size % chip.wrap_multiple == 0 for size in shape]
  options['wrap'] = tuple(wrap + [False] * (3 - len(wrap)))
  if chip.name == 'v4':  # two cores are one device, as on a TPU VM
    options['chip_config_name'] = 'megacore'
  try:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=topology, **options
    ).devices
  except Exception as error:  # libtpu raises several types
    raise UserError(
      f'--topology {topology}: libtpu refuses it ({one_line(error)}); '
      'choose a shape that exists, e.g. v5p:4x4x4 or v5e:2x4'
    ) from error


def open_target(config, topology, num_slices=1):
  """Returns a Target: the mesh of a config on the devices of a topology.

  Args:
    config: ConfigDict; only config.mesh is read.
    topology: topology of one slice, e.g. 'v5p:4x4x4'.
    num_slices: number of slices.

  Returns:
    Target.

  Raises:
    UserError: see `topology_devices`; or the mesh does not fit the devices.
  """
  chip, shape = chips.parse_topology(topology)
  devices = topology_devices(topology, num_slices)
  mesh = mesh_lib.make_mesh(**config.mesh, devices=devices)
  flat = list(mesh.devices.flat)
  machine = Machine(
    chip=chip,
    shape=shape,
    axes=dict(mesh.shape),
    coords=tuple(tuple(d.coords[: len(shape)]) for d in flat),
    # Devices of a single slice do not have the attribute.
    slices=tuple(getattr(d, 'slice_index', 0) for d in flat),
  )
  return Target(topology, mesh, machine)


def compile_train(config, target):
  """Compiles the train step that launch/pretrain.py runs.

  Args:
    config: ConfigDict that passed config.validate_mesh.
    target: Target.

  Returns:
    Compiled.

  Raises:
    jax.errors.JaxRuntimeError: the compiler fails, e.g. for lack of memory.
  """
  c = step.step_config(config)
  optimizer = make_optimizer(
    OptimizerConfig(**config.optimizer),
    config.train.steps,
    trainable(c.model, transformer.axes(c.model)),
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(
    functools.partial(
      train_state.init, c.model, optimizer, ema=c.ema_decay > 0
    ),
    key,
  )
  rows = Rows(jax.ShapeDtypeStruct((config.train.batch, c.length), jnp.int32))
  train_step = step.compile_train_step(c, optimizer, target.mesh)
  return compile_on(train_step, target.mesh, state, rows, key)


def compile_evaluation(config, target):
  """Compiles the evaluation step that a run uses.

  Args:
    config: ConfigDict that passed config.validate_mesh.
    target: Target.

  Returns:
    Compiled.

  Raises:
    jax.errors.JaxRuntimeError: the compiler fails, e.g. for lack of memory.
  """
  c = evaluation.eval_config(step.step_config(config))
  params = params_on(c.model, target.mesh)
  tokens = jax.ShapeDtypeStruct(
    (config.eval.batch, c.length),
    jnp.int32,
    sharding=mesh_lib.batch_sharding(target.mesh),
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  return compile_on(
    evaluation.jit_eval_step, target.mesh, c, params, Rows(tokens), key
  )


def params_on(model, mesh, dtype=None):
  """Returns the parameter tree as ShapeDtypeStructs with shardings.

  Args:
    model: TransformerConfig.
    mesh: device mesh.
    dtype: of all parameters; None: as declared.
  """
  shapes = transformer.shapes(model)
  shardings = mesh_lib.param_shardings(mesh, transformer.axes(model), shapes)
  return sharded(shapes, shardings, dtype)


def sharded(shapes, shardings, dtype=None):
  """Returns ShapeDtypeStructs with shardings.

  Args:
    shapes: tree of arrays or ShapeDtypeStructs.
    shardings: tree of shardings, of the same structure.
    dtype: of all arrays; None: that of each.
  """
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s),
    shapes,
    shardings,
  )


def compile_denoise(config, target, prompts, length, params, window=False):
  """Compiles one denoising step of the sampler.

  The settings of the config are constants of the program, so that the compiler
  removes the computations that no row uses.

  Args:
    config: ConfigDict that passed config.validate_mesh.
    target: Target.
    prompts: number of rows.
    length: tokens of a row; config.sample.gen_length of them are slots.
    params: parameter tree of ShapeDtypeStructs with shardings.
    window: compile the step that computes windows with the cache, instead of
      the step over the canvas.

  Returns:
    Compiled.

  Raises:
    jax.errors.JaxRuntimeError: the compiler fails, e.g. for lack of memory.
  """
  c, settings = sampler_config(config)
  canvas = np.zeros((prompts, length), np.int32)
  fill = np.arange(length) >= length - config.sample.gen_length
  fill = np.broadcast_to(fill, canvas.shape)
  valid = np.ones(canvas.shape, bool)
  network = load.network(config, params)
  carry, layout, shapes = begin(
    network, c, Request(canvas, fill, valid, np.arange(prompts), settings)
  )
  settings = layout.settings
  replicated = mesh_lib.replicated(target.mesh)
  carry, layout = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
    (carry, layout),
  )
  step = sampler.window_step if window else sampler.canvas_step
  cache = None
  if c.cache != 'none':
    cache = _cache_on(network, c, shapes[-1][0], layout, target.mesh)
  return compile_on(
    _with_constants(step, settings),
    target.mesh,
    *(network, c, shapes[-1], layout, carry, cache),
  )


def _cache_on(network, c, length, layout, mesh):
  """Returns the shapes and shardings of a Cache of `length` positions."""
  cache = jax.eval_shape(
    lambda layout: cache_lib.first_places(
      passes.empty_cache(network, c, layout), length
    ),
    layout,
  )
  rows, tensor = mesh_lib.batch_shards(mesh), mesh.shape['tensor']
  batch, groups = len(cache.labels.doc), network.config.kv_heads
  split = P(
    None,
    mesh_lib.BATCH_AXES if batch % rows == 0 else None,
    'tensor' if groups % tensor == 0 else None,
  )
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape,
      x.dtype,
      sharding=NamedSharding(mesh, split if x.ndim == 5 else P()),
    ),
    cache,
  )


def _with_constants(step, settings):
  """Returns a jitted step of the sampler, with constant settings of the rows.

  Args:
    step: function (network, c, shape, layout, carry, cache).
    settings: Settings of NumPy arrays.
  """

  def denoising_step(network, c, shape, layout, carry, cache):
    constants = jax.tree.map(jnp.asarray, settings)
    layout = layout._replace(settings=constants)
    return step(network, c, shape, layout, carry, cache)

  return jax.jit(denoising_step, static_argnums=(1, 2), donate_argnames='cache')


def compile_on(function, mesh, *args):
  """Compiles a jitted function for the devices of a mesh.

  Args:
    function: from jax.jit.
    mesh: device mesh.
    *args: its arguments; ShapeDtypeStructs stand for arrays.

  Returns:
    Compiled.

  Raises:
    jax.errors.JaxRuntimeError: the compiler fails, e.g. for lack of memory.
  """
  began = time.monotonic()
  name = _name(function)
  with jax.set_mesh(mesh):
    with progress.waiting(f'tracing {name}'):
      lowered = function.lower(*args)
    with progress.waiting(f'compiling {name} for {mesh.size} devices'):
      executable = lowered.compile()
  return Compiled(executable, time.monotonic() - began)


def _name(function):
  """Returns the name of a jitted function, or of the function of a partial."""
  inner = getattr(function, '__wrapped__', function)
  return getattr(getattr(inner, 'func', inner), '__name__', 'the program')
