"""The sampler against recorded runs of LLaDA, oracles and plain loops."""

import dataclasses
import itertools
import os
import pathlib

import fake_networks
import forked
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled
import scipy.stats
import tiny
from jax.experimental import io_callback

from maskdiff.config.key import Key
from maskdiff.config.sample import SETTINGS
from maskdiff.distributed import mesh
from maskdiff.errors import UserError
from maskdiff.model import masks, transformer
from maskdiff.sampling import (
  candidates,
  commit,
  layouts,
  passes,
  remasking,
  sampler,
)
from maskdiff.sampling.request import Request, begin
from maskdiff.sampling.settings import per_row, split

ROOT = pathlib.Path(__file__).resolve().parents[2]
MASK, BOS, VOCAB = 4, 1, tiny.MODEL.vocab_size
GREEDY = dict(
  steps=8,
  block_length=8,
  temperature=0.0,
  remasking='low_confidence',
)


def config(**changes):
  return {**GREEDY, **changes}


CASES = [
  'pure',
  'semi2',
  'semi4',
  'few_steps_pure',
  'few_steps_semi2',
  'more_steps_than_tokens',
  'left_padded',
  'cfg',
  'cfg_left_padded',
  'logits_eos_inf',
  'confidence_eos_eot_inf',
  'both_eos_flags',
]
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15], []]
WORDS = 'abcdefghijklmnopqrs'


@pytest.fixture(scope='module')
def network():
  params = tiny.strong_params()
  return fake_networks.network(tiny.MODEL, params, mask_id=MASK, bos_id=BOS)


def of_rows(values, batch):
  """Returns a SamplerConfig, and Settings for `batch` rows."""
  c, settings = split(values)
  return c, per_row(settings, batch)


def encode(text):
  return [5 + WORDS.index(letter) for letter in text]


# Recorded runs of LLaDA


def golden_request(name, case):
  """Returns arguments of `generate`, and the recorded arrays."""
  with np.load(golden_models.GOLDEN / 'generate.npz') as file:
    recorded = {
      key.rpartition('.')[2]: file[key]
      for key in file
      if key.startswith(f'{name}.{case}.')
    }
    mask_id, eos_id, eot_id = map(int, file[f'{name}.ids'])
  model_config, params = golden_models.load(name)
  c = config(
    steps=int(recorded['steps']),
    block_length=int(recorded['block_length']),
    temperature=float(recorded['temperature']),
    guidance=float(recorded['cfg_scale']),
    logits_eos_inf=bool(recorded['logits_eos_inf']),
    confidence_eos_eot_inf=bool(recorded['confidence_eos_eot_inf']),
    eot_id=eot_id,
  )
  network = fake_networks.network(
    model_config, params, predict_mask=True, mask_id=mask_id, eos_id=eos_id
  )
  prompt, answer = recorded['prompt'], int(recorded['gen_length'])
  fill = np.zeros(recorded['out'].shape, bool)
  fill[:, -answer:] = True
  canvas = np.pad(prompt, ((0, 0), (0, answer)))
  valid = np.pad(
    recorded.get('attention_mask', np.ones_like(prompt)).astype(bool),
    ((0, 0), (0, answer)),
    constant_values=True,
  )
  request = Request(canvas, fill, valid, range(len(prompt)))
  return network, c, request, recorded


def without_repeats(canvases):
  """Drops the canvases of LLaDA's steps that commit nothing."""
  changed = [(a != b).any() for a, b in itertools.pairwise(canvases)]
  return canvases[[True, *changed]]


@pytest.mark.parametrize('name', ['model_a', 'model_b'])
@pytest.mark.parametrize('case', CASES)
def test_canvases_of_every_step_equal_llada(case, name):
  *request, recorded = golden_request(name, case)
  canvases = sampled.trace(*request)
  np.testing.assert_array_equal(canvases, without_repeats(recorded['trace']))


@pytest.mark.parametrize(
  'case',
  ['semi4', 'more_steps_than_tokens', 'cfg_left_padded', 'both_eos_flags'],
)
def test_generate_equals_llada(case):
  """Runs the compiled loop; it has no steps that commit nothing."""
  network, c, request, recorded = golden_request('model_b', case)
  carry = sampled.complete(network, c, request)
  np.testing.assert_array_equal(carry.canvas, recorded['out'])
  np.testing.assert_array_equal(
    sampled.generate(network, c, request), recorded['out']
  )
  assert int(carry.calls) == len(without_repeats(recorded['trace'])) - 1
  if case == 'more_steps_than_tokens':
    tokens = int(recorded['gen_length'])
    assert len(recorded['trace']) - 1 == c['steps'] > tokens == int(carry.calls)


def test_generate_on_a_mesh_equals_llada():
  """Two rows with guidance: eight devices cannot divide them evenly."""
  *request, recorded = golden_request('model_b', 'cfg_left_padded')
  with jax.set_mesh(mesh.make_mesh(fsdp=4, tensor=2)):
    np.testing.assert_array_equal(sampled.generate(*request), recorded['out'])


@pytest.mark.parametrize('name', ['model_a', 'model_b'])
def test_random_remasking_equals_llada(monkeypatch, name):
  """Replaces the rule's random scores by LLaDA's, step by step."""
  network, c, request, recorded = golden_request(name, 'random_remasking')
  size, prompt = c['block_length'], recorded['prompt'].shape[1]
  blocks = int(recorded['gen_length']) // size
  scores = iter(
    recorded['u'][step, :, prompt + block * size :][:, :size]
    for step, block in enumerate(np.repeat(range(blocks), c['steps'] // blocks))
  )

  def injected(confidence, masked, budget, keys):
    drawn = jax.ShapeDtypeStruct(masked.shape, jnp.float32)
    score = io_callback(lambda: next(scores), drawn, ordered=True)
    return remasking.commit_top(score, masked, budget)

  monkeypatch.setitem(remasking.RULES, 'injected', injected)
  monkeypatch.setitem(SETTINGS, 'remasking', Key('injected', '', ('injected',)))
  c = {**c, 'remasking': 'injected'}
  canvases = sampled.trace(network, c, request)
  np.testing.assert_array_equal(canvases, without_repeats(recorded['trace']))


def test_draws_at_a_temperature_equal_llada(monkeypatch):
  """Replaces the noise by LLaDA's uniform draws, step by step."""
  *request, recorded = golden_request('model_b', 'gumbel')
  answer = recorded['prompt'].shape[1]
  noise = iter(-np.log(-np.log(recorded['u'][:, :, answer:])))

  def injected(keys, shape):
    drawn = jax.ShapeDtypeStruct((len(keys), *shape), jnp.float32)
    draw = lambda: next(noise).astype(np.float32)
    return io_callback(draw, drawn, ordered=True)

  monkeypatch.setattr(candidates, 'gumbel', injected)
  canvases = sampled.trace(*request)
  np.testing.assert_array_equal(canvases, recorded['trace'])


@pytest.mark.parametrize('name', ['model_a', 'model_b'])
def test_masks_in_a_prompt_stay_unlike_llada(name):
  """A mask outside of the slots is context.

  In LLaDA's code such masks compete with the slots for the quota, so that masks
  may remain in the answer.
  """
  network, c, request, recorded = golden_request(name, 'maskprompt')
  canvas, fill, valid, seeds, _ = request
  prompt, out = recorded['prompt'], sampled.generate(network, c, request)
  mask_id = network.mask_id
  assert (prompt == mask_id).sum() == 2
  np.testing.assert_array_equal(out[~fill], canvas[~fill])
  assert not (out[fill] == mask_id).any()
  assert (recorded['out'][fill] == mask_id).any()

  @jax.jit
  def predict(canvas):
    model = transformer.bind(network.config, network.params)
    logits = model.logits(model(canvas, masks.bidirectional(valid)))
    keys = jax.random.split(jax.random.key(0), len(canvas))
    return commit.predict(network, *of_rows(c, len(canvas)), logits, keys)

  # LLaDA's loop: all masks up to the end of the block compete.
  length, size = canvas.shape[1], c['block_length']
  canvas = np.where(fill, mask_id, canvas)
  canvases = [canvas]
  for step in range(c['steps']):
    end = prompt.shape[1] + size * (step // (c['steps'] // 2) + 1)
    token, confidence = predict(canvas)
    masked = (canvas == mask_id) & (np.arange(length) < end)
    committed = remasking.commit_top(
      confidence, jnp.asarray(masked), jnp.array([1])
    )
    canvas = np.where(committed, token, canvas)
    canvases.append(canvas)
  np.testing.assert_array_equal(canvases, recorded['trace'])

  # If the masks are slots, they are filled.
  fill = canvases[0] == mask_id
  c = {**c, 'steps': 10, 'block_length': 10}
  every = sampled.generate(network, c, Request(canvases[0], fill, valid, seeds))
  assert not (every == mask_id).any()


# The loop


LOOPS = {
  'pure': dict(steps=8, block_length=8),
  'few_steps': dict(steps=3, block_length=8),
  'two_blocks': dict(steps=6, block_length=4),
  'last_block_short': dict(steps=6, block_length=3),
  'one_by_one': dict(steps=8, block_length=1),
  'one_step': dict(steps=1, block_length=8),
  'too_many_steps': dict(steps=20, block_length=8),
}


SAMPLINGS = {
  'few_steps': config(temperature=0.7, **LOOPS['few_steps']),
  'random_in_blocks': config(
    temperature=0.7, remasking='random', **LOOPS['last_block_short']
  ),
}


class Oracle:
  """A network that predicts `answer`; confidence depends on the position."""

  def __init__(self, answer):
    self.answer = answer  # [B, L]

  def __call__(self, tokens, labels):
    scale = 5 + jax.random.uniform(jax.random.key(0), tokens.shape)
    return scale[..., None] * jax.nn.one_hot(self.answer, VOCAB)

  def logits(self, hidden):
    return hidden


@pytest.fixture
def oracle(monkeypatch):
  """Makes the sampler use Oracle(params) in place of the network."""
  monkeypatch.setattr(passes, 'bind', lambda _, answer: Oracle(answer))

  def run(c, answer, request, **fields):
    network = fake_networks.network('oracle', jnp.asarray(answer), **fields)
    return sampled.generate(network, c, request)

  return run


EVERY_LOOP = [
  (rule, loop)
  for rule in remasking.RULES
  for loop in LOOPS
  if rule in ('low_confidence', 'random') or loop == 'last_block_short'
]


@pytest.mark.parametrize('rule, loop', EVERY_LOOP)
def test_oracle_network_returns_its_answer(oracle, rule, loop):
  request = layouts.continue_prompts(PROMPTS, 8)
  answer = np.random.default_rng(0).integers(5, VOCAB, request.canvas.shape)
  out = oracle(config(remasking=rule, **LOOPS[loop]), answer, request)
  np.testing.assert_array_equal(
    out, np.where(request.fill, answer, request.canvas)
  )


def test_empty_prompt_can_be_continued(oracle):
  answer = np.arange(5, 13)[None]
  out = oracle(GREEDY, answer, layouts.continue_prompts([[]], 8))
  np.testing.assert_array_equal(out, answer)


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_mask_is_predicted_only_with_predict_mask(oracle, temperature):
  request = layouts.continue_prompts(PROMPTS, 8)
  # The network gives the mask token nearly all probability.
  answer = np.full(request.canvas.shape, MASK)
  c = config(temperature=temperature)
  assert not (oracle(c, answer, request) == MASK).any()
  out = oracle(c, answer, request, predict_mask=True)
  assert (out[request.fill] == MASK).mean() > 0.5


@pytest.mark.parametrize('sampling', SAMPLINGS)
def test_trace_ends_with_the_result_of_generate(network, sampling):
  c, request = SAMPLINGS[sampling], layouts.continue_prompts(PROMPTS, 8)
  canvases = sampled.trace(network, c, request)
  np.testing.assert_array_equal(
    canvases[-1], sampled.generate(network, c, request)
  )
  assert len(canvases) == c['steps'] + 1
  assert (canvases[0] == MASK).sum() == 8 * len(PROMPTS)


@pytest.mark.parametrize('sampling', SAMPLINGS)
def test_confidence_of_committed_tokens_is_recorded(network, sampling):
  """The confidence equals the probability that the network computes."""

  @jax.jit
  def probabilities(canvas, valid):
    model = transformer.bind(network.config, network.params)
    labels = masks.bidirectional(valid)
    logits = model.logits(model(canvas, labels)).at[..., MASK].set(-jnp.inf)
    return jax.nn.softmax(logits, axis=-1)

  c, request = SAMPLINGS[sampling], layouts.continue_prompts(PROMPTS, 8)
  carry = sampled.complete(network, c, request)
  filled_at, confidence = map(np.asarray, (carry.filled_at, carry.confidence))
  np.testing.assert_array_equal(np.isnan(confidence), ~request.fill)
  np.testing.assert_array_equal(filled_at > 0, request.fill)
  canvases = sampled.trace(network, c, request)
  for step, (before, after) in enumerate(itertools.pairwise(canvases), 1):
    committed = filled_at == step
    np.testing.assert_array_equal(committed, before != after)
    p = np.asarray(probabilities(before, request.valid))
    p = np.take_along_axis(p, after[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(confidence[committed], p[committed], rtol=1e-4)


def test_recorded_steps_equal_steps_taken_one_at_a_time(network):
  """Rows end after different numbers of steps; each counts its own."""
  c = config(remasking='threshold', threshold=0.3, block_length=4)
  request = layouts.continue_prompts(PROMPTS, 8)
  network, c, request = sampled.arguments(network, c, request)
  carry, layout, (shape,) = begin(network, c, request)
  one_step = jax.jit(sampler.canvas_step, static_argnums=(1, 2))
  canvases, ended = [carry.canvas], np.zeros(len(PROMPTS), int)
  while np.asarray(carry.masked).any():
    ended += np.asarray(carry.masked).any((1, 2))
    carry, _ = one_step(network, c, shape, layout, carry, None)
    canvases.append(np.asarray(carry.canvas))
  last = sampler.complete(network, c, request)
  for field in carry._fields:
    np.testing.assert_array_equal(
      getattr(carry, field), getattr(last, field), err_msg=field
    )
  for step, canvas in enumerate(canvases):
    np.testing.assert_array_equal(
      canvas, np.where(last.filled_at > step, MASK, last.canvas)
    )
  assert last.total_steps.tolist() == ended.tolist()
  assert last.filled_at.max(axis=1).tolist() == ended.tolist()
  assert len(set(ended)) > 1


@pytest.mark.parametrize('sampling', SAMPLINGS)
def test_blocks_are_filled_left_to_right_and_never_revised(network, sampling):
  c, request = SAMPLINGS[sampling], layouts.continue_prompts(PROMPTS, 8)
  canvases = sampled.trace(network, c, request)
  for before, after in itertools.pairwise(canvases):
    np.testing.assert_array_equal(after[before != MASK], before[before != MASK])
  for canvas in canvases[1:-1]:
    for answer in canvas[request.fill].reshape(len(canvas), 8):
      blocks = np.flatnonzero(answer != MASK) // c['block_length']
      open_blocks = np.flatnonzero(answer == MASK) // c['block_length']
      assert blocks.max() <= open_blocks.min(initial=8)


def test_prompts_and_padding_are_not_changed(network):
  request = layouts.continue_prompts(PROMPTS, 8)
  out, given = (
    sampled.generate(network, SAMPLINGS['few_steps'], request),
    ~request.fill,
  )
  np.testing.assert_array_equal(out[given], request.canvas[given])
  for row, ok, prompt in zip(out, request.valid, PROMPTS, strict=True):
    assert list(row[: len(prompt)]) == prompt
    assert ok.sum() == len(prompt) + 8


def test_only_gaps_are_filled(network):
  texts = ['ab{{2}}c{{5}}d', '{{1}}abcdefg', 'hi{{3}}{{1}}', 'a{{0}}b{{6}}']
  request = canvas, fill, valid, *_ = layouts.fill_gaps(texts, encode)
  assert fill.sum(axis=1).tolist() == [7, 1, 4, 6]
  assert canvas[0, valid[0] & ~fill[0]].tolist() == encode('abcd')
  assert fill[0].nonzero()[0].tolist() == [2, 3, 5, 6, 7, 8, 9]
  out = sampled.generate(network, config(steps=4, block_length=4), request)
  np.testing.assert_array_equal(out[~fill], canvas[~fill])
  assert not (out == MASK).any()


@pytest.mark.parametrize('sampling', SAMPLINGS)
def test_row_does_not_depend_on_other_rows_or_padding(network, sampling):
  c, seeds = SAMPLINGS[sampling], [3, 4, 5, 6]
  request = layouts.continue_prompts(PROMPTS, 8, seeds)
  together = sampled.generate(network, c, request)
  for row in (0, 1):
    alone = layouts.continue_prompts([PROMPTS[row]], 8, [seeds[row]])
    np.testing.assert_array_equal(
      sampled.generate(network, c, alone)[0], together[row, request.valid[row]]
    )


@pytest.mark.parametrize('sampling', SAMPLINGS)
def test_seed_belongs_to_its_row(network, sampling):
  out, others = (
    sampled.generate(
      network,
      SAMPLINGS[sampling],
      layouts.continue_prompts(PROMPTS, 8, seeds),
    )
    for seeds in ([0] * 4, [0, 7, 0, 8])
  )
  same = (out == others).all(axis=1)
  assert same.tolist() == [True, False, True, False]


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_one_slot_follows_the_softmax(monkeypatch, temperature):
  draws, logits = 4000, np.array([0.3, -1.0, 1.2, 0.0, 9.0, 0.8, -0.2])

  class Fixed(Oracle):
    def __call__(self, tokens, labels):
      return jnp.broadcast_to(self.answer, (*tokens.shape, len(logits)))

  monkeypatch.setattr(passes, 'bind', lambda _, answer: Fixed(answer))
  network = fake_networks.network('fixed', jnp.asarray(logits, jnp.float32))
  request = layouts.continue_prompts([[]] * draws, 1)
  out = sampled.generate(
    network, config(steps=1, temperature=temperature), request
  )
  counts = np.bincount(out[:, 0], minlength=len(logits))
  others = np.arange(len(logits)) != MASK
  weights = np.exp(logits[others] / temperature)
  assert counts[MASK] == 0
  test = scipy.stats.chisquare(counts[others], draws * weights / weights.sum())
  assert test.pvalue > 1e-3


def test_one_compilation_per_shape_and_config(oracle):
  def compilations(c, prompts, answer):
    before = sampler.run._cache_size()
    request = layouts.continue_prompts(prompts, 9)
    oracle(c, np.full(request.canvas.shape, answer), request)
    return sampler.run._cache_size() - before

  assert compilations(GREEDY, [[7, 8], [9]], 10) == 1
  assert compilations(config(), [[7, 8], [9]], 11) == 0
  assert compilations(GREEDY, [[5], [6, 7]], 10) == 0
  assert compilations(config(remasking='random'), [[7, 8], [9]], 10) == 1
  assert compilations(GREEDY, [[7], [9]], 10) == 1


# Autoregressive networks


def test_autoregressive_sampling_is_next_token_prediction(network):
  @jax.jit
  def next_token(tokens):
    model = transformer.bind(network.config, network.params)
    hidden = model(tokens[None], masks.causal(jnp.ones((1, len(tokens)))))
    return model.logits(hidden)[0, -1].at[MASK].set(-jnp.inf).argmax()

  prompts = [[7, 8, 9], []]
  out = sampled.generate(
    dataclasses.replace(network, objective='autoregressive'),
    config(steps=2, block_length=1),
    layouts.continue_prompts(prompts, 2),
  )
  for row, prompt in zip(out, prompts, strict=True):
    tokens = [BOS, *prompt]
    for _ in range(2):
      tokens.append(int(next_token(jnp.asarray(tokens))))
    assert row[: len(prompt) + 2].tolist() == tokens[1:]


# Refusals


CANVAS = np.full((1, 8), 5)
ALL = np.ones((1, 8), bool)
REFUSED = {
  'steps': (
    dict(steps=3, block_length=4, gen_length=8),
    ALL,
    'steps=3.* multiple of 2',
  ),
  'no_steps': (dict(steps=0, gen_length=8), ALL, 'steps=0'),
  'nothing': ({}, ~ALL, 'nothing to fill'),
  'rule': (dict(remasking='lowest'), ALL, "'lowest'.*low_confidence"),
  'shapes': ({}, ALL[:, :7], r'\(1, 8\).*\(1, 7\)'),
  'causal': (dict(objective='autoregressive'), ALL, 'block_length=1'),
  'confidence': (dict(confidence='hope'), ALL, "'hope'.*probability"),
  'no_block': (dict(block_length=0), ALL, 'block_length=0'),
  'guidance': (
    dict(objective='autoregressive', block_length=1, guidance=1.0),
    ALL,
    'guidance=1.0.*autoregressive',
  ),
  'schedule': (dict(schedule='sine'), ALL, "'sine'.*linear"),
  'no_eos': (dict(stop_at_eos=True), ALL, 'stop_at_eos.*an eos token'),
  'no_eos_either': (
    dict(logits_eos_inf=True),
    ALL,
    'logits_eos_inf.*an eos token',
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_invalid_requests_are_refused(network, case):
  changes, fill, message = REFUSED[case]
  changes = dict(changes)
  objective = changes.pop('objective', 'masked_diffusion')
  network = dataclasses.replace(network, objective=objective)
  with pytest.raises(UserError, match=message):
    sampled.generate(
      network, config(**changes), Request(CANVAS, fill, ALL, [0])
    )


@pytest.mark.parametrize('text', ['abc', '', 'ab{{0}}', 'a{{b}}', 'a{2}'])
def test_text_without_a_gap_is_refused(text):
  with pytest.raises(UserError, match='no gap'):
    layouts.fill_gaps(['a{{1}}', text], lambda text: [5] * len(text))


@pytest.mark.parametrize('n', ['1000001', '9' * 5000])
def test_gap_longer_than_any_row_is_refused(n):
  with pytest.raises(UserError, match='more than any model has'):
    layouts.fill_gaps(['a{{' + n + '}}'], encode)


def test_request_without_slots_is_refused(network):
  with pytest.raises(UserError, match='nothing to fill'):
    sampled.generate(network, GREEDY, layouts.continue_prompts([[7]], 0))


@pytest.mark.parametrize('flag', ['block_length', 'steps', 'gen_length'])
@pytest.mark.parametrize('value', [0, -4])
def test_numbers_on_the_command_line_are_positive(tmp_path, flag, value):
  """They are checked before the work directory is opened."""
  result = forked.run(
    [
      'launch/sample.py',
      f'--workdir={tmp_path}/none',
      f'--{flag}={value}',
    ],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )
  assert result.returncode == 2
  assert len(result.stderr.strip().splitlines()) == 1
  assert flag in result.stderr and str(value) in result.stderr
