"""Files that a run writes to its work directory at its start."""

import json
import os
import types

import jax
import pytest
import tiny

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.monitoring import terminal
from maskdiff.training import workdir as workdir_lib

NAMES = ('header.txt', 'config.json', 'stage.json')


@pytest.fixture
def save(tokenizer, tmp_path):
  setup = types.SimpleNamespace(
    model=tiny.MODEL, mesh=mesh_lib.make_mesh(devices=jax.devices()[:1])
  )
  stage = types.SimpleNamespace(
    name='toy',
    header='data: caf\udce9',
    tokenizer=tokenizer,
    panels=(),
    files={'note.txt': b'of the stage'},
  )
  config = tiny.config({'optimizer.learning_rate': float('nan')})
  workdir = tmp_path / 'run'
  workdir.mkdir()
  return lambda: workdir_lib.save_run_files(config, setup, stage, workdir)


@pytest.fixture
def workdir(tmp_path):
  return tmp_path / 'run'


@pytest.fixture
def warnings(monkeypatch):
  lines = []
  monkeypatch.setattr(terminal, 'warn', lines.append)
  return lines


def full(*_):
  raise OSError(28, 'No space left on device')


def test_files_are_whole_and_strict(save, workdir, warnings):
  def refuse(word):
    raise ValueError(word)

  assert save().endswith('data: caf\udce9')
  found = json.loads(
    (workdir / 'config.json').read_text(), parse_constant=refuse
  )
  assert found['optimizer']['learning_rate'] is None
  assert json.loads((workdir / 'stage.json').read_text())['name'] == 'toy'
  assert 'caf\\udce9' in (workdir / 'header.txt').read_text()
  assert (workdir / 'note.txt').read_text() == 'of the stage'
  assert warnings == []


def test_planted_links_are_replaced(save, workdir, tmp_path):
  victim = tmp_path / 'victim'
  victim.write_text('private')
  hidden = [f'.{name}.{os.getpid()}.tmp' for name in NAMES]
  for name in (*NAMES, *hidden):
    (workdir / name).symlink_to(victim)
  (workdir / 'tokenizer.model').symlink_to(victim)
  save()
  assert victim.read_text() == 'private'
  assert not any((workdir / name).is_symlink() for name in NAMES)


def test_run_without_these_files_continues_with_warnings(
  save, workdir, warnings
):
  for name in NAMES:
    (workdir / name).mkdir()
  save()
  assert warnings == [
    f'warning: cannot write {workdir / name} (Is a directory); the run '
    'continues without this file'
    for name in NAMES
  ]


def test_resumed_run_writes_nothing_again(save, workdir, warnings, monkeypatch):
  """So that it can resume on a full disk."""
  save()
  monkeypatch.setattr(os, 'replace', full)
  save()
  assert warnings == []


def test_new_run_on_a_full_disk_ends_with_one_line(save, monkeypatch):
  """Without a tokenizer nobody can use the checkpoints."""
  monkeypatch.setattr(os, 'replace', full)
  with pytest.raises(UserError, match=r'\(No space left on device\)'):
    save()


def test_work_directory_without_room_is_refused(workdir, monkeypatch):
  """Only for a new run; one that resumes waits for room."""
  workdir_lib.make_workdir(str(workdir))
  assert list(workdir.iterdir()) == []
  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(UserError, match='No space left on device.*make room'):
    workdir_lib.make_workdir(str(workdir))
  (workdir / 'checkpoints').mkdir()
  workdir_lib.make_workdir(str(workdir))


@pytest.mark.parametrize(
  'name, fix',
  [
    ('params/meta.json', 'init_from'),
    ('config.json', 'init_from'),  # of a published folder
    ('manifest.json', 'data.path'),
  ],
)
def test_a_directory_of_another_kind_is_no_work_directory(workdir, name, fix):
  """The run would overwrite files, or its checkpoints would not be found."""
  path = workdir / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('{"architectures": ["LLaDAModelLM"]}')
  with pytest.raises(UserError, match=f'use another --workdir.*{fix}='):
    workdir_lib.make_workdir(str(workdir))
