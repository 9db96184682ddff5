"""Parts of pages that scripts write: between comments, and tables."""

import re


def fill(text, script, part):
  """Replaces the parts of a page between comments of a script.

  Args:
    text: the page.
    script: name of the script, without .py.
    part: function from the name of a part to its text.
  """
  text, count = re.subn(
    rf'(<!-- benchmarks/{script}.py: (\w+) -->\n).*?(<!-- end -->)',
    lambda m: f'{m[1]}{part(m[2])}\n{m[3]}',
    text,
    flags=re.S,
  )
  assert count, f'the page has no comments of {script}.py'
  return text


def table(rows):
  """Returns a table of Markdown.

  Args:
    rows: list of lists of text; the first has the heads of the columns.
  """
  lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
  return '\n'.join([lines[0], '|---' * len(rows[0]) + '|', *lines[1:]])
