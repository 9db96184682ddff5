"""The part of the model that an instruction of a compiled program belongs to.

A part is declared once, beside the code that computes it, as a named scope:
`jax.named_scope('part(optimizer)')`. A part of the network is declared as
`network(...)`; its direction is forward, recomputed (rematerialization) or
backward. The compiler keeps scopes in the `op_name` of
an instruction; the innermost scope names its part. An instruction outside of
all scopes keeps its op_name.
"""

import re

_SCOPE = re.compile(r'\b(part|network)\(([^()]+)\)')
# The Pallas kernels of splash attention, in the scope of splash.run.
_KERNEL = 'splash_mha'
# The compiler names casts and copies of an argument after the argument.
_WEIGHTS = re.compile(r'(state\.(ema\.)?|network\.)?params\[')


def part(op_name):
  """Returns the name of the innermost part, e.g. 'mlp down', or None.

  Args:
    op_name: str, from the metadata of an instruction.
  """
  scopes = _SCOPE.findall(op_name)
  return scopes[-1][1] if scopes else None


def model_part(op_name):
  """Returns the part and, within the network, its direction.

  Args:
    op_name: str, from the metadata of an instruction, or its name.

  Returns:
    E.g. 'mlp gate/up forward' or 'optimizer'. Without a scope: the op_name
    without the name of the program and the number of the instruction.
  """
  if _WEIGHTS.match(op_name):
    return 'weights: cast and copy'
  scopes = _SCOPE.findall(op_name)
  if not scopes:
    return re.sub(r'^jit\(\w+\)/|\.\d+$', '', op_name)
  kind, name = scopes[-1]
  if _KERNEL in op_name:
    name = 'attention kernel'
  return f'{name} {direction(op_name)}' if kind == 'network' else name


def direction(op_name):
  """Returns 'forward', 'recomputed' (rematerialization) or 'backward'."""
  if 'rematted_computation' in op_name:
    return 'recomputed'
  return 'backward' if 'transpose(' in op_name else 'forward'
