"""Requests served by one program: answers do not depend on the batch."""

import dataclasses
import itertools
import re

import fake_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled

from maskdiff.distributed import mesh
from maskdiff.errors import UserError
from maskdiff.sampling import layouts, sampler
from maskdiff.sampling import serve as serve_lib
from maskdiff.sampling.serve import RowRequest, serve
from maskdiff.sampling.settings import Settings, split

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
C, SETTINGS = split(CONFIG)


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


FIRST = [7 + n for n in (0, 7, 1, 3, 8, 2, 0, 5, 1, 6)]
NETWORK = fake_networks.network(countdown, mask_id=MASK, eos_id=EOS)


def ask(first, number, slots=ROOM, settings=SETTINGS):
  """Returns a request that is answered by first - 7 more tokens and eos."""
  return RowRequest(number, [first, *[None] * slots], number, settings)


def requests(first=FIRST):
  return [ask(token, i) for i, token in enumerate(first)]


def served(asked, rows, c=C, network=NETWORK):
  return serve(network, c, asked, rows, 1 + ROOM)


@pytest.mark.parametrize('rows', [1, 3, 10])
def test_every_request_has_one_answer_that_equals_sampling_alone(rows):
  alone = sampled.complete(
    NETWORK, CONFIG, layouts.continue_prompts([[n] for n in FIRST], ROOM)
  )
  found = list(served(requests(), rows))
  assert sorted(answer.id for answer in found) == list(range(10))
  for answer in found:
    tokens = answer.recording.tokens
    np.testing.assert_array_equal(tokens, alone.canvas[answer.id])
    np.testing.assert_array_equal(
      answer.recording.steps, alone.filled_at[answer.id]
    )
    number = FIRST[answer.id] - 7
    assert tokens.tolist() == (
      [7 + number] * (1 + number) + [EOS] * (ROOM - number)
    )
    assert answer.forwards == alone.forwards[answer.id]
    assert answer.positions == alone.positions[answer.id]
    assert not answer.error


def test_short_answers_overtake_long_ones():
  """The batch has one answer of nine tokens and many of one token."""
  found = list(served(requests([15, 7, 7, 7, 7]), 2))
  assert [answer.id for answer in found][:3] == [1, 2, 3]


def test_refilled_rows_save_calls(monkeypatch):
  calls = []
  run = sampler.run

  def counted(*args):
    carry, cache = run(*args)
    calls.append(int(carry.calls) - int(args[3].calls))
    return carry, cache

  monkeypatch.setattr(sampler, 'run', counted)
  long, short = 15, 7
  asked = requests([long, *[short] * 7] * 2)
  list(served(asked, 4))
  continuous = sum(calls)
  calls.clear()
  for first in range(0, 16, 4):
    list(served(asked[first : first + 4], 4))
  assert continuous < sum(calls)


@pytest.mark.slow
def test_fifty_requests_with_fifty_settings_compile_one_program():
  """Settings, lengths and prompts differ; rows of one batch mix them."""
  random = np.random.default_rng(0)
  asked = []
  for i in range(50):
    slots = int(random.integers(1, ROOM + 1))
    settings = Settings(
      gen_length=slots,
      steps=-(-slots // 4) * int(random.integers(1, 5)),
      temperature=float(random.choice([0, random.uniform(0.1, 2)])),
      top_k=int(random.integers(0, 9)),
      top_p=float(random.uniform(0.3, 1)),
      threshold=float(random.uniform()),
      factor=float(random.uniform(0, 3)),
      guidance=float(random.choice([0, random.uniform(0.1, 2)])),
      stop_at_eos=bool(random.integers(2)),
      logits_eos_inf=bool(random.integers(2)),
      confidence_eos_eot_inf=bool(random.integers(2)),
      eot_id=int(random.integers(VOCAB)),
    )
    asked.append(ask(FIRST[i % 10], i, slots, settings))
  assert len({request.settings for request in asked}) == 50
  c = dataclasses.replace(C, guided=True)
  sampler.run.clear_cache()
  together = {answer.id: answer for answer in served(asked, 4, c)}
  assert sampler.run._cache_size() == 1
  assert len(together) == 50
  for answer in served(asked[:12], 1, c):  # alone
    mixed = together[answer.id]
    assert answer.forwards == mixed.forwards
    assert answer.positions == mixed.positions
    for x, y in zip(answer.recording, mixed.recording, strict=True):
      np.testing.assert_array_equal(x, y)
  assert sampler.run._cache_size() == 2  # batches of four, and of one


@pytest.mark.slow
def test_served_rows_on_a_mesh_equal_one_device():
  settings = SETTINGS._replace(temperature=0.7)
  asked = [request._replace(settings=settings) for request in requests()[:5]]
  tokens = lambda: {a.id: a.recording.tokens.tolist() for a in served(asked, 2)}
  expected = tokens()
  with jax.set_mesh(mesh.make_mesh(fsdp=4, tensor=2)):
    assert tokens() == expected


# The iterator of requests


@pytest.mark.parametrize('rows', [1, 3])
def test_requests_are_taken_only_for_free_rows(rows):
  taken = []

  def endless():
    for i in itertools.count():
      taken.append(i)
      yield ask(FIRST[i % 10], i)

  found = itertools.islice(served(endless(), rows), 12)
  for answered, _ in enumerate(found, 1):
    assert len(taken) <= rows + answered - 1


def test_request_may_depend_on_the_answer_before_it():
  """As for lines that a user types, with a single row."""
  answers = []

  def typed():
    token = 9
    for i in range(4):
      yield ask(token, i)
      (slots,) = np.nonzero(answers[-1].recording.fill)
      token = 7 + int((answers[-1].recording.tokens[slots] == token).sum()) + i

  for answer in served(typed(), 1):
    answers.append(answer)
  numbers = [
    int((a.recording.tokens[1:] != EOS).sum()) for a in answers
  ]  # of tokens before eos
  assert numbers == [2, 2, 3, 5]


def test_rows_go_on_while_there_is_no_request(monkeypatch):
  """None stands for no request now. A later request joins a running batch."""
  monkeypatch.setattr(serve_lib, 'POLL_PASSES', 2)
  events = []
  c, settings = split(dict(block_length=1, steps=ROOM, gen_length=ROOM))

  def queue():
    for event in (8, None, None, None, 9, None, None):
      events.append(event)
      yield event and ask(event, event, settings=settings)

  found = served(queue(), 2, c)
  first = next(found)
  assert first.id == 8 and first.forwards == ROOM
  assert events == [8, None, None, None, 9]  # 9 joined before 8 ended
  (second,) = found
  assert second.id == 9 and second.forwards == ROOM


def test_no_requests_have_no_answers():
  assert list(served([], 2)) == []
  assert [a.id for a in served([None, None, ask(7, 0)], 2)] == [0]


def one_by_one():
  """Returns a SamplerConfig and Settings that commit one slot per pass."""
  return split(dict(block_length=1, steps=ROOM, gen_length=ROOM))


def test_progress_has_the_committed_slots_of_rows_in_progress():
  c, settings = one_by_one()
  asked = [ask(9, i, settings=settings) for i in range(3)]
  found = list(serve(NETWORK, c, asked, 2, 1 + ROOM, report_passes=3))
  reports = [item for item in found if isinstance(item, serve_lib.Progress)]
  answers = {a.id: a for a in found if isinstance(a, serve_lib.Answer)}
  assert answers.keys() == {0, 1, 2}
  committed = {i: [] for i in answers}
  for report in reports:
    for i, partial in report.recordings.items():
      done = partial.steps > 0
      committed[i].append(int(done.sum()))
      final = answers[i].recording.tokens
      np.testing.assert_array_equal(partial.tokens[done], final[done])
      assert (partial.tokens[partial.fill & ~done] == MASK).all()
  assert committed == {i: [3, 6, 9, 12, 15] for i in range(3)}


@pytest.mark.parametrize('when', ['waiting', 'in a row'])
def test_cancelled_request_frees_its_row(when):
  c, settings = one_by_one()
  asked = [ask(9 + i, i, settings=settings) for i in range(3)]
  expected = {a.id: a.recording.tokens.tolist() for a in served(asked, 1, c)}
  cancelled = {1} if when == 'waiting' else set()
  found, before = {}, 0
  for item in serve(NETWORK, c, asked, 1, 1 + ROOM, 3, cancelled):
    if isinstance(item, serve_lib.Answer):
      found[item.id] = item
    elif 1 in item.recordings:
      before += 1
      cancelled.add(1)
  assert before == (when == 'in a row')  # it had a row for 3 passes of 16
  assert str(found[1].error) == 'the request was cancelled'
  assert found[1].recording is None
  tokens = {i: a.recording.tokens.tolist() for i, a in found.items() if i != 1}
  assert tokens == {0: expected[0], 2: expected[2]}


# Requests without an answer


SEEDED = RowRequest('bad', [7, *[None] * ROOM], 2**32, SETTINGS)
GAP = RowRequest('bad', [7, None, 8], 0, Settings())


def bad(slots=ROOM, settings=SETTINGS):
  return RowRequest('bad', [7, *[None] * slots], 0, settings)


def odd(row=(7, None), seed=0, settings=SETTINGS):
  return RowRequest('bad', row, seed, settings)


BAD = {
  'row': (odd(None), 'row: must be a list of token ids'),
  'text': (odd([7, 'x', None]), "element 1 is 'x', but must be None"),
  'float': (odd([7.0, None]), 'element 0 is 7.0'),
  'negative': (odd([7, -1, None]), 'element 1 is -1'),
  'large': (odd([2**40, None]), 'token id in '),
  'float seed': (odd(seed=1.5), 'seed=1.5: must be an integer'),
  'no settings': (odd(settings=None), 'must be sampling.settings.Settings'),
  'overflow': (
    odd(settings=SETTINGS._replace(top_k=2**32)),
    'top_k=4294967296',
  ),
  'long': (bad(ROOM + 1), '18 tokens and slots, but rows have room for 17'),
  'empty': (bad(0), 'nothing to fill'),
  'seed': (SEEDED, 'seed 4294967296 must be'),
  'gap': (GAP, 'lookahead=0 hides slots'),
  'top_p': (bad(settings=Settings(top_p=2.0)), 'top_p=2.0: must be at most 1'),
  'steps': (
    bad(settings=SETTINGS._replace(steps=3)),
    'steps=3 cannot be shared equally by 4',
  ),
  'guidance': (
    bad(settings=Settings(guidance=1.5)),
    r"guidance=1.5 needs another program than this sampler's \(guided=False\); "
    'settings that may differ by request: gen_length, steps, temperature',
  ),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_request_is_answered_by_its_error(case):
  """The requests around it are answered as without it."""
  request, message = BAD[case]
  good = requests([9, 8, 10])
  expected = {a.id: a.recording.tokens.tolist() for a in served(good, 2)}
  found = {a.id: a for a in served([good[0], request, *good[1:]], 2)}
  refused = found.pop('bad')
  assert re.search(message, str(refused.error))
  assert refused.recording is None
  assert {i: a.recording.tokens.tolist() for i, a in found.items()} == expected


def test_broken_row_does_not_stop_the_others():
  def nan_at_10(given, tokens, valid):
    logits = countdown(given, tokens, valid)
    return jnp.where(tokens[:, :1, None] == 10, jnp.nan, logits)

  config = fake_networks.Config(nan_at_10)
  network = dataclasses.replace(NETWORK, config=config)
  found = list(served(requests(), 3, network=network))
  assert len(found) == 10
  (broken,) = [a for a in found if a.error]
  assert broken.id == 3
  assert 'this request were NaN or infinite' in str(broken.error)
  assert (broken.recording.tokens[1:] == MASK).all()
  assert not broken.recording.steps.any()


@pytest.mark.parametrize(
  'rows, length, problem',
  [
    (0, 16, 'rows=0 and length=16 must be at least 1'),
    (2, 17, 'longer than the training rows of the model, .* at most 16'),
  ],
)
def test_impossible_batch_is_one_error(rows, length, problem):
  network = dataclasses.replace(NETWORK, context=16)
  with pytest.raises(UserError, match=problem) as error:
    next(serve(network, C, requests(), rows, length))
  assert '\n' not in str(error.value)
