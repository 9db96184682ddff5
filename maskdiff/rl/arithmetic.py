"""The value of an arithmetic expression, without running it as a program.

Python parses the expression, and only operators and numbers of its tree are
computed. The length of the expression and of all numbers is bounded, so that
no text takes long or much memory.
"""

import ast
import fractions
import operator
import re

MAX_CHARACTERS = 1000
MAX_BITS = 100_000  # of a number
BASIC = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
}
# What Python's eval computes of digits, + - * / . and brackets.
PYTHON = BASIC | {
  ast.FloorDiv: operator.floordiv,
  ast.Pow: operator.pow,
  ast.USub: operator.neg,
  ast.UAdd: operator.pos,
}
_CHARACTERS = re.compile(r'[\d+\-*/().\s]+', re.ASCII)


def value(expression, operators=BASIC, exact=True):
  """Returns the value of an expression, or None.

  Args:
    expression: text of digits, operators, points, brackets and white space.
    operators: nodes of `ast` -> functions, such as BASIC or PYTHON.
    exact: True: numbers are fractions and zeros before a number are dropped.
      False: numbers are those of Python.

  Returns:
    A number. None if the expression is not well formed or too long, has another
    operator, divides by zero, or has a number of more than MAX_BITS.
  """
  if len(expression) > MAX_CHARACTERS or not _CHARACTERS.fullmatch(expression):
    return None
  if exact:
    expression = re.sub(r'(?<![\d.])0+(?=\d)', '', expression)
  try:
    tree = ast.parse(expression.strip(), mode='eval')
    return _value(tree.body, operators, exact)
  except (SyntaxError, ValueError, ArithmeticError, TypeError):
    return None
  except (MemoryError, RecursionError):  # too many brackets for the parser
    return None


def _value(node, operators, exact):
  if isinstance(node, ast.Constant) and type(node.value) in (int, float):
    return fractions.Fraction(str(node.value)) if exact else node.value
  compute = operators.get(type(getattr(node, 'op', None)))
  if compute is None:
    raise ValueError('not an operator')
  if isinstance(node, ast.UnaryOp):
    return compute(_value(node.operand, operators, exact))
  left, right = (_value(n, operators, exact) for n in (node.left, node.right))
  if max(_bits(left), _bits(right)) > MAX_BITS:
    raise ValueError('too large')
  if compute is operator.pow and isinstance(left, int):
    if isinstance(right, int) and right * (_bits(left) - 1) > MAX_BITS:
      raise ValueError('too large')
  return compute(left, right)


def _bits(number):
  """Returns the size of a whole number or fraction; 0 for other numbers."""
  if isinstance(number, int):
    return number.bit_length()
  if isinstance(number, fractions.Fraction):
    return max(number.numerator.bit_length(), number.denominator.bit_length())
  return 0
