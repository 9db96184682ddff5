"""Plans policy optimization on TPUs without a TPU; plan.py plans training.

A round runs four programs, and each is compiled as launch/rl.py runs it:

- copy: each parameter is cast and gathered for the sampler.
- sampling: a denoising step of all rows of the sampler.
- fixed: log-probabilities of the answers that stay the same in a round.
- training: a train step on all answers.

The train state and the reference stay in memory during all of them, and the
copy during the first two. The peak of a program is the memory of these and of
its own buffers.

The times are those of rounds in which no answer ends before its last denoising
step. They leave out rewards, the work of the host, and evaluations.
"""

import functools
import math

from maskdiff import config as config_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.planner import copies_rl, levers, plan_sample, pricing
from maskdiff.planner.parts import part
from maskdiff.planner.plan import DAY_S
from maskdiff.planner.target import open_target
from maskdiff.planner.target_rl import (
  compile_copy,
  compile_fixed,
  compile_step,
  open_round,
  parameters_to_copy,
)
from maskdiff.rl import table


def plan_rl(config, topology, num_slices=1):
  """Plans policy optimization.

  Args:
    config: ConfigDict with the keys of config.default(). `train.batch` is set
      to the number of answers of a round.
    topology: topology of one slice, e.g. 'v5p:2x2x1'.
    num_slices: number of slices.

  Returns:
    Dict with the keys of fields.FIELDS; its values can be written as JSON. The
    keys of a step are those of the train step.

  Raises:
    UserError: config, topology and mesh do not fit each other.
  """
  r = open_plan(config, topology, num_slices)
  facts, held = facts_of(r), held_gib(r)
  found = [program(r, facts, name) for name in names(r)]
  step = {key: value for key, value in found[-1].items() if key in facts}
  result = facts | step | held | {'programs': [row(p) for p in found]}
  result |= _status(found)
  if result['status'] == 'does not fit':
    result['levers'] = levers.policy_levers(
      r.config, result, dict(r.target.mesh.shape), result['programs']
    )
  if any(p['run_s'] is None for p in result['programs']):
    return result
  return result | _times(r, result['programs'])


def open_plan(config, topology, num_slices=1):
  """Returns the target_rl.Round to plan; arguments and errors as `plan_rl`."""
  config = config.copy_and_resolve_references()
  config.train.batch = config.policy.prompts * config.policy.group
  config_lib.validate(config)
  if table.find(config.policy.method).pairs:
    raise UserError(
      f'config.policy.method={config.policy.method} learns from pairs of '
      'answers, and a plan of launch/preferences.py is not supported; set '
      '--config.policy.method=espo for one of launch/rl.py'
    )
  if config.sample.gen_length >= config.data.length:
    raise UserError(
      f'config.sample.gen_length={config.sample.gen_length} leaves no room for '
      f'a prompt in rows of config.data.length={config.data.length}; raise '
      '--config.data.length'
    )
  target = open_target(config, topology, num_slices)
  config_lib.validate_mesh(config, target.mesh.shape)
  return open_round(config, target)


def names(r):
  """Returns the names of the programs of a Round, in their order."""
  fixed = ['fixed'] * bool(r.c.fixed_steps and r.c.fixed_networks)
  return ['copy', 'sampling', *fixed, 'training']


def facts_of(r):
  """Returns the values of a plan that are known before compiling."""
  t, shards = r.config.train, mesh_lib.batch_shards(r.target.mesh)
  return pricing.facts(r.config, r.target, 'rl') | {
    'length': r.config.data.length,
    'batch': t.batch,
    'microbatches': t.microbatches,
    'rows_per_chip': t.batch / t.microbatches / shards,
    'copies': r.programs.copies,
    'inner_steps': r.c.inner_steps,
    'denoising_steps': r.config.sample.steps,
    'loss_chunks': copies_rl.loss_chunks(r),
  }


def held_gib(r):
  """Returns the GiB per chip that stay in memory, by their keys of a plan."""
  params = pricing.gib_per_chip(r.state.params)
  return {
    'hbm_parameters_gib': params,
    'hbm_optimizer_gib': pricing.gib_per_chip(
      (r.state.opt_state, r.state.ema, r.state.guard)
    ),
    'hbm_reference_gib': pricing.gib_per_chip(r.reference),
    'hbm_copy_gib': pricing.gib_per_chip(r.copy),
  }


def program(r, facts, name):
  """Plans one program, with all arrays that stay in memory while it runs.

  Args:
    r: target_rl.Round.
    facts: from `facts_of`.
    name: of the program.
  """
  of = {'copy': _copy, 'sampling': _sampling}
  found = of.get(name, functools.partial(_priced, name))(r, facts)
  return _in_memory({'runs': 1} | found | {'name': name}, r)


def _priced(name, r, facts):
  """Returns the plan of the program `fixed` or `training` alone."""
  compile_program, runs = {
    'fixed': (compile_fixed, 1),
    'training': (compile_step, r.c.inner_steps),
  }[name]
  chunks = facts['loss_chunks']
  return pricing.price(
    facts,
    r.target,
    lambda: compile_program(r),
    lambda op_name: chunks if part(op_name) == 'loss' else None,
    copies_rl.regime(r.c.network, r.config.data.length),
  ) | {'runs': runs}


def _sampling(r, facts):
  """Returns the plan of the sampler alone; its rows have long prompts."""
  config, answers = r.config, r.config.train.batch
  rows = min(config.policy.sampling_rows or answers, answers)
  prompt_tokens = config.data.length - config.sample.gen_length
  found = plan_sample.plan_sample_on(
    config, r.target, rows, prompt_tokens, r.copy
  )
  return found | {'runs': math.ceil(answers / rows)}


def _copy(r, facts):
  """Returns the plan of the copy; its memory is that of the largest buffer."""
  found = []
  for pair, count in parameters_to_copy(r).items():
    program = functools.partial(compile_copy, r, pair)
    p = pricing.price(
      facts,
      r.target,
      program,
      None,
      copies_rl.regime(r.c.network, r.config.data.length),
    )
    if p['step_s'] is not None:
      p['hbm_total_gib'] -= pricing.gib_per_chip(pair)
      p = p | {key: p[key] * count for key in ('step_s', 'compile_s')}
    found.append(p)
  failed = [p for p in found if p['step_s'] is None]
  largest = failed or sorted(found, key=lambda p: p['hbm_total_gib'])
  total = {
    key: None if failed else sum(p[key] for p in found)
    for key in ('step_s', 'compile_s')
  }
  return largest[-1] | total


def _in_memory(p, r):
  total, name, held = p['hbm_total_gib'], p['name'], held_gib(r)
  if total is None or p['status'] == 'does not compile':
    return p
  resident, arguments = sum(held.values()), ()
  if name == 'sampling':
    arguments = r.copy
  elif name != 'copy':
    arguments = r.fixed_params if name == 'fixed' else r.state
    resident -= held['hbm_copy_gib']
  buffers = total - pricing.gib_per_chip(arguments)
  total = resident + buffers
  fits = p['status'] == 'fits' and total <= r.target.chip.hbm_gib
  return p | {
    'status': 'fits' if fits else 'does not fit',
    'hbm_buffers_gib': buffers,
    'hbm_total_gib': total,
  }


def row(p):
  """Returns the entry of a program in the key `programs` of a plan."""
  sampling = p['name'] == 'sampling'
  return {
    'name': p['name'],
    'status': p['status'],
    'error': p['error'],
    'hbm_buffers_gib': p.get('hbm_buffers_gib'),
    'hbm_total_gib': p['hbm_total_gib'],
    'step_s': p['step_s'],
    'runs': p['runs'],
    # The denoising steps of all rows are one run of the sampler.
    'run_s': p['latency_s'] if sampling else p['step_s'],
    'compile_s': p['compile_s'],
  }


def _status(found):
  """Returns the keys of a plan that depend on all programs."""
  statuses = [p['status'] for p in found]
  worst = 'does not compile', 'does not fit', 'fits'
  status = next(s for s in worst if s in statuses)
  totals = [p['hbm_total_gib'] for p in found]
  sampling = next(p for p in found if p['name'] == 'sampling')
  failed = next((p for p in found if p['error']), None)
  return {
    'status': status,
    'fits': status == 'fits',
    'error': failed and f'the program {failed["name"]}: {failed["error"]}',
    'hbm_total_gib': None if None in totals else max(totals),
    'latency_s': sampling['latency_s'],
    'window_step_s': sampling['window_step_s'],
    'warnings': sorted({line for p in found for line in p['warnings']}),
  }


def _times(r, programs):
  """Returns the seconds of a round, by their keys of a plan."""
  seconds = {p['name']: p['runs'] * p['run_s'] for p in programs}
  parts = {
    'sampling_s': seconds['copy'] + seconds['sampling'],
    'fixed_s': seconds.get('fixed', 0.0),
    'training_s': seconds['training'],
  }
  round_s, config = sum(parts.values()), r.config
  total_s = config.train.steps / r.c.inner_steps * round_s
  slots = config.train.batch * config.sample.gen_length
  return parts | {
    'round_s': round_s,
    'tokens_per_s': slots / round_s,
    'tokens_per_s_per_chip': slots / round_s / r.target.mesh.size,
    'days': total_s / DAY_S,
    'chip_hours': total_s / 3600 * r.target.mesh.size,
  }
