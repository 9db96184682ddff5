"""Finds the answer in a text with reasoning.

Every rule takes time that is linear in the length of the text, and reads texts
of several lines. A rule returns None if its mark is missing, and '' if nothing
follows the mark.
"""

import re

OPEN, CLOSE = '<answer>', '</answer>'
BOXES = (r'\boxed', r'\fbox')
HASHES = '####'
PHRASE = 'answer is'
# A minus sign directly after a word, a number or a bracket is an operator.
_NUMBER = re.compile(
  r'(?:(?<![\w)\]}])-)?\d[\d,]*(?:\.\d+)?(?:/\d+)?', re.ASCII
)
_THOUSANDS = re.compile(r'-?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?:/\d+)?', re.ASCII)


def extract(text, rules=None):
  """Returns the answer that the first of some rules finds.

  A later rule is tried only if the mark of an earlier one is missing. If
  nothing follows the mark, the answer is '', not a number of the reasoning.

  Args:
    text: str.
    rules: names of RULES, in the order of trial; None: all.

  Returns:
    str without white space at its ends; or None.
  """
  for name in RULES if rules is None else rules:
    found = RULES[name](text)
    if found is not None:
      return found.strip()
  return None


def tags(text):
  """Returns the contents of the last complete pair of answer tags."""
  end = text.rfind(CLOSE)
  start = text.rfind(OPEN, 0, max(0, end))
  return None if start < 0 else text[start + len(OPEN) : end]


def boxed(text):
  r"""Returns the contents of the last \boxed{...} or \fbox{...}."""
  start = max(text.rfind(box) for box in BOXES)
  brace = text.find('{', start) if start >= 0 else -1
  if brace < 0:
    return None
  depth = 0
  for i in range(brace, len(text)):
    if text[i] in '{}' and text[i - 1] != '\\':
      depth += 1 if text[i] == '{' else -1
      if depth == 0:
        return text[brace + 1 : i]
  return None


def hashes(text):
  """Returns the line after the last ####, the mark of GSM8K."""
  _, mark, rest = text.rpartition(HASHES)
  return rest.strip(' ').partition('\n')[0] if mark else None


def phrase(text):
  """Returns the sentence after the last 'answer is'."""
  start = text.lower().rfind(PHRASE)
  if start < 0:
    return None
  line = text[start + len(PHRASE) :].lstrip(' :*').partition('\n')[0]
  return line.partition('. ')[0].rstrip(' .*')


def last_number(text):
  """Returns the last number, also 1,234.5 and 3/4."""
  numbers = _NUMBER.findall(text)
  if not numbers:
    return None
  number = numbers[-1].rstrip(',')
  # Other commas separate the numbers of a list.
  return number if _THOUSANDS.fullmatch(number) else number.split(',')[-1]


# In the order of trial.
RULES = {
  'tags': tags,
  'boxed': boxed,
  'hashes': hashes,
  'phrase': phrase,
  'last_number': last_number,
}
