"""The server over HTTP on a local port: answers, streams, errors, its end."""

import concurrent.futures
import importlib
import pathlib
import sys
import threading

import pytest

pytest.importorskip('starlette')  # requirements-test.txt
pytest.importorskip('uvicorn')

import local_server  # noqa: E402
import pages  # noqa: E402
from local_server import COMPILED, CONTEXT, leave_early, send, stream  # noqa: E402

from maskdiff.errors import UserError  # noqa: E402


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return local_server.byte_tokenizer(tmp_path_factory.mktemp('model') / 'bytes')


@pytest.fixture(scope='module')
def server(tokenizer):
  with local_server.running(tokenizer) as server:
    yield server


@pytest.fixture(scope='module')
def url(server):
  return server.url


def requests(number):
  """Returns (path, body) of requests that differ in prompt and settings."""
  found = []
  for i in range(number):
    body = {'seed': i, 'max_tokens': 4 + i % 20, 'temperature': i % 4 / 2}
    if i % 3 == 1:
      body |= {'top_p': 0.9, 'temperature': 0.8}
    if i % 3 == 2:
      body |= {'steps': 24, 'max_tokens': 17 + i % 8, 'threshold': 0.5}
    if i % 5 == 4:
      body |= {'stop': ['de', ':']}
    text = f'def f{i}(' + ' + read' * (i % 11)
    if i % 2:
      found.append(('/v1/completions', body | {'prompt': text}))
    else:
      messages = [{'role': 'user', 'content': text}]
      found.append(('/v1/chat/completions', body | {'messages': messages}))
  return found


def text_of(choice):
  """Returns the text of a choice of either path, whole or a part."""
  turn = choice.get('message', choice.get('delta'))
  return choice['text'] if turn is None else turn.get('content', '')


def answer(url, path, body):
  """Returns text, finish and usage of an answer that is not streamed."""
  status, found = send(url + path, body)
  assert status == 200, found
  (choice,) = found['choices']
  assert found['seed'] == body['seed']
  return text_of(choice), choice['finish_reason'], found['usage']


def streamed(url, path, body):
  """Returns text, finish and usage of a streamed answer."""
  *parts, usage = stream(
    url + path, body | {'stream_options': {'include_usage': True}}
  )
  choices = [part['choices'][0] for part in parts]
  assert {c['finish_reason'] for c in choices[:-1]} <= {None}
  text = ''.join(map(text_of, choices))
  assert usage['choices'] == []
  return text, choices[-1]['finish_reason'], usage['usage']


@pytest.mark.slow
def test_64_requests_at_once_are_answered_as_alone(url):
  """Half of them are streamed. No request compiles anything."""
  asked = requests(64)
  compiled = len(COMPILED)
  alone = [answer(url, *request) for request in asked]
  assert len({text for text, _, _ in alone}) > 50
  assert {finish for _, finish, _ in alone} == {'stop', 'length'}
  with concurrent.futures.ThreadPoolExecutor(64) as pool:
    ways = [answer, streamed] * 32
    together = list(pool.map(lambda way, r: way(url, *r), ways, asked))
  assert together == alone
  assert len(COMPILED) == compiled
  assert compiled  # the programs, before the first request


def test_seed_and_settings_change_an_answer(url):
  ask = lambda **body: answer(
    url, '/v1/completions', {'prompt': 'x =', 'max_tokens': 40, **body}
  )
  texts = {ask(seed=1)[0], ask(seed=2)[0], ask(seed=1, temperature=0)[0]}
  assert len(texts) == 3
  greedy = ask(seed=1, temperature=0, logits_eos_inf=True)
  assert greedy[1] == 'length' and greedy[2]['completion_tokens'] == 40
  assert greedy == ask(seed=2, temperature=0, logits_eos_inf=True)


def test_prompt_of_token_ids_equals_its_text(url, tokenizer):
  ids = tokenizer.encode('def read(')
  found = [
    answer(url, '/v1/completions', {'prompt': prompt, 'seed': 1})
    for prompt in ('def read(', ids)
  ]
  assert found[0] == found[1]
  assert answer(url, '/v1/completions', {'prompt': '', 'seed': 1})[0]


def test_long_prompt_gets_the_room_that_is_left(url, tokenizer):
  ids = (tokenizer.encode('def read(') * CONTEXT)[: CONTEXT - 3]
  body = {'prompt': ids, 'seed': 1, 'logits_eos_inf': True}
  assert answer(url, '/v1/completions', body)[2]['total_tokens'] == CONTEXT


def test_models_health_and_metrics(url):
  assert send(f'{url}/v1/models')[1]['data'][0]['id'] == 'tiny'
  assert send(f'{url}/health') == (200, {'status': 'ok'})
  before = metrics(url)
  body = {'prompt': 'x', 'seed': 1, 'max_tokens': 7, 'logits_eos_inf': True}
  answer(url, '/v1/completions', body)
  after = metrics(url)
  grown = {key: after[key] - before.get(key, 0) for key in after}
  path = 'path="/v1/completions"'
  assert grown[f'maskdiff_requests_total{{{path},status="200"}}'] == 1
  assert grown['maskdiff_prompt_tokens_total'] == 1
  assert grown['maskdiff_completion_tokens_total'] == 7
  assert grown['maskdiff_request_seconds_count'] == 1
  assert (
    0
    < grown['maskdiff_first_token_seconds_sum']
    <= (grown['maskdiff_request_seconds_sum'])
  )
  assert after['maskdiff_requests_waiting'] == 0


def metrics(url):
  status, text = send(f'{url}/metrics')
  assert status == 200
  lines = [line for line in text.splitlines() if line[0] != '#']
  return {key: float(value) for key, value in map(str.split, lines)}


# Bad requests

PROMPT = {'prompt': 'x'}
USER = [{'role': 'user', 'content': 'x'}]
BAD = {
  'not JSON': (b'{"prompt": ', None, 'the body is not valid JSON'),
  'not UTF-8': (b'{"prompt": "\xff"}', None, 'the body is not valid JSON'),
  'deep': (b'[' * 100_000, None, 'nested'),
  'a list': (b'[]', None, 'the body must be a JSON object'),
  'no prompt': ({}, 'prompt', 'prompt is missing'),
  'null prompt': ({'prompt': None}, 'prompt', 'prompt is missing'),
  'prompts': ({'prompt': ['a', 'b']}, 'prompt', 'one text or one list'),
  'ids': ({'prompt': [1, 10**9]}, 'prompt', 'token ids must lie in [0, '),
  'unknown': (PROMPT | {'temprature': 1}, 'temprature', "did you mean 'temp"),
  'type': (PROMPT | {'temperature': 'hot'}, 'temperature', 'must be float'),
  'bool': (PROMPT | {'max_tokens': True}, 'max_tokens', 'must be int'),
  'huge': (PROMPT | {'temperature': 1e999}, 'temperature', 'finite'),
  'range': (PROMPT | {'top_p': 2}, 'top_p', 'at most 1'),
  'no tokens': (PROMPT | {'max_tokens': 0}, 'max_tokens', 'at least 1'),
  'tokens': (PROMPT | {'max_tokens': 256}, 'max_tokens', 'at most 255'),
  'seed': (PROMPT | {'seed': -1}, 'seed', 'must lie in [0, 2^32)'),
  'stop': (PROMPT | {'stop': ['']}, 'stop', 'at most 4 texts of 1 to'),
  'stream': (PROMPT | {'stream': 'yes'}, 'stream', 'must be bool'),
  'steps': (PROMPT | {'steps': 3, 'max_tokens': 32}, 'steps', 'multiple of 4'),
  'program': (PROMPT | {'block_length': 8}, 'block_length', 'another prog'),
  'length': (PROMPT | {'gen_length': 8}, 'gen_length', 'unknown field'),
  'factor': (PROMPT | {'factor': 1.0}, 'factor', 'has no effect'),
  'guidance': (PROMPT | {'guidance': 1.0}, None, 'guidance=1.0 needs another'),
  'n': (PROMPT | {'n': 2}, 'n', 'only 1 is supported'),
  'logprobs': (PROMPT | {'logprobs': 0}, 'logprobs', 'only False is supported'),
  'no messages': ({'messages': []}, 'messages', 'at least one'),
  'message': ({'messages': ['x']}, 'messages[0]', 'must be an object'),
  'role': ({'messages': [USER[0] | {'role': 'x'}]}, 'messages[0]', 'role'),
  'content': ({'messages': [{'role': 'user'}]}, 'messages[0]', 'must be text'),
  'image': (
    {'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]},
    'messages[0]',
    'must be text',
  ),
  'call': (
    {'messages': [USER[0] | {'tool_calls': [1]}]},
    'messages[0].tool_calls',
    'is not supported',
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', BAD)
@pytest.mark.parametrize('is_stream', [False, True])
def test_bad_request_is_one_line_that_names_the_field(url, case, is_stream):
  body, param, message = BAD[case]
  is_chat = isinstance(body, dict) and 'messages' in body
  if is_stream and isinstance(body, dict):
    body = {'stream': True} | body
  path = '/v1/chat/completions' if is_chat else '/v1/completions'
  status, found = send(url + path, body)
  assert status == 400
  error = found['error']
  assert message in error['message'] and '\n' not in error['message']
  assert error['param'] == param
  assert error['type'] == 'invalid_request_error'


def test_too_long_prompt_is_refused_with_the_limit(url):
  body = {'prompt': 'def read(' * CONTEXT}
  status, found = send(f'{url}/v1/completions', body)
  assert status == 400
  assert found['error']['code'] == 'context_length_exceeded'
  assert 'at most 256: shorten it' in found['error']['message']


def test_body_of_10_mb_is_refused(url):
  status, found = send(f'{url}/v1/completions', {'prompt': 'x' * 10_000_000})
  assert status == 413
  assert 'more than 2,097,152 bytes' in found['error']['message']


def test_broken_row_is_an_error_of_the_server(url):
  path, body = requests(2)[1]
  expected = answer(url, path, body)
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    bad = PROMPT | {'prompt': local_server.BROKEN}
    broken = [pool.submit(send, url + path, bad) for _ in range(4)]
    assert answer(url, path, body) == expected
    for future in broken:
      status, found = future.result()
      assert status == 500 and found['error']['type'] == 'server_error'
      assert 'were NaN or infinite' in found['error']['message']
  assert answer(url, path, body) == expected


def test_unknown_model_and_path_are_404(url):
  status, found = send(f'{url}/v1/completions', PROMPT | {'model': 'gpt'})
  assert (status, found['error']['code']) == (404, 'model_not_found')
  assert 'this server has tiny' in found['error']['message']
  assert send(f'{url}/v1/engines')[0] == 404
  status, found = send(f'{url}/v1/completions')
  assert status == 405 and 'GET /v1/completions' in found['error']['message']


# Clients that leave, and the end of the server

# One token per step at most, and 25,000 steps for 200 tokens.
SLOW = {
  **PROMPT,
  **{'steps': 25_000, 'max_tokens': 200},
  **{'threshold': 2.0, 'logits_eos_inf': True, 'seed': 0},
}


@pytest.mark.parametrize('is_stream', [False, True])
def test_rows_of_clients_that_left_are_free(server, url, is_stream):
  """The other requests are answered as without them."""
  path, body = requests(2)[1]
  expected = answer(url, path, body)
  slow = SLOW | {'stream': is_stream}
  with concurrent.futures.ThreadPoolExecutor(12) as pool:
    left = [
      pool.submit(leave_early, f'{url}/v1/completions', slow) for _ in range(12)
    ]
    assert answer(url, path, body) == expected
    for future in left:
      future.result()
  engine = server.engine
  local_server.wait_until(lambda: not (engine.running or engine.waiting))
  assert answer(url, path, body) == expected


@pytest.mark.slow
def test_shutdown_waits_for_answers(tokenizer):
  with local_server.running(tokenizer, rows=2, grace=60.0) as server:
    url = f'{server.url}/v1/completions'
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
      some = [pool.submit(send, url, SLOW | {'steps': 600}) for _ in range(3)]
      engine = server.engine
      local_server.wait_until(lambda: engine.running + engine.waiting == 3)
      server.should_exit = True
      assert [future.result()[0] for future in some] == [200] * 3
    server.engine.join()


@pytest.mark.slow
def test_shutdown_sends_an_error_to_requests_that_take_too_long(tokenizer):
  """Also to those that wait for a row, and within a stream."""
  with local_server.running(tokenizer, rows=2, grace=0.3) as server:
    url = f'{server.url}/v1/completions'
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      some = [pool.submit(send, url, SLOW) for _ in range(3)]
      some.append(pool.submit(send, url, SLOW | {'stream': True}))
      local_server.wait_until(lambda: server.engine.waiting == 2)
      server.should_exit = True
      for future in some:
        status, found = future.result()
        assert 'the server is shutting down' in str(found)
        assert status == 503 or 'data: {"error"' in found
    server.engine.join()


def test_failure_of_the_sampler_is_reported_to_all(tokenizer, monkeypatch):
  def fail():
    raise RuntimeError('out of memory')

  with local_server.running(tokenizer) as server:
    (short, _) = server.engine._batches
    monkeypatch.setattr(short, 'step', fail)
    status, found = send(f'{server.url}/v1/completions', PROMPT)
    problem = 'the sampler failed: out of memory'
    assert (status, found['error']['message']) == (503, problem)
    assert send(f'{server.url}/health') == (503, {'status': problem})
    assert send(f'{server.url}/v1/completions', PROMPT)[0] == 503


@pytest.mark.parametrize('module', ['app', 'server'])
def test_missing_package_is_one_line(monkeypatch, module):
  for name in ('app', 'server'):
    monkeypatch.delitem(sys.modules, f'maskdiff.serving.{name}', raising=False)
  missing = 'starlette.applications' if module == 'app' else 'uvicorn'
  monkeypatch.setitem(sys.modules, missing, None)
  with pytest.raises(UserError, match='pip install -r requirements-serve.txt'):
    importlib.import_module(f'maskdiff.serving.{module}')


def test_openai_client(url):
  openai = pytest.importorskip('openai')  # requirements-test.txt
  client = openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0)
  assert [model.id for model in client.models.list()] == ['tiny']
  messages = [{'role': 'user', 'content': 'read'}]
  asked = dict(model='tiny', messages=messages, seed=3, max_tokens=20)
  whole = client.chat.completions.create(**asked, extra_body={'steps': 21})
  text = whole.choices[0].message.content
  assert text and whole.usage.completion_tokens > 1
  parts = client.chat.completions.create(
    **asked, stream=True, extra_body={'steps': 21}
  )
  pieces = [part.choices[0].delta.content or '' for part in parts]
  assert ''.join(pieces) == text
  found = client.completions.create(model='tiny', prompt='x', stop=':', seed=1)
  assert ':' not in found.choices[0].text
  with pytest.raises(openai.NotFoundError, match='there is no model'):
    client.completions.create(model='gpt', prompt='x')
  with pytest.raises(openai.BadRequestError, match='at least 1'):
    client.completions.create(model='tiny', prompt='x', max_tokens=0)
  assert threading.active_count() < 100


def test_client_of_the_page_runs(url, capsys):
  """The last block of Python in docs/serving.md, on the port of the tests."""
  pytest.importorskip('openai')
  page = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'serving.md'
  blocks = [b for b in pages.blocks(page.read_text()) if b.language == 'python']
  program = '\n'.join(blocks[-1].lines)
  assert 'http://127.0.0.1:8008/v1' in program
  exec(program.replace('http://127.0.0.1:8008', url), {})
  assert capsys.readouterr().out
