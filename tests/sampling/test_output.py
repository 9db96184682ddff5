"""Answers and steps that are printed or written."""

import collections
import json
import os

import pytest

from maskdiff.errors import UserError
from maskdiff.sampling import output

ANSWER = {'text': 'a\x1b[2J\ud7ff', 'tokens': 2, 'forwards': 3, 'positions': 4}


def test_printed_texts_are_printable_and_files_are_exact(tmp_path, capsys):
  totals = collections.Counter()
  output.write_answers([ANSWER], None, False, totals)
  assert capsys.readouterr().out == 'a\\x1b[2J\ud7ff\n'
  output.print_step(['\x1b]0;title\x07'])
  assert '\x1b' not in capsys.readouterr().out
  path = tmp_path / 'a.jsonl'
  with output.open_lines('out', str(path)) as write:
    output.write_answers([ANSWER] * 2, write, False, totals)
  assert list(map(json.loads, path.read_text().splitlines())) == [ANSWER] * 2
  printed = capsys.readouterr()
  assert (printed.out, printed.err) == ('', f'answers: {path}\n')
  assert totals == {'tokens': 6, 'forwards': 9, 'positions': 12}


def test_a_page_is_named_when_it_is_written(tmp_path, capsys):
  path = tmp_path / 'a.html'
  output.check_files(html=str(path), out=None)
  assert not os.listdir(tmp_path)
  output.write_page('html', str(path), '<p>')
  assert path.read_text() == '<p>'
  assert capsys.readouterr().err == f'page: {path}\n'
  with pytest.raises(UserError, match='--html: cannot write'):
    output.check_files(html=str(tmp_path / 'none' / 'a.html'))


def test_two_flags_do_not_name_one_file(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  output.check_files(out='/dev/null', html='/dev/null')
  with pytest.raises(UserError, match='--out and --html name the same file'):
    output.check_files(out='a', html=str(tmp_path / 'a'))
