"""--config reads a program or a saved config; every other file is one line."""

import json
import os
import re

import pytest

from maskdiff import config as config_lib
from maskdiff.config import config_file, keys
from maskdiff.errors import UserError

HEAD = 'from maskdiff.config import default\n'


def saved(**changes):
  """Returns the JSON object of a saved config, with changes by dotted key."""
  tree = json.loads(config_lib.default().to_json())
  for key, value in changes.items():
    section, _, name = key.partition('__')
    if name:
      tree[section][name] = value
    else:
      tree[section] = value
  return tree


def load(tmp_path, content, name='config.json'):
  path = tmp_path / name
  if isinstance(content, bytes):
    path.write_bytes(content)
  else:
    path.write_text(
      content if isinstance(content, str) else json.dumps(content)
    )
  return config_file.load(str(path))


def refused(function, *args):
  """Returns the message of a UserError, which is one short line."""
  with pytest.raises(UserError) as error:
    function(*args)
  message = str(error.value)
  assert message.isprintable() and len(message) < 500
  return message


# Saved configs


def test_a_saved_config_is_data_and_can_be_repeated(tmp_path):
  tree = saved(
    sample__prompts=['a', 'b'],
    optimizer__pieces=[[10, 0, 1.5]],
    optimizer__learning_rate=1,
  )
  c = load(tmp_path, tree)
  assert c.is_locked
  assert c.sample.prompts == ('a', 'b')
  assert c.optimizer.pieces == ((10, 0, 1.5),)
  rate = c.optimizer.learning_rate
  assert (rate, type(rate)) == (1.0, float)
  assert config_lib.flatten(load(tmp_path, json.loads(c.to_json()))) == (
    config_lib.flatten(c)
  )


def test_a_saved_config_is_not_executed(tmp_path):
  """JSON is also an expression of Python, and a file may have any name."""
  for name in ('config.json', 'config', 'config.py.bak'):
    message = refused(load, tmp_path, 'raise SystemExit', name)
    assert 'is not valid JSON' in message


def test_a_renamed_key_is_read(tmp_path, monkeypatch):
  tree = saved()
  tree['train']['num_steps'] = tree['train'].pop('steps') + 1
  monkeypatch.setattr(keys, 'RENAMED', {'train.num_steps': 'train.steps'})
  assert load(tmp_path, tree).train.steps == 1001


@pytest.mark.parametrize(
  'tree, message',
  [
    ([], 'not a JSON object'),
    (None, 'not a JSON object'),
    ({'modle': {'heads': 2}}, "modle.heads.*did you mean 'model.heads'"),
    (saved(train__batchs=2), "train.batchs.*did you mean 'train.batch'"),
    ({'x' * 10**5: 1}, 'xxx'),
    ({'\x1b[2J\n': 1}, r'\\x1b'),
    (saved(model=3), 'the keys model,'),
    (saved(model={'heads': {'a': 1}}), 'model.heads.a'),
    (saved(train__batch='many'), "config.train.batch='many': must be int"),
    (saved(train__batch=True), 'config.train.batch=True: must be int'),
    (saved(train__batch=None), 'config.train.batch=None: must be int'),
    (saved(train__batch=2.5), 'config.train.batch=2.5: must be int'),
    (saved(train__steps=10**18), 'config.train.steps=.*at most 2147483647'),
    (saved(seed=2**70), 'config.seed=.*at most 9223372036854775807'),
    (saved(train__stall_s=2**70), 'config.train.stall_s=.*must be finite'),
    (saved(model__heads=0), 'config.model.heads=0: must be at least 1'),
    (saved(model__head_dim=7), 'config.model.head_dim=7 must be even'),
    (saved(model__dtype='float3'), "did you mean 'float32'"),
    (saved(model__dtype='x' * 10**5), "config.model.dtype='xxx"),
    (saved(sample__prompts='abc'), "prompts='abc': must be tuple, not str"),
    (saved(model__rope_scaling=['a'] * 4), 'config.model.rope_scaling'),
    (saved(optimizer__eps=float('nan')), 'config.optimizer.eps=nan: must be'),
    (saved(optimizer__eps=float('inf')), 'config.optimizer.eps=inf: must be'),
  ],
)
def test_a_wrong_saved_config_is_one_line(tmp_path, tree, message):
  assert re.search(message, refused(load, tmp_path, tree))


@pytest.mark.parametrize(
  'content, message',
  [
    (b'{"model": ' * 10**5, 'nested more than 100 levels'),
    (b'[' * 10**5 + b']' * 10**5, 'nested more than 100 levels'),
    (b'\xff\xfe{}', 'is not UTF-8'),
    (b'{"seed": 1' + b' ' * 2**20 + b'}', 'has more than 1,048,576 bytes'),
    (b'{"seed": 1' + b'0' * 5000 + b'}', 'is not valid JSON'),
    (b'', 'is not valid JSON'),
    (b'\x00' * 100, 'is not valid JSON'),
  ],
)
def test_an_odd_file_is_one_line(tmp_path, content, message):
  assert message in refused(load, tmp_path, content)


@pytest.mark.parametrize('name', ['config.py', 'config.json'])
@pytest.mark.parametrize('kind', ['none', 'folder', 'fifo', 'null'])
def test_what_is_not_a_regular_file_is_one_line(tmp_path, name, kind):
  path = tmp_path / name
  if kind == 'folder':
    path.mkdir()
  elif kind == 'fifo':
    os.mkfifo(path)
  path = f'{path}\0' if kind == 'null' else str(path)
  message = refused(config_file.load, path)
  assert message.startswith('--config: cannot read ')


def test_only_programs_have_entries(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(saved()))
  assert 'leave out' in refused(config_file.load, f'{path}:big')


# Programs


@pytest.mark.parametrize(
  'text, message',
  [
    ('raise SystemExit(3)', 'line 1, SystemExit: 3'),
    ('import sys; sys.exit()', 'line 1, SystemExit'),
    ('\n1 / 0', 'line 2, ZeroDivisionError: division by zero'),
    ('def get_config():\n  return get_config()', 'line 2, RecursionError'),
    ('def get_config(:', 'SyntaxError'),
    ('x = ' + '(' * 10**5, "cannot load the config file '.*config.py'"),
    ('x = ' + '-' * 10**6, "cannot load the config file '.*config.py'"),
    ('\0', "cannot load the config file '.*config.py'"),
    ('', "has no attribute 'get_config'"),
    ('get_config = 3', "'int' object is not callable"),
    ('def get_config():\n  pass', 'must return the config, not a NoneType'),
    ('def get_config():\n  return {}', 'must return the config, not a dict'),
    ('def get_config():\n  open("none")', 'line 2, FileNotFoundError'),
    (f'{HEAD}def get_config():\n  default().trian = 1', 'unknown config key'),
    ('raise ValueError("\\x1b[2J\\n" + 10**6 * "x")', r'ValueError: \\x1b'),
  ],
)
def test_a_wrong_program_is_one_line(tmp_path, text, message):
  assert re.search(message, refused(load, tmp_path, text, 'config.py'))


def test_a_binary_program_is_one_line(tmp_path):
  message = refused(load, tmp_path, os.urandom(1000) + b'\xff', 'config.py')
  assert 'is not UTF-8' in message


def test_a_program_may_define_classes_and_take_an_entry(tmp_path):
  text = """
from __future__ import annotations
import dataclasses
from maskdiff.config import default

@dataclasses.dataclass
class Size:
  heads: int

def get_config(name='small'):
  c = default()
  c.model.heads = Size({'small': 2, 'big': 8}[name]).heads
  return c
"""
  assert load(tmp_path, text, 'a.py').model.heads == 2
  assert config_file.load(f'{tmp_path}/a.py:big').model.heads == 8


def test_colons_of_paths_begin_no_entry(tmp_path):
  folder = tmp_path / 'a:b'
  folder.mkdir()
  assert load(folder, saved(), 'c:d.json').is_locked
  message = refused(config_file.load, 'gs://none/x.py:small')
  assert message.startswith('--config: gs://none/x.py is not')
  assert config_file._split('x.py:gs://b/c') == ['x.py', 'gs://b/c']
