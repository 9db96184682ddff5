r"""Whether two answers to a question of mathematics are equal.

Numbers, fractions, decimals, roots, powers, pi, letters as variables, and lists
of these are compared by value, in plain text or LaTeX:

  1/2 = 0.5 = \frac{1}{2}    2\sqrt{3} = \sqrt{12}    (x+1)^2 = x^2+2x+1

All other answers are compared as text. Nothing is executed. The time and memory
of a comparison are bounded, whatever the texts.
"""

import cmath
import fractions
import hashlib
import math
import re

MAX_CHARACTERS = 300
MAX_DEPTH = 30  # of brackets
MAX_BITS = 10_000  # of a number
MAX_EXPONENT = 1000
TOLERANCE = 1e-10  # relative, between numbers that are not fractions

_REPLACED = (
  (r'\\(?:left|right|displaystyle|!|,|;|:|quad|qquad)(?![a-z])|\{,\}', ''),
  (r'\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}', r' \1 '),
  (r'\\[dt]frac', r'\\frac'),
  (r'\\frac\s*(\d)\s*(\d)', r'\\frac{\1}{\2}'),
  (r'\\cdot(?![a-z])|\\times|\*\*|×|·', '*'),
  (r'\\div|÷', '/'),
  ('−|–', '-'),
  (r'\^\s*\{?\s*\\circ\s*\}?|°|\\?%|\\?\$|\\[()\[\]]', ''),
  (r'\\pi(?![a-z])|π', 'pi'),
  (r'√', r'\\sqrt'),
)
_REPLACED = tuple((re.compile(old), new) for old, new in _REPLACED)
_THOUSANDS = re.compile(r'-?\d{1,3}(,\d{3})+(\.\d+)?', re.ASCII)
_MIXED = re.compile(r'(-?)(\d+) +(\d+)/(\d+)', re.ASCII)
_WITH_UNIT = re.compile(r'(-?[\d.,/ ]*\d) +[^\W\d_]{2}[^\d]*')
# A word is not a product of letters, but xy is.
_TOKEN = re.compile(
  r'\s*(\d+\.?\d*|\.\d+|\\frac|\\sqrt|[-+*/^(){}]|'
  r'(?<![A-Za-z])(?:sqrt|pi|[abcxyz]+|[A-Za-z])(?![A-Za-z]))',
  re.ASCII,
)
_SPACE = re.compile(r'(?<!\d) | (?!\d)')  # not between two numbers
_BRACKETS = {'(': ')', '[': ']', r'\{': r'\}'}


class _Unknown(Exception):
  """The text is not an expression that this module computes."""


def equivalent(text, answer):
  """Returns whether an answer equals the right answer.

  Args:
    text: answer without reasoning, see extraction.extract.
    answer: the right answer.
  """
  if max(len(text), len(answer)) > MAX_CHARACTERS:
    return False
  text, answer = _plain(text), _plain(answer)
  if not text:
    return False
  if _same(text, answer):
    return True
  return _same(_number(text), answer) or _same(text, _number(answer))


def _number(text):
  """Returns a text without the unit that follows its only number."""
  match = _WITH_UNIT.fullmatch(text)
  return match[1] if match else text


def _plain(text):
  """Returns a text with plain operators, without marks that mean nothing."""
  for pattern, new in _REPLACED:
    text = pattern.sub(new, text)
  text = ' '.join(text.split()).rstrip('.').strip()
  return text.replace(',', '') if _THOUSANDS.fullmatch(text) else text


def _same(text, answer):
  compact = lambda t: _SPACE.sub('', t).casefold()
  if compact(text) == compact(answer):
    return True
  left, right = _elements(text), _elements(answer)
  if left and right:
    return _same_lists(left, right)
  if left or right:
    return False
  try:
    return _close(_value(text), _value(answer))
  except (_Unknown, ArithmeticError, ValueError):
    return False


def _same_lists(left, right):
  """Returns whether lists are equal; the order within braces is free."""
  (brackets, left), (other, right) = left, right
  if brackets != other or len(left) != len(right):
    return False
  if brackets != r'\{':
    return all(map(_same, left, right))
  for element in left:
    found = next((i for i, e in enumerate(right) if _same(element, e)), None)
    if found is None:
      return False
    del right[found]
  return True


def _elements(text):
  """Returns (brackets, texts of a list); None if the text is not a list."""
  opening = next((b for b in _BRACKETS if text.startswith(b)), '')
  closing = next((b for b in _BRACKETS.values() if text.endswith(b)), '')
  if bool(opening) != bool(closing):
    opening = closing = ''  # as in (1+2)/3, 4
  inner = text[len(opening) : len(text) - len(closing)]
  parts, depth, start = [], 0, 0
  for i, c in enumerate(inner):
    depth += (c in '([{') - (c in ')]}')
    if c == ',' and depth == 0:
      parts.append(inner[start:i])
      start = i + 1
  if not parts and opening != r'\{':
    return None
  # (a, b] and (a, b) differ.
  kind = opening if opening == r'\{' else opening + closing
  return kind, [part.strip() for part in [*parts, inner[start:]]]


def _value(text):
  """Returns the value of an expression: a Fraction, or a complex number."""
  mixed = _MIXED.fullmatch(text)
  if mixed:
    sign, whole, a, b = mixed.groups()
    value = int(whole) + fractions.Fraction(int(a), int(b))
    return -value if sign else value
  text = re.sub(r'^[A-Za-z]\s*=', '', text)
  tokens, at = [], 0
  while at < len(text):
    match = _TOKEN.match(text, at)
    if not match:
      raise _Unknown
    tokens.append(match[1])
    at = match.end()
  value = _sum(tokens, MAX_DEPTH)
  if tokens:
    raise _Unknown
  return value


# The functions below remove an expression from the start of a list of tokens
# and return its value. `depth` is the number of brackets that may still open.


def _sum(tokens, depth):
  value = _product(tokens, depth)
  while tokens and tokens[0] in ('+', '-'):
    sign = tokens.pop(0)
    term = _product(tokens, depth)
    value = _checked(value + term if sign == '+' else value - term)
  return value


def _product(tokens, depth):
  value = _signed(tokens, depth)
  while tokens:
    if tokens[0] in ('*', '/'):
      sign = tokens.pop(0)
      factor = _signed(tokens, depth)
      value = _checked(value * factor if sign == '*' else value / factor)
    elif tokens[0] not in '+-^)}' and not _is_number(tokens[0]):
      value = _checked(value * _power(tokens, depth))
    else:
      break
  return value


def _signed(tokens, depth):
  sign = 1
  while tokens and tokens[0] in ('+', '-'):
    sign = -sign if tokens.pop(0) == '-' else sign
  return sign * _power(tokens, depth)


def _power(tokens, depth):
  base = _atom(tokens, depth)
  if not tokens or tokens[0] != '^':
    return base
  tokens.pop(0)
  if depth == 0:
    raise _Unknown
  exponent = _signed(tokens, depth - 1)
  return _checked(_raised(base, exponent))


def _raised(base, exponent):
  exact = isinstance(base, fractions.Fraction)
  if exact and isinstance(exponent, fractions.Fraction):
    if exponent.denominator == 1:
      size = abs(exponent) * max(1, _bits(base))
      if abs(exponent) > MAX_EXPONENT or size > MAX_BITS:
        raise _Unknown
      return base ** int(exponent)
    if exponent == fractions.Fraction(1, 2):
      return _root(base)
  return complex(base) ** complex(exponent)


def _atom(tokens, depth):
  if not tokens or depth == 0:
    raise _Unknown
  token = tokens.pop(0)
  if _is_number(token):
    value = _checked(fractions.Fraction(token))
    if token.isdigit() and tokens and tokens[0] == r'\frac':
      value = _checked(value + _atom(tokens, depth - 1))  # 1\frac{1}{2} is 3/2
    return value
  if token in '({':
    value = _sum(tokens, depth - 1)
    if not tokens or tokens.pop(0) != {'(': ')', '{': '}'}[token]:
      raise _Unknown
    return value
  if token == r'\frac':
    top = _atom(tokens, depth - 1)
    return _checked(top / _atom(tokens, depth - 1))
  if token in (r'\sqrt', 'sqrt'):
    return _root(_atom(tokens, depth - 1))
  if token == 'pi':
    return complex(math.pi)
  if token.isalpha():
    return math.prod(map(_variable, token))
  raise _Unknown


def _is_number(token):
  return token[0].isdigit() or token[0] == '.'


def _root(value):
  """Returns the square root, a Fraction if there is one."""
  if isinstance(value, fractions.Fraction) and value >= 0:
    top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
    root = fractions.Fraction(top, bottom)
    if root * root == value:
      return root
  return cmath.sqrt(value)


def _variable(letter):
  """Returns a number between 1 and 2 that stands for a letter; 1j for i."""
  if letter == 'i':
    return 1j
  digest = hashlib.blake2b(letter.encode(), digest_size=6).digest()
  return complex(1 + int.from_bytes(digest, 'big') / 2**48)


def _bits(value):
  return max(value.numerator.bit_length(), value.denominator.bit_length())


def _checked(value):
  """Returns a value; raises _Unknown if it is too large or not finite."""
  if isinstance(value, fractions.Fraction):
    if _bits(value) > MAX_BITS:
      raise _Unknown
  elif not cmath.isfinite(value):
    raise _Unknown
  return value


def _close(a, b):
  if isinstance(a, fractions.Fraction) and isinstance(b, fractions.Fraction):
    return a == b
  return cmath.isclose(a, b, rel_tol=TOLERANCE)
