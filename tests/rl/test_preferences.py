"""The stage of preference learning, in short runs of a tiny model."""

import json
import pathlib
import runpy
import shutil

import jax
import made_answers
import numpy as np
import pytest
import rl_runs
import saved
import tiny

from maskdiff import config as config_lib
from maskdiff.data import packing, prepare, sources
from maskdiff.errors import UserError
from maskdiff.model import lora, transformer
from maskdiff.model.trainable import join
from maskdiff.monitoring import metrics
from maskdiff.posttraining import chat, chat_rows
from maskdiff.rl import preferences
from maskdiff.training import inputs, loop

LENGTH, STEPS = 16, 12
RECIPE = pathlib.Path(__file__).parents[2] / 'configs' / 'preferences.py'


@pytest.fixture(scope='module')
def model(tmp_path_factory, tokenizer):
  return made_answers.save_model(tmp_path_factory.mktemp('model'), tokenizer)


@pytest.fixture(scope='module')
def pairs(tmp_path_factory, tokenizer):
  """Returns a directory of pairs, in which "yes" is preferred to "no"."""
  folder = tmp_path_factory.mktemp('pairs')
  lines = [
    json.dumps({'prompt': f'{i}?', 'chosen': 'yes', 'rejected': 'no'})
    for i in range(100)
  ]
  (folder / 'pairs.jsonl').write_text('\n'.join(lines))
  encode = chat_rows.ChatDocuments(chat.load('plain'), 2 * LENGTH, pairs=True)
  prepare.prepare(
    sources.plan([str(folder / 'pairs.jsonl')], records=True),
    tokenizer,
    folder / 'rows',
    row_length=2 * LENGTH,
    heldout_fraction=0.3,
    workers=0,
    layout=packing.Layout('pairs', LENGTH),
    encode=encode,
    encode_settings=encode.settings,
    log=lambda line: None,
  )
  encode.save_template(folder / 'rows')
  return folder / 'rows'


@pytest.fixture(scope='module')
def keys(model, pairs):
  return {
    **tiny.TRAIN_KEYS,
    'policy.method': 'vrpo',
    'policy.settings': (('times', 2), ('chosen_weight', 0.05)),
    'init_from': str(model),
    'data.path': str(pairs),
    'train.batch': 16,
    'train.steps': STEPS,
    'train.log_every_steps': 1,
    'optimizer.learning_rate': 3e-2,
    'eval.batches': 1,
    'eval.every_steps': 100,
    'checkpoint.every_steps': 7,
    'sample.prompts': (),
  }


def completed(keys, given=(), **changes):
  """Returns a config; `changes` have _ for the dot of the section."""
  changes = {key.replace('_', '.', 1): value for key, value in changes.items()}
  return preferences.complete(tiny.config(keys | changes), given)


def test_config_is_completed_from_the_model_and_the_pairs(keys):
  path = made_answers.__file__.replace(
    'tests/made_answers', 'configs/preferences'
  )
  recipe = runpy.run_path(path)['get_config']()
  names = ('init_from', 'data.path', 'train.batch')
  recipe.update_from_flattened_dict({name: keys[name] for name in names})
  c = preferences.complete(recipe)
  rows = (
    inputs.open_data(c, inputs.open_tokenizer(c), columns=('doc',), pairs=True)[
      0
    ]
    .manifest.splits['train']
    .rows
  )
  assert c.data.length == LENGTH and c.model.embed == 16
  assert c.train.steps == -(-rows // 16) and not c.train.epochs
  config_lib.validate(c)


@pytest.mark.parametrize(
  'changes, given, message',
  [
    ({'init_from': ''}, (), 'preference learning starts from a trained model'),
    ({'data.path': 'embedded'}, (), 'prepare.py --chat --layout=pairs'),
    ({'policy.method': 'espo'}, (), 'use launch/rl.py, or set .* to vrpo'),
    ({'data.length': 32}, ('data.length',), 'have 16 tokens for each answer'),
  ],
)
def test_configs_that_do_not_fit(keys, changes, given, message):
  with pytest.raises(UserError, match=message) as error:
    preferences.complete(tiny.config(keys | changes), given)
  assert '\n' not in str(error.value)


def test_rows_of_another_kind_are_refused(keys, pairs, tokenizer, tmp_path):
  rows = made_answers.write_rows(tmp_path / 'rows', tokenizer)
  config = completed(keys)
  with pytest.raises(UserError, match='has no pairs .* --layout=pairs'):
    inputs.open_data(config, tokenizer, str(rows), ('answer',), pairs=True)
  with pytest.raises(UserError, match='has pairs .* launch/preferences.py'):
    inputs.open_data(config, tokenizer, str(pairs), ('answer',))


@pytest.fixture(scope='module')
def finished(keys, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('preferences') / 'run'
  loop.run(completed(keys), str(workdir), preferences.make_stage)
  return workdir


def rows_of(workdir, name):
  rows = metrics.read(workdir / 'metrics.jsonl')
  times = ('train/step_s', 'train/pairs_per_s')
  return [
    {k: v for k, v in row.items() if k not in times}
    for row in rows
    if name in row
  ]


@pytest.mark.slow
def test_a_preference_is_learned(finished):
  """At the start, policy and reference are equal, as are their masks."""
  first, *_, last = rows_of(finished, 'train/preference_loss')
  assert first['train/margin'] == pytest.approx(0, abs=1e-5)
  assert first['train/preference_loss'] == pytest.approx(np.log(2), abs=1e-5)
  chosen = first['train/chosen_nats_per_token']
  total = first['train/preference_loss'] + 0.05 * chosen
  assert first['train/policy_loss'] == pytest.approx(total, rel=1e-4)
  assert last['train/preference_loss'] < 0.2
  before, after = rows_of(finished, 'eval/margin')
  assert before['eval/margin'] == pytest.approx(0, abs=1e-5)
  assert after['eval/preference_accuracy'] == 1
  assert after['eval/chosen_nats_per_token'] < chosen
  header = (finished / 'header.txt').read_text()
  assert 'preference learning: vrpo (times=2, chosen_weight=0.05), 2' in header
  assert (finished / 'chat_template.jinja').exists()


@pytest.mark.slow
def test_resume_is_bitwise_exact(keys, finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'run')
  shutil.rmtree(workdir / 'checkpoints' / str(STEPS))
  loop.run(completed(keys), str(workdir), preferences.make_stage)
  (step, _, arrays), (_, _, expected) = map(saved.newest, (workdir, finished))
  assert step == STEPS
  for name, x in arrays.items():
    assert x.tobytes() == expected[name].tobytes(), name
  for name in ('train/margin', 'eval/margin'):
    assert rows_of(workdir, name) == rows_of(finished, name)
  other = completed(keys, policy_settings=(('times', 4),))
  with pytest.raises(UserError, match='policy.settings'):
    loop.run(other, str(workdir), preferences.make_stage)


@pytest.fixture(scope='module')
def one(keys):
  return rl_runs.Opened(completed(keys), 1, preferences.make_stage)


@pytest.mark.slow
def test_eight_devices_and_microbatches_train_as_one_device(keys, one):
  config = completed(keys, train_microbatches=2)
  many = rl_runs.Opened(config, 8, preferences.make_stage)
  for name in ('tokens', 'valid', 'answer', 'counted'):
    found, expected = (getattr(o.batch.rows, name) for o in (many, one))
    np.testing.assert_array_equal(found, expected)
  rl_runs.require_equal_steps(many, one, atol=5e-5)


@pytest.mark.slow
def test_rows_of_a_batch_are_chosen_and_rejected_answers(one, tokenizer):
  rows = jax.device_get(one.batch.rows)
  texts = [
    tokenizer.decode(t[a].tolist())
    for t, a in zip(rows.tokens, rows.answer, strict=True)
  ]
  assert texts == ['yes', 'no'] * 16
  prompts = np.where(rows.valid & ~rows.answer, rows.tokens, -1)
  np.testing.assert_array_equal(prompts[::2], prompts[1::2])
  assert len(np.unique(prompts, axis=0)) == 16


@pytest.mark.slow
def test_reference_of_adapters_is_the_base(keys, one):
  config = completed(keys, lora_rank=2)
  made = preferences.make_stage(config, one.setup)
  c = transformer.from_config(config)
  adapters = lora.trained(transformer.init(c, jax.random.key(0)))
  one.start()
  params = join(one.state.params, jax.tree.map(lambda x: x + 0.1, adapters))
  with jax.set_mesh(one.mesh):
    batch, _, _ = made.next_batch(made.start, params)
  np.testing.assert_allclose(batch.fixed, one.batch.fixed, atol=1e-6)
