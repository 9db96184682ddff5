"""From a folder of text to a trained model, with one command for each."""

import dataclasses
import json
import os
import pathlib
import random
import shlex
import tempfile

import forked
import pytest
import tiny

from maskdiff import config
from maskdiff.data import (
  first_run,
  prepare,
  records,
  samples,
  shards,
  sources,
  tokenizer,
  tokenizer_training,
)
from maskdiff.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
SHIPPED = ROOT / 'tokenizer' / 'stdlib_4k.model'
WORDS = (ROOT / 'WORKSPACE.md').read_text().split()


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
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
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
  pieces = list(shards.pieces([text, 'x' * 250], 100))
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


def test_rows_without_held_out_text_have_no_command(tmp_path):
  path = write_texts(tmp_path / 'in', [3000] * 3)
  choices = first_run.Choices(16, 0.0)
  manifest, tok = prepared(path, tmp_path / 'out', choices)
  assert first_run.command('rows', manifest, tok) is None
  assert isinstance(manifest, records.Manifest)
