"""From a folder of text to a trained model, with one command for each."""

import dataclasses
import itertools
import json
import os
import pathlib
import random
import re
import shlex
import tempfile
import types

import forked
import jax
import pytest
import tiny

from maskdiff import config
from maskdiff.data import (
  documents,
  first_run,
  prepare,
  records,
  samples,
  shards,
  sources,
  tokenizer,
  tokenizer_training,
)
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.training import inputs

ROOT = pathlib.Path(__file__).parents[2]
SHIPPED = ROOT / 'tokenizer' / 'stdlib_4k.model'
SYLLABLES = (
  'ba de fi go lu ma ne pi ro su ta ve wi xo zu an er il os um'.split()
)
WORDS = [''.join(p) for p in itertools.product(SYLLABLES, SYLLABLES[::3])]


def write_texts(folder, sizes, seed=0):
  """Writes text files of about so many bytes; returns the folder."""
  rng = random.Random(seed)
  folder.mkdir(parents=True, exist_ok=True)
  for n, size in enumerate(sizes):
    lines, length = [], 0
    while length < size:
      lines.append(' '.join(rng.choices(WORDS, k=8)))
      length += len(lines[-1]) + 1
    (folder / f'{n}.txt').write_text('\n'.join(lines))
  return folder


def run(folder, *words):
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  return forked.run(list(map(str, words)), environment, folder, timeout=300)


@pytest.mark.slow
def test_printed_command_trains_on_three_text_files(tmp_path):
  """The first command is all that a new user must know."""
  write_texts(tmp_path / 'text', [3000, 4000, 5000])
  words = [ROOT / 'launch' / 'prepare.py', '--source=text', '--workers=1']
  words += ['--out=text/my rows', '--train_tokenizer']
  done = run(tmp_path, *words)
  assert done.returncode == 0, done.stderr
  *_, line, command = done.stdout.splitlines()
  assert line == 'to train on these rows:'
  python, script, *arguments = shlex.split(command)
  assert python == 'python' and "'--config.data.path=text/my rows'" in command
  small = {
    k: v for k, v in tiny.TRAIN_KEYS.items() if k[:4] in ('mode', 'opti')
  }
  small |= {
    'train.steps': 2,
    'optimizer.warmup_steps': 1,
    'optimizer.decay_steps': 1,
    'sample.steps': 2,
    'sample.gen_length': 8,
  }
  arguments += [f'--config.{key}={value}' for key, value in small.items()]
  done = run(tmp_path, ROOT / script, *arguments)
  assert done.returncode == 0, done.stderr[-2000:]
  metrics = (tmp_path / 'runs' / 'my rows' / 'metrics.jsonl').read_text()
  rows = list(map(json.loads, metrics.splitlines()))
  assert any('eval/loss_nats_per_token' in row for row in rows)
  assert rows[-1]['step'] == 2


def plan_of(path):
  return sources.plan([str(path)])


def prepared(path, out, choices=None, tok=None, vocab_size=None):
  plan = plan_of(path)
  choices = choices or first_run.choose(plan)
  out.mkdir(exist_ok=True)
  tok = tok or first_run.train_tokenizer(
    plan, choices, vocab_size, out.parent / f'{out.name}.model'
  )
  manifest = prepare.prepare(
    plan,
    tok,
    out,
    workers=0,
    log=lambda line: None,
    row_length=choices.row_length,
    heldout_fraction=choices.heldout_fraction,
    piece_chars=choices.piece_chars,
  )
  return manifest, tok


@pytest.mark.parametrize(
  'sizes',
  [[3000], [60_000], [2000] * 3, [300] * 40, [3000] * 30, [40_000, 500], [900]],
  ids=str,
)
def test_choices_leave_rows_for_training_and_evaluation(tmp_path, sizes):
  for seed in range(3):
    path = write_texts(tmp_path / f'in{seed}', sizes, seed)
    manifest, tok = prepared(path, tmp_path / f'out{seed}')
    splits = manifest.splits
    assert splits['heldout'].rows >= 2
    assert splits['train'].rows >= splits['heldout'].rows
    values = flags_of(first_run.command('rows', manifest, tok))
    batch, batches = values['eval.batch'], values['eval.batches']
    held_out = samples.num_samples(
      splits['heldout'].rows, manifest.row_length, values['data.length']
    )
    assert batch % 2 == 0 and 1 <= batch * batches <= held_out
    assert batch >= 8 or sum(sizes) < 3000  # divides among 8 devices


def flags_of(command):
  """Returns the config keys of a command, as the script would parse them."""
  found = {}
  for word in shlex.split(command):
    if word.startswith('--config.'):
      key, _, value = word.removeprefix('--config.').partition('=')
      kind = type(config.lookup(config.default(), key))
      found[key] = value if kind is tuple else kind(value)
  return found


def test_whole_documents_stay_whole_if_they_are_many(tmp_path):
  path = write_texts(tmp_path / 'in', [2000] * 60)
  choices = first_run.choose(plan_of(path))
  assert choices.piece_chars == 0 and choices.row_length == 128
  assert first_run.choose(plan_of(path), 16, 0.25) == first_run.Choices(
    16, 0.25
  )
  assert first_run.choose(plan_of(path), heldout_fraction=0.0) == (
    first_run.Choices(128, 0.0)
  )
  for bad in (float('nan'), -1.0, float('inf'), 1.5):
    with pytest.raises(UserError, match='--heldout_fraction'):
      first_run.choose(plan_of(path), heldout_fraction=bad)


def test_pieces_hold_all_the_text(tmp_path):
  path = write_texts(tmp_path / 'in', [5000])
  choices = first_run.Choices(8, 0.0, 100)
  manifest, tok = prepared(path, tmp_path / 'out', choices)
  assert manifest.settings['piece_chars'] == 100
  assert manifest.splits['train'].documents >= 50
  text = (path / '0.txt').read_text()
  pieces = list(documents.pieces([text, 'x' * 250], 100))
  assert ''.join(pieces) == text + 'x' * 250
  assert max(map(len, pieces)) <= 100
  assert all(p.endswith('\n') for p in pieces[:40])


def test_tokenizer_is_not_trained_on_held_out_text(tmp_path):
  """A character of held-out documents only is no piece of the tokenizer."""
  (tmp_path / 'in').mkdir()
  rare = {}
  for n in range(200):
    text = f'{chr(0x4E00 + n)} ' * 300
    (tmp_path / 'in' / f'{n}.txt').write_text(text)
    rare[chr(0x4E00 + n)] = shards.hash_fraction(text) < 0.2
  choices = first_run.Choices(16, 0.2)
  tok = first_run.train_tokenizer(
    plan_of(tmp_path / 'in'), choices, None, tmp_path / 'a.model'
  )
  known = {
    c: c in b''.join(tok.pieces).decode('utf-8', 'replace') for c in rare
  }
  assert any(rare.values())
  assert all(known[c] != held_out for c, held_out in rare.items())
  again = first_run.train_tokenizer(
    plan_of(tmp_path / 'in'), choices, None, tmp_path / 'b.model'
  )
  assert again.fingerprint == tok.fingerprint


def test_vocabulary_size_fits_the_text():
  size = lambda *args: len(
    tokenizer_of(tokenizer_training.train_on(*args)).pieces
  )
  rng = random.Random(0)
  text = '\n'.join(' '.join(rng.choices(WORDS, k=9)) for _ in range(3000))
  assert size(['tiny'], None) < 512  # the text allows no more
  assert size([text], None) == 512
  assert size([text], 700) == 700
  many = ''.join(chr(0x4E00 + n) for n in range(2000)) * 2
  assert size([many], None) > 2000  # its characters need as many
  with pytest.raises(UserError, match='--vocab_size 10 is too small'):
    size([text], 10)
  with pytest.raises(UserError, match='--vocab_size 9999 is too large'):
    size(['tiny'], 9999)
  with pytest.raises(UserError, match='no text'):
    size([], None)


@pytest.mark.parametrize(
  'text, vocab_size', [('\n\n\n', None), ('\0' * 50, None), ('tiny', 1)]
)
def test_text_without_pieces_is_one_line(text, vocab_size):
  with pytest.raises(UserError, match='cannot train a tokenizer'):
    tokenizer_training.train_on([text], vocab_size)


def tokenizer_of(model):
  with tempfile.NamedTemporaryFile(suffix='.model') as file:
    file.write(model)
    file.flush()
    return tokenizer.load(file.name)


def test_stored_choices_are_used_again(tmp_path):
  path = write_texts(tmp_path / 'in', [3000] * 3)
  assert first_run.stored(tmp_path / 'out') is None
  choices = first_run.choose(plan_of(path))
  _, tok = prepared(path, tmp_path / 'out', choices)
  found, again = first_run.stored(tmp_path / 'out')
  assert (found.fingerprint, again) == (tok.fingerprint, choices)


@pytest.mark.parametrize(
  'settings',
  [
    [],
    {},
    {'row_length': '8', 'heldout_fraction': 0.1},
    {'row_length': 8.0, 'heldout_fraction': 0.1},
    {'row_length': 8, 'heldout_fraction': float('nan')},
    {'row_length': 8, 'heldout_fraction': 0.1, 'piece_chars': -1},
    {'row_length': 10**12, 'heldout_fraction': 0.1},
    {'row_length': True, 'heldout_fraction': 0.1},
  ],
)
def test_damaged_stored_choices_are_refused(tmp_path, settings):
  (tmp_path / '.prepare').mkdir()
  path = tmp_path / '.prepare' / 'settings.json'
  path.write_text(json.dumps(settings))
  with pytest.raises(UserError, match='rows of another kind'):
    first_run.stored(tmp_path)


def test_command_gives_ids_that_a_tokenizer_lacks(tmp_path):
  tok = tokenizer.load(SHIPPED)
  path = write_texts(tmp_path / 'in', [3000] * 3)
  manifest, _ = prepared(path, tmp_path / 'out', tok=tok)
  values = flags_of(first_run.command('rows', manifest, tok))
  assert values['model.vocab_size'] == tok.vocab_size
  assert not any(key.startswith('tokens.') for key in values)
  bare = dataclasses.replace(tok, mask_id=None, bos_id=None, eos_id=7)
  values = flags_of(first_run.command('rows', manifest, bare))
  # The ids 4 and 1 are special in the file, so that no text has them.
  assert values['tokens.eos_id'] == 7 and 'tokens.mask_id' not in values
  pieces = (b'a',) * 10
  bare = dataclasses.replace(bare, vocab_size=10, pieces=pieces)
  values = flags_of(first_run.command('rows', manifest, bare))
  assert values['tokens.mask_id'] == 10 and values['tokens.bos_id'] == 11
  assert values['model.vocab_size'] == 12


def test_command_of_a_fine_tuning_fits_the_rows(tmp_path):
  """The model is a folder with a config.json, or one that the user names."""
  split = lambda rows: types.SimpleNamespace(rows=rows)
  manifest = lambda train, heldout, layout='packed': types.SimpleNamespace(
    splits={'train': split(train), 'heldout': split(heldout)},
    settings={'layout': layout},
  )
  model = tmp_path / 'a model'
  model.mkdir()
  (model / 'config.json').write_text('{}')
  for train, heldout, expected in (
    (10**6, 10**4, (256, 32, 16)),
    (3531, 188, (64, 32, 5)),
    (40, 3, (2, 2, 1)),
  ):
    text = first_run.fine_tuning(
      'rows', manifest(train, heldout), ['plain', str(model)]
    )
    line, command = text.splitlines()
    assert line == 'to fine-tune a model on these rows:'
    values = flags_of(command)
    names = ('train.batch', 'eval.batch', 'eval.batches')
    assert tuple(values[name] for name in names) == expected
    assert values['init_from'] == str(model) and values['data.path'] == 'rows'
    assert 'launch/finetune.py --config configs/sft.py' in command
  text = first_run.fine_tuning('rows', manifest(9, 2), ['plain', 'x.model'])
  assert 'MODEL being' in text and '--config.init_from=MODEL' in text
  text = first_run.fine_tuning('rows', manifest(9, 2, 'pairs'), [])
  assert 'launch/preferences.py --config configs/preferences.py' in text
  for rows in ((9, 1), (0, 9)):
    assert first_run.fine_tuning('rows', manifest(*rows), []).startswith('note')


def test_rows_without_held_out_text_have_no_command(tmp_path):
  path = write_texts(tmp_path / 'in', [3000] * 3)
  choices = first_run.Choices(16, 0.0)
  manifest, tok = prepared(path, tmp_path / 'out', choices)
  assert first_run.command('rows', manifest, tok) is None
  assert isinstance(manifest, records.Manifest)


def config_of(**changes):
  c = config.default()
  c.update_from_flattened_dict(
    {k.replace('__', '.'): v for k, v in changes.items()}
  )
  return c


def follow(c, message):
  """Sets the flags that a message names, as a user who pastes them."""
  found = re.findall(r'--config\.([\w.]+)=([^\s,;:]+)', message)
  assert found, message
  for key, value in found:
    kind = type(config.lookup(c, key))
    c.update_from_flattened_dict({key: kind(value)})


def test_first_errors_name_flags_that_work(tmp_path):
  """From rows of a trained tokenizer, each error's flags lead to the next."""
  path = write_texts(tmp_path / 'in', [3000] * 3)
  rows = tmp_path / 'rows'
  prepared(path, rows)
  c = config_of(
    data__path=str(rows),
    data__length=48,
    model__vocab_size=64,
    tokens__mask_id=9,
  )
  c.data.tokenizer = str(SHIPPED)
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  errors = []
  for _ in range(8):
    try:
      tok = inputs.open_tokenizer(c)
      datasets = inputs.open_data(c, tok)
      batches = list(inputs.heldout_batches(c, datasets[0], mesh))
      break
    except UserError as e:
      errors.append(str(e))
      follow(c, str(e))
  assert batches[0].tokens.shape == (c.eval.batch, c.data.length)
  assert c.eval.batch % 2 == 0
  kinds = (
    'mask_id',
    'prepared with tokenizer',
    'does not fit rows',
    'batches of',
  )
  for kind in kinds:
    assert any(kind in error for error in errors), errors
  config.validate(c)


@pytest.mark.parametrize(
  'held_out, batch, advice',
  [
    (100, 32, 'set --config.eval.batches=3'),
    (31, 32, 'set --config.eval.batch=16 --config.eval.batches=1'),
    (3, 32, 'set --config.eval.batch=2 --config.eval.batches=1'),
    (1, 2, 'prepare more held-out text'),
  ],
)
def test_advice_on_few_held_out_samples(held_out, batch, advice):
  found = samples.fewer_batches(held_out, batch)
  assert found.startswith(advice) and 'prepare more held-out text' in found


def test_vocabulary_of_a_tokenizer_without_mask(tmp_path):
  tok = tokenizer.load(SHIPPED)
  fit = lambda tok, **ids: first_run.fit_vocabulary(
    tok, {'mask_id': 4, 'bos_id': 1, 'eos_id': 2} | ids, 4096
  )
  assert fit(tok) == {}
  assert fit(tok, mask_id=7) == {'tokens.mask_id': 4}
  text = next(i for i, piece in enumerate(tok.pieces) if piece)
  bare = dataclasses.replace(tok, mask_id=None)
  assert fit(bare) == {}  # no text has the id 4
  for given in (text, -1, 2):
    assert fit(bare, mask_id=given) == {
      'tokens.mask_id': 4096,
      'model.vocab_size': 4097,
    }
  assert fit(bare, mask_id=5000) == {'model.vocab_size': 5001}
