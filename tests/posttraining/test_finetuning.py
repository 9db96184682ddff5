"""The stage of fine-tuning, and the configs that it completes."""

import json
import pathlib
import runpy
import shutil
import types

import made_answers
import published_folders
import pytest

from maskdiff import config as config_lib
from maskdiff.errors import UserError
from maskdiff.interop import hf
from maskdiff.posttraining import chat, finetuning
from maskdiff.training import loop, pretraining

ROOT = pathlib.Path(__file__).parents[2]
LENGTH = made_answers.LENGTH


@pytest.fixture(scope='module')
def model(tmp_path_factory, tokenizer):
  path = tmp_path_factory.mktemp('model')
  changes = {'objective_predict_mask': True, 'data_length': 2 * LENGTH}
  return made_answers.save_model(path, tokenizer, **changes)


@pytest.fixture(scope='module')
def rows(tmp_path_factory, tokenizer):
  path = tmp_path_factory.mktemp('rows') / 'rows'
  return made_answers.write_rows(path, tokenizer)


def recipe(**changes):
  """Returns configs/sft.py with other values for some keys."""
  c = runpy.run_path(str(ROOT / 'configs' / 'sft.py'))['get_config']()
  c.update_from_flattened_dict(changes)
  return c


def small(model, rows, **changes):
  """Returns the config of a run of two epochs, completed."""
  keys = {
    'init_from': str(model),
    'data.path': str(rows),
    'model.dtype': 'float32',
    'model.remat': 'none',
    'objective.loss_chunk_tokens': 32,
    'train.epochs': 2.0,
    'train.batch': 16,
    'optimizer.learning_rate': 1e-2,
    'eval.batch': 16,
    'eval.batches': 1,
  }
  return finetuning.complete(recipe(**keys | changes))


@pytest.mark.slow
def test_config_is_completed_from_the_model_and_the_rows(model, rows):
  c = small(model, rows)
  assert (c.model.embed, c.model.layers) == (16, 1)
  assert c.data.tokenizer == str(model) and c.data.length == LENGTH
  assert c.objective.predict_mask and c.objective.name == 'masked_diffusion'
  assert c.train.steps == 6 == 2 * 48 // 16
  assert (c.optimizer.warmup_steps, c.optimizer.decay_steps) == (0, 0)
  assert c.optimizer.weight_decay == 0.1
  config_lib.validate(c)
  # Three epochs of 100,000 rows.
  other = {'train.batch': 1, 'train.epochs': 100.0}
  c = small(model, rows, **other)
  assert c.train.steps == 4800
  assert (c.optimizer.warmup_steps, c.optimizer.decay_steps) == (50, 480)


def test_run_has_the_template_and_the_end_tokens_of_its_rows(
  rows, tokenizer, tmp_path
):
  """An export has them too, with the other values of its source."""
  config = types.SimpleNamespace(
    data=types.SimpleNamespace(path=f'{rows}=1,other=1')
  )
  assert finetuning.chat_files(config, tokenizer) == {}
  named = tmp_path / 'named'
  shutil.copytree(rows, named)
  chat.save(chat.load('plain'), named)
  config.data.path = str(named)
  files = finetuning.chat_files(config, tokenizer)
  assert files['chat_template.jinja'].decode() == chat.load('plain').source
  ids = {'bos_token_id': 1, 'eos_token_id': [2], 'pad_token_id': 0}
  assert json.loads(files['generation_config.json']) == ids
  run, export = tmp_path / 'run', tmp_path / 'export'
  for folder in (run, export):
    folder.mkdir()
  for name, content in files.items():
    (run / name).write_bytes(content)
  source = {'eos_token_id': 5, 'top_k': 7}
  (export / 'generation_config.json').write_text(json.dumps(source))
  hf.copy_chat_files(str(run), str(export))
  found = json.loads((export / 'generation_config.json').read_text())
  assert found == ids | {'top_k': 7}
  assert chat.of_folder(export).source == chat.load('plain').source
  hf.copy_chat_files(str(tmp_path), str(export))  # no template: no change
  assert json.loads((export / 'generation_config.json').read_text()) == found


def test_template_of_a_run_has_the_arguments_of_its_rows(
  rows, tokenizer, tmp_path
):
  named = tmp_path / 'named'
  shutil.copytree(rows, named)
  (named / 'chat_template.jinja').write_text('{{ thinks }}')
  manifest = json.loads((named / 'manifest.json').read_text())
  manifest['settings']['chat_arguments'] = '{"thinks": false}'
  (named / 'manifest.json').write_text(json.dumps(manifest))
  config = types.SimpleNamespace(data=types.SimpleNamespace(path=str(named)))
  files = finetuning.chat_files(config, tokenizer)
  template = chat.Template('run', files['chat_template.jinja'].decode())
  rendered = chat.render(template, [], generation_prompt=True, special={})
  assert rendered.text == 'False'


def test_lengths_are_those_of_the_rows_or_of_the_model(
  model, rows, tokenizer, tmp_path
):
  assert small(model, rows).data.length_tokens == ()
  named = tmp_path / 'named'
  shutil.copytree(rows, named)
  manifest = json.loads((named / 'manifest.json').read_text())
  manifest['settings'] |= {'length_tokens': '4=212,8=213'}
  (named / 'manifest.json').write_text(json.dumps(manifest))
  c = small(model, named)
  assert c.data.length_tokens == ((4, 212), (8, 213))
  config_lib.validate(c)
  changes = {'data_length_tokens': ((5, 212),), 'data_length': LENGTH}
  taught = made_answers.save_model(tmp_path / 'model', tokenizer, **changes)
  assert small(taught, rows).data.length_tokens == ((5, 212),)
  assert small(taught, named).data.length_tokens == ((4, 212), (8, 213))
  manifest['settings'] |= {'length_tokens': '4=212'}
  other = tmp_path / 'other'
  shutil.copytree(named, other)
  (other / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(UserError, match='the same ones'):
    small(model, f'{named}=0.5,{other}=0.5')


def test_flags_keep_their_values(model, rows):
  c = recipe(
    **{
      'init_from': str(model),
      'data.path': str(rows),
      'train.steps': 200,
      'data.length': 8,
      'objective.name': 'masked_diffusion',
      'optimizer.warmup_steps': 7,
    }
  )
  given = ('train.steps', 'data.length', 'optimizer.warmup_steps')
  c = finetuning.complete(c, given)
  assert (c.train.steps, c.data.length) == (200, 8)
  assert (c.optimizer.warmup_steps, c.optimizer.decay_steps) == (7, 20)
  assert c.train.epochs == 0


def test_recipe_is_that_of_llada():
  c = recipe()
  o = c.optimizer
  assert (c.train.epochs, c.train.batch) == (3, 256)
  assert (o.learning_rate, o.warmup_steps) == (2.5e-5, 50)
  assert (o.final_learning_rate, o.weight_decay) == (2.5e-6, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
  'case, objective, expected',
  [
    ('llada', None, ('masked_diffusion', False, 272)),
    ('dream', None, ('masked_diffusion', True, 272)),
    ('sdar', None, ('block_diffusion', False, 272)),
    ('qwen2', None, ('masked_diffusion', True, 272)),
    ('qwen2', 'block_diffusion', ('block_diffusion', True, 272)),
    ('qwen2', 'autoregressive', ('autoregressive', False, 272)),
    ('qwen2', 'sdlm', ('sdlm', False, 272)),
    ('sdlm', None, ('sdlm', False, 272)),
    ('dream', 'autoregressive', ('autoregressive', False, 272)),
  ],
)
def test_published_models_keep_their_outputs(
  case, objective, expected, tmp_path, rows
):
  folder = published_folders.make(tmp_path / 'in', case)
  keys = {'init_from': str(folder), 'data.path': str(rows)}
  if objective:
    keys |= {'objective.name': objective, 'objective.block_length': 8}
  c = finetuning.complete(recipe(**keys), ['objective.name'] * bool(objective))
  assert (
    c.objective.name,
    c.model.predict_next,
    c.model.vocab_size,
  ) == expected
  assert c.objective.predict_mask == (case != 'qwen2')
  assert c.tokens.eos_id == 257
  assert pathlib.Path(c.data.tokenizer).parent == folder
  if case == 'sdar':
    assert c.objective.block_length == 4
  if 'sdlm' in (case, objective):
    assert c.sample.remasking == 'longest_prefix'
    assert c.tokens.bos_id == (-1 if case == 'sdlm' else 256)
  if case == 'sdlm':
    assert c.objective.window_length == 4 and c.tokens.mask_id == 258
  config_lib.validate(c)


def test_missing_inputs_are_refused_in_one_line(
  model, rows, tokenizer, tmp_path
):
  for changes, message in (
    ({'init_from': ''}, 'set --config.init_from to a Hugging Face folder'),
    ({'data.path': 'embedded'}, 'launch/prepare.py --chat, and set --config'),
    ({'init_from': str(rows)}, 'holds no checkpoint'),
    ({'data.path': str(tmp_path)}, 'prepared directory'),
  ):
    with pytest.raises(UserError, match=message) as error:
      small(model, rows, **changes)
    assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='set --config.train.epochs=0 and'):
    pretraining.make_stage(recipe(), None)


def test_rows_without_answers_are_refused(model, corpus, tokenizer, tmp_path):
  c = small(model, corpus, **{'train.epochs': 1.0})
  with pytest.raises(UserError, match='have the columns tokens; this run') as e:
    loop.run(c, str(tmp_path / 'run'), finetuning.make_stage)
  assert 'answer: prepare conversations with launch/prepare.py --chat' in str(
    e.value
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'objective',
  ['masked_diffusion', 'block_diffusion', 'autoregressive', 'sdlm'],
)
def test_run_lowers_the_bound_of_the_answers(model, rows, tmp_path, objective):
  """The answers repeat the prompts, so few steps suffice."""
  c = small(
    model,
    rows,
    **{
      'objective.name': objective,
      'objective.block_length': 8,
      'train.epochs': 4.0,
      'objective.denominator': 'row',
      'eval.answers': 8,
    },
  )
  workdir = tmp_path / 'run'
  loop.run(c, str(workdir), finetuning.make_stage)
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  evaluations = [x for x in lines if 'eval/loss_nats_per_token' in x]
  bounds = [line['eval/loss_nats_per_token'] for line in evaluations]
  assert bounds[-1] < bounds[0] - 0.5, bounds
  assert all(0 <= line['eval/exact_match'] <= 1 for line in evaluations)
  assert json.loads((workdir / 'stage.json').read_text())['name'] == (
    'fine-tuning'
  )
  with pytest.raises(UserError, match='is a checkpoint of fine-tuning, not of'):
    loop.run(c, str(workdir))
