"""Many requests through a small batch: answers do not depend on the batch."""

import dataclasses

import fake_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled

from maskdiff.distributed import mesh
from maskdiff.sampling import layouts, refill, sampler

MASK, EOS, VOCAB, ROOM = 4, 5, 16, 16
CONFIG = dict(
  steps=ROOM,
  block_length=4,
  temperature=0.0,
  remasking='low_confidence',
  gen_length=ROOM,
  stop_at_eos=True,
  lookahead=0,
)


def countdown(given, tokens, valid):
  """Returns logits for n - 7 copies of the first token n, then eos."""
  length = tokens.shape[1]
  number = tokens[:, :1] - 7
  place = jnp.arange(length)
  answer = jnp.where(place == number + 1, EOS, tokens[:, :1])
  return 9.0 * jax.nn.one_hot(answer, VOCAB) + 0.01 * place[None, ::-1, None]


@pytest.fixture(autouse=True)
def fake(monkeypatch):
  fake_networks.put_in(monkeypatch)


PROMPTS = [[7 + n] for n in (0, 7, 1, 3, 8, 2, 0, 5, 1, 6)]


NETWORK = fake_networks.network(countdown, mask_id=MASK, eos_id=EOS)


def all_answers(c, batch, prompts=PROMPTS):
  request = layouts.continue_prompts(prompts, ROOM)
  return list(refill.answers(*sampled.arguments(NETWORK, c, request), batch))


@pytest.mark.parametrize('batch', [1, 3, 100])
def test_every_request_has_one_answer_that_equals_sampling_alone(batch):
  request = layouts.continue_prompts(PROMPTS, ROOM)
  alone = sampled.complete(NETWORK, CONFIG, request)
  found = all_answers(CONFIG, batch)
  assert sorted(answer.row for answer in found) == list(range(10))
  for answer in found:
    tokens = answer.recording.tokens
    np.testing.assert_array_equal(tokens, alone.canvas[answer.row])
    number = PROMPTS[answer.row][0] - 7
    assert tokens.tolist() == (
      [7 + number] * (1 + number) + [EOS] * (ROOM - number)
    )
    assert answer.forwards == alone.forwards[answer.row]
    assert answer.positions == alone.positions[answer.row]
    assert not answer.broken


def test_short_answers_overtake_long_ones():
  """The batch has one answer of nine tokens and many of one token."""
  found = all_answers(CONFIG, 2, [[15], [7], [7], [7], [7]])
  assert [answer.row for answer in found][:3] == [1, 2, 3]


def test_refill_saves_calls(monkeypatch):
  calls = []
  run = sampler.run
  monkeypatch.setattr(
    sampler, 'run', lambda *a: calls.append(run(*a)) or calls[-1]
  )
  long, short = [15], [7]
  prompts = [long, short, short, short, short, short, short, short] * 2
  all_answers(CONFIG, 4, prompts)
  continuous = sum(int(carry.calls) for carry in calls)
  calls.clear()
  for first in range(0, 16, 4):
    all_answers(CONFIG, 4, prompts[first : first + 4])
  assert continuous < sum(int(carry.calls) for carry in calls)


def test_one_program_serves_all_requests(monkeypatch):
  sampler.run.clear_cache()
  all_answers(CONFIG, 2)
  assert sampler.run._cache_size() == 1


def test_broken_row_does_not_stop_the_others():
  def nan_at_10(given, tokens, valid):
    logits = countdown(given, tokens, valid)
    return jnp.where(tokens[:, :1, None] == 10, jnp.nan, logits)

  network = dataclasses.replace(NETWORK, config=nan_at_10)
  request = layouts.continue_prompts(PROMPTS, ROOM)
  found = refill.answers(*sampled.arguments(network, CONFIG, request), 3)
  assert {a.row for a in found if a.broken} == {3}


def test_refill_on_a_mesh_equals_one_device():
  c = {**CONFIG, 'temperature': 0.7}
  expected = {
    a.row: a.recording.tokens.tolist() for a in all_answers(c, 2, PROMPTS[:5])
  }
  with jax.set_mesh(mesh.make_mesh(fsdp=4, tensor=2)):
    found = {
      a.row: a.recording.tokens.tolist() for a in all_answers(c, 2, PROMPTS[:5])
    }
  assert found == expected
