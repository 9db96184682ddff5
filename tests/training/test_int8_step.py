"""Gradients of a train step with products in 8-bit integers, on meshes."""

import dataclasses
import functools
import re

import jax
import pytest
import test_step
from test_step import assert_close, gradients_on

from maskdiff.data.rows import Rows
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.model import lora, transformer
from maskdiff.training import step
from maskdiff.training import train_state as state_lib
from maskdiff.training.guard import GuardConfig

MODEL = dataclasses.replace(test_step.MODEL, quantization='int8')


@pytest.mark.parametrize('other', test_step.OTHERS[1:], ids=str)
def test_gradients_are_those_of_one_device(other):
  gradients = functools.partial(
    gradients_on, model=MODEL, objective=test_step.OBJECTIVE
  )
  name, microbatches = other
  found, _ = gradients(name, microbatches=microbatches)
  expected, _ = gradients('one_device', microbatches=1)
  assert_close(found, expected)


def test_devices_gather_matrices_as_integers():
  c = step.StepConfig(
    MODEL, test_step.OBJECTIVE, test_step.LENGTH, 1, GuardConfig(0.0)
  )
  m = test_step.make_mesh('fsdp8')
  with jax.set_mesh(m):
    tx = test_step.optimizer.make_optimizer(test_step.OPTIMIZER, 100, None)
    shardings = state_lib.shardings(MODEL, tx, m).params
    params = jax.device_put(test_step.initial_params(), shardings)
    rows = jax.device_put(
      Rows(test_step.make_tokens()), mesh_lib.batch_sharding(m)
    )
    compute = jax.jit(functools.partial(step.batch_gradients, c))
    text = (
      compute.lower(params, rows, jax.random.key(0), 0.0).compile().as_text()
    )
  gathers = re.findall(r'= (\w+)\[([\d,]*)\]\S* all-gather', text)
  matrices = transformer.shapes(MODEL)['blocks']
  shapes = {
    ','.join(map(str, matrices[n].shape[1:])) for n in lora.TARGETS.values()
  }
  assert {dtype for dtype, shape in gathers if shape in shapes} == {'s8'}
  assert {shape for _, shape in gathers} >= shapes
