"""Answers in batches, recorded, and in a conversation, with a fake network."""

import dataclasses
import json
import re

import fake_networks
import jax.numpy as jnp
import numpy as np
import pytest

from maskdiff.sampling import answers, recording, sampler
from maskdiff.sampling.answers import Sampling
from maskdiff.sampling.prompts import Prompt
from maskdiff.sampling.settings import SamplerConfig, Settings

LENGTH = 8  # slots of an answer


def nearest(table, tokens, valid):
  """Returns logits that depend on the two neighbours of each position."""
  known = jnp.where(valid, tokens, 0)
  left, right = jnp.roll(known, 1, axis=1), jnp.roll(known, -1, axis=1)
  right = right.at[:, -1].set(0)
  return table[left.at[:, 0].set(0)] + table[right]


@pytest.fixture(autouse=True)
def fake(monkeypatch):
  fake_networks.put_in(monkeypatch)


@pytest.fixture(scope='module')
def sampling(tokenizer):
  """Returns a Sampling whose network predicts 31 tokens, eos among them."""
  random = np.random.default_rng(0)
  size = tokenizer.vocab_size
  table = np.full((size, size), -30.0)
  some = [tokenizer.eos_id, *range(300, 330)]
  table[:, some] = random.normal(size=(size, len(some))) * 2
  c = SamplerConfig(block_length=4, remasking='low_confidence')
  network = fake_networks.network(
    nearest,
    jnp.asarray(table, jnp.float32),
    mask_id=tokenizer.mask_id,
    bos_id=tokenizer.bos_id,
    eos_id=tokenizer.eos_id,
  )
  return Sampling(network, c, tokenizer, context=100)


SETTINGS = Settings(steps=LENGTH, gen_length=LENGTH, temperature=0.7)


def encode(sampling, texts, gaps=False, **changes):
  """Returns a list of Texts with settings that differ from SETTINGS."""
  settings = SETTINGS._replace(**changes)
  if gaps:
    settings = settings._replace(steps=0, gen_length=0)
  return [
    answers.encode_text(
      Prompt(text, seed),
      gaps,
      settings,
      sampling.tokenizer.encode,
      sampling.context,
    )
    for seed, text in enumerate(texts)
  ]


def converse(sampling, lines, **changes):
  """Returns the answers of a conversation, and its notes."""
  notes = []
  settings = SETTINGS._replace(**changes)
  found = answers.converse(sampling, settings, lines, 0, notes.append)
  return list(found), notes


TEXTS = ['def f(', '', 'x = 1', 'a much longer text, of many words more', '"']
GAPS = ['def {{2}}({{1}}):', '{{3}}', 'a{{1}}b{{1}}c{{1}}']


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch(sampling):
  texts = encode(sampling, TEXTS)
  found = list(answers.in_batches(sampling, texts, 2))
  assert found == list(answers.in_batches(sampling, texts, 5))
  assert [a['prompt'] for a in found] == TEXTS
  assert [a['seed'] for a in found] == list(range(5))
  for answer in found:
    assert answer['text'] == answer['prompt'] + answer['answer']
    assert answer['tokens'] == answer['forwards'] == LENGTH


def test_prompts_stop_at_eos_and_gaps_do_not(sampling):
  texts = encode(sampling, ['x'] * 24, stop_at_eos=True)
  found = list(answers.in_batches(sampling, texts, 24))
  short = [a for a in found if a['tokens'] < LENGTH]
  assert short and len(short) < len(found)
  assert all(a['forwards'] <= LENGTH for a in found)
  found, _ = converse(sampling, ['x {{8}} y'] * 24, stop_at_eos=True)
  assert {a['tokens'] for a in found} == {LENGTH}
  assert all(a['text'].endswith(' y') for a in found)


@pytest.mark.parametrize('gaps', [False, True])
def test_recorded_answers_equal_those_in_batches(sampling, gaps, tokenizer):
  texts = encode(sampling, GAPS if gaps else TEXTS, gaps)
  seen, rows = [], len(texts)
  found, recordings = answers.record(sampling, texts, rows, seen.append)
  assert found == list(answers.in_batches(sampling, texts, rows))
  assert seen[-1] == [answer['text'] for answer in found]
  assert len(seen) == max(map(recording.num_steps, recordings)) + 1
  for step, texts_then in enumerate(seen):
    canvases = [
      recording.canvas_after(r, step, tokenizer.mask_id) for r in recordings
    ]
    assert texts_then == list(map(tokenizer.decode, canvases))
  for r in recordings:
    np.testing.assert_array_equal(np.isnan(r.confidence), ~r.fill)


@pytest.mark.parametrize('gaps', [False, True])
def test_trajectory_has_every_slot(sampling, gaps, tokenizer):
  """The lists rebuild the row, and the canvas of every step."""
  s = sampling._replace(trajectory=True)
  texts = encode(s, GAPS if gaps else ['x'] * 24, gaps, stop_at_eos=not gaps)
  seen = []
  answers.record(s, texts, 8, seen.append)
  for row, answer in enumerate(answers.in_batches(s, texts, 3)):
    json.dumps(answer)
    slots, ids = answer['slots'], np.array(answer['ids'])
    assert len(ids) == len(answer['steps']) == texts[row].row.count(None)
    tokens = np.zeros(len(slots) + len(answer['given_ids']), int)
    tokens[slots] = ids
    tokens[np.setdiff1d(np.arange(len(tokens)), slots)] = answer['given_ids']
    if tokenizer.eos_id not in ids:
      assert tokenizer.decode(tokens) == answer['text']
    for step in range(max(answer['steps'])):
      masked = np.array(answer['steps']) > step
      assert masked.any()
      assert seen[step][row].count('\u2591') <= masked.sum()
    # Slots that were filled because of an eos have no confidence.
    ended = [c is None for c in answer['confidence']]
    assert set(ids[ended]) <= {tokenizer.eos_id}
    assert {a for a, e in zip(answer['steps'], ended, strict=True) if e} <= {
      max(answer['steps'])
    }
    assert answer['settings']['temperature'] == 0.7
  assert 'ids' not in next(answers.in_batches(sampling, texts, 3))


def test_each_text_has_its_own_settings_and_length(sampling):
  """Equals the same text among texts that all have its settings."""
  own = [dict(), dict(temperature=0.0), dict(gen_length=5, steps=4), dict()]
  own.append(dict(gen_length=3, steps=3, temperature=1.5, top_k=4))
  mixed = [
    encode(sampling, TEXTS, **changes)[i] for i, changes in enumerate(own)
  ]
  found = list(answers.in_batches(sampling, mixed, 2))
  assert [a['tokens'] for a in found] == [LENGTH, LENGTH, 5, LENGTH, 3]
  for i, changes in enumerate(own):
    all_alike = encode(sampling, TEXTS, **changes)
    assert list(answers.in_batches(sampling, all_alike, 5))[i] == found[i]


def test_program_fits_its_texts(sampling):
  """Blocks are not longer than answers; one text with guidance needs it."""
  texts = encode(sampling, TEXTS)
  c = dataclasses.replace(sampling.c, block_length=64)
  fit = lambda texts: answers.fit(sampling.network, c, texts, SETTINGS)
  assert fit(texts).block_length == LENGTH
  assert not fit(texts).guided
  texts += encode(sampling, ['x'], gen_length=20, steps=20, guidance=0.5)
  assert fit(texts).block_length == 20
  assert fit(texts).guided


def test_conversation_equals_a_batch(sampling):
  """Neither padding nor earlier lines change an answer."""
  texts = [text for text in TEXTS if text]
  found, _ = converse(sampling, texts)
  batch = answers.in_batches(sampling, encode(sampling, texts), len(texts))
  assert found == list(batch)


def test_conversation_mixes_prompts_and_gaps(sampling):
  found, _ = converse(sampling, [GAPS[0], 'x = 1', GAPS[2]])
  assert [a.get('infill') for a in found] == [GAPS[0], None, GAPS[2]]
  assert found[0]['text'].startswith('def ')
  assert found[0]['text'].endswith('):')
  assert [a['tokens'] for a in found] == [3, LENGTH, 3]


@pytest.mark.slow
def test_conversation_compiles_few_programs(sampling):
  """One program each for rows of up to 32, 64 and 100 (the context) tokens."""
  sampler.run.clear_cache()
  texts = ['a' + ' b' * n for n in (1, 3, 40, 5, 70, 41, 71, 2)]
  lengths = [len(sampling.tokenizer.encode(text)) + LENGTH for text in texts]
  assert min(lengths) <= 32 < 64 < max(lengths) <= 100
  found, notes = converse(sampling, texts, top_k=9)
  assert len(found) == len(texts)
  assert notes == [
    f'compiling for texts of up to {n} tokens' for n in (32, 64, 100)
  ]
  assert sampler.run._cache_size() == 3


BAD_LINES = {
  'empty': ('', 'the line is empty'),
  'blank': (' \t', 'the line is empty'),
  'long': ('a b ' * 60, 'tokens together.*data.length=100'),
  'letter': ('a{{b}}', r'braces that are not a gap: write \{\{n\}\}'),
  'open': ('a{{2', 'braces that are not a gap'),
  'one_bad': ('a{{2}} {{', 'braces that are not a gap'),
  'none': ('a{{0}}', 'no gap in'),
  'too_many': ('a{{9}}', 'gaps have 9 tokens.*--gen_length=9 instead of 8'),
  'huge': ('a{{' + '9' * 30 + '}}', 'data.length=100: ask for fewer'),
  'many': ('a{{99999}}' * 1000, 'gaps have 99999000 tokens together'),
  'bytes': ('a\udcff', 'not UTF-8'),
}


@pytest.mark.parametrize('case', BAD_LINES)
def test_bad_line_is_reported_and_skipped(sampling, case):
  line, message = BAD_LINES[case]
  found, notes = converse(sampling, ['x', line, 'y'])
  assert [(a['prompt'], a['seed']) for a in found] == [('x', 0), ('y', 1)]
  (error,) = [note for note in notes if note.startswith('error: ')]
  assert '\n' not in error
  assert re.search(message, error)


def test_line_with_nan_logits_is_reported(sampling, monkeypatch):
  def fails_at_x(table, tokens, valid):
    bad = (tokens == sampling.tokenizer.encode('x')[0]).any(axis=1)
    return jnp.where(bad[:, None, None], jnp.nan, nearest(table, tokens, valid))

  config = fake_networks.Config(fails_at_x)
  network = dataclasses.replace(sampling.network, config=config)
  found, notes = converse(sampling._replace(network=network), ['x', 'y'])
  assert [a['prompt'] for a in found] == ['y']
  assert 'NaN or infinite' in notes[-1]
