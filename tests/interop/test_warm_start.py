"""Warm starts from published weights; scripts on Hugging Face folders."""

import json
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys

import forked
import numpy as np
import published_folders
import pytest
import safetensors.numpy
import tiny
import untrained_run

from maskdiff.data import prepare, sources, tokenizer
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import convert, load, start_checks
from maskdiff.training import loop

ROOT = pathlib.Path(__file__).parents[2]
TEXT = 'def f(x):\n  return x + 1\n\n'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('qwen') / 'in'
  return published_folders.make(path, 'qwen2', 'bfloat16')


@pytest.fixture(scope='module')
def rows(folder, tmp_path_factory):
  """Returns a directory of rows of 16 tokens, with the folder's tokenizer."""
  path = tmp_path_factory.mktemp('rows')
  with open(path / 'text.jsonl', 'w') as f:
    for i in range(60):
      f.write(json.dumps({'text': f'# {i}\n' + TEXT * (i % 5 + 1)}) + '\n')
  prepare.prepare(
    sources.plan([str(path / 'text.jsonl')]),
    tokenizer.load(folder),
    path / 'rows',
    row_length=16,
    heldout_fraction=0.3,
    workers=0,
  )
  return path / 'rows'


def make_config(folder, rows, **changes):
  """Returns configs/published.py with one step and a learning rate of 0."""
  path = ROOT / 'configs' / 'published.py'
  c = runpy.run_path(str(path))['get_config'](str(folder))
  settings = {
    'model.dtype': 'float32',
    'data.path': str(rows),
    'data.length': 16,
    'train.steps': 1,
    'train.batch': 16,
    'optimizer.learning_rate': 0.0,
    'optimizer.final_learning_rate': 0.0,
    'optimizer.warmup_steps': 0,
    'optimizer.decay_steps': 0,
    'eval.batch': 16,
    'eval.batches': 1,
    'sample.prompts': (),
    **changes,
  }
  c.update_from_flattened_dict(settings)
  return c


@pytest.mark.slow
def test_warm_start_and_export_keep_the_weights(folder, rows, tmp_path):
  """The learning rate is 0, so that a run keeps its weights.

  Qwen2, trained by masked diffusion with predict_next, is exported as Dream. A
  second run starts from the first run's weights.
  """
  config = make_config(folder, rows)
  assert config.model.predict_next and config.model.qkv_bias
  loop.run(config, str(tmp_path / 'run'))
  convert.to_hf(tmp_path / 'run', tmp_path / 'out', dtype='bfloat16')
  before, after = (
    safetensors.numpy.load_file(path / 'model.safetensors')
    for path in (folder, tmp_path / 'out')
  )
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert tensor.dtype == after[name].dtype
    np.testing.assert_array_equal(tensor, after[name], err_msg=name)
  written = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert written['architectures'] == ['DreamModel']
  assert written['mask_token_id'] == 258
  assert (tmp_path / 'out' / 'chat_template.jinja').exists()
  convert.check(tmp_path / 'out', tmp_path / 'run')

  convert.from_hf(folder, tmp_path / 'converted')
  for source in (tmp_path / 'run', tmp_path / 'converted'):
    config.init_from = str(source)
    params = load.warm_start(config, mesh_lib.make_mesh(tensor=2, fsdp=-1))
    embed = before['model.embed_tokens.weight'].astype(np.float32)
    assert params['embed'].dtype == np.float32
    np.testing.assert_array_equal(params['embed'], embed)


def test_warm_start_from_another_model_names_the_key(folder, rows):
  config = make_config(folder, rows, **{'model.rope_theta': 5e5})
  with pytest.raises(UserError, match='model.rope_theta=10000.0, not 500000.0'):
    load.warm_start(config, mesh_lib.make_mesh())
  config = make_config(folder, rows, init_from=str(rows))
  with pytest.raises(UserError, match='rows holds no checkpoint'):
    load.warm_start(config, mesh_lib.make_mesh())


def test_warm_start_may_scale_positions_but_not_undo_it(tokenizer, tmp_path):
  plain, scaled = tmp_path / 'plain', tmp_path / 'scaled'
  untrained_run.save(plain, tokenizer)
  config = untrained_run.save(scaled, tokenizer, model_rope_scaling=(16, 32))
  mesh = mesh_lib.make_mesh()
  stored = load.load_params(str(plain), mesh)[1]
  for source, scaling in ((plain, (16, 32)), (scaled, (16, 64))):
    config.init_from, config.model.rope_scaling = str(source), scaling
    found = load.warm_start(config, mesh)
    np.testing.assert_array_equal(found['embed'], stored['embed'])
  for scaling in ((), (32, 64)):
    config.model.rope_scaling = scaling
    with pytest.raises(UserError, match=r'rope_scaling=\(16, 32\), not \('):
      load.warm_start(config, mesh)


def test_only_a_drafter_needs_a_network_that_predicts_next_tokens():
  run = tiny.config({'objective.name': 'drafting', 'drafter.kind': 'medusa'})
  stored = lambda name: tiny.config({'objective.name': name})
  for name in ('autoregressive', 'drafting'):
    start_checks.check('network', stored(name), run)
  for name in ('masked_diffusion', 'block_diffusion', 'sdlm'):
    with pytest.raises(UserError, match='autoregressive_weight=1'):
      start_checks.check('network', stored(name), run)
  run.objective.autoregressive_weight = 1.0
  start_checks.check('network', stored('masked_diffusion'), run)


def test_drafter_of_the_same_kind_and_size_is_taken_over(
  tokenizer, tmp_path, capfd
):
  drafting = dict(objective_name='drafting', drafter_kind='block')
  config = untrained_run.save(
    tmp_path, tokenizer, **drafting, drafter_layers=1, model_layers=2
  )
  config.init_from, mesh = str(tmp_path), mesh_lib.make_mesh()
  _, stored = load.load_params(str(tmp_path), mesh)
  config.objective.window_length += 1  # changes no weight
  found = load.warm_start(config, mesh)
  np.testing.assert_array_equal(
    found['drafter']['fuse'], stored['drafter']['fuse']
  )
  assert 'new one' not in capfd.readouterr().err
  config.drafter.layers = 2
  assert 'drafter' not in load.warm_start(config, mesh)
  assert 'new one' in capfd.readouterr().err
  config.objective.name, config.drafter.kind = 'autoregressive', 'none'
  assert 'drafter' not in load.warm_start(config, mesh)
  assert 'new one' not in capfd.readouterr().err


def test_published_config_needs_a_folder():
  path = ROOT / 'configs' / 'published.py'
  with pytest.raises(UserError, match='configs/published.py:DIR'):
    runpy.run_path(str(path))['get_config']()


def script(name, *flags):
  return forked.run(
    [f'launch/{name}.py', *flags],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )


@pytest.mark.slow
def test_scripts_read_a_folder_without_changing_it(folder, tmp_path):
  """Sampling from the folder gives the same text as from a converted folder."""
  before = published_folders.contents(folder)
  convert.from_hf(folder, tmp_path / 'run')
  flags = ('--prompt=def f', '--gen_length=8', '--steps=4', '--block_length=4')
  texts = []
  for source in (folder, tmp_path / 'run'):
    result = script('sample', f'--workdir={source}', *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('def f')
    texts.append(result.stdout)
  assert texts[0] == texts[1]
  (tmp_path / 'lines.jsonl').write_text('{"prompt": "def", "answer": " f"}\n')
  result = script(
    'evaluate',
    f'--workdir={folder}',
    '--task=bound',
    f'--data={tmp_path / "lines.jsonl"}',
  )
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout.splitlines()[-1])['nats_per_token'] > 0
  assert published_folders.contents(folder) == before


def test_folder_without_a_tokenizer_cannot_be_sampled(folder, tmp_path):
  shutil.copytree(folder, tmp_path / 'in')
  (tmp_path / 'in' / 'tokenizer.json').unlink()
  with pytest.raises(UserError, match='in has no tokenizer: put tokenizer.js'):
    load.load(str(tmp_path / 'in'))


# launch/convert.py


@pytest.mark.slow
def test_convert_script_converts_both_ways_and_checks(folder, tmp_path):
  workdir, out = tmp_path / 'run', tmp_path / 'out'
  result = script(
    'convert', '--from=hf', f'--in={folder}', f'--out={workdir}', '--check'
  )
  assert result.returncode == 0, result.stderr
  assert 'parameters, 0.00 GB as published, qwen2' in result.stdout
  line = 'model.layers.1.mlp.up_proj.weight  [24, 16]  bfloat16'
  assert line in result.stdout.splitlines()
  assert 'largest difference of a logit' in result.stdout.splitlines()[-1]
  result = script('convert', '--to=hf', f'--in={workdir}', f'--out={out}')
  assert result.returncode == 0, result.stderr
  assert 'Qwen2ForCausalLM from' in result.stdout
  before, after = map(published_folders.contents, (folder, out))
  del before['model.safetensors'], after['model.safetensors']
  assert before == after


def test_truncated_file_is_one_error_line_and_leaves_nothing(folder, tmp_path):
  shutil.copytree(folder, tmp_path / 'in')
  path = tmp_path / 'in' / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-100])
  result = script(
    'convert', '--from=hf', f'--in={path.parent}', f'--out={tmp_path / "run"}'
  )
  assert result.returncode == 2
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ') and f'{path} is cut off within' in line
  assert os.listdir(tmp_path) == ['in']


# Runs launch/convert.py, and stops while it writes parameters.
PAUSED = """
import runpy, sys, time
from maskdiff.interop import leaves
def write(folder, *args):
  print(folder, flush=True)
  time.sleep(600)
leaves.write = write
runpy.run_path('launch/convert.py', run_name='__main__')
"""


@pytest.mark.slow
def test_ended_conversion_leaves_nothing_and_killed_one_is_cleaned_up(
  folder, tmp_path
):
  flags = ('--from=hf', f'--in={folder}', f'--out={tmp_path / "run"}')
  for number, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
    process = subprocess.Popen(
      [sys.executable, '-c', PAUSED, *flags],
      stdout=subprocess.PIPE,
      text=True,
      cwd=ROOT,
      env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    params = pathlib.Path(process.stdout.readline().strip())
    assert params.parent.parent == tmp_path
    process.send_signal(number)
    assert process.wait(60) == status
    # The place of the folder is locked and empty.
    left = {params.parent.name, 'run'} if number == signal.SIGKILL else set()
    assert set(os.listdir(tmp_path)) == left
  result = script('convert', *flags)
  assert result.returncode == 0, result.stderr
  assert f'removed {params.parent}, 0.00 GB, left by' in result.stdout
  assert os.listdir(tmp_path) == ['run']


WRONG_FLAGS = {
  'no action': ((), 'give one of --from hf, --to hf, --to peft and --check'),
  'no out': (('--from=hf',), '--out is missing'),
  'no such directory': (('--check', '--in=nowhere'), 'no such directory'),
  'flag of the other direction': (
    ('--from=hf', '--out=x', '--family=llama'),
    '--family is for --to hf',
  ),
  'average of a published folder': (
    ('--check', '--ema'),
    '--ema is for --to hf',
  ),
}


@pytest.mark.parametrize(
  'flags, message', WRONG_FLAGS.values(), ids=WRONG_FLAGS
)
def test_contradictory_flags_are_refused(folder, flags, message):
  result = script('convert', f'--in={folder}', *flags)
  assert result.returncode == 2
  (line,) = result.stderr.splitlines()
  assert message in line
