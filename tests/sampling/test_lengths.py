"""Predicted lengths of answers: the logits of a prompt and one mask."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import untrained_run

import maskdiff
from maskdiff.errors import UserError
from maskdiff.sampling import commit, lengths
from maskdiff.sampling.settings import per_row, sampler_config

CONTEXT = 32
NAMED = ((2, 212), (4, 213), (16, 265))
IDS = [i for _, i in NAMED]
PROMPTS = [[9, 10, 11], [300] * 7, [40, 41, 42, 43]]


def opened(path, tokenizer, objective, **changes):
  """Returns a model with random parameters whose predictions differ."""
  untrained_run.save(
    path,
    tokenizer,
    objective_name=objective,
    data_length_tokens=NAMED,
    **changes,
  )
  model = maskdiff.load(path)
  keys = iter(jax.random.split(jax.random.key(1), 99))
  params = jax.tree.map(
    lambda x: jax.random.normal(next(keys), x.shape), model.params
  )
  return dataclasses.replace(model, params=params)


@pytest.fixture(scope='module')
def model(tokenizer, tmp_path_factory):
  path = tmp_path_factory.mktemp('run')
  return opened(path, tokenizer, 'masked_diffusion')


def predict(model, prompts, batch=8, **changes):
  c, settings = sampler_config(model.config)
  settings = settings._replace(**changes)
  with jax.set_mesh(model.mesh):
    return lengths.predict(
      model.network,
      c,
      NAMED,
      prompts,
      range(len(prompts)),
      [settings] * len(prompts),
      batch,
    )


def expected(model, prompt):
  """Returns the most probable length by the logits of the library."""
  row = [*prompt, model.config.tokens.mask_id]
  logits = np.asarray(maskdiff.logits(model, [row]))[0, -1]
  return NAMED[int(logits[IDS].argmax())]


@pytest.mark.parametrize(
  'objective',
  [
    'masked_diffusion',
    pytest.param('block_diffusion', marks=pytest.mark.slow),
    pytest.param('autoregressive', marks=pytest.mark.slow),
  ],
)
def test_length_is_the_most_probable_at_one_mask(
  objective, model, tokenizer, tmp_path
):
  """Rows of a batch have the lengths that they have alone."""
  if objective != 'masked_diffusion':
    model = opened(tmp_path, tokenizer, objective, objective_block_length=8)
  prompts = [[i, *p] for i in range(20, 25) for p in PROMPTS]
  found = predict(model, prompts, batch=4)
  assert [(x.slots, x.token) for x in found] == [
    expected(model, p) for p in prompts
  ]
  assert len({x.slots for x in found}) > 1
  assert {x.forwards for x in found} == {1}
  assert [x.positions for x in found] == [len(p) + 1 for p in prompts]


def test_temperature_draws_lengths_by_their_probabilities(model):
  prompt = PROMPTS[0]
  row = [*prompt, model.config.tokens.mask_id]
  logits = np.asarray(maskdiff.logits(model, [row]))[0, -1, IDS] / 50
  drawn = predict(model, [prompt] * 600, batch=600, temperature=50.0)
  share = np.mean([[x.slots == n for n, _ in NAMED] for x in drawn], axis=0)
  p = np.exp(logits) / np.exp(logits).sum()
  np.testing.assert_allclose(share, p, atol=0.06)  # 3 standard errors


def test_lengths_without_room_are_left_out(model):
  prompt = [7] * (CONTEXT - 4)  # room for one token and 3 slots
  (found,) = predict(model, [prompt])
  assert found.slots == 2
  with pytest.raises(UserError, match='shorten the prompt'):
    predict(model, [[7] * (CONTEXT - 2)])


def test_samples_have_the_predicted_lengths(model):
  """The token is part of the row, not of the answer or of its text."""
  found = maskdiff.sample(model, PROMPTS, length='predicted')
  for answer, prompt in zip(found, PROMPTS, strict=True):
    length, token = expected(model, prompt)
    assert answer['length'] == length == len(answer['ids'])
    assert answer['given_ids'] == [*prompt, token]
    assert answer['forwards'] == 1 + length
    text = model.tokenizer.decode([*prompt, *answer['ids']])
    assert answer['text'] == text
  assert (
    maskdiff.sample(model, PROMPTS[1:2], length='predicted', seed=1)
    == found[1:2]
  )


def test_tokens_of_lengths_are_never_in_answers(model):
  logits = jnp.arange(300, dtype=jnp.float32)[None, None]
  logits = logits.at[..., np.array(IDS)].add(1000)
  c, settings = sampler_config(model.config)
  arguments = per_row(settings, 1), logits, jax.random.key(0)[None]
  token, _ = commit.predict(model.network, c, *arguments)
  assert token.tolist() == [[299]]
  others = dataclasses.replace(model.network, length_ids=())
  token, _ = commit.predict(others, c, *arguments)
  assert token.tolist() == [[265]]


@pytest.mark.parametrize(
  'changes, problem',
  [
    ({'gen_length': 8}, 'give only one of the two'),
    ({'open_length': True}, 'does not go with'),
    ({'length': 'x'}, 'given or predicted'),
  ],
)
def test_settings_that_do_not_go_with_it_are_refused(model, changes, problem):
  with pytest.raises(UserError, match=problem):
    maskdiff.sample(model, PROMPTS, **{'length': 'predicted'} | changes)


def test_model_without_lengths_is_refused():
  known = tiny.config({}).data.length_tokens
  with pytest.raises(UserError, match='--length_buckets'):
    lengths.check(known)
  with pytest.raises(UserError, match='--length_buckets'):
    lengths.chosen('predicted', known, None)
  assert not lengths.chosen(None, known, None)


def test_chat_predicts_unless_a_length_is_given():
  assert lengths.chosen(None, NAMED, None)
  assert lengths.chosen('predicted', NAMED, None)
  assert not lengths.chosen(None, NAMED, 8)
  assert not lengths.chosen('given', NAMED, None)
  with pytest.raises(UserError, match='give only one of the two'):
    lengths.chosen('predicted', NAMED, 8)
  assert not lengths.chosen(None, NAMED, None, open_length=True)
  with pytest.raises(UserError, match='open_length'):
    lengths.chosen('predicted', NAMED, None, open_length=True)
