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
    Prompt('def f(', 5, where=f'{path}:1'),
    Prompt('  x = "é"', 6, where=f'{path}:3'),
    Prompt('last\u2028one', 7, where=f'{path}:4'),
  ]


def test_json_prompts_may_have_newlines_and_seeds(tmp_path):
  rows = '{"prompt": "a\\nb"}\n{"prompt": "", "seed": 70}\n\n{"prompt": "c"}\n'
  path = write(tmp_path / 'a.jsonl', rows)
  found, gaps = prompts.read(path, 0)
  assert not gaps
  parts = [(p.text, p.seed, p.settings) for p in found]
  assert parts == [('a\nb', 0, {}), ('', 70, {}), ('c', 2, {})]


def test_json_prompts_may_have_settings(tmp_path):
  rows = (
    '{"prompt": "a", "settings": {"temperature": 0.7, "gen_length": 8}}\n'
    '{"prompt": "b"}\n'
  )
  path = write(tmp_path / 'a.jsonl', rows)
  (first, second), _ = prompts.read(path, 0)
  assert first.settings == {'temperature': 0.7, 'gen_length': 8}
  assert second.settings == {}
  assert second.where == f'{path}:2'


def test_errors_of_a_prompt_name_its_line():
  def fails(prompt):
    raise UserError('too long')

  with pytest.raises(UserError, match=r'^a.jsonl:3: too long$'):
    prompts.located(fails, Prompt('', 0, where='a.jsonl:3'))
  with pytest.raises(UserError, match='^too long$'):
    prompts.located(fails, Prompt('', 0))
  assert prompts.located(lambda prompt: prompt.seed, Prompt('', 7)) == 7


def test_json_lines_may_have_gaps(tmp_path):
  rows = '{"infill": "a {{3}} b"}\n{"infill": "{{1}}", "seed": 9}\n'
  found, gaps = prompts.read(write(tmp_path / 'a.jsonl', rows), 0)
  assert gaps
  assert [(p.text, p.seed) for p in found] == [('a {{3}} b', 0), ('{{1}}', 9)]


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
    ('{"prompt": "a", "settings": 3}', 'a.jsonl:2: "settings" must be an obj'),
    (
      '{"prompt": "a", "settings": {"temprature": 1}}',
      "a.jsonl:2: unknown setting 'temprature'; did you mean 'temperature'",
    ),
    (
      '{"prompt": "a", "settings": {"block_length": 8}}',
      'a.jsonl:2: another block_length needs another program: set '
      '--block_length for all requests; settings that may differ by request: '
      'gen_length, steps, temperature, top_k, ',
    ),
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
