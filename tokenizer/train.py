"""Trains a SentencePiece tokenizer: the shipped one, or one on your own text.

    python tokenizer/train.py
    python tokenizer/train.py --input corpus/ more.jsonl.gz \\
      --vocab_size 32768 --out my.model

The result depends on the input only; without --input, it depends on the Python
version. README.md in this folder explains the settings.
"""

import argparse
import collections
import contextlib
import hashlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator

from maskdiff.data import sources
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.data.tokenizer_training import THREADS, chunks, draw, train
from maskdiff.errors import UserError
from maskdiff.files.paths import local_path

SHIPPED = pathlib.Path(__file__).resolve().parent / 'stdlib_4k.model'

# Tests and character tables are two thirds of the standard library and differ
# from other code, so that only one in 16 of these files is trained on.
RARE = {'test', 'tests', 'idle_test', 'encodings', 'pydoc_data'}
KEEP_ONE_IN = 16

# The trained model depends on the number of threads, which is therefore fixed.
SHIPPED_THREADS = 2
INPUT_THREADS = THREADS

# Chunks of --input that are held out to measure bytes per token.
HOLD_OUT_ONE_IN = 64


def is_training_file(name: str) -> bool:
  """Returns whether a file of the standard library is trained on."""
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  rare = not RARE.isdisjoint(name.split('/'))
  return not rare or int.from_bytes(digest, 'big') % KEEP_ONE_IN == 0


def library() -> tuple[Iterator[str], list[bytes]]:
  """Returns training chunks of the standard library, and held-out chunks."""
  others = (
    text for name, text in sources.embedded() if not is_training_file(name)
  )
  _, held_out = draw(others, 0, one_in=1)
  training = (
    chunk
    for name, text in sources.embedded()
    if is_training_file(name)
    for chunk in chunks(text)
  )
  return training, held_out


def corpus(
  specs: list[str],
  text_key: str,
  by_line: bool,
  max_mb: int,
  skipped: collections.Counter,
) -> tuple[Iterator[bytes], list[bytes]]:
  """Returns training chunks and held-out chunks of --input.

  Args:
    specs: values of --input.
    text_key: see sources.plan.
    by_line: see sources.plan.
    max_mb: largest size of the training chunks, in MB.
    skipped: counter to which skipped documents are added, by reason.

  Raises:
    UserError: the input has no text.
  """

  def texts():
    for part in sources.plan(specs, text_key=text_key, by_line=by_line).parts:
      for document in sources.read(part):
        if isinstance(document, sources.Skipped):
          skipped[document.reason] += 1
        else:
          yield document

  training, held_out = draw(texts(), max_mb * 10**6, HOLD_OUT_ONE_IN)
  if not training:
    reasons = f' ({_counts(skipped)})' if skipped else ''
    raise UserError(
      f'no text to train on in {" ".join(specs)}{reasons}: give files with text'
    )
  # Frees each chunk once SentencePiece has copied it.
  training.reverse()
  return (training.pop() for _ in range(len(training))), held_out


@contextlib.contextmanager
def atomic_write(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary file to write, and renames it to `path` on success.

  Raises:
    UserError: the file cannot be written; raised before the body runs if
      possible.
  """
  if path.exists() and not (path.is_file() or path.is_dir()):
    raise UserError(
      f'cannot write --out {path} (not a regular file): name a file in a '
      'writable directory'
    )
  # The target of a link is replaced, not the link.
  path = pathlib.Path(os.path.realpath(path))
  temporary = path.parent / f'.{path.name}.{os.getpid()}'
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
      raise IsADirectoryError(0, 'Is a directory')
    temporary.touch()
    yield temporary
    os.replace(temporary, path)
  except OSError as e:
    raise UserError(
      f'cannot write --out {path} ({e.strerror}): name a file in a writable '
      'directory'
    ) from e
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)


def bytes_per_token(model: pathlib.Path, texts: list[bytes]) -> float:
  """Returns the mean number of UTF-8 bytes per token of some texts."""
  tokenizer = tokenizer_lib.load(model)
  ids = tokenizer.encode_batch([text.decode() for text in texts], 2)
  return sum(map(len, texts)) / sum(map(len, ids))


def _counts(skipped: collections.Counter) -> str:
  reasons = ', '.join(f'{n} {reason}' for reason, n in skipped.most_common())
  return f'{skipped.total()} documents skipped: {reasons}'


def run(flags: argparse.Namespace) -> None:
  start = time.monotonic()
  if flags.input and not flags.out:
    raise UserError('--input needs --out: name the output file')
  for name in ('vocab_size', 'max_mb'):
    if not 0 < getattr(flags, name) < 1 << 31:
      raise UserError(f'--{name} must be in [1, 2147483647]')
  out = local_path(flags.out) if flags.out else SHIPPED
  skipped = collections.Counter()
  with atomic_write(out) as file:
    if flags.input:
      threads = INPUT_THREADS
      sentences, held_out = corpus(
        flags.input, flags.text_key, flags.by_line, flags.max_mb, skipped
      )
    else:
      threads = SHIPPED_THREADS
      sentences, held_out = library()
    model = train(sentences, flags.vocab_size, flags.model_type, threads)
    file.write_bytes(model)
    digest = hashlib.sha256(model).hexdigest()[:16]
    line = f'{out}: {flags.vocab_size} pieces, fingerprint {digest}'
    if held_out:
      rate = bytes_per_token(file, held_out)
      line += f', {rate:.2f} bytes per token on held-out text'
  line += f', {time.monotonic() - start:.1f} s'
  print(f'{line}, {_counts(skipped)}' if skipped else line)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--input',
    nargs='+',
    metavar='PATH',
    help='files, directories, globs or tfds:DIR:SPLIT to train on; default: '
    'the standard library, which gives the shipped tokenizer',
  )
  parser.add_argument(
    '--vocab_size', type=int, default=4096, help='number of token ids'
  )
  parser.add_argument('--out', help='output file, required with --input')
  parser.add_argument(
    '--model_type',
    choices=('bpe', 'unigram'),
    default='bpe',
    help='algorithm of SentencePiece',
  )
  parser.add_argument(
    '--text_key', default='text', help='field of --input that holds the text'
  )
  parser.add_argument(
    '--by_line',
    action='store_true',
    help='make each line of a .txt file a document',
  )
  parser.add_argument(
    '--max_mb',
    type=int,
    default=500,
    help='largest sample of --input to train on, in MB',
  )
  flags = parser.parse_args()
  try:
    run(flags)
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  main()
