"""Prompts from files, streams and a terminal."""

import io
import os

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
    ('{"prompt": ', 'a.jsonl:2 is not valid JSON'),
    ('{"text": "a"}', r'a.jsonl:2: must be \{"prompt": "text"\}'),
    ('["a"]', 'a.jsonl:2: must be'),
    ('{"infill": 3}', r'a.jsonl:2: must be .* or \{"infill": "text, \{\{n'),
    ('{"infill": "{{2}}", "prompt": "a"}', 'a.jsonl:2: must be'),
    ('{"infill": "{{2}}"}', 'a.jsonl:2: "prompt" and "infill" are in one file'),
    ('{"prompt": 3}', 'a.jsonl:2: must be'),
    ('{"prompt": "a", "seed": -1}', 'a.jsonl:2: "seed"'),
    ('{"prompt": "a", "seed": "1"}', 'a.jsonl:2: "seed"'),
    ('{"prompt": "\\ud800"}', 'a.jsonl:2 has half of a surrogate pair'),
    ('{"prompt": "a", "seed": true}', 'a.jsonl:2: "seed"'),
    ('{"prompt": "a", "seed": 1e400}', 'a.jsonl:2: "seed"'),
    ('{"prompt": "a", "seed": 4294967296}', 'a.jsonl:2: "seed"'),
    ('{"prompt": ' + '[' * 100_000, 'a.jsonl:2 is nested more than 100'),
    ('{"prompt": "a", "seed": ' + '9' * 5000 + '}', 'a.jsonl:2 is not valid'),
    *(
      (
        f'{{"prompt": "a", "settings": {{"{key}": {value}}}}}',
        f'a.jsonl:2: sampler setting {key}=.*: must be {form}',
      )
      for key, value, form in (
        ('temperature', 'NaN', 'a finite number'),
        ('guidance', '1e999', 'a finite number'),
        ('factor', '1' + '0' * 400, 'a finite number'),
        ('threshold', '"0.5"', 'float'),
        ('top_p', 'true', 'float'),
        ('gen_length', '8.0', 'int'),
        ('gen_length', '1' + '0' * 30, 'between'),
        ('steps', 'false', 'int'),
        ('stop_at_eos', '1', 'bool'),
        ('top_k', '[' * 50 + ']' * 50, 'int'),
        ('eot_id', 'null', 'int'),
      )
    ),
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
  (tmp_path / 'a.txt').write_bytes(b'a\n\xff\xfe')
  with pytest.raises(UserError, match=r'a.txt:2: not UTF-8'):
    prompts.read(str(tmp_path / 'a.txt'), 0)
  os.mkfifo(tmp_path / 'pipe')
  with pytest.raises(UserError, match='not a regular file'):
    prompts.read(str(tmp_path / 'pipe'), 0)


def test_prompts_may_come_from_a_pipe_of_the_shell():
  reader, writer = os.pipe()
  os.write(writer, b'a\nb')
  os.close(writer)
  found, _ = prompts.read(f'/dev/fd/{reader}', 0)
  os.close(reader)
  assert [prompt.text for prompt in found] == ['a', 'b']


def stream(content):
  """Returns a standard input that is not a terminal."""
  return io.TextIOWrapper(io.BytesIO(content), encoding='ascii')


def test_lines_come_from_a_stream():
  content = 'def f(\n\né\u2028🦉\n'.encode() + b'\0\x1b\nlast'
  lines = list(prompts.typed(stream(content), None))
  assert lines == ['def f(', '', 'é\u2028🦉', '\0\x1b', 'last']


def test_a_bad_line_of_a_stream_is_skipped(monkeypatch):
  monkeypatch.setattr('maskdiff.files.reading.MAX_LINE_BYTES', 1000)
  long = b'x' * 1001
  notes, content = [], b'\n'.join([b'a', b'\xff', long, long * 3, b'b', long])
  assert list(prompts.typed(stream(content), notes.append)) == ['a', 'b']
  assert [note.split(':')[1].strip() for note in notes] == [
    f'line {number}' for number in (2, 3, 4, 6)
  ]
  assert 'not UTF-8' in notes[0] and 'more than 1,000 bytes' in notes[1]


def test_an_unreadable_stream_is_an_error(tmp_path):
  class Broken(io.BytesIO):
    def readline(self, size):
      raise OSError(5, 'Input/output error')

  file = io.TextIOWrapper(Broken())
  with pytest.raises(UserError, match=r'standard input \(Input/output error'):
    list(prompts.typed(file, None))


@pytest.mark.parametrize('end', ['\n', '\r\n'])
@pytest.mark.parametrize('start', ['', '\ufeff'])
@pytest.mark.parametrize('last', [True, False])
def test_a_stream_and_a_file_give_the_same_prompts(tmp_path, end, start, last):
  texts = ['def f(', '  é\rb\t', 'x\ufeff = ']
  content = (start + end.join(texts) + end * last).encode()
  path = tmp_path / 'a.txt'
  path.write_bytes(content)
  found, _ = prompts.read(str(path), 0)
  assert [prompt.text for prompt in found] == texts
  assert list(prompts.typed(stream(content), None)) == texts


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
  assert list(prompts.typed(Terminal(), None)) == ['a', '']
  assert shown == ['> '] * 3
