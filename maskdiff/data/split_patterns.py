"""Regular expressions by which tokenizers split texts, in linear time only.

The package `tokenizers` matches the pattern of a tokenizer.json by
backtracking. A pattern such as `(a+)+b` then takes exponential time, and `a*b`
quadratic time, on a text of many a. A pattern is therefore accepted if its form
bounds its time, or if it is one of PUBLISHED.

The accepted form is an alternation of sequences of characters, character
classes and small groups. A sequence may repeat a character without limit only
if nothing after the repetition can fail: a match is then never given back, so
the search reads every character a bounded number of times.
"""

import re
from typing import NamedTuple

# GPT-2 and its descendants; ByteLevel with use_regex is the same pattern.
GPT2 = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
  r'|\s+(?!\S)|\s+'
)
# PRETOKENIZE_REGEX of transformers' Qwen2Tokenizer and of Dream's
# tokenization_dream.py.
QWEN2 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)

_PREFIX = r'[^\r\n\p{L}\p{N}]?'
_UPPER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]'
_LOWER = r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_REST = r'| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
# Their first alternative gives letters back if no lower-case letter follows.
# The second one then takes all these letters, so the time is linear.
PUBLISHED = {
  # GPT-4o, Llama 4
  f'{_PREFIX}{_UPPER}*{_LOWER}+{_ENDING}|{_PREFIX}{_UPPER}+{_LOWER}*{_ENDING}'
  rf'|\p{{N}}{{1,3}}{_REST}',
  # Mistral's Tekken
  f'{_PREFIX}{_UPPER}*{_LOWER}+|{_PREFIX}{_UPPER}+{_LOWER}*'
  rf'|\p{{N}}{_REST}',
}

# Published patterns end with some of these alternatives and then with `\s+`,
# which takes all white space that they give back.
_WHITE_SPACE = (r'\s*[\r\n]+', r'\s*[\r\n]', r'\s+(?!\S)')
_LAST = r'\s+'

MAX_LENGTH = 4000  # characters of a pattern
MAX_REPEAT = 100  # of {m,n}
MAX_WAYS = 64  # in which the bounded part of a sequence can match

_ESCAPE = r"""
    \\[pP]\{\^?\w+\}                          # Unicode property
  | \\u[0-9A-Fa-f]{4} | \\x\{[0-9A-Fa-f]{1,6}\}
  | \\[sSdDwWrntfv]
  | \\[^\w\s]                                 # escaped punctuation
"""
_ATOM = rf"""
  (?:{_ESCAPE}
  | \[ \^? (?: {_ESCAPE} | [^\\\[\]&] | &(?!&) )+ \]
  | [^\\\[\](){{}}*+?|^$]
  )
"""
_TOKEN = re.compile(
  rf"""
    (?P<bar>\|) | (?P<close>\))
  | (?P<ahead> \(\?[!=] {_ATOM} \) )
  | (?P<open> \( (?: \?: | \?i: | (?!\?) ) )
  | (?P<atom> {_ATOM} )
  """,
  re.VERBOSE | re.DOTALL,
)
_QUANTIFIER = re.compile(
  r'(?: (?P<sign>[?*+]) \+?'
  r' | \{ (?P<low>\d{1,9}) (?P<range>,(?P<high>\d{0,9}))? \} )?'
  r' (?P<more>[?*+{])?',
  re.VERBOSE,
)


class _Item(NamedTuple):
  """A part of a sequence: a character, a class, a group or a lookahead."""

  optional: bool
  unbounded: bool = False
  ways: int = 1
  ahead: bool = False


class _Refused(Exception):
  """Why a pattern is not accepted."""


def problem(pattern):
  """Returns why a pattern may take more than linear time.

  Args:
    pattern: regular expression in the syntax of Oniguruma, which the package
      `tokenizers` uses.

  Returns:
    A phrase for an error message; None if the pattern is accepted.
  """
  if len(pattern) > MAX_LENGTH:
    return f'is longer than {MAX_LENGTH:,} characters'
  pattern = pattern.replace('\r', r'\r').replace('\n', r'\n')
  if pattern in PUBLISHED:
    return None
  try:
    sequences, _ = _sequences(pattern, 0, in_group=False)
    _check_white_space([text for text, _ in sequences])
    for text, items in sequences:
      _check_sequence(items, text in _WHITE_SPACE)
  except _Refused as reason:
    return str(reason)
  return None


def _sequences(pattern, start, in_group):
  """Parses an alternation.

  Returns:
    - `sequences`: list of (text, list of _Item).
    - `end`: index after the alternation.
  """
  sequences, items, at, first = [], [], start, start
  while at < len(pattern):
    token = _TOKEN.match(pattern, at)
    if token is None or (token['close'] and not in_group):
      raise _Refused(f'has an unknown part at {pattern[at : at + 10]!r}')
    if token['close']:
      break
    at = token.end()
    if token['bar']:
      sequences.append((pattern[first : token.start()], items))
      items, first = [], at
      continue
    ways = 1
    if token['open']:
      if in_group:
        raise _Refused('has a group within a group')
      inner, at = _sequences(pattern, at, in_group=True)
      ways = sum(_ways_of_group(items) for _, items in inner)
      at += 1
    item, at = _quantified(pattern, at, ways, token)
    items.append(item)
  if in_group and at >= len(pattern):
    raise _Refused('has a group that does not end')
  return [*sequences, (pattern[first:at], items)], at


def _quantified(pattern, at, ways, token):
  """Returns the _Item of a token and its quantifier, and the index after it."""
  found = _QUANTIFIER.match(pattern, at)
  sign, low = found['sign'], found['low']
  quantified = bool(sign or low)
  if found['more'] or (token['ahead'] and quantified):
    raise _Refused(f'repeats a repetition at {pattern[at : at + 10]!r}')
  if token['open'] and quantified and sign != '?':
    raise _Refused('repeats a group')
  low = {'?': 0, '*': 0, '+': 1}.get(sign, int(low or 1))
  unbounded = sign in ('*', '+') or bool(found['range'] and not found['high'])
  high = 1 if sign or found['low'] is None else int(found['high'] or low)
  if max(low, high) > MAX_REPEAT:
    raise _Refused(f'repeats a part more than {MAX_REPEAT} times')
  item = _Item(
    optional=low == 0,
    unbounded=unbounded,
    ways=max(ways, 1) + (sign == '?') + max(0, high - low),
    ahead=bool(token['ahead']),
  )
  return item, found.end()


def _ways_of_group(items):
  """Returns in how many ways a sequence within a group can match."""
  ways = 1
  for item in items:
    if item.unbounded:
      raise _Refused('has a repetition without limit within a group')
    ways *= item.ways
  if all(item.optional or item.ahead for item in items):
    raise _Refused('has a group that can match nothing')
  return ways


def _check_sequence(items, is_white_space):
  """Raises _Refused if a sequence can give back more than bounded text."""
  ways, unbounded = 1, False
  for item in items:
    if unbounded and not is_white_space and not item.optional:
      raise _Refused('needs more text after a repetition without limit')
    ways *= 1 if unbounded else item.ways
    unbounded = unbounded or item.unbounded
  if ways > MAX_WAYS:
    raise _Refused(f'has a part that matches in more than {MAX_WAYS} ways')
  if all(item.optional or item.ahead for item in items):
    raise _Refused('can match nothing')


def _check_white_space(texts):
  """Raises _Refused if `\\s+` does not take what _WHITE_SPACE gives back."""
  first = next(
    (i for i, text in enumerate(texts) if text in _WHITE_SPACE), None
  )
  if first is not None and (
    texts[-1] != _LAST or set(texts[first:-1]) - set(_WHITE_SPACE)
  ):
    raise _Refused('repeats white space and does not end with `\\s+`')
