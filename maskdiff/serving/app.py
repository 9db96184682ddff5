"""The HTTP server: paths, streams of answers, errors in OpenAI's format.

    GET  /v1/models                the one model
    POST /v1/chat/completions      the next turn of a conversation
    POST /v1/completions           the continuation of a text
    GET  /health                   200 as long as requests are taken
    GET  /metrics                  counters for Prometheus

A streamed answer is sent as far as all tokens from its beginning are committed.
If a client leaves, the row of its request is freed.
"""

import asyncio
import time

from maskdiff.errors import UserError, one_line
from maskdiff.serving import asked, replies
from maskdiff.serving.committed import Committed
from maskdiff.serving.counters import Counters

try:
  from starlette.applications import Starlette
  from starlette.exceptions import HTTPException
  from starlette.requests import ClientDisconnect
  from starlette.responses import JSONResponse, Response, StreamingResponse
  from starlette.routing import Route
except ImportError as error:
  raise UserError(
    f'the server needs starlette and uvicorn ({error}): pip install -r '
    'requirements-serve.txt'
  ) from error

MAX_BODY_BYTES = 2 << 20
# More bytes of a body that is too long are read, so that its client sees the
# error instead of a closed connection.
MAX_DROPPED_BYTES = 1 << 30
CLIENT_LEFT = 499  # status in the counters, as in nginx


class App:
  """The paths of the server, as methods of a request."""

  def __init__(self, model, engine):
    """`model` is the asked.Model, and `engine` the started Engine."""
    self.model, self.engine, self.counters = model, engine, Counters()
    self._created = int(time.time())

  def starlette(self):
    """Returns the ASGI application."""
    return Starlette(
      routes=[
        Route('/v1/models', self.models),
        Route('/v1/chat/completions', self.chat, methods=['POST']),
        Route('/v1/completions', self.complete, methods=['POST']),
        Route('/health', self.health),
        Route('/metrics', self.metrics),
      ],
      exception_handlers={
        HTTPException: _http_error,
        Exception: _unexpected_error,
      },
    )

  async def models(self, request):
    return JSONResponse(replies.models(self.model.name, self._created))

  async def health(self, request):
    error = self.engine.error
    return JSONResponse(
      {'status': str(error) if error else 'ok'}, 503 if error else 200
    )

  async def metrics(self, request):
    text = self.counters.text(self.engine.running, self.engine.waiting)
    return Response(text, media_type='text/plain; version=0.0.4')

  async def chat(self, request):
    return await self._respond(request, is_chat=True)

  async def complete(self, request):
    return await self._respond(request, is_chat=False)

  async def _respond(self, request, is_chat):
    """Returns the Response to a request for an answer, and counts it."""
    try:
      response = await self._answer(request, is_chat)
    except (ClientDisconnect, _ClientLeft):
      response = Response(status_code=CLIENT_LEFT)
    except UserError as error:
      response = JSONResponse(*_error(error))
    self.counters.add(
      'requests', path=request.url.path, status=response.status_code
    )
    return response

  async def _answer(self, request, is_chat):
    content = await _body(request)
    began = time.monotonic()
    # Encoding a long text must not hold up the other requests.
    found = await asyncio.to_thread(asked.parse, self.model, content, is_chat)
    reply = replies.Reply(self.model.name, found, is_chat)
    texts = self._texts(found, began)
    if not found.stream:
      parts = await _unless_client_leaves(request, _list(texts))
      committed = parts[-1][1]
      text = ''.join(text for text, _ in parts)
      return JSONResponse(reply.whole(text, committed.finish, committed.tokens))
    # The status of a stream is sent after the first pass, which refuses some
    # requests.
    first = await _unless_client_leaves(request, anext(texts))
    events = _events(reply, first, texts, found.include_usage)
    return StreamingResponse(events, media_type='text/event-stream')

  async def _texts(self, found, began):
    """Yields new text of an answer, and its Committed, until the answer ends.

    Args:
      found: Asked.
      began: time.monotonic() at which the request arrived.
    """
    committed = Committed(
      self.model.tokenizer,
      self.model.config.tokens.mask_id,
      found.end_ids,
      found.stop,
    )
    pending = self.engine.submit(found.row, found.seed, found.settings)
    is_first = True
    try:
      async for recording in pending.recordings():
        text = committed.advance(recording, pending.answer is not None)
        if is_first and (text or committed.finish):
          is_first = False
          self.counters.observe('first_token_seconds', time.monotonic() - began)
        yield text, committed
        if committed.finish:
          break
    finally:
      self.engine.cancel(pending)
    self.counters.observe('request_seconds', time.monotonic() - began)
    self.counters.add('prompt_tokens', found.num_prompt)
    self.counters.add('completion_tokens', committed.tokens)
    if pending.answer:
      self.counters.add('forward_passes', pending.answer.forwards)


class _ClientLeft(Exception):
  """The client has closed its connection."""


async def _list(items):
  return [item async for item in items]


async def _events(reply, first, rest, include_usage):
  """Yields the server-sent events of an answer.

  Args:
    reply: replies.Reply.
    first: first item of App._texts.
    rest: asynchronous iterator of the other items.
    include_usage: whether the last part counts tokens.
  """
  text, committed = first
  yield replies.event(reply.part(text, is_first=True))
  try:
    async for text, _ in rest:
      if text:
        yield replies.event(reply.part(text))
  except UserError as error:
    yield replies.event(_error(error)[0])
    return
  yield replies.event(reply.part('', committed.finish))
  if include_usage:
    yield replies.event(reply.usage(committed.tokens))
  yield replies.DONE


async def _unless_client_leaves(request, coroutine):
  """Returns the result of a coroutine; cancels it if the client leaves.

  Raises:
    _ClientLeft: the client has left.
  """
  work = asyncio.ensure_future(coroutine)
  left = asyncio.ensure_future(_until_client_leaves(request))
  try:
    await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
      raise _ClientLeft
    return work.result()
  finally:
    work.cancel()
    left.cancel()


async def _until_client_leaves(request):
  while (await request.receive())['type'] != 'http.disconnect':
    pass


async def _body(request):
  """Returns the body of a request, bytes.

  Raises:
    BadRequest: it is too long.
  """
  parts, size = [], 0
  async for part in request.stream():
    size += len(part)
    if size <= MAX_BODY_BYTES:
      parts.append(part)
    elif size > MAX_DROPPED_BYTES:
      break
  if size > MAX_BODY_BYTES:
    raise asked.BadRequest(
      f'the body has more than {MAX_BODY_BYTES:,} bytes: shorten the prompt',
      http_status=413,
    )
  return b''.join(parts)


def _error(error):
  """Returns the body and the status of the reply to a UserError."""
  status = getattr(error, 'http_status', 400)
  fields = (getattr(error, name, None) for name in ('param', 'code'))
  return replies.error(one_line(error, 1000), status, *fields), status


async def _http_error(request, error):
  message = f'{request.method} {request.url.path}: {error.detail}'
  status = error.status_code
  return JSONResponse(replies.error(one_line(message), status), status)


async def _unexpected_error(request, error):
  """Replies to an error whose traceback uvicorn logs."""
  return JSONResponse(replies.error('internal error', 500), 500)
