"""Parts of the model, from the named scopes of a compiled program."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
import tiny

from maskdiff import config as config_lib
from maskdiff.data.rows import Rows
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.model import transformer
from maskdiff.planner.parts import model_part, part
from maskdiff.training import step, train_state
from maskdiff.training.optimizer import OptimizerConfig, make_optimizer

FORWARD = 'jit(train_step)/jvp(network(layer: stacked arrays))/while/body/'
BACKWARD = (
  'jit(train_step)/transpose(jvp(network(layer: stacked arrays)))/while/body/'
)
LAYER = 'closed_call/checkpoint/network(layer: elementwise)/'
RECOMPUTED = 'closed_call/checkpoint/rematted_computation/'


@pytest.mark.parametrize(
  'op_name, expected',
  [
    (FORWARD + 'dynamic_slice', 'layer: stacked arrays forward'),
    (FORWARD + LAYER + 'add', 'layer: elementwise forward'),
    (
      FORWARD + LAYER + 'network(mlp gate/up)/bld,df->blf/dot_general',
      'mlp gate/up forward',
    ),
    (
      BACKWARD + LAYER + 'network(mlp gate/up)/bld,df->blf/dot_general',
      'mlp gate/up backward',
    ),
    (
      BACKWARD + RECOMPUTED + 'network(mlp down)/blf,fd->bld/dot_general',
      'mlp down recomputed',
    ),
    ('jit(train_step)/part(optimizer)/part(guard)/reduce_sum', 'guard'),
    (
      'jit(train_step)/jvp(part(loss))/shard_map/while/body/'
      'part(loss: logits)/td,dv->tv/dot_general',
      'loss: logits',
    ),
    ('jit(canvas_step)/vmap(part(sampling))/add', 'sampling'),
  ],
)
def test_innermost_scope_names_the_part(op_name, expected):
  assert model_part(op_name) == expected


@pytest.mark.parametrize(
  'op_name, direction',
  [
    (FORWARD, 'forward'),
    (BACKWARD + RECOMPUTED, 'recomputed'),
    (BACKWARD + 'closed_call/checkpoint/', 'backward'),
  ],
)
def test_splash_kernel_is_a_part_of_its_own(op_name, direction):
  op_name += 'network(attention besides kernel)/jit(_splash_attention)/'
  name = 'attention besides kernel'
  assert model_part(op_name + 'slice') == f'{name} {direction}'
  kernel = op_name + 'splash_mha_fwd_residuals/pallas_call'
  assert model_part(kernel) == f'attention kernel {direction}'


def test_instruction_without_a_scope_keeps_its_name():
  assert model_part('jit(train_step)/cumsum') == 'cumsum'
  assert model_part('copy.12') == 'copy'
  # JAX's own transformations are not scopes.
  assert model_part('jit(train_step)/transpose(jvp())/mul') == (
    'transpose(jvp())/mul'
  )


@pytest.mark.parametrize(
  'argument', ['state.params', 'state.ema.params', 'params', 'network.params']
)
def test_casts_of_arguments_are_parts_of_the_weights(argument):
  name = f"{argument}[\\'blocks\\'][\\'q\\']"
  assert model_part(name) == 'weights: cast and copy'


def test_part_is_none_outside_of_scopes():
  assert part('jit(train_step)/while') is None
  assert part('jit(f)/jvp(part(loss))/shard_map/while') == 'loss'


@functools.cache
def op_names_of_the_train_step(name='adamw'):
  """Returns the op names of a tiny train step, from its StableHLO text.

  The text is not compiled, so no compilation cache can return old names.
  """
  c = config_lib.default()
  c.update_from_flattened_dict(
    tiny.TRAIN_KEYS
    | {
      'model.dtype': 'bfloat16',
      'model.remat': 'full',
      'optimizer.name': name,
      'train.batch': 4,
      'train.microbatches': 2,
      'train.ema_decay': 0.9,
    }
  )
  s = step.step_config(c)
  optimizer = make_optimizer(
    OptimizerConfig(**c.optimizer), c.train.steps, transformer.axes(s.model)
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(
    functools.partial(train_state.init, s.model, optimizer, ema=True), key
  )
  rows = Rows(jax.ShapeDtypeStruct((4, 16), jnp.int32))
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    program = step.compile_train_step(s, optimizer, mesh)
    text = program.lower(state, rows, key).as_text(debug_info=True)
  names = set(re.findall(r'loc\("([^"]+)"', text))
  return [name for name in names if '/' in name and not name.startswith('/')]


def test_every_matrix_product_of_the_train_step_has_a_part():
  products = [n for n in op_names_of_the_train_step() if 'dot_general' in n]
  assert len(products) > 20
  assert all(part(name) for name in products)


def test_muon_is_a_part_of_its_own():
  parts = {part(n) for n in op_names_of_the_train_step('muon')}
  assert 'optimizer: Newton-Schulz' in parts


def test_parts_of_the_train_step():
  assert {part(n) for n in op_names_of_the_train_step()} - {None} == {
    'attention',
    'attention key/value',
    'attention output',
    'attention query',
    'embedding',
    'gradient sum over microbatches',
    'guard',
    'layer: elementwise',
    'layer: stacked arrays',
    'loss',
    'loss: gradient of hidden states',
    'loss: gradient of the head',
    'loss: logits',
    'metrics',
    'mlp activation',
    'mlp down',
    'mlp gate/up',
    'noise',
    'normalisation',
    'optimizer',
    'rotary positions',
    'weights: cast and copy',
  }
