"""Prompts from files, streams and a terminal."""

import io

import pytest

from maskdiff.errors import UserError
from maskdiff.sampling import prompts
from maskdiff.sampling.prompts import Prompt


def write(path, text):
  path.write_bytes(text.encode())
  return str(path)


def test_each_line_is_a_prompt_and_empty_lines_are_skipped(tmp_path):
  path = write(tmp_path / 'a.txt', 'def f(\n\n  x = "é"\r\nlast\u2028one')
  found, gaps = prompts.read(path, 5)
  assert not gaps
  assert found == [
    Prompt('def f(', 5),
    Prompt('  x = "é"', 6),
    Prompt('last\u2028one', 7),
  ]


def test_json_prompts_may_have_newlines_and_seeds(tmp_path):
  rows = '{"prompt": "a\\nb"}\n{"prompt": "", "seed": 70}\n\n{"prompt": "c"}\n'
  path = write(tmp_path / 'a.jsonl', rows)
  found, gaps = prompts.read(path, 0)
  assert not gaps
  assert found == [Prompt('a\nb', 0), Prompt('', 70), Prompt('c', 2)]


def test_json_lines_may_have_gaps(tmp_path):
  rows = '{"infill": "a {{3}} b"}\n{"infill": "{{1}}", "seed": 9}\n'
  found, gaps = prompts.read(write(tmp_path / 'a.jsonl', rows), 0)
  assert gaps
  assert found == [Prompt('a {{3}} b', 0), Prompt('{{1}}', 9)]


@pytest.mark.parametrize(
  'line, message',
  [
    ('{"prompt": ', 'a.jsonl:2: not JSON'),
    ('{"text": "a"}', r'a.jsonl:2: must be \{"prompt": "text"\}'),
    ('["a"]', 'a.jsonl:2: must be'),
    ('{"infill": 3}', r'a.jsonl:2: must be .* or \{"infill": "text, \{\{n'),
    ('{"infill": "{{2}}", "prompt": "a"}', 'a.jsonl:2: must be'),
    ('{"infill": "{{2}}"}', 'a.jsonl:2: "prompt" and "infill" are in one file'),
    ('{"prompt": 3}', 'a.jsonl:2: must be'),
    ('{"prompt": "a", "seed": -1}', 'a.jsonl:2: "seed"'),
    ('{"prompt": "a", "seed": "1"}', 'a.jsonl:2: "seed"'),
    ('{"prompt": "\\ud800"}', 'a.jsonl:2: half a surrogate pair'),
  ],
)
def test_invalid_line_is_named_by_number(tmp_path, line, message):
  path = write(tmp_path / 'a.jsonl', '{"prompt": "a"}\n' + line)
  with pytest.raises(UserError, match=message):
    prompts.read(path, 0)


def test_file_without_prompts_is_refused(tmp_path):
  path = write(tmp_path / 'a.txt', '\n \n')
  with pytest.raises(UserError, match='no prompts'):
    prompts.read(path, 0)


def test_unreadable_file_is_refused(tmp_path):
  with pytest.raises(UserError, match='cannot read'):
    prompts.read(str(tmp_path / 'none.txt'), 0)
  (tmp_path / 'a.txt').write_bytes(b'\xff\xfe')
  with pytest.raises(UserError, match='cannot read'):
    prompts.read(str(tmp_path / 'a.txt'), 0)


def test_lines_come_from_a_stream():
  """The stream is not a terminal and has bytes that `check_unicode` refuses."""
  raw = io.BytesIO('def f(\n\né\u2028\r\n'.encode() + b'\xff\nlast')
  file = io.TextIOWrapper(raw, encoding='ascii')
  *lines, odd, last = prompts.typed(file)
  assert lines == ['def f(', '', 'é\u2028']
  assert last == 'last'
  with pytest.raises(UserError, match='no text'):
    prompts.check_unicode(odd, 'no text')
  prompts.check_unicode('é\u2028🦉', 'text')


def test_terminal_prompts_for_lines(monkeypatch, capsys):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  shown, lines = [], ['a', '']

  def typed_in(prompt):
    shown.append(prompt)
    if not lines:
      raise EOFError  # Ctrl-D
    return lines.pop(0)

  monkeypatch.setattr('builtins.input', typed_in)
  monkeypatch.setattr('sys.stdout', Terminal())
  assert list(prompts.typed(Terminal())) == ['a', '']
  assert shown == ['> '] * 3
