"""Samples: those of launch/sample.py, golden runs, given noise, errors."""

import math

import golden_models
import jax
import numpy as np
import pytest

import maskdiff
from maskdiff.sampling import answers, layouts, sampler
from maskdiff.sampling.prompts import Prompt
from maskdiff.sampling.settings import of_request

# The longest rows have 32 tokens and slots, which the library pads rows to, so
# that the script runs the same program.
PROMPTS = ['def read(', 'x = ', ' return' * 24]
GAPS = [' return' * 28 + '{{3}}{{1}}', 'a{{1}}b']
GREEDY = {'gen_length': 8, 'block_length': 8}


@pytest.fixture(scope='module')
def golden_b():
  """Returns the second golden model, which has a run at a temperature."""
  return maskdiff.load(golden_models.GOLDEN / 'model_b')


def by_script(model, texts, values, gaps=False, changes=({}, {}, {}), seed=0):
  """Returns the answers by the functions that launch/sample.py calls."""
  context = model.config.data.length
  steps = values.get('steps')
  c, settings = of_request(model.config, values, {}, gaps, steps)
  encoded = []
  for i, (text, change) in enumerate(zip(texts, changes, strict=False)):
    own = of_request(model.config, values, change, gaps, steps)[1]
    prompt = Prompt(text, seed + i)
    encode = model.tokenizer.encode
    encoded.append(answers.encode_text(prompt, gaps, own, encode, context))
  s = answers.Sampling(
    model.network,
    answers.fit(model.network, c, encoded, settings),
    model.tokenizer,
    context,
    trajectory=True,
  )
  with jax.set_mesh(model.mesh):
    return list(answers.in_batches(s, encoded, 16))


@pytest.mark.slow
@pytest.mark.parametrize(
  'values',
  [
    GREEDY,
    {**GREEDY, 'temperature': 1.0, 'top_p': 0.9, 'steps': 3},
    {**GREEDY, 'remasking': 'threshold', 'threshold': 0.001},
  ],
  ids=['greedy', 'temperature', 'threshold'],
)
def test_samples_equal_those_of_the_script(run, values):
  found = maskdiff.sample(run, PROMPTS, seed=3, **values)
  assert found == by_script(run, PROMPTS, values, seed=3)
  ids = [run.tokenizer.encode(prompt) for prompt in PROMPTS]
  again = maskdiff.sample(run, ids, seed=[3, 4, 5], **values)
  assert [a['ids'] for a in again] == [b['ids'] for b in found]


def test_filled_gaps_equal_those_of_the_script(run):
  values = {'temperature': 0.7}
  found = maskdiff.sample(run, GAPS, gaps=True, **values)
  expected = by_script(run, GAPS, {**values, 'gen_length': 64}, gaps=True)
  assert found == expected
  rows = [layouts.gap_row(text, run.tokenizer.encode) for text in GAPS]
  again = maskdiff.sample(run, rows, gaps=True, **values)
  assert [a['ids'] for a in again] == [b['ids'] for b in found]


def test_settings_may_differ_by_prompt(run):
  changes = [{'temperature': t} for t in (0.0, 0.5, 1.5)]
  temperature = np.array([0, 0.5, 1.5], np.float32)
  found = maskdiff.sample(run, PROMPTS, temperature=temperature, **GREEDY)
  assert found == by_script(run, PROMPTS, GREEDY, changes=changes)


def test_left_to_right_samples_equal_those_of_the_script(causal):
  values = {'gen_length': 8}
  found = maskdiff.sample(causal, PROMPTS, **values)
  assert found == by_script(causal, PROMPTS, values)


def test_open_answers_fill_the_row(run):
  (found,) = maskdiff.sample(run, ['def '], open_length=True, block_length=32)
  assert found['settings']['stop_at_eos']
  assert len(found['given_ids']) + len(found['slots']) == 32


def test_seed_has_no_effect_at_temperature_0(run):
  first, second = (
    maskdiff.sample(run, PROMPTS, seed=seed, **GREEDY) for seed in (0, 99)
  )
  assert [a['ids'] for a in first] == [b['ids'] for b in second]
  drawn = lambda seed: maskdiff.sample(
    run, PROMPTS, temperature=1.0, seed=seed, **GREEDY
  )[0]['ids']
  assert drawn(0) == drawn(0) != drawn(99)


# Golden runs and given noise


def recorded(name, case):
  with np.load(golden_models.GOLDEN / 'generate.npz') as file:
    arrays = {
      key.rpartition('.')[2]: file[key]
      for key in file
      if key.startswith(f'{name}.{case}.')
    }
    return arrays, int(file[f'{name}.ids'][2])


def assert_golden(model, name, case, noise=lambda size: {}):
  """Compares the filled rows, and the step of every slot, with a golden run."""
  of, eot_id = recorded(name, case)
  prompts = of['prompt']
  if 'attention_mask' in of:
    is_text = of['attention_mask'].astype(bool)
    prompts = [p[ok] for p, ok in zip(prompts, is_text, strict=True)]
  size = int(of['gen_length'])
  found = maskdiff.sample(
    model,
    prompts,
    gen_length=size,
    block_length=of['block_length'],
    steps=of['steps'],
    guidance=of['cfg_scale'],
    temperature=of['temperature'],
    logits_eos_inf=of['logits_eos_inf'],
    confidence_eos_eot_inf=of['confidence_eos_eot_inf'],
    eot_id=eot_id,
    **noise(size),
  )
  filled = of['trace'][:, :, -size:] != of['trace'][0, 0, -1]
  for i, answer in enumerate(found):
    assert answer['ids'] == of['out'][i, -size:].tolist()
    steps = filled[:, i].argmax(axis=0)  # of LLaDA, which may commit nothing
    order = np.unique(steps, return_inverse=True)[1] + 1
    assert answer['steps'] == order.tolist()
    assert 'text' not in answer and 'answer' not in answer


@pytest.mark.parametrize('case', ['cfg_left_padded', 'both_eos_flags'])
def test_golden_samples(golden, case):
  assert_golden(golden, 'model_a', case)


def test_golden_samples_for_given_gumbel_noise(golden_b):
  u = recorded('model_b', 'gumbel')[0]['u'].swapaxes(0, 1)
  noise = lambda size: {'gumbel': -np.log(-np.log(u[:, :, -size:]))}
  assert_golden(golden_b, 'model_b', 'gumbel', noise)


def test_golden_samples_for_given_random_remasking(golden):
  u = recorded('model_a', 'random_remasking')[0]['u'].swapaxes(0, 1)
  noise = lambda size: {'uniform': u[:, :, -size:], 'remasking': 'random'}
  assert_golden(golden, 'model_a', 'random_remasking', noise)


@pytest.mark.parametrize('kind', ['run', 'of_blocks'])
def test_noise_of_the_seed_given_as_arrays_gives_the_same_samples(
  kind, request
):
  """Blocks of four slots, three steps each.

  Blocks of a network trained on blocks have fixed places, so the first and the
  last block of an answer may have fewer slots.
  """
  run = request.getfixturevalue(kind)
  prompts, sizes = PROMPTS[:2], [[4, 4], [4, 4]]
  if kind == 'of_blocks':
    prompts, sizes = [[9] * 6, [9] * 4], [[2, 4, 2], [4, 4]]
  values = dict(
    gen_length=8,
    block_length=4,
    steps=6,
    temperature=1.0,
    remasking='ancestral',
  )
  seeds, vocab_size = [7, 8], run.config.model.vocab_size
  expected = maskdiff.sample(run, prompts, seed=seeds, **values)
  gumbel = np.zeros((2, 9, 8, vocab_size), np.float32)
  uniform = np.zeros((2, 9, 8), np.float32)
  for row, seed in enumerate(seeds):
    total = 0  # steps before this one
    for block, size in enumerate(sizes[row]):
      first = sum(sizes[row][:block])
      slots = slice(first, first + size)
      key = jax.random.fold_in(jax.random.key(seed), block)
      # A block that is complete early skips its remaining steps.
      last = max(expected[row]['steps'][slots])
      for step in range(last - total):
        draw, rule = jax.random.split(jax.random.fold_in(key, step))
        noise = jax.random.gumbel(draw, (4, vocab_size))
        gumbel[row, total + step, slots] = noise[:size]
        uniform[row, total + step, slots] = jax.random.uniform(rule, (4,))[
          :size
        ]
      total = last
  found = maskdiff.sample(
    run, prompts, gumbel=gumbel, uniform=uniform, **values
  )
  for a, b in zip(found, expected, strict=True):
    assert (a['ids'], a['steps']) == (b['ids'], b['steps'])


# Compilations


def test_settings_of_a_request_compile_nothing(run):
  maskdiff.sample(run, PROMPTS, **GREEDY)
  size = sampler.run._cache_size()
  for values in (
    {'temperature': 0.7, 'top_k': 5, 'top_p': 0.5},
    {'gen_length': 5, 'stop_at_eos': True},
    {'gen_length': [5, 6, 8], 'steps': [1, 6, 2]},
    {'logits_eos_inf': True, 'seed': 9},
    {'confidence_eos_eot_inf': True, 'eot_id': 7},
  ):
    maskdiff.sample(run, ['a', 'b', 'c d'], **{**GREEDY, **values})
  assert sampler.run._cache_size() == size


# Errors

NOISE = np.zeros((1, 4, 4, 4096), np.float32)


@pytest.mark.parametrize(
  ('prompts', 'arguments', 'message'),
  [
    (['a'], {'temprature': 1}, "unknown setting 'temprature'; did you mean"),
    (['a'], {'prompts_': 1}, 'unknown setting .*; settings: gen_length'),
    (['a'], {'temperature': 'hot'}, "temperature='hot': must be float"),
    (['a'], {'temperature': math.nan}, 'temperature'),
    (['a'], {'temperature': -1.0}, 'temperature=-1.0: must be at least 0'),
    (['a'], {'temperature': [1, 1]}, 'give one value, or 1, one per prompt'),
    (['a'], {'temperature': [[1, 2]]}, 'temperature'),
    (['a'], {'temperature': {}}, 'temperature={}: must be float'),
    (['a'], {'remasking': 'lowest'}, "remasking='lowest': choose one of"),
    (['a'], {'remasking': ['random']}, 'all prompts share one value'),
    (
      ['a'],
      {'threshold': 0.5},
      'threshold is for .*threshold, quota_and_threshold, .* only',
    ),
    (['a'], {'gen_length': 32}, 'prompt and answer have 33 tokens'),
    (['a'], {'gen_length': 10**12}, 'gen_length|tokens together'),
    (['a'], {'gen_length': 0}, 'gen_length=0: must be at least 1'),
    (['a'], {'steps': 5, 'block_length': 2, 'gen_length': 8}, 'steps=5'),
    (['a'], {'seed': -1}, r'seed=-1 must be an integer in \[0, '),
    (['a'], {'seed': [1, 2]}, 'give an integer, or a list of 1'),
    (['a'], {'seed': 0.5}, 'seed=0.5: give an integer'),
    (['a'], {'batch': 0}, 'batch=0 must be an integer of at least 1'),
    ('a', {}, "prompts='a': give a list"),
    ([], {}, 'prompts is empty'),
    ([5, 6], {}, r'prompt is int64 of shape \[\]'),
    ([[5, 4096]], {}, 'prompt: token id 4096 is outside'),
    ([[5, None]], {}, 'prompt is object of shape'),
    ([[5, 6]], {'gaps': True}, 'no gap in a token list: put None'),
    ([5], {'gaps': True}, 'prompt is int64 of shape'),
    (['a'], {'gaps': True}, "no gap in 'a'"),
    (['{{1}}'], {'gaps': True, 'gen_length': 4}, 'gen_length is for prompts'),
    (['{{40}}'], {'gaps': True}, 'have 40 tokens'),
    (['a'], {'gumbel': NOISE[:, :3]}, r'give float of shape \[1, at least 4'),
    (['a'], {'gumbel': NOISE[..., 0]}, 'prompts, steps, slots, vocabulary'),
    (['a'], {'uniform': np.zeros((1, 4, 4), int)}, 'uniform is int64 of shape'),
    (
      ['a'],
      {'uniform': np.ones((1, 4, 4))},
      r'uniform has the value 1.0: give',
    ),
    (['a'], {'gumbel': NOISE * math.nan}, 'gumbel has values that are not'),
    (['a'], {'temperature': np.ones(99)}, 'give one value, or 1, one per'),
  ],
)
def test_bad_arguments_are_one_line(run, prompts, arguments, message):
  if 'gen_length' not in arguments and not arguments.get('gaps'):
    arguments = {**arguments, 'gen_length': 4}
  with pytest.raises(maskdiff.UserError, match=message) as error:
    maskdiff.sample(run, prompts, **arguments)
  assert '\n' not in str(error.value)


def test_a_text_needs_a_tokenizer(golden):
  with pytest.raises(maskdiff.UserError, match='without a tokenizer: give tok'):
    maskdiff.sample(golden, ['a'], gen_length=4)
