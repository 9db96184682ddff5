"""Every path flag and every path key of the config expands ~ and gs://."""

import ast
import pathlib

import numpy as np
import pytest
from absl import flags

from maskdiff import config
from maskdiff.config import keys, path_flags
from maskdiff.data import pipeline, prepare, row_writer, tokenizer
from maskdiff.data.rows import Rows
from maskdiff.errors import UserError
from maskdiff.files import paths
from maskdiff.interop import config_json, hf, load
from maskdiff.training import inputs, workdir

ROOT = pathlib.Path(__file__).parents[2]
DEFINE_TEXT = {'DEFINE_string', 'DEFINE_list', 'DEFINE_multi_string'}
# Keys of the config without choices whose values are texts.
PATH_KEYS = {
  'init_from',
  'data.path',
  'data.tokenizer',
  'data.cache_dir',
  'eval.path',
  'policy.chat_template',
  'policy.reference',
}
TEXT_KEYS = {'train.wandb_project', 'policy.task', 'policy.reward'}


def text_flags(script):
  """Returns the names of the flags of a script that take a text."""
  return {
    node.args[0].value
    for node in ast.walk(ast.parse(script.read_text()))
    if isinstance(node, ast.Call)
    and getattr(node.func, 'attr', '') in DEFINE_TEXT
  }


def test_each_text_flag_is_listed_as_a_path_or_a_text():
  found = set()
  for script in sorted((ROOT / 'launch').glob('*.py')):
    new = text_flags(script) - path_flags.PATHS - path_flags.TEXTS
    assert not new, f'{script}: add {new} to PATHS or TEXTS in path_flags.py'
    found |= text_flags(script)
  assert found == path_flags.PATHS | path_flags.TEXTS
  assert not path_flags.PATHS & path_flags.TEXTS


def test_each_text_key_is_listed_as_a_path_or_a_text():
  found = {
    name
    for name, key in keys.KEYS.items()
    if isinstance(key.default, str) and not key.choices
  }
  assert found == PATH_KEYS | TEXT_KEYS


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setattr(paths, 'BUCKETS', tmp_path / 'gcs')
  (tmp_path / 'gcs' / 'bucket').mkdir(parents=True)
  return tmp_path


def parsed(monkeypatch, *arguments):
  """Runs `run_script` on flags of the test; returns values and other words."""
  values = flags.FlagValues()
  for name in path_flags.PATHS - {'source'}:
    flags.DEFINE_string(name, None, '', flag_values=values)
  for name in ('source', 'prompt'):
    flags.DEFINE_multi_string(name, [], '', flag_values=values)
  monkeypatch.setattr(flags, 'FLAGS', values)
  found = []
  config.run_script(
    lambda *args: found.extend(args), ['script', *arguments], positional=True
  )
  return found


@pytest.mark.parametrize('name', sorted(path_flags.PATHS))
def test_path_flags_are_expanded(home, monkeypatch, name):
  for arguments in ([f'--{name}=~/x'], [f'--{name}', '~/x']):
    args, _ = parsed(monkeypatch, *arguments)
    assert args[name].value in (f'{home}/x', [f'{home}/x'])
  args, _ = parsed(monkeypatch, f'--{name}=gs://bucket/x')
  mounted = f'{home}/gcs/bucket/x'
  if name == 'workdir':  # make_workdir refuses it
    assert args.workdir == 'gs://bucket/x'
  else:
    assert args[name].value in (mounted, [mounted])


def test_other_words_are_expanded_or_kept(home, monkeypatch):
  args, rest = parsed(
    monkeypatch,
    '--source=tfds:~/x:train',
    '--prompt=~/x',
    '--source=~/y',
    '~/z',
  )
  assert args.source == ['tfds:~/x:train', f'{home}/y']
  assert args.prompt == ['~/x'] and rest == [f'{home}/z']
  assert args.out is None


def test_flag_with_a_bucket_that_is_not_mounted_is_named(
  home, monkeypatch, capsys
):
  with pytest.raises(SystemExit):
    parsed(monkeypatch, '--html=gs://absent/x')
  error = capsys.readouterr().err
  assert error.startswith('error: --html: gs://absent/x') and 'gcsfuse' in error


@pytest.fixture
def tok():
  return tokenizer.load(ROOT / 'tokenizer' / 'stdlib_4k.model')


def write_rows(directory, tok):
  rows = Rows(np.full((2, 8), 20))
  row_writer.write_rows(directory, {'train': [rows]}, tok, source='a test')


def test_path_keys_of_data_are_expanded(home, tok):
  write_rows('~/rows', tok)
  write_rows(home / 'more', tok)
  assert (home / 'rows' / 'manifest.json').exists()
  c = config.default()
  c.data.tokenizer = '~/rows'
  assert inputs.open_tokenizer(c).fingerprint == tok.fingerprint
  for path in ('~/rows', '~/rows=0.5,~/more=0.5'):
    c.data.path = c.eval.path = path
    assert inputs.open_data(c, tok) and inputs.open_data(c, tok, c.eval.path)
  with pytest.raises(UserError, match='twice'):
    pipeline.parse_mixture(f'~/rows=0.5,{home}/rows=0.5')


def test_cache_dir_is_expanded(home, tok, monkeypatch):
  def stop(plan, tokenizer, directory, **_):
    raise UserError(f'{directory}')

  monkeypatch.setattr(prepare, 'prepare', stop)
  with pytest.raises(UserError, match=f'^{home}/cache/embedded'):
    prepare.embedded(tok, '~/cache', 8, log=lambda line: None)


def test_init_from_is_expanded(home, monkeypatch):
  c = config.default()
  c.init_from = '~/model'
  (home / 'model').mkdir()
  seen = []

  def load_params(path, *_):
    seen.append(path)
    return c, {}

  monkeypatch.setattr(load, 'load_params', load_params)
  load.warm_start(c, None)
  monkeypatch.setattr(config_json, 'is_published', lambda path: True)
  monkeypatch.setattr(
    hf, 'copy_published_files', lambda path, *_, **__: seen.append(path)
  )
  workdir.copy_published_files(c, 'run')
  assert seen == [f'{home}/model'] * 2
  c.init_from = ''
  workdir.copy_published_files(c, 'run')
  assert len(seen) == 2
