"""Trip counts of the loops of a compiled TPU program.

If the text does not state a trip count, the count is derived from the condition
`counter < limit`, the step of the counter in the body, and the first value of
the counter. Each value is traced through copies, tuples and the invariant state
of enclosing loops to a constant. Software pipelining by the compiler moves
iterations out of a loop; the trip count does not include them.
"""

import functools
import re

# Operations whose result has the value of their operand.
PASS_THROUGH = (
  'copy copy-start copy-done bitcast reshape convert optimization-barrier'
).split()
# A value is unknown if tracing it takes more instructions than this.
MAX_DEPTH = 60


def trips(module, computation, loop, expected_trips):
  """Returns the trip count that an estimate uses, and where it is from.

  Args:
    module: hlo.Module.
    computation: name of the computation of the loop.
    loop: hlo.Instruction.
    expected_trips: (op_name) -> the trip count of a loop whose trip count the
      text does not have, or None.

  Returns:
    The count; and 'known', 'expected', or 'unresolved' for a loop that is
    counted once.
  """
  count = trip_count(module, computation, loop)
  if count is not None:
    return count, 'known'
  count = expected_trips(loop.op_name)
  return (1, 'unresolved') if count is None else (count, 'expected')


def trip_count(module, computation, loop):
  """Returns the trip count of a loop of `computation`, or None if unknown."""
  known = re.search(r'known_trip_count"?:\{"n":"?(\d+)', loop.attributes)
  if known:
    return int(known[1])
  condition, body = loop.attribute('condition'), loop.attribute('body')
  test = module.roots.get(condition)
  if test is None or test.op != 'compare' or module.roots.get(body) is None:
    return None
  direction = test.attribute('direction')
  mirrored = {'LT': 'GT', 'GT': 'LT', 'LE': 'GE', 'GE': 'LE', 'NE': 'NE'}
  left, right = test.operands
  for counter, limit, relation in (
    (left, right, direction),
    (right, left, mirrored.get(direction)),
  ):
    count = _count(module, computation, loop, counter, limit, relation)
    if count is not None:
      return count
  return None


def _count(module, computation, loop, counter, limit, relation):
  condition, body = loop.attribute('condition'), loop.attribute('body')
  index = _carried(module, condition, counter)
  end = _constant(module, condition, limit)
  if index is None or end is None:
    return None
  step = _step(module, body, module.roots[body].operands[index], index)
  first = _element(module, computation, loop.operands[0], index)
  if not step or first is None:
    return None
  distance = {
    'LT': end - first,
    'LE': end - first + 1,
    'NE': abs(end - first),
    'GT': first - end,
    'GE': first - end + 1,
  }.get(relation)
  return None if distance is None else max(0, -(-distance // abs(step)))


def _constant(module, computation, name, depth=0):
  """Returns the integer that an instruction always yields, or None."""
  i = module.computations[computation].get(name)
  if i is None or depth > MAX_DEPTH:
    return None
  trace = functools.partial(_constant, module, computation, depth=depth + 1)
  if i.op == 'constant':
    value = i.args.strip()
    return int(value) if re.fullmatch(r'-?\d+', value) else None
  if i.op in PASS_THROUGH:
    return trace(i.operands[0])
  if i.op == 'get-tuple-element':
    index = int(i.attribute('index'))
    return _element(module, computation, i.operands[0], index, depth + 1)
  if i.op in ('add', 'subtract', 'multiply'):
    a, b = map(trace, i.operands)
    if a is None or b is None:
      return None
    return {'add': a + b, 'subtract': a - b, 'multiply': a * b}[i.op]
  if i.op == 'fusion':
    inner = i.attribute('calls')
    root = module.roots.get(inner)
    return root and _constant(module, inner, root.name, depth + 1)
  return None


def _element(module, computation, name, index, depth=0):
  """Returns the integer that is always at `index` of a tuple, or None."""
  i = module.computations[computation].get(name)
  if i is None or depth > MAX_DEPTH:
    return None
  if i.op == 'tuple':
    return _constant(module, computation, i.operands[index], depth + 1)
  if i.op in PASS_THROUGH:
    return _element(module, computation, i.operands[0], index, depth + 1)
  if i.op == 'parameter' and computation in module.loops:
    outside, loop = module.loops[computation]  # the value may be loop-invariant
  elif i.op == 'while':
    outside, loop = computation, i
  else:
    return None
  body = loop.attribute('body')
  root = module.roots.get(body)
  if root is None or root.op != 'tuple':
    return None
  if _carried(module, body, root.operands[index]) != index:
    return None
  return _element(module, outside, loop.operands[0], index, depth + 1)


def _carried(module, computation, name):
  """Returns the index of a value in the parameter of `computation`, or None."""
  for _ in range(MAX_DEPTH):
    i = module.computations[computation].get(name)
    if i is None:
      return None
    if i.op == 'get-tuple-element':
      source = module.computations[computation][i.operands[0]]
      return int(i.attribute('index')) if source.op == 'parameter' else None
    if i.op not in PASS_THROUGH:
      return None
    name = i.operands[0]
  return None


def _step(module, body, name, index, depth=0):
  """Returns the integer that a body adds to `index` of its state, or None."""
  i = module.computations[body].get(name)
  if i is None or depth > MAX_DEPTH:
    return None
  if _carried(module, body, name) == index:
    return 0
  if i.op in PASS_THROUGH:
    return _step(module, body, i.operands[0], index, depth + 1)
  if i.op not in ('add', 'subtract'):
    return None
  for a, b in (i.operands, i.operands[::-1]):
    before = _step(module, body, a, index, depth + 1)
    change = _constant(module, body, b)
    if before is not None and change is not None:
      return before + (change if i.op == 'add' else -change)
  return None
