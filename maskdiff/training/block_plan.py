"""Block lengths that change during a training of block diffusion.

LLaDA 2.0 turns an autoregressive network into a block diffusion model with
blocks that grow from 1 token to the whole row and shrink again to 32. The block
length is a constant of the compiled step, so every length has a step of its
own. The number of the step determines the length, which makes a resumed run
exact and needs no agreement between processes.
"""

import dataclasses
from typing import NamedTuple

from maskdiff.training import step as step_lib
from maskdiff.training.stage import compile_step


class Phase(NamedTuple):
  """A part of the training: its first step, from 0, and its block length."""

  first_step: int
  block_length: int


def phases(config):
  """Returns the phases of a training, a list of Phase in their order.

  Shares of the training are rounded to steps. A phase without steps is left
  out. Without a plan, the whole training is one phase.

  Args:
    config: ConfigDict.
  """
  plan = config.objective.block_plan or ((0.0, config.objective.block_length),)
  found = {}  # a later phase replaces one that begins at the same step
  for share, block_length in plan:
    found[round(share * config.train.steps)] = block_length
  return [Phase(*item) for item in found.items()]


def block_length(phases, step):
  """Returns the block length of a step, counted from 0."""
  return [p.block_length for p in phases if p.first_step <= step][-1]


def with_block_length(c, block_length):
  """Returns a StepConfig with another block length.

  Args:
    c: StepConfig.
    block_length: tokens of a block.
  """
  objective = dataclasses.replace(c.objective, block_length=block_length)
  return dataclasses.replace(c, objective=objective)


def compile_steps(config, c, optimizer, mesh, gradients, state, batch, key):
  """Compiles a train step for every block length of the remaining steps.

  All are compiled before the first step, so that a phase that needs too much
  memory fails at the start of the run.

  Args:
    config: ConfigDict.
    c: its StepConfig.
    optimizer: see `step.compile_train_step`.
    mesh: see `step.compile_train_step`.
    gradients: see `step.compile_train_step`.
    state: TrainState; its number of steps is that of the next step.
    batch: Rows, as for the train step.
    key: PRNG key, as for the train step.

  Returns:
    - function from a step number to the compiled train step.
    - the lines of `compile_step`, with the block length if there are several.
  """
  plan, compiled, lines = phases(config), {}, []
  start, last = int(state.step), config.train.steps - 1
  first = block_length(plan, min(start, last))
  remaining = [first, *(p.block_length for p in plan if p.first_step > start)]
  for length in dict.fromkeys(remaining):
    jitted = step_lib.compile_train_step(
      with_block_length(c, length), optimizer, mesh, gradients
    )
    compiled[length], line = compile_step(jitted, state, batch, key)
    of_blocks = f'block length {length}: ' if len(plan) > 1 else ''
    lines.append(of_blocks + line)
  return lambda step: compiled[block_length(plan, step)], '\n'.join(lines)
