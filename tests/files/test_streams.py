"""Standard streams that are closed, broken or full, in forked children."""

import os
import sys

import pytest

from maskdiff.errors import OutputClosed, UserError
from maskdiff.files import streams


def child(program, stdout=None, stderr=None, stdin=None, encoding='utf-8'):
  """Runs a function after `protect` in a fork; returns what it returns.

  The streams are file descriptors, or None to close the stream.
  """
  reader, writer = os.pipe()
  pid = os.fork()
  if not pid:
    try:
      given = (stdin, stdout, stderr)
      for number, handle in enumerate(given):
        if handle is None:
          os.close(number)
        else:
          os.dup2(handle, number)
      sys.stdin, sys.stdout, sys.stderr = (
        None
        if handle is None
        else open(number, mode, encoding=encoding, closefd=False)
        for number, (handle, mode) in enumerate(zip(given, 'rww', strict=True))
      )
      streams.protect()
      result = program()
    except BaseException as error:
      result = f'{type(error).__name__}: {error}'
    os.write(writer, str(result).encode())
    os._exit(0)
  os.close(writer)
  with open(reader, 'rb') as file:
    result = file.read().decode()
  os.waitpid(pid, 0)
  return result


def say(text):
  """Returns a program that prints a text and flushes it."""

  def program():
    print(text)
    sys.stdout.flush()
    return 'done'

  return program


@pytest.fixture
def null():
  handle = os.open(os.devnull, os.O_RDWR)
  yield handle
  os.close(handle)


@pytest.mark.parametrize('size', [1, 100_000])
def test_a_reader_that_has_ended_is_an_error_of_its_own(null, size):
  reader, writer = os.pipe()
  os.close(reader)
  found = child(say('x' * size), writer, null, null)
  os.close(writer)
  assert found.startswith(OutputClosed.__name__)


@pytest.mark.parametrize('size', [1, 100_000])
def test_a_full_disk_is_a_user_error(null, size):
  full = os.open('/dev/full', os.O_WRONLY)
  found = child(say('x' * size), full, null, null)
  assert found == (
    f'{UserError.__name__}: cannot write to standard output '
    '(No space left on device)'
  )

  def again():
    try:
      say('a')()
    except UserError:
      return say('b')()  # as the interpreter flushes at its end

  assert child(again, full, null, null) == 'done'
  os.close(full)


def test_messages_that_cannot_be_written_are_dropped(null):
  full = os.open('/dev/full', os.O_WRONLY)
  reader, writer = os.pipe()
  os.close(reader)
  for handle in (full, writer, None):

    def program():
      print('message', file=sys.stderr, flush=True)
      return 'done'

    assert child(program, null, handle, null) == 'done'
  os.close(full)
  os.close(writer)


def test_a_closed_stream_is_empty_and_its_number_stays_taken(tmp_path):
  def program():
    print('lost')
    with open(tmp_path / 'a', 'w') as file:
      taken = file.fileno()
    return sys.stdin.read(), taken > 2, say('more')()

  assert child(program) == str(('', True, 'done'))


@pytest.mark.parametrize('encoding', ['ascii', 'utf-8', 'latin-1'])
def test_output_is_printable_in_any_encoding(null, encoding):
  reader, writer = os.pipe()
  text = 'a\tb\x1b[2J\u0151\udcff\x9b\x00'
  assert child(say(text), writer, null, null, encoding) == 'done'
  os.close(writer)
  with open(reader, 'rb') as file:
    printed = file.read().decode(encoding)
  letter = '\u0151' if encoding == 'utf-8' else '\\u0151'
  assert printed == f'a\tb\\x1b[2J{letter}\\udcff\\x9b\\x00\n'


def test_streams_of_a_test_stay(capsys):
  before = sys.stdin, sys.stdout, sys.stderr
  streams.protect()
  assert (sys.stdin, sys.stdout, sys.stderr) == before
