"""Phases of a training: block lengths that change, and annealed attention.

LLaDA 2.0 turns an autoregressive network into a block diffusion model with
blocks that grow from 1 token to the whole row and shrink again to 32
(config.objective.block_plan). DiffuLLaMA anneals attention from causal to
bidirectional (config.objective.anneal_steps). Both are constants of the
compiled step, so every phase has a step of its own. The number of the step
determines the phase, which makes a resumed run exact and needs no agreement
between processes.
"""

import dataclasses
from typing import NamedTuple

from maskdiff.training import step as step_lib
from maskdiff.training.stage import compile_step


class Phase(NamedTuple):
  """A part of the training.

  Attributes:
    first_step: number of its first step, from 0.
    block_length: tokens of a block.
    anneal_steps: config.objective.anneal_steps if attention is annealed; else
      0.
  """

  first_step: int
  block_length: int
  anneal_steps: int = 0


def phases(config):
  """Returns the phases of a training, a list of Phase in their order.

  Shares of the training are rounded to steps. A phase without steps is left
  out. Without a plan of block lengths and annealing, the whole training is one
  phase. The last phase is that of the evaluation.

  Args:
    config: ConfigDict.
  """
  o = config.objective
  if o.anneal_steps > 1:
    # In the last of these steps all pairs are open.
    annealed = Phase(0, o.block_length, o.anneal_steps)
    return [annealed, Phase(o.anneal_steps - 1, o.block_length)]
  plan = o.block_plan or ((0.0, o.block_length),)
  found = {}  # a later phase replaces one that begins at the same step
  for share, block_length in plan:
    found[round(share * config.train.steps)] = block_length
  return [Phase(*item) for item in found.items()]


def at(phases, step):
  """Returns the Phase of a step, counted from 0."""
  return [p for p in phases if p.first_step <= step][-1]


def with_phase(c, phase):
  """Returns the StepConfig of a phase.

  Args:
    c: StepConfig.
    phase: Phase.
  """
  objective = dataclasses.replace(
    c.objective,
    block_length=phase.block_length,
    anneal_steps=phase.anneal_steps,
    train_steps=c.steps if phase.anneal_steps else 1,
  )
  return dataclasses.replace(c, objective=objective)


def compile_steps(config, c, optimizer, mesh, gradients, state, batch, key):
  """Compiles a train step for every phase of the remaining steps.

  All are compiled before the first step, so that a phase that needs too much
  memory fails at the start of the run. Phases that differ only in their first
  step share a compiled step.

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
    - the lines of `compile_step`, with the name of the phase if there are
      several.
  """
  plan, compiled, lines = phases(config), {}, []
  start, last = int(state.step), config.train.steps - 1
  first = at(plan, min(start, last))
  for phase in (first, *(p for p in plan if p.first_step > start)):
    of_phase = with_phase(c, phase)
    if of_phase in compiled:
      continue
    jitted = step_lib.compile_train_step(of_phase, optimizer, mesh, gradients)
    compiled[of_phase], line = compile_step(jitted, state, batch, key)
    lines.append(f'{_name(config, phase)}: {line}' if len(plan) > 1 else line)
  return (
    lambda step: compiled[with_phase(c, at(plan, step))],
    '\n'.join(lines),
  )


def _name(config, phase):
  if config.objective.anneal_steps:
    return f'{"annealed" if phase.anneal_steps else "bidirectional"} attention'
  return f'block length {phase.block_length}'
