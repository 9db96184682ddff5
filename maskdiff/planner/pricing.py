"""Compiles one program; returns its memory and time as keys of a plan."""

import math
import re

import jax

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import one_line
from maskdiff.model import transformer
from maskdiff.monitoring import progress
from maskdiff.planner import hlo, hlo_cost
from maskdiff.planner.fields import FIELDS
from maskdiff.planner.parts import model_part
from maskdiff.training import step

GIB = 2**30


def facts(config, target, mode):
  """Returns a plan with the values that are known before compiling.

  Args:
    config: ConfigDict.
    target: target.Target.
    mode: 'train', 'sample' or 'rl'.

  Returns:
    Dict with all keys of FIELDS.
  """
  sizes = target.mesh.shape
  parameters, _ = transformer.num_params(step.step_config(config).model)
  return dict.fromkeys(FIELDS) | {
    'mode': mode,
    'topology': target.topology,
    'num_slices': target.machine.num_slices,
    'chip': target.chip.name,
    'chips': target.mesh.size // target.chip.devices,
    'devices': target.mesh.size,
    'mesh': ','.join(f'{a}={sizes[a]}' for a in mesh_lib.AXES),
    'parameters': parameters,
    'remat': config.model.remat,
    'hbm_capacity_gib': target.chip.hbm_gib,
    'fits': False,
    'levers': [],
    'collectives': [],
    'operations': [],
    'warnings': [],
    'programs': [],
  }


def price(
  plan, target, compile_program, expected_trips, regime, branch_shares=None
):
  """Returns the plan with memory and time of the program, or its failure.

  Args:
    plan: dict, from `facts`.
    target: target.Target.
    compile_program: () -> target.Compiled.
    expected_trips: see hlo_cost.price.
    regime: see hlo_cost.price.
    branch_shares: see hlo_cost.price.
  """
  compiled, failure = attempt(compile_program)
  if failure:
    return plan | failure
  memory = compiled.executable.memory_analysis()
  total = peak_bytes(memory)
  fits = total / GIB <= target.chip.hbm_gib
  with progress.waiting('estimating the time of its instructions'):
    module = hlo.parse(compiled.executable.as_text())
    cost = hlo_cost.price(
      module, target.machine, expected_trips, regime, branch_shares
    )
  return (
    plan
    | {
      'status': 'fits' if fits else 'does not fit',
      'fits': fits,
      'compile_s': compiled.seconds,
      'hbm_arguments_gib': memory.argument_size_in_bytes / GIB,
      'hbm_temporaries_gib': memory.temp_size_in_bytes / GIB,
      'hbm_total_gib': total / GIB,
      'host_gib': memory.host_temp_size_in_bytes / GIB,
    }
    | costs(cost)
  )


def attempt(compile_program):
  """Returns a Compiled and {}, or None and the failure as keys of a plan."""
  try:
    return compile_program(), {}
  except jax.errors.JaxRuntimeError as error:
    # VMEM and other memories can be exhausted too. Such a program counts as one
    # that does not compile, because a larger topology would not help.
    if 'RESOURCE_EXHAUSTED' in str(error) and 'hbm' in str(error).lower():
      needed = needed_gib(str(error))
      return None, {'status': 'does not fit', 'hbm_total_gib': needed}
    return None, {'status': 'does not compile', 'error': one_line(error)}


def needed_gib(message):
  """Returns the GiB of HBM that an out-of-memory message names, or None."""
  match = re.search(r'Used ([\d.]+)([KMGT]) of', message) or re.search(
    r'required for [^(]*\(([\d.]+)([KMGT])\)', message
  )
  if not match:
    return None
  return float(match[1]) * 1024.0 ** ('KMGT'.index(match[2]) - 2)


def peak_bytes(memory):
  """Returns the peak HBM of a program, from its memory_analysis()."""
  allocated = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  # The compiler checks the reported peak against the chip. With offloading the
  # peak includes host memory, so it may exceed the sum of HBM allocations.
  return min(memory.peak_memory_in_bytes or allocated, allocated)


def gib_per_chip(tree):
  """Returns the GiB of the arrays of a tree on one chip.

  Args:
    tree: ShapeDtypeStructs with shardings.
  """
  shards = (
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )
  return sum(shards) / GIB


def costs(cost):
  """Returns the keys of a plan that an hlo_cost.Cost determines."""
  parts = {}
  for operation in cost.operations.values():
    name = model_part(operation.op_name)
    part = parts.setdefault(
      name, {'part': name, 'seconds': 0.0, 'count': 0.0, 'op_name': ''}
    )
    # The op_name of a part is that of its longest operation.
    if operation.seconds > part['seconds'] or not part['op_name']:
      part['op_name'] = operation.op_name
    part['seconds'] += operation.seconds
    part['count'] += operation.count
  operations = sorted(parts.values(), key=lambda p: -p['seconds'])
  total = cost.total_s or 1.0
  exposed = cost.exposed_s
  return {
    'step_s': cost.total_s,
    'cycles_s': cost.cycles_s,
    'attention_s': cost.kernel_s,
    'attention_mxu_s': cost.kernel_mxu_s,
    'rows_s': cost.rows_s,
    'exposed_ici_s': exposed['ici'],
    'exposed_dcn_s': exposed['dcn'],
    'exposed_host_s': exposed['host_in'] + exposed['host_out'],
    'exposed_prefetch_s': exposed['prefetch'],
    'cycles': cost.cycles,
    'collectives': [
      {
        'kind': t.kind,
        'axes': t.axes,
        'network': t.network,
        'dtype': t.dtype,
        'count': t.count,
        'sync_count': t.sync_count,
        'gb': t.nbytes / 1e9,
        'seconds': t.seconds,
      }
      for t in sorted(cost.traffic.values(), key=lambda t: -t.seconds)
    ],
    'operations': [o | {'share': o['seconds'] / total} for o in operations],
    'warnings': _warnings(cost),
  }


def _warnings(cost):
  """Returns a line for each cost that the estimate leaves out."""
  lines = [
    f'the trip count of the loop {name} depends on data; it is counted once'
    for name in cost.unresolved
  ]
  if cost.unpriced:
    names = ', '.join(f'{n} x{count:g}' for n, count in cost.unpriced.items())
    lines.append(f'the time leaves out operations without estimate: {names}')
  return lines
