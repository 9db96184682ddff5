"""Sampling against LLaDA's recorded traces, oracles and hand-written loops."""

import dataclasses

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from maskdiff import masks, model, remasking, sampler
from maskdiff.errors import UserError
from maskdiff.model import TransformerConfig
from maskdiff.sampler import SamplerConfig

MASK, BOS, PAD, VOCAB = 4, 1, 0, 24
TINY = TransformerConfig(
  vocab_size=VOCAB,
  embed=16,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=8,
  mlp=24,
  tie_embeddings=True,
  rope_theta=1e4,
  norm_eps=1e-5,
  dtype='float32',
  remat='none',
  attention='xla',
)
GREEDY = SamplerConfig(
  steps=8,
  block_length=8,
  temperature=0.0,
  remasking='low_confidence',
  objective='masked_diffusion',
  predict_mask=False,
  mask_id=MASK,
  bos_id=BOS,
)
CASES = [
  'pure',
  'semi2',
  'semi4',
  'few_steps_pure',
  'few_steps_semi2',
  'more_steps_than_tokens',
  'left_padded',
]
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15], []]
WORDS = 'abcdefghijklmnopqrs'


def config(**changes):
  return dataclasses.replace(GREEDY, **changes)


@pytest.fixture(scope='module')
def params():
  """Weights drawn large, so that predictions differ from slot to slot."""
  return jax.tree.map(
    lambda w: 4 * w, model.init(TINY, jax.random.key(5))
  )


def encode(text):
  return [5 + WORDS.index(letter) for letter in text]


def generate(c, params, layout, seeds=None):
  seeds = range(len(layout[0])) if seeds is None else seeds
  return np.asarray(sampler.generate(TINY, c, params, *layout, seeds))


def trace(c, params, layout, seeds=None):
  seeds = range(len(layout[0])) if seeds is None else seeds
  return list(sampler.trace(TINY, c, params, *layout, seeds))


# The recorded runs of LLaDA


def golden_request(name, case):
  """Arguments of `generate`, and the recorded canvases and result."""
  with np.load(golden_models.GOLDEN / 'generate.npz') as file:
    recorded = {
      key.rpartition('.')[2]: file[key]
      for key in file
      if key.startswith(f'{name}.{case}.')
    }
    mask_id = int(file[f'{name}.ids'][0])
  model_config, params = golden_models.load(name)
  c = config(
    steps=int(recorded['steps']),
    block_length=int(recorded['block_length']),
    predict_mask=True,
    mask_id=mask_id,
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
  seeds = range(len(prompt))
  return (model_config, c, params, canvas, fill, valid, seeds), recorded


def without_repeats(canvases):
  """LLaDA also calls the network for steps that have nothing to commit."""
  kept = [canvases[0]]
  for canvas in canvases[1:]:
    if (canvas != kept[-1]).any():
      kept.append(canvas)
  return np.stack(kept)


@pytest.mark.parametrize('name', ['model_a', 'model_b'])
@pytest.mark.parametrize('case', CASES)
def test_tokens_of_every_step_are_those_of_llada(case, name):
  request, recorded = golden_request(name, case)
  canvases = np.stack(list(sampler.trace(*request)))
  np.testing.assert_array_equal(canvases, without_repeats(recorded['trace']))
  np.testing.assert_array_equal(sampler.generate(*request), recorded['out'])


@pytest.mark.parametrize('name', ['model_a', 'model_b'])
def test_random_remasking_is_that_of_llada(monkeypatch, name):
  """With LLaDA's random scores, one [S] row of the block for every step."""
  request, recorded = golden_request(name, 'random_remasking')
  model_config, c, *rest = request
  blocks = int(recorded['gen_length']) // c.block_length
  answers = recorded['u'][:, :, recorded['prompt'].shape[1] :]
  scores = iter(
    answers[step, :, block * c.block_length :][:, : c.block_length]
    for step, block in enumerate(np.repeat(range(blocks), c.steps // blocks))
  )

  def injected(confidence, masked, budget, keys):
    return remasking.keep_top(jnp.asarray(next(scores)), masked, budget)

  monkeypatch.setitem(remasking.RULES, 'injected', injected)
  c = dataclasses.replace(c, remasking='injected')
  with jax.disable_jit():  # so that the rule runs at every step
    canvases = np.stack(list(sampler.trace(model_config, c, *rest)))
  np.testing.assert_array_equal(canvases, without_repeats(recorded['trace']))


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


class Oracle:
  """A network that knows the answer, more surely at some positions."""

  def __init__(self, answer):
    self.answer = answer  # [B, L]

  def __call__(self, tokens, labels):
    sure = 5 + jax.random.uniform(jax.random.key(0), tokens.shape)
    return sure[..., None] * jax.nn.one_hot(self.answer, VOCAB)

  def logits(self, hidden):
    return hidden


@pytest.fixture
def oracle(monkeypatch):
  """Makes the sampler use Oracle(params) in place of the network."""
  monkeypatch.setattr(sampler, 'bind', lambda _, answer: Oracle(answer))

  def run(c, answer, layout):
    seeds = range(len(answer))
    return np.asarray(
      sampler.generate('oracle', c, jnp.asarray(answer), *layout, seeds)
    )

  return run


@pytest.mark.parametrize('loop', LOOPS)
@pytest.mark.parametrize('rule', remasking.RULES)
def test_an_oracle_is_believed(oracle, rule, loop):
  layout = sampler.continue_prompts(PROMPTS, 8, PAD)
  canvas, fill, _ = layout
  answer = np.random.default_rng(0).integers(5, VOCAB, canvas.shape)
  out = oracle(config(remasking=rule, **LOOPS[loop]), answer, layout)
  np.testing.assert_array_equal(out, np.where(fill, answer, canvas))


@pytest.mark.parametrize('temperature', [0.0, 1.0])
def test_the_mask_is_never_predicted_unless_allowed(oracle, temperature):
  layout = sampler.continue_prompts(PROMPTS, 8, PAD)
  canvas, fill, _ = layout
  answer = np.full(canvas.shape, MASK)  # the network wants nothing else
  c = config(temperature=temperature)
  assert not (oracle(c, answer, layout) == MASK).any()
  allowed = dataclasses.replace(c, predict_mask=True)
  assert (oracle(allowed, answer, layout)[fill] == MASK).mean() > 0.5


@pytest.mark.parametrize('loop', LOOPS)
@pytest.mark.parametrize(
  'rule, temperature', [('low_confidence', 0.0), ('random', 1.0)]
)
def test_the_trace_ends_with_what_generate_returns(
  params, rule, temperature, loop
):
  c = config(remasking=rule, temperature=temperature, **LOOPS[loop])
  layout = sampler.continue_prompts(PROMPTS, 8, PAD)
  canvases = trace(c, params, layout)
  np.testing.assert_array_equal(canvases[-1], generate(c, params, layout))
  assert len(canvases) - 1 == min(c.steps, 8)  # a step fills at least one


def test_a_token_is_never_revised_and_blocks_go_left_to_right(params):
  c = config(steps=6, block_length=3)
  layout = sampler.continue_prompts(PROMPTS, 8, PAD)
  _, fill, _ = layout
  canvases = trace(c, params, layout)
  for before, after in zip(canvases, canvases[1:], strict=False):
    committed = before != MASK
    np.testing.assert_array_equal(before[committed], after[committed])
    for row, filled in zip(after, fill, strict=True):
      done = (row[filled] != MASK).nonzero()[0]
      first_open = (row[filled] == MASK).argmax() if MASK in row else 8
      assert done.max() // 3 <= first_open // 3


def test_prompts_and_padding_are_not_changed(params):
  canvas, fill, valid = sampler.continue_prompts(PROMPTS, 8, PAD)
  out = generate(config(temperature=1.0), params, (canvas, fill, valid))
  np.testing.assert_array_equal(out[~fill], canvas[~fill])
  for row, ok, prompt in zip(out, valid, PROMPTS, strict=True):
    assert list(row[: len(prompt)]) == prompt
    assert ok.sum() == len(prompt) + 8


def test_only_the_gaps_of_a_text_are_filled(params):
  texts = ['ab{{2}}c{{5}}d', '{{1}}abcdefg', 'hi{{3}}{{1}}', 'a{{0}}b{{6}}']
  layout = canvas, fill, valid = sampler.fill_gaps(texts, encode, PAD)
  assert fill.sum(axis=1).tolist() == [7, 1, 4, 6]
  assert canvas[0, valid[0] & ~fill[0]].tolist() == encode('abcd')
  assert fill[0].nonzero()[0].tolist() == [2, 3, 5, 6, 7, 8, 9]
  out = generate(config(steps=4, block_length=4), params, layout)
  np.testing.assert_array_equal(out[~fill], canvas[~fill])
  assert not (out == MASK).any()


@pytest.mark.parametrize('loop', ['pure', 'few_steps', 'last_block_short'])
@pytest.mark.parametrize('rule', remasking.RULES)
def test_a_row_depends_on_its_own_prompt_and_seed_alone(params, rule, loop):
  """Not on the other rows, nor on the padding that they bring."""
  c = config(temperature=0.7, remasking=rule, **LOOPS[loop])
  layout = sampler.continue_prompts(PROMPTS, 8, PAD)
  together = generate(c, params, layout, seeds=[3, 4, 5, 6])
  for prompt, seed, row, ok in zip(
    PROMPTS, [3, 4, 5, 6], together, layout[2], strict=True
  ):
    alone = sampler.continue_prompts([prompt], 8, PAD)
    np.testing.assert_array_equal(
      generate(c, params, alone, seeds=[seed])[0], row[ok]
    )


def test_the_seed_alone_decides_between_samples(params):
  c = config(temperature=1.0)
  layout = sampler.continue_prompts([[7, 8]] * 8, 8, PAD)
  out = generate(c, params, layout, seeds=[*range(7), 0])
  assert len({tuple(row) for row in out}) == 7
  np.testing.assert_array_equal(out[0], out[7])


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_one_slot_is_drawn_from_the_softmax(monkeypatch, temperature):
  draws, logits = 4000, np.array([0.3, -1.0, 1.2, 0.0, 9.0, 0.8, -0.2])

  class Fixed(Oracle):
    def __call__(self, tokens, labels):
      return jnp.broadcast_to(self.answer, (*tokens.shape, len(logits)))

  monkeypatch.setattr(sampler, 'bind', lambda _, answer: Fixed(answer))
  layout = sampler.continue_prompts([[]] * draws, 1, PAD)
  c = config(steps=1, temperature=temperature)
  out = sampler.generate(
    'fixed', c, jnp.asarray(logits, jnp.float32), *layout, range(draws)
  )
  counts = np.bincount(np.asarray(out)[:, 0], minlength=len(logits))
  others = np.arange(len(logits)) != MASK
  weights = np.exp(logits[others] / temperature)
  assert counts[MASK] == 0
  test = scipy.stats.chisquare(counts[others], draws * weights / weights.sum())
  assert test.pvalue > 1e-3


def test_one_compilation_per_shape_and_config(params):
  sampler._generate.clear_cache()
  compilations = sampler._generate._cache_size
  layout = sampler.continue_prompts([[7, 8], [9]], 8, PAD)
  generate(GREEDY, params, layout)
  assert compilations() == 1
  generate(config(), params, layout, seeds=[8, 9])
  generate(GREEDY, params, sampler.continue_prompts([[5], [6, 7]], 8, PAD))
  assert compilations() == 1
  generate(config(steps=4), params, layout)
  generate(GREEDY, params, sampler.continue_prompts([[5], [6]], 8, PAD))
  assert compilations() == 3


# Autoregressive networks


def test_autoregressive_sampling_is_next_token_prediction(params):
  c = config(objective='autoregressive', block_length=1)
  network = model.bind(TINY, params)
  out = generate(c, params, sampler.continue_prompts(PROMPTS, 8, PAD))
  for row, prompt in zip(out, PROMPTS, strict=True):
    tokens = [BOS, *prompt]
    for _ in range(8):
      labels = masks.causal(jnp.ones((1, len(tokens)), bool))
      hidden = network(jnp.asarray([tokens], jnp.int32), labels)
      logits = network.logits(hidden)[0, -1].at[MASK].set(-jnp.inf)
      tokens.append(int(logits.argmax()))
    assert row[: len(prompt) + 8].tolist() == tokens[1:]


# What is refused


def test_an_empty_prompt_works(params):
  out = generate(GREEDY, params, sampler.continue_prompts([[]], 8, PAD))
  assert out.shape == (1, 8)
  assert not (out == MASK).any()


CANVAS = np.full((1, 8), 5)
ALL = np.ones((1, 8), bool)
REFUSED = {
  'steps': (dict(steps=3, block_length=4), ALL, 'steps=3.* multiple of 2'),
  'no_steps': (dict(steps=0), ALL, 'steps=0'),
  'nothing': ({}, ~ALL, 'nothing to fill'),
  'rule': (dict(remasking='lowest'), ALL, "'lowest'.*'low_confidence'"),
  'shapes': ({}, ALL[:, :7], r'\(1, 8\).*\(1, 7\)'),
  'causal': (dict(objective='autoregressive'), ALL, 'block_length=1'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_a_request_that_cannot_be_served_says_why(params, case):
  changes, fill, message = REFUSED[case]
  with pytest.raises(UserError, match=message):
    generate(config(**changes), params, (CANVAS, fill, ALL))


@pytest.mark.parametrize('text', ['abc', '', 'ab{{0}}', 'a{{b}}', 'a{2}'])
def test_a_text_without_a_gap_is_refused(text):
  with pytest.raises(UserError, match='no gap'):
    sampler.fill_gaps(['a{{1}}', text], lambda text: [5] * len(text), PAD)


def test_no_slots_after_a_prompt_is_refused(params):
  with pytest.raises(UserError, match='nothing to fill'):
    generate(GREEDY, params, sampler.continue_prompts([[7]], 0, PAD))
