"""Parses the text of a compiled TPU program: instructions, shapes, loops.

`Compiled.as_text()` of a TPU executable is its final, scheduled HLO. The
instructions of a computation are in order of execution, and most carry the
compiler's estimate of their cycles. This module only parses the text;
hlo_cost.py prices it. Nothing is executed, and JAX is not needed.

Properties of the text:

- A type is `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`: dtype, shape, layout, tiling
  and memory space. S(1) is VMEM, S(5) is host memory.
- Kernels put metadata with raw newlines into an instruction, so one instruction
  may span several lines.
- Loops seldom state their trip counts; hlo_loops.py derives them.
- `metadata={op_name=...}` holds the named scopes that an instruction was traced
  in; parts.py reads them.
"""

import dataclasses
import functools
import math
import re

DTYPE_BITS = {
  **dict.fromkeys(('s4', 'u4'), 4),
  **dict.fromkeys(('pred', 's8', 'u8', 'f8e4m3fn', 'f8e5m2'), 8),
  **dict.fromkeys(('s16', 'u16', 'bf16', 'f16'), 16),
  **dict.fromkeys(('s32', 'u32', 'f32'), 32),
  **dict.fromkeys(('s64', 'u64', 'f64'), 64),
}

_ARRAY = re.compile(r'\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]')
_START = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = ')
_HEAD = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
_END = re.compile(r'\}(, execution_thread=.*)?\s*$')


@dataclasses.dataclass(frozen=True)
class Array:
  dtype: str
  shape: tuple

  @property
  def nbytes(self):
    return math.prod(self.shape) * DTYPE_BITS[self.dtype] / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  type: str  # as in the text; see `arrays`
  op: str  # fusion, while, all-gather-start, ...
  args: str  # the text between the parentheses
  attributes: str  # the rest of the text
  is_root: bool

  @functools.cached_property
  def operands(self):
    """Names of the instructions whose results this one reads."""
    return tuple(re.findall(r'%([\w.\-]+)', self.args))

  @functools.cached_property
  def cycles(self):
    """The compiler's estimate of clock cycles; 0 if it has none."""
    match = re.search(r'"estimated_cycles":"?(\d+)', self.attributes)
    return int(match[1]) if match else 0

  @functools.cached_property
  def op_name(self):
    """Named scopes and operation of the traced program; '' if unknown."""
    match = re.search(r'op_name="([^"]*)"', self.attributes)
    return match[1] if match else ''

  def attribute(self, key):
    """Returns an attribute that is a name, e.g. 'calls', or None."""
    match = re.search(rf'\b{key}=%?([\w.\-]+)', self.attributes)
    return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Module:
  computations: dict  # name -> {name: Instruction}, in order of execution
  entry: str
  num_partitions: int  # devices that the program addresses
  name: str = ''  # such as jit_train_step

  @functools.cached_property
  def roots(self):
    """Dict from computation names to root (result) instructions."""
    return {
      name: next((i for i in body.values() if i.is_root), None)
      for name, body in self.computations.items()
    }

  @functools.cached_property
  def loops(self):
    """Dict from a loop's body or condition to (computation, loop)."""
    return {
      loop.attribute(part): (name, loop)
      for name, body in self.computations.items()
      for loop in body.values()
      if loop.op == 'while'
      for part in ('body', 'condition')
    }


def parse(text):
  """Parses the HLO text of an executable.

  Returns:
    Module.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations, entry, current, lines = {}, None, None, []
  for line in text.splitlines():
    if current is None:
      head = _HEAD.match(line)
      if head and not line.startswith('HloModule'):
        current, lines = head[2], []
        entry = current if head[1] else entry
    elif _END.match(line):
      body = map(_instruction, lines)
      computations[current], current = {i.name: i for i in body}, None
    elif _START.match(line):
      lines.append(line)
    elif lines:
      lines[-1] += ' ' + line
  if entry is None:
    raise ValueError('this HLO text has no ENTRY computation')
  partitions = re.search(r'num_partitions=(\d+)', text[:100_000])
  partitions = int(partitions[1]) if partitions else 1
  name = re.match(r'HloModule ([\w.\-]+)', text)
  return Module(computations, entry, partitions, name[1] if name else '')


def _instruction(line):
  start = _START.match(line)
  rest = line[start.end() :]
  end = closing(rest, 0) if rest[0] == '(' else rest.index(' ')
  kind, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index('(')
  end = closing(rest, opening)
  return Instruction(
    name=start[2],
    type=kind,
    op=rest[:opening].strip(),
    args=rest[opening + 1 : end - 1],
    attributes=rest[end:],
    is_root=bool(start[1]),
  )


def closing(text, start):
  """Returns the index after the bracket that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] in '([{') - (text[i] in ')]}')
    if depth == 0:
      return i + 1
  return len(text)


def arrays(kind):
  """Returns the arrays of a type, tuples flattened, as a list of Array."""
  return [
    Array(dtype, tuple(int(d) for d in dims.split(',') if d))
    for dtype, dims in _ARRAY.findall(kind)
    if dtype in DTYPE_BITS
  ]


def nbytes(kind):
  """Returns the bytes of a type, without padding to tiles."""
  return sum(array.nbytes for array in arrays(kind))


def elements(kind):
  """Returns the element types of a tuple, or [kind] for any other type."""
  if not kind.startswith('('):
    return [kind]
  parts, depth, start = [], 0, 1
  for i, character in enumerate(kind):
    depth += (character in '([{') - (character in ')]}')
    if (character == ',' and depth == 1) or depth == 0:
      parts.append(kind[start:i].strip())
      start = i + 1
  return [part for part in parts if part]


def branches(module, conditional):
  """Returns the names of the branches of a conditional, False before True."""
  listed = re.search(r'branch_computations=\{(.*?)\}', conditional.attributes)
  names = re.findall(r'[\w.\-]+', listed[1]) if listed else []
  names = names or [
    conditional.attribute('false_computation'),
    conditional.attribute('true_computation'),
  ]
  return [n for n in names if n in module.computations]


def describing(module, instruction):
  """Returns the instruction whose op_name describes this one.

  An instruction with an op_name describes itself. A fusion without an op_name
  is described by a matrix product inside it, else by its root, else by any
  instruction inside that has an op_name.
  """
  if instruction.op_name or instruction.op != 'fusion':
    return instruction
  inside = module.computations.get(instruction.attribute('calls'), {}).values()
  named = [describing(module, i) for i in inside]
  named = [i for i in named if i.op_name]
  best = lambda i: (i.op in ('convolution', 'dot'), i.is_root)
  return max(named, key=best, default=instruction)
