"""A model and its flags, loaded onto all devices and sampled by the engine."""

import asyncio
import dataclasses
import json
import types

import fake_networks
import made_tokenizers
import pytest
import tiny
import untrained_run
from local_server import COMPILED

import maskdiff
from maskdiff.config.sample import SETTINGS
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.errors import UserError
from maskdiff.sampling.serve import Answer, RowRequest
from maskdiff.sampling.settings import SamplerConfig
from maskdiff.serving import asked, setup
from maskdiff.serving.batch import Batch, default_lengths
from maskdiff.serving.chat_prompts import open_chat
from maskdiff.serving.engine import Engine, Unavailable


@pytest.fixture(scope='module')
def run(tmp_path_factory, tokenizer):
  """Returns a work directory of rows of 32 tokens."""
  path = tmp_path_factory.mktemp('run')
  untrained_run.save(path, tokenizer)
  return path


def opened(run, **changes):
  """Returns the Model, Network and mesh, with some flags set."""
  flags = dict.fromkeys(SETTINGS) | dict(
    workdir=str(run),
    **dict(tensor=1, dtype=None, ema=False, rope_scaling=None),
    **dict(open_length=False, suppress_mask=False),
    **dict(chat_template=None, chat_arguments=None),
  )
  return setup.open_model(types.SimpleNamespace(**flags | changes), 'a model')


def ask(engine, request):
  """Returns the tokens of a row, from the Pending of an asked.Asked."""

  async def last():
    pending = engine.submit(request.row, request.seed, request.settings)
    found = [recording async for recording in pending.recordings()]
    return found[-1].tokens.tolist()

  return asyncio.run(last())


@pytest.mark.slow
def test_engine_on_a_mesh_gives_the_tokens_of_sample(run):
  """Steps of the flags shrink with the answer; a request changes others."""
  model, network, mesh = opened(run, gen_length=16, steps=32, block_length=4)
  engine = Engine(network, model.c, 2, [8, 32], mesh)
  engine.start()
  library = maskdiff.load(run)
  try:
    for slots, temperature in ((4, 0.0), (16, 0.8)):
      body = (
        b'{"prompt": "def", "max_tokens": %d, "temperature": %f, "seed": 7}'
        % (slots, temperature)
      )
      request = asked.parse(model, body, is_chat=False)
      assert request.settings.steps == 2 * slots
      assert request.settings.stop_at_eos
      (expected,) = maskdiff.sample(
        *(library, ['def']),
        **dict(seed=7, gen_length=slots, steps=2 * slots, block_length=4),
        **dict(temperature=temperature, stop_at_eos=True),
      )
      tokens = ask(engine, request)
      assert tokens[request.num_prompt :] == expected['ids']
  finally:
    engine.stop(Unavailable('the end'))
    engine.join()
  with pytest.raises(Unavailable, match='the end'):
    ask(engine, request)


def test_full_engine_refuses_requests(run):
  model, network, _ = opened(run)
  engine = Engine(network, model.c, 1, [32], max_waiting=2)  # not started

  async def submit():
    request = asked.parse(model, b'{"prompt": "x"}', is_chat=False)
    engine.submit(request.row, request.seed, request.settings)

  for _ in range(2):
    asyncio.run(submit())
  with pytest.raises(Unavailable, match='2 requests are waiting: try again'):
    asyncio.run(submit())


def test_template_is_that_of_the_flag_or_of_the_folder(run):
  assert opened(run)[0].chat is None
  message = b'{"messages": [{"role": "user", "content": "x"}]}'
  with pytest.raises(asked.BadRequest, match='no chat template: start the ser'):
    asked.parse(opened(run)[0], message, is_chat=True)
  model = opened(run, chat_template='plain')[0]
  tokenizer = model.tokenizer
  assert model.chat.end_ids == (tokenizer.eos_id,)
  request = asked.parse(model, message, is_chat=True)
  eos = tokenizer.eos_id
  assert request.row[: request.num_prompt] == [
    tokenizer.bos_id,
    *tokenizer.encode('user\nx'),
    eos,
    *tokenizer.encode('assistant\n'),
  ]
  with pytest.raises(UserError, match='there is no chat template'):
    opened(run, chat_template='plane')


def test_end_of_turn_of_a_template_ends_an_answer(tmp_path):
  """<|im_end|> ends a turn of Qwen's template, and its eos a text."""
  (tmp_path / 'tokenizer.json').write_text(json.dumps(made_tokenizers.spec()))
  tokenizer = tokenizer_lib.load(tmp_path)
  ids = tokenizer.special_tokens()
  chat = open_chat('qwen25', None, tmp_path, tokenizer)
  ends = {ids['<|im_end|>'], ids['<|endoftext|>']}
  assert set(chat.end_ids) == ends


@pytest.mark.parametrize(
  'fields, lengths',
  [
    ({}, [64, 256]),
    ({'lookahead': 0}, [256]),
    ({'block_length': 8}, [256]),
    ({'context': 128}, [128]),
  ],
)
def test_default_lengths(fields, lengths):
  network = types.SimpleNamespace(block_length=fields.get('block_length', 0))
  c = types.SimpleNamespace(lookahead=fields.get('lookahead', -1))
  assert default_lengths(network, c, fields.get('context', 256)) == lengths


PLAIN = SamplerConfig(block_length=4)
ONE_BY_ONE = SamplerConfig(block_length=1, cache='prefix')


@pytest.mark.slow
@pytest.mark.parametrize(
  'objective, c, rows',
  [
    ('masked_diffusion', PLAIN, 1),
    ('masked_diffusion', dataclasses.replace(PLAIN, cache='dual'), 2),
    ('autoregressive', ONE_BY_ONE, 2),
  ],
)
def test_warm_up_compiles_everything(objective, c, rows):
  """Requests join alone or while another one runs, and are cancelled."""
  network = fake_networks.network(
    tiny.MODEL, tiny.strong_params(), objective=objective
  )
  cancelled = set()
  batch = Batch(network, c, rows, 8, cancelled)
  batch.warm_up()
  assert not batch.busy and not cancelled
  compiled = len(COMPILED)
  found = []
  for i in range(5):
    request = RowRequest(i, [5] * (i % 3) + [None] * 5, i)
    batch.waiting.append(request)
    found.append(batch.step())
  cancelled.add(4)
  while batch.busy:
    found.append(batch.step())
  answers = [item for item in found if isinstance(item, Answer)]
  assert {answer.id: answer.error is None for answer in answers} == {
    0: True, 1: True, 2: True, 3: True, 4: False
  }  # fmt: skip
  assert len(COMPILED) == compiled


def test_template_of_the_folder_takes_arguments(tmp_path):
  source = (
    '{{ messages[0].content }}{% if brief is defined %}, briefly{% endif %}'
  )
  (tmp_path / 'chat_template.jinja').write_text(source)
  (tmp_path / 'tokenizer.json').write_text(json.dumps(made_tokenizers.spec()))
  tokenizer = tokenizer_lib.load(tmp_path)
  for arguments, end in ((None, ''), ('{"brief": true}', ', briefly')):
    chat = open_chat(None, arguments, str(tmp_path), tokenizer)
    ids = chat.encode([{'role': 'user', 'content': 'x'}])
    assert tokenizer.decode(ids) == 'x' + end
    assert chat.end_ids == (tokenizer.eos_id,)
