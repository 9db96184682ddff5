"""Tables of the pages in docs/."""


def cells(line):
  """Returns the cells of a line of a Markdown table."""
  return [cell.strip() for cell in line.strip('|').split('|')]
