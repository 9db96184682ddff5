"""A server with a tiny network on a local port, in a thread of the tests."""

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import jax
import numpy as np
import published_folders
import tiny

from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.interop import load
from maskdiff.model import transformer
from maskdiff.model.transformer import TransformerConfig
from maskdiff.sampling.settings import sampler_config
from maskdiff.serving import asked
from maskdiff.serving.batch import default_lengths
from maskdiff.serving.engine import Engine

CONTEXT = 256
BROKEN = 'Z'  # a prompt with this character has logits that are NaN

COMPILED = []  # an entry for every program that this process has compiled


@jax.monitoring.register_event_duration_secs_listener
def _count_compilations(event, seconds, **kwargs):
  if 'backend_compile' in event:
    COMPILED.append(event)


def byte_tokenizer(folder):
  """Returns a Tokenizer with a token per byte, in a folder that it makes."""
  folder.mkdir()
  published_folders.save_tokenizer(folder)
  return tokenizer_lib.load(folder)


def make_network(tokenizer):
  """Returns the config and the Network of a model with few likely tokens.

  These are eos and the bytes of some characters. Their logits differ between
  positions.
  """
  keys = {
    'model.vocab_size': tokenizer.vocab_size,
    'model.tie_embeddings': False,
    'data.length': CONTEXT,
    'sample.temperature': 1.0,
    'sample.block_length': 8,
    'sample.remasking': 'quota_and_threshold',
    'tokens.mask_id': tokenizer.mask_id,
    'tokens.bos_id': tokenizer.bos_id,
    'tokens.eos_id': tokenizer.eos_id,
  }
  config = tiny.config(tiny.MODEL_KEYS | keys)
  params = transformer.init(
    TransformerConfig(**config.model), jax.random.key(0)
  )
  random = np.random.default_rng(1)
  embed = config.model.embed
  head = np.zeros((embed, tokenizer.vocab_size), np.float32)
  known = tokenizer.encode('é→ def:x+\n')
  likely = [tokenizer.eos_id, *known]
  head[:, likely] = random.normal(size=(embed, len(likely))) * 1.5
  (bad,) = tokenizer.encode(BROKEN)
  embed = params['embed'].at[bad].set(jax.numpy.nan)
  params = params | {'embed': embed, 'head': jax.numpy.asarray(head)}
  return config, load.network(config, params)


def encode_chat(tokenizer):
  """Returns a function from messages to token ids."""
  return lambda messages: tokenizer.encode(
    ''.join(f'{m["role"]}: {m["content"]}\n' for m in messages) + 'assistant:'
  )


@contextlib.contextmanager
def running(tokenizer, rows=4, max_waiting=1024, grace=10.0, **values):
  """Yields a running server.Server; its `url` is the address.

  Args:
    tokenizer: data.tokenizer.Tokenizer.
    rows: rows of each batch.
    max_waiting: see Engine.
    grace: see server.Server.
    **values: settings of all requests.
  """
  from maskdiff.serving import server as server_lib

  config, network = make_network(tokenizer)
  values = {'gen_length': 32, 'stop_at_eos': True} | values
  c, _ = sampler_config(config)
  lengths = default_lengths(network, c, CONTEXT)
  engine = Engine(network, c, rows, lengths, max_waiting=max_waiting)
  engine.start()
  chat = asked.Chat(encode_chat(tokenizer))
  model = asked.Model('tiny', config, c, values, tokenizer, CONTEXT, chat)
  listener = server_lib.listen('127.0.0.1', 0)
  server = server_lib.Server(model, engine, grace)
  server.url = f'http://127.0.0.1:{listener.getsockname()[1]}'
  thread = threading.Thread(target=server_lib.run, args=(server, listener))
  thread.start()
  try:
    yield server
  finally:
    server.should_exit = True
    thread.join()
    listener.close()


def send(url, body=None, timeout=60):
  """Returns the status and the parsed JSON (or text) of a request.

  Args:
    url: str.
    body: dict, bytes, or None for a GET.
    timeout: seconds.
  """
  content = json.dumps(body).encode() if isinstance(body, dict) else body
  request = urllib.request.Request(
    url, content, {'Content-Type': 'application/json'}
  )
  try:
    with urllib.request.urlopen(request, timeout=timeout) as response:
      status, text = response.status, response.read().decode()
  except urllib.error.HTTPError as error:
    status, text = error.code, error.read().decode()
  with contextlib.suppress(ValueError):
    return status, json.loads(text)
  return status, text


def stream(url, body):
  """Returns the parsed events of a streamed answer, without the last."""
  status, text = send(url, body | {'stream': True})
  assert status == 200, text
  *events, done, end = text.split('\n\n')
  assert (done, end) == ('data: [DONE]', '')
  return [json.loads(event.removeprefix('data: ')) for event in events]


def leave_early(url, body):
  """Sends a request and closes the connection without reading an answer."""
  host, port = url.removeprefix('http://').split('/')[0].split(':')
  path = '/' + url.removeprefix('http://').partition('/')[2]
  content = json.dumps(body).encode()
  head = (
    f'POST {path} HTTP/1.1\r\nHost: {host}\r\n'
    f'Content-Length: {len(content)}\r\n\r\n'
  )
  with socket.create_connection((host, int(port))) as connection:
    connection.sendall(head.encode() + content)
    time.sleep(0.1)


def wait_until(condition, seconds=30):
  """Waits until a function returns a true value; fails after some seconds."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)
