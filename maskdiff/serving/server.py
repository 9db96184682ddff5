"""Runs the HTTP server until a signal, and ends it without losing answers."""

import asyncio
import signal
import socket
import threading

from maskdiff.errors import UserError
from maskdiff.serving.app import App  # reports a missing starlette
from maskdiff.serving.engine import Unavailable

try:
  import uvicorn
except ImportError as error:
  raise UserError(
    f'the server needs uvicorn ({error}): pip install -r requirements-serve.txt'
  ) from error


class Server(uvicorn.Server):
  """An HTTP server for an engine.

  After `should_exit`, or SIGINT or SIGTERM, no connection is accepted. Requests
  in the engine have `grace` seconds to be answered; then they get an error.
  """

  def __init__(self, model, engine, grace=10.0, max_requests=None):
    """Makes a server.

    Args:
      model: asked.Model.
      engine: Engine, which has been started.
      grace: seconds.
      max_requests: end after this number of HTTP requests; None: no limit.
    """
    self.engine, self._grace = engine, grace
    super().__init__(
      uvicorn.Config(
        App(model, engine).starlette(),
        lifespan='off',
        log_level='warning',
        access_log=False,
        limit_max_requests=max_requests,
        timeout_graceful_shutdown=round(grace) + 5,  # streams to slow clients
      )
    )

  async def shutdown(self, sockets=None):
    """Ends the server, as uvicorn calls it."""
    error = Unavailable('the server is shutting down')
    self.engine.refuse(error)
    loop = asyncio.get_running_loop()
    timer = loop.call_later(self._grace, self.engine.stop, error)
    await super().shutdown(sockets)
    timer.cancel()
    self.engine.stop(error)


def listen(host, port):
  """Returns a listening socket.

  Args:
    host: name or address.
    port: number; 0: any that is free.

  Raises:
    UserError: the port is taken, or the address is not of this machine.
  """
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family, backlog=1024)
  except OSError as error:
    raise UserError(
      f'--host={host} --port={port}: cannot listen there ({error.strerror}); '
      'choose another port'
    ) from error


def run(server, listener):
  """Runs a Server until a signal, or until its limit of requests."""
  if threading.current_thread() is threading.main_thread():
    # uvicorn sends itself the signal again at its end. The status is 0.
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, lambda *_: None)
  server.run(sockets=[listener])
  server.engine.join()
