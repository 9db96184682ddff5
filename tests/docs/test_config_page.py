"""docs/config.md lists every config key as maskdiff.config declares it.

python tests/docs/test_config_page.py  # rewrites the tables
"""

import pathlib
import re

from maskdiff.config import keys as config_keys

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'config.md'


def table(section):
  """Returns the Markdown table of a section; 'top': keys without a section."""
  declared = config_keys.SECTIONS.get(section, config_keys.TOP)
  prefix = '' if section == 'top' else f'{section}.'
  lines = ['| key | default | meaning |', '|---|---|---|']
  for name, key in declared.items():
    meaning = ' '.join(key.help.split())
    if key.choices:
      meaning += ' One of ' + ', '.join(f'`{c}`' for c in key.choices) + '.'
    cells = f'`{prefix}{name}`', f'`{key.default!r}`', meaning
    lines.append('| ' + ' | '.join(c.replace('|', '\\|') for c in cells) + ' |')
  return '\n'.join(lines)


def filled(text):
  """Returns the page with new tables between its comments."""
  return re.sub(
    r'(<!-- config: (\w+) -->\n).*?(<!-- end -->)',
    lambda m: f'{m[1]}{table(m[2])}\n{m[3]}',
    text,
    flags=re.S,
  )


def test_the_page_equals_the_declarations():
  text = PAGE.read_text()
  sections = re.findall(r'<!-- config: (\w+) -->', text)
  assert sections == ['top', *config_keys.SECTIONS]
  assert text == filled(text), 'run python tests/docs/test_config_page.py'


if __name__ == '__main__':
  PAGE.write_text(filled(PAGE.read_text()))
