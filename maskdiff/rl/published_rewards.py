"""The rewards of d1 and ESPO, with their quirks; see docs/rewards.md.

Source: behaviour of diffu-grpo/reward_func.py of d1, recorded in
tests/golden/rewards.json. ESPO has the same rewards for countdown and sudoku.
"""

import re

from maskdiff.rl import arithmetic

STRICT = '<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$'
SOFT = r'<reasoning>.*?</reasoning>\s*<answer>.*?</answer>'


def gsm8k(answer, text, multiline=False):
  """Returns the five parts of d1's reward for GSM8K.

  Args:
    answer: the right answer.
    text: the sampled answer.
    multiline: whether a dot in the patterns of the two format rewards matches a
      newline. False: as published, where reasoning of two lines gets nothing.

  Returns:
    dict of name -> float. The reward is their sum.
  """
  found = answer_of(text)
  flags = re.DOTALL if multiline else 0
  return {
    'correctness': 2.0 * (found == answer),
    'integer': 0.5 * found.isdigit(),
    'strict_format': 0.5 * bool(re.match(STRICT, text, flags)),
    'soft_format': 0.5 * bool(re.match(SOFT, text, flags)),
    'xml_count': xml_count(text),
  }


def answer_of(text):
  """Returns the text after the last <answer>, up to the next </answer>.

  A tag that is missing does not cut the text.
  """
  return text.split('<answer>')[-1].split('</answer>')[0].strip()


def xml_count(text):
  """Returns 1/8 per tag on a line of its own, less 0.001 per character after.

  The characters after </answer> count twice: once if <answer> is in the text,
  for which all of the text counts if no newline follows </answer>, and once
  without the newline.
  """
  score = 0.125 * (text.count('<reasoning>\n') == 1)
  score += 0.125 * (text.count('\n</reasoning>\n') == 1)
  if text.count('\n<answer>\n') == 1:
    score += 0.125 - 0.001 * len(text.split('\n</answer>\n')[-1])
  if text.count('\n</answer>') == 1:
    score += 0.125 - 0.001 * (len(text.split('\n</answer>')[-1]) - 1)
  return score


def _last_tags(text):
  """Returns the contents of the last pair of answer tags, or None."""
  found = re.findall('<answer>(.*?)</answer>', text, re.DOTALL)
  return found[-1].strip() if found else None


def countdown(numbers, target, text):
  """Returns the reward of a countdown: 1, 0.1 or 0.

  It is 1 for an expression that uses the numbers and has the value of the
  target, 0.1 for other texts in answer tags, and 0 without the tags. As
  published, ** and // are operators, and -3 is a use of the number 3.
  """
  expression = _last_tags(text)
  if expression is None:
    return 0.0
  used = sorted(int(number) for number in re.findall(r'\d+', expression))
  value = arithmetic.value(expression, arithmetic.PYTHON, exact=False)
  if used != sorted(numbers) or value is None:
    return 0.1
  try:
    return 1.0 if abs(value - target) < 1e-5 else 0.1
  except OverflowError:
    return 0.1


def sudoku(puzzle, solution, text):
  """Returns the share of empty cells of a sudoku that are right.

  The digits of the last answer tags are cut or filled with 0 to 16. Given cells
  do not count.

  Args:
    puzzle: 16 digits, 0 for an empty cell.
    solution: 16 digits.
    text: the sampled answer.
  """
  answer = _last_tags(text) or ''
  cells = ''.join(c for c in answer if c.isdigit())[:16].ljust(16, '0')
  empty = [i for i, given in enumerate(puzzle) if given == '0']
  right = sum(cells[i] == solution[i] for i in empty)
  return right / len(empty) if empty else 0.0
