"""Jinja for templates of strangers: the sandbox, its errors and its time.

Options, filters and functions are those of apply_chat_template in transformers
4.49.
"""

import contextlib
import ctypes
import datetime
import functools
import json
import signal
import threading

import jinja2
import jinja2.ext
import jinja2.sandbox

from maskdiff.errors import UserError, one_line


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
  """Returns the program of a template.

  Its variables include `generation_marks`, two texts that it writes before and
  after the parts in {% generation %}.

  Raises:
    jinja2.TemplateSyntaxError: the source is not in the language of Jinja.
  """
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _raise_exception
  return environment.from_string(source)


class _Generation(jinja2.ext.Extension):
  """{% generation %} ... {% endgeneration %}: marks a part of the text."""

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
    marks = jinja2.nodes.Name('generation_marks', 'load')
    call = self.call_method('_mark', [marks])
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _mark(self, marks, caller):
    return marks[0] + caller() + marks[1]


def _to_json(value, ensure_ascii=False, indent=None, separators=None, **kwargs):
  # Jinja's own filter escapes < and >.
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=kwargs.get('sort_keys', False),
  )


def _raise_exception(message):
  raise jinja2.TemplateError(message)


def strftime_now(format):
  """Returns the date and time of now, for templates."""
  return datetime.datetime.now().strftime(format)


def refuse_date(format):
  """Refuses to return the date, in place of strftime_now."""
  raise jinja2.TemplateError(
    'it prints the date of today; set its variable of the date, such as '
    '--chat_arguments=\'{"date_string": "26 Jul 2024"}\''
  )


class _TooSlow(BaseException):
  """Not an Exception, which a template's functions might catch."""


@contextlib.contextmanager
def errors(name: str):
  """Context manager: turns all that a template may raise into a UserError.

  Args:
    name: name of the template, for the message.
  """
  try:
    yield
  except _TooSlow as e:
    reason = 'it does not end'
    raise UserError(f'chat template {name!r}: {reason}') from e
  except Exception as e:  # a template may call any method of its values
    reason = one_line(e)
    raise UserError(f'chat template {name!r}: {reason}') from e


@contextlib.contextmanager
def time_limit(seconds: float):
  """Context manager: raises _TooSlow in this thread after some seconds."""
  if threading.current_thread() is threading.main_thread():
    with _alarm(seconds):
      yield
  else:
    with _raised_by_timer(seconds):
      yield


@contextlib.contextmanager
def _alarm(seconds):
  def stop(*_):
    raise _TooSlow

  previous = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def _raised_by_timer(seconds):
  # Signals reach the main thread only.
  thread = ctypes.c_ulong(threading.get_ident())
  raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc
  running, lock = True, threading.Lock()

  def stop():
    with lock:
      if running:
        raise_in_thread(thread, ctypes.py_object(_TooSlow))

  timer = threading.Timer(seconds, stop)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()
    with lock:
      running = False
    raise_in_thread(thread, None)  # drops one that is not raised yet
