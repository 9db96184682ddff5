"""The pod configs, compiled for TPU pods by the real compiler.

No TPU is needed: libtpu compiles for a topology that is not here. Each test
compiles the very step that launch/pretrain.py runs, in a process of its own,
because libtpu wants its settings before JAX starts.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
GIB = 2**30
HBM_GIB = {'v5p': 95, 'v5e': 16}

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None,
    reason='libtpu is not installed: pip install -r requirements-test.txt',
  ),
]

COMPILE = """
import functools, json, runpy, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from maskdiff import config as config_lib
from maskdiff import mesh as mesh_lib
from maskdiff import model, optimizer, run, step

path, topology, overrides = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
config = runpy.run_path(path)['get_config']()
config.update_from_flattened_dict(overrides)
config_lib.validate(config)
devices = topologies.get_topology_desc(
  platform='tpu', topology_name=topology
).devices
mesh = mesh_lib.make_mesh(**config.mesh, devices=devices)
config_lib.validate_mesh(config, mesh.shape)
c = run.step_config(config)
update = optimizer.make_optimizer(
  optimizer.OptimizerConfig(**config.optimizer),
  config.train.steps,
  model.axes(c.model),
)
key = jax.eval_shape(lambda: jax.random.key(0))
state = jax.eval_shape(functools.partial(step.init_state, c.model, update), key)
tokens = jax.ShapeDtypeStruct((config.train.batch, c.length), jnp.int32)
train_step = step.compile_train_step(c, update, mesh)
with jax.set_mesh(mesh):
  compiled = train_step.lower(state, tokens, key).compile()
memory = compiled.memory_analysis()
print(json.dumps({
  'arguments': memory.argument_size_in_bytes,
  'temporaries': memory.temp_size_in_bytes,
  'hlo': compiled.as_text(),
}))
"""


def compile_for(topology, config, **overrides):
  """Memory per chip in bytes and the HLO text of a config's train step."""
  result = subprocess.run(
    [
      sys.executable,
      '-c',
      COMPILE,
      str(ROOT / 'configs' / config),
      topology,
      json.dumps(overrides),
    ],
    env={
      **{k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
      'JAX_PLATFORMS': 'cpu',
      'TPU_SKIP_MDS_QUERY': '1',
      'TPU_WORKER_HOSTNAMES': 'localhost',
      'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
      'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    },
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr[-4000:]
  return json.loads(result.stdout.splitlines()[-1])


def test_8b_fits_a_v5p_pod_of_64_chips():
  compiled = compile_for('v5p:4x4x4', '8b.py')
  total = (compiled['arguments'] + compiled['temporaries']) / GIB
  print(f'8b on v5p:4x4x4: {total:.1f} GiB')
  assert total < HBM_GIB['v5p']
  # Parameters and two moments in float32, split over all chips.
  assert compiled['arguments'] / GIB < 1.05 * 3 * 4 * 8.016e9 / 64 / GIB
  assert 'splash' in compiled['hlo']
  # No logits of a microbatch: 4 rows of 4096 tokens, 126464 wide.
  assert '[4,4096,126464]' not in compiled['hlo']
  assert '[16384,126464]' not in compiled['hlo']


def test_1b_fits_eight_v5e_chips():
  compiled = compile_for('v5e:2x4', '1b.py')
  total = (compiled['arguments'] + compiled['temporaries']) / GIB
  print(f'1b on v5e:2x4: {total:.1f} GiB')
  assert total < HBM_GIB['v5e']
  assert 'splash' in compiled['hlo']
