"""Finds the commands in the documents and docstrings of this repository.

Documents show commands in fenced blocks of bash. Marks say which blocks cannot
run on every machine: ```bash {.cluster} needs a cluster or its tools,
```bash {.download} downloads more than packages. GitHub and MkDocs do not show
the marks. A block ```python {.run} is a program to run as well.
"""

import ast
import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Pages that change the code have a test of their own.
FOLLOWED = {'how_to': ROOT / 'tests' / 'docs' / 'test_how_to.py'}
PAGES = [
  path
  for path in [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
  if path.parent.name not in FOLLOWED
]
MARKS = ('cluster', 'download')

FENCE = re.compile(r'( *)(`{3,})([\w-]*)([^`]*)$')
SCRIPT = r'(?:launch|benchmarks|tokenizer)/\w+\.py'
SPAN = re.compile(rf'`((?:python3? )?{SCRIPT} [^`]+)`')


class Block(NamedTuple):
  """A fenced block.

  Attributes:
    line: number of its first line.
    language: language after the fence.
    marks: marks in braces, without dots.
    title: name of the file whose text the block shows, or ''.
    lines: list of lines.
  """

  line: int
  language: str
  marks: tuple
  title: str
  lines: list


class Command(NamedTuple):
  """A simple command as words without quotes, and its place."""

  where: str
  words: list


def blocks(text):
  """Returns the fenced blocks of a page, in order.

  Raises:
    ValueError: a block has no end.
  """
  found, opened = [], None
  for number, line in enumerate(text.splitlines(), 1):
    match = FENCE.match(line)
    if opened:
      if match and match[2] == opened[1] and not (match[3] or match[4].strip()):
        found.append(opened[0])
        opened = None
      else:
        opened[0].lines.append(line.removeprefix(opened[2]))
    elif match:
      marks = tuple(re.findall(r'\.(\w+)(?=[^{]*\})', match[4]))
      title = re.search('title="([^"]+)"', match[4])
      title = title[1] if title else ''
      block = Block(number + 1, match[3], marks, title, [])
      opened = block, match[2], match[1]
  if opened:
    raise ValueError(f'the block at line {opened[0].line} has no end')
  return found


def runs(block):
  """Returns whether a block can run on every machine."""
  if block.language == 'python':
    return 'run' in block.marks
  return block.language == 'bash' and not set(block.marks) & set(MARKS)


def shell(text, chosen):
  """Returns blocks of a page as a bash script with the page's line numbers.

  Args:
    text: text of the page.
    chosen: list of Blocks.
  """
  script = [''] * (len(text.splitlines()) + 1)
  for block in chosen:
    begin = block.line - 1
    script[begin : begin + len(block.lines)] = block.lines
    if block.language == 'python':  # in place of the fences
      script[begin - 1] = "python - <<'PROGRAM'"
      script[begin + len(block.lines)] = 'PROGRAM'
  return '\n'.join(script)


def simple_commands(text):
  """Returns the commands of a shell script as lists of words.

  Quotes are removed, and redirections and assignments are left out. Expansions
  stay as they are.
  """
  found, pending = [], ''
  for line in text.replace('\\\n', ' ').splitlines():
    pending += line
    lexer = shlex.shlex(pending, posix=True, punctuation_chars='();<>|&')
    lexer.whitespace_split = True
    try:
      words = list(lexer)
    except ValueError:  # a quote continues in the next line
      pending += '\n'
      continue
    pending = ''
    command, skip = [], False
    for word in [*words, ';']:
      if skip:
        skip = False
      elif set(word) <= set('<>&') and set(word) & set('<>'):
        if command and command[-1].isdecimal():  # as in 2>&1
          command.pop()
        skip = True
      elif set(word) <= set('();|&'):
        if command:
          found.append(command)
        command = []
      elif command or not re.match(r'\w+=', word):
        command.append(word)
  return found


def docstring_commands(text):
  """Returns the commands of a docstring: lines that begin with python and a
  script, with their continuation lines. [--flag] counts as --flag."""
  lines, found = text.replace('\\\n', ' ').splitlines(), []
  for number, line in enumerate(lines):
    if re.match(rf' *python {SCRIPT}', line):
      for more in lines[number + 1 :]:
        if not re.match(r' +(\[|--)', more):
          break
        line += more
      found += simple_commands(without_brackets(line).replace(' ...', ''))
  return found


def without_brackets(line):
  """Returns a line with [--flag] as --flag."""
  return re.sub(r'\[(--[^][]*)\]', r'\1', line)


def all_commands():
  """Returns every Command of bash blocks (run or not), of code spans that begin
  with a script, and of docstrings of scripts."""
  found = []
  for path in [*PAGES, ROOT / 'WORKSPACE.md']:
    page, text = path.relative_to(ROOT), path.read_text()
    for block in blocks(text):
      if block.language == 'bash':
        where = f'{page}:{block.line}'
        for words in simple_commands('\n'.join(block.lines)):
          found.append(Command(where, words))
    for span in SPAN.finditer(text):
      number = text[: span.start()].count('\n') + 1
      line = without_brackets(' '.join(span[1].split()))
      for words in simple_commands(line):
        found.append(Command(f'{page}:{number}', words))
  for folder in ('launch', 'configs', 'benchmarks', 'tokenizer'):
    for path in sorted((ROOT / folder).glob('*.py')):
      doc = ast.get_docstring(ast.parse(path.read_text())) or ''
      for words in docstring_commands(doc):
        found.append(Command(str(path.relative_to(ROOT)), words))
  return found


def scripts(command):
  """Returns (script, arguments) of each script of this repository that a
  Command starts, also within a quoted command for another shell or
  tpu_pod.sh."""
  found, words = [], command.words
  for i, word in enumerate(words):
    if re.fullmatch(rf'(\./)?{SCRIPT}', word):
      if i == 0 or re.search(r'python3?$', words[i - 1]):
        arguments = [w for w in words[i + 1 :] if w != '...']
        return [*found, (word, arguments)]
    if ' ' in word and re.search(rf'python {SCRIPT}', word):
      for inner in simple_commands(word):
        found += scripts(Command(command.where, inner))
    if word == '--' and words[:2] == ['launch/tpu_pod.sh', 'start']:
      finetune = '--script finetune' in ' '.join(words[:i])
      script = 'finetune' if finetune else 'pretrain'
      found.append((f'launch/{script}.py', words[i + 1 :]))
  return found
