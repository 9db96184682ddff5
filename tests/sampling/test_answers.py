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
from maskdiff.sampling.settings import split

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
  c, settings = split(
    {
      'steps': LENGTH,
      'block_length': 4,
      'temperature': 0.7,
      'remasking': 'low_confidence',
      'gen_length': LENGTH,
    }
  )
  network = fake_networks.network(
    nearest,
    jnp.asarray(table, jnp.float32),
    mask_id=tokenizer.mask_id,
    bos_id=tokenizer.bos_id,
    eos_id=tokenizer.eos_id,
  )
  return Sampling(network, c, settings, tokenizer, context=100)


def with_settings(sampling, **changes):
  return sampling._replace(settings=sampling.settings._replace(**changes))


def encode(sampling, texts, gaps=False):
  prompts = [Prompt(text, seed) for seed, text in enumerate(texts)]
  return answers.encode_texts(prompts, gaps, sampling.tokenizer.encode, LENGTH)


def converse(sampling, lines):
  """Returns the answers of a conversation, and its notes."""
  notes = []
  return list(answers.converse(sampling, lines, 0, notes.append)), notes


TEXTS = ['def f(', '', 'x = 1', 'a much longer text, of many words more', '"']
GAPS = ['def {{2}}({{1}}):', '{{3}}', 'a{{1}}b{{1}}c{{1}}']


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
  s = with_settings(sampling, stop_at_eos=True)
  found = list(answers.in_batches(s, encode(s, ['x'] * 24), 24))
  short = [a for a in found if a['tokens'] < LENGTH]
  assert short and len(short) < len(found)
  assert all(a['forwards'] <= LENGTH for a in found)
  found, _ = converse(s, ['x {{8}} y'] * 24)
  assert {a['tokens'] for a in found} == {LENGTH}
  assert all(a['text'].endswith(' y') for a in found)


@pytest.mark.parametrize('gaps', [False, True])
def test_recorded_answers_equal_those_in_batches(sampling, gaps, tokenizer):
  texts = encode(sampling, GAPS if gaps else TEXTS, gaps)
  seen, rows = [], len(texts.prompts)
  found, recordings = answers.record(sampling, texts, seen.append)
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
  s = with_settings(sampling, stop_at_eos=True)._replace(trajectory=True)
  texts = encode(sampling, GAPS if gaps else ['x'] * 24, gaps)
  seen = []
  answers.record(s, texts, seen.append)
  for row, answer in enumerate(answers.in_batches(s, texts, 3)):
    json.dumps(answer)
    slots, ids = answer['slots'], np.array(answer['ids'])
    assert len(ids) == len(answer['steps']) == texts.request.fill[row].sum()
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


def test_conversation_compiles_few_programs(sampling):
  """One program each for rows of up to 32, 64 and 100 (the context) tokens."""
  before = sampler.run._cache_size()
  texts = ['a' + ' b' * n for n in (1, 3, 40, 5, 70, 41, 71, 2)]
  lengths = [len(sampling.tokenizer.encode(text)) + LENGTH for text in texts]
  assert min(lengths) <= 32 < 64 < max(lengths) <= 100
  found, notes = converse(with_settings(sampling, top_k=9), texts)
  assert len(found) == len(texts)
  assert notes == [
    f'compiling for texts of up to {n} tokens' for n in (32, 64, 100)
  ]
  assert sampler.run._cache_size() == before + 3


BAD_LINES = {
  'empty': ('', 'the line is empty'),
  'blank': (' \t', 'the line is empty'),
  'long': ('a b ' * 60, 'tokens together.*data.length=100'),
  'letter': ('a{{b}}', r'braces that are not a gap: write \{\{n\}\}'),
  'open': ('a{{2', 'braces that are not a gap'),
  'one_bad': ('a{{2}} {{', 'braces that are not a gap'),
  'none': ('a{{0}}', 'no gap in'),
  'too_many': ('a{{9}}', 'gaps have 9 tokens.*--gen_length=9 instead of 8'),
  'huge': ('a{{' + '9' * 30 + '}}', 'too long'),
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

  network = dataclasses.replace(sampling.network, config=fails_at_x)
  found, notes = converse(sampling._replace(network=network), ['x', 'y'])
  assert [a['prompt'] for a in found] == ['y']
  assert 'NaN or infinite' in notes[-1]
