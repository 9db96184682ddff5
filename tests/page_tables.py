"""Tables of the pages in docs/."""

import pytest


def cells(line):
  """Returns the cells of a line of a Markdown table."""
  return [cell.strip() for cell in line.strip('|').split('|')]


def table(text, first):
  """Returns the rows of the table whose first head cell is `first`."""
  lines = text[text.index(f'\n| {first} |') + 1 :].splitlines()
  rows = []
  for line in lines:
    if not line.startswith('|'):
      break
    rows.append(cells(line))
  return [rows[0], *rows[2:]]


def every_row(text, first):
  """Parametrizes a test by the rows of a table; `first` as for `table`."""
  rows = table(text, first)[1:]
  return pytest.mark.parametrize('row', rows, ids=lambda row: row[0])


def number(text):
  return float(text.replace(',', ''))


def percent(cell):
  """Returns the number of a cell such as '76.0% (63% to 80%)'."""
  return number(cell.partition('%')[0])
