"""Estimates the time of a compiled GPU program from its HLO text.

Each instruction takes the longer of two times: its matrix products at the peak
of the GPU, and the bytes that it reads and writes at the bandwidth of the
memory. This is a bound that good kernels approach from above: it leaves out
launches, caches, and products too small to fill the GPU. Collectives have no
price, because the text does not say which links they use.

These forms of matrix products are recognized: dot, in a fusion (Triton, or any
other) or alone; custom calls to cuBLAS and cuBLASLt, whose backend_config has
the dimensions of the product; and cuDNN's attention, whose backend_config has
the shape of the scores.
"""

import collections
import dataclasses
import math
import re

from maskdiff.planner import hlo, hlo_collectives, hlo_loops

# Rates of products in multiples of the peak of bfloat16, by type of an operand:
# TF32, and integers of 8 bits (NVIDIA A100 and H100 data sheets: 156 and 624 of
# 312 TFLOP/s, 494.7 and 1978.9 of 989.4).
RATES = {'f32': 0.5, 's8': 2.0}
# Instructions that read and write nothing.
FREE = (
  'parameter constant get-tuple-element tuple bitcast after-all '
  'opt-barrier optimization-barrier partition-id replica-id'
).split()
_SLICES = ('dynamic-slice', 'slice', 'gather')
_VIEWS = ('bitcast', 'reshape')


@dataclasses.dataclass
class Estimate:
  """Estimated time of one run of a program on one GPU."""

  instructions: dict  # name -> seconds of all its runs
  unresolved: list  # op names of loops that are counted once
  unpriced: dict  # name -> number of runs of instructions without a price


@dataclasses.dataclass(frozen=True)
class Gpu:
  peak_flops: float  # dense bfloat16, FLOP/s
  hbm_bandwidth: float  # bytes/s


def estimate(module, gpu, expected_trips=lambda op_name: None):
  """Returns the Estimate of one run of a program.

  Args:
    module: hlo.Module.
    gpu: Gpu.
    expected_trips: (op_name) -> the trip count of a loop whose trip count the
      text does not have, or None.
  """
  e = Estimate(collections.Counter(), [], collections.Counter())
  _add(module, gpu, expected_trips, e, module.entry, 1.0)
  return e


def _add(module, gpu, expected_trips, e, computation, weight):
  """Adds `weight` runs of a computation to an Estimate."""
  inner = lambda name, weight: _add(
    module, gpu, expected_trips, e, name, weight
  )
  for i in module.computations[computation].values():
    if i.op == 'while':
      trips, how = hlo_loops.trips(module, computation, i, expected_trips)
      if how == 'unresolved':
        e.unresolved.append(i.op_name or i.name)
      inner(i.attribute('body'), weight * trips)
    elif i.op == 'conditional':
      branches = hlo.branches(module, i)
      for name in branches:
        inner(name, weight / len(branches))
    elif i.op == 'call':
      inner(i.attribute('to_apply'), weight)
    elif hlo_collectives.base_kind(i.op):
      e.unpriced[i.name] += weight
    elif i.op.endswith('-start') and i.attribute('calls'):
      inner(i.attribute('calls'), weight)
    elif i.op not in FREE and not i.op.endswith(('-done', '-start')):
      seconds = max(
        _product_s(module, gpu, computation, i),
        nbytes(module, computation, i) / gpu.hbm_bandwidth,
      )
      e.instructions[i.name] += seconds * weight


def _product_s(module, gpu, computation, i):
  """Returns the seconds of all matrix products of an instruction."""
  if i.op == 'fusion':
    called = i.attribute('calls')
    return sum(
      _product_s(module, gpu, called, j)
      for j in module.computations.get(called, {}).values()
    )
  body = module.computations[computation]
  count = flops(body, i)
  if not count:
    return 0.0
  dtypes = [a.dtype for o in i.operands[:2] for a in hlo.arrays(body[o].type)]
  rate = min(RATES.get(dtype, 1.0) for dtype in dtypes)
  return count / (gpu.peak_flops * rate)


def flops(body, i):
  """Returns the FLOPs of a matrix product or of attention; 0 for others.

  Args:
    body: dict of the instructions of its computation.
    i: hlo.Instruction.
  """
  target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
  target = target[1] if target else ''
  if i.op == 'dot':
    dims = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.attributes)
  elif target.startswith('__cublas'):
    dims = re.search(
      r'"lhs_contracting_dimensions":\s*\[([\d,"\s]*)\]', i.attributes
    )
  else:
    return _attention_flops(body, i) if 'fmha' in target else 0.0
  if not dims:
    return 0.0
  lhs = hlo.arrays(body[i.operands[0]].type)[0].shape
  inner = math.prod(lhs[int(d)] for d in re.findall(r'\d+', dims[1]))
  return 2.0 * math.prod(hlo.arrays(i.type)[0].shape) * inner


def _attention_flops(body, i):
  """Returns the FLOPs of cuDNN's attention: 2 products forward, 5 backward."""
  scores = re.search(
    r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([\d,"\s]*)\]',
    i.attributes,
  )
  if not scores:
    return 0.0
  pairs = math.prod(int(d) for d in re.findall(r'\d+', scores[1]))
  width = hlo.arrays(body[i.operands[0]].type)[0].shape[-1]
  products = 5 if 'Backward' in i.attributes else 2
  causal = re.search(r'"mask_type":\s*"[A-Z_]*CAUSAL', i.attributes)
  return 2.0 * products * pairs * width * (0.5 if causal else 1.0)


def nbytes(module, computation, i):
  """Returns the bytes that an instruction reads and writes in memory.

  If only slices of an operand are read, the slices count, and if an array is
  updated in place, the update.

  Args:
    module: hlo.Module.
    computation: name of the computation of i.
    i: hlo.Instruction.
  """
  body = module.computations[computation]
  if i.op in _SLICES:
    return 2 * hlo.nbytes(i.type)
  if i.op == 'dynamic-update-slice':
    return 2 * hlo.nbytes(body[i.operands[1]].type)
  if i.op != 'fusion':
    return hlo.nbytes(i.type) + sum(
      hlo.nbytes(body[o].type) for o in set(i.operands)
    )
  inside = module.computations.get(i.attribute('calls'), {})
  users = collections.defaultdict(list)
  for j in inside.values():
    for operand in set(j.operands):
      users[operand].append(j)
  read = sum(
    _bytes_read(users, j) for j in inside.values() if j.op == 'parameter'
  )
  root = module.roots.get(i.attribute('calls'))
  return read + (_bytes_written(inside, root) if root else hlo.nbytes(i.type))


def _bytes_read(users, array):
  """Returns the bytes that a fusion reads of one of its arrays."""
  total = 0.0
  for user in users[array.name]:
    if user.op in _SLICES and user.operands[0] == array.name:
      total += hlo.nbytes(user.type)
    elif user.op == 'dynamic-update-slice' and user.operands[0] == array.name:
      continue
    elif user.op in _VIEWS:
      total += _bytes_read(users, user)
    else:
      return hlo.nbytes(array.type)
  return min(total, hlo.nbytes(array.type))


def _bytes_written(inside, root):
  """Returns the bytes that a fusion writes."""
  if root.op == 'tuple':
    return sum(_bytes_written(inside, inside[o]) for o in root.operands)
  if root.op in _VIEWS:
    return _bytes_written(inside, inside[root.operands[0]])
  if root.op == 'dynamic-update-slice':
    return hlo.nbytes(inside[root.operands[1]].type)
  return hlo.nbytes(root.type)
