"""Writes documents as token rows: parallel, resumable, deterministic.

The input is cut into parts (sources.py). A process turns each part into one
shard and a small file of leftovers (shards.py). A preparation that was killed
resumes with the unfinished parts. Every file of the result is the same for any
number of workers and interruptions.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import tqdm

from maskdiff.data import (
  documents,
  leftovers,
  packing,
  records,
  row_reader,
  shards,
  sources,
)
from maskdiff.data import job as job_lib
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.data import workers as workers_lib
from maskdiff.errors import UserError, one_line, require_utf8
from maskdiff.files import reading
from maskdiff.files.paths import local_path

# One document in 20 of the embedded corpus is held out.
EMBEDDED_HELDOUT_FRACTION = 0.05

_LOCK = '.prepare.lock'
_PLAIN_REPORT_S = 10.0  # seconds between progress lines without a terminal


def prepare(
  plan: sources.Plan,
  tokenizer: tokenizer_lib.Tokenizer,
  directory: str | pathlib.Path,
  *,
  row_length: int,
  heldout_fraction: float,
  workers: int,
  elsewhere: Callable | None = None,
  piece_chars: int = 0,
  layout: packing.Layout | None = None,
  encode: Callable[..., Iterator[documents.Document]] | None = None,
  encode_settings: Mapping[str, str | int] | None = None,
  log: Callable[[str], None] = print,
) -> records.Manifest:
  """Writes the documents of a plan as rows of row_length tokens.

  Each document is followed by eos. The training documents of a part are
  concatenated and cut into rows, so a document may continue in the next row.
  The leftovers of all parts are concatenated in the same way. At the end of
  each split less than a row of tokens is dropped.

  With a layout, the rows of a part hold its documents only, the last row is
  padded, and nothing is dropped.

  A call after an interruption resumes; a call after the end returns at once. If
  two processes call the function at the same time, one waits for the other.

  Args:
    plan: from sources.plan.
    tokenizer: Tokenizer.
    directory: directory to write; new, empty, or of the same preparation.
    row_length: tokens per row.
    heldout_fraction: share of the documents that goes to the split 'heldout'. A
      hash of the text decides, so all copies of a document are in one split.
    workers: number of worker processes; 0 uses this process, with one thread
      per core.
    elsewhere: function from (Job, Tokenizer, list of (number, part)) that makes
      the shards of these parts, such as on other machines (beam.py); None:
      worker processes.
    piece_chars: cut longer documents into pieces of at most so many characters,
      each of which then counts as a document; 0 keeps documents whole.
    layout: arrangement of documents in rows with columns; None: rows of tokens
      only.
    encode: function that reads and encodes the documents of a part, if they are
      not texts, see shards.Job. It can be pickled.
    encode_settings: settings of `encode` that decide the rows.
    log: function that receives lines of progress.

  Returns:
    The manifest. The tokenizer's files are copied to the same directory.

  Raises:
    UserError: heldout_fraction is not in [0, 1], the text does not fill one
      row, the disk is full or not writable, the directory holds other data,
      input is damaged, or a worker was killed.
  """
  check_heldout_fraction(heldout_fraction)
  if layout:
    packing.check(layout, row_length)
  directory = local_path(directory)
  require_utf8(directory)  # ArrayRecord takes no other path
  settings = {
    'input': plan.fingerprint,
    'tokenizer': tokenizer.fingerprint,
    'eos_id': tokenizer.eos_id,
    'row_length': row_length,
    'heldout_fraction': heldout_fraction,
    # Absent if documents stay whole, as in manifests of earlier code.
    **({'piece_chars': piece_chars} if piece_chars else {}),
    **(layout.settings if layout else {}),
    **(encode_settings or {}),
  }
  job = job_lib.Job(
    directory,
    row_length,
    heldout_fraction,
    num_threads=1 if workers else os.cpu_count() or 1,
    piece_chars=piece_chars,
    layout=layout,
    encode=encode,
  )
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory, log):
      if (directory / records.MANIFEST).exists():
        manifest = records.read_manifest(directory)
        _check_settings(manifest.settings, settings, directory)
        row_reader.verify(directory, manifest)
        shutil.rmtree(job.state, ignore_errors=True)
        return manifest
      known = set(os.listdir(directory))
      if job.state.exists():  # the other files are of this preparation
        known = {name for name in known if name.startswith('.')}
      _start_or_resume(job, settings)
      tokenizer_lib.copy(tokenizer, directory)
      try:
        _do_parts(job, tokenizer, plan.parts, workers, elsewhere, log)
        manifest = shards.conclude(job, plan, tokenizer, settings)
      except (shards.TooShort, documents.BadRecord):
        # The command with another row length, or with corrected input, must not
        # find this preparation.
        shutil.rmtree(job.state, ignore_errors=True)
        for name in set(os.listdir(directory)) - known:
          (directory / name).unlink()
        raise
      records.write_manifest(directory, manifest)
      shutil.rmtree(job.state, ignore_errors=True)
      return manifest
  except OSError as e:
    raise UserError(
      f'cannot write prepared data to {directory} ({e.strerror or e}): free '
      'disk space or choose another directory, and run again; finished parts '
      'are kept'
    ) from e


def embedded(
  tokenizer: tokenizer_lib.Tokenizer,
  cache_dir: str | pathlib.Path,
  row_length: int,
  log: Callable[[str], None] = print,
) -> pathlib.Path:
  """Returns the directory of the embedded corpus; prepares it on first use.

  The name of the directory holds the Python version, the tokenizer's
  fingerprint and the row length, so cache_dir can hold several preparations.

  Raises:
    UserError: as `prepare`.
  """
  version = '.'.join(map(str, sys.version_info[:3]))
  name = f'embedded-py{version}-{tokenizer.fingerprint}-{row_length}'
  directory = local_path(cache_dir) / name
  if (directory / records.MANIFEST).exists():
    return directory
  plan = sources.plan(['embedded'])
  log(f'data: preparing {plan.description} in {directory} (once)')
  start = time.perf_counter()
  try:
    manifest = prepare(
      plan,
      tokenizer,
      directory,
      row_length=row_length,
      heldout_fraction=EMBEDDED_HELDOUT_FRACTION,
      workers=0,
      log=log,
    )
  except UserError as e:
    raise UserError(
      f'{e} (for the embedded corpus --row_length is --config.data.length, and '
      'the directory is in --config.data.cache_dir)'
    ) from e
  log(f'data: {summary(manifest)}; {time.perf_counter() - start:.1f} s')
  return directory


def summary(manifest: records.Manifest) -> str:
  """Returns rows, tokens, documents and skipped documents as one line."""
  splits = manifest.splits.values()
  tokens = sum(split.tokens for split in splits)
  text_bytes = sum(split.text_bytes for split in splits)
  train, heldout = (manifest.splits[name] for name in records.SPLITS)
  skipped = ', '.join(
    f'{n:,} {reason}' for reason, n in manifest.skipped.items()
  )
  return (
    f'{train.rows:,} + {heldout.rows:,} held-out rows of '
    f'{manifest.row_length}, {tokens:,} tokens of '
    f'{text_bytes / max(1, tokens):.2f} bytes, '
    f'{train.documents:,} + {heldout.documents:,} documents'
    + (f' (skipped: {skipped})' if skipped else '')
  )


def check_heldout_fraction(fraction: float) -> None:
  """Raises UserError unless the fraction is in [0, 1]; NaN is not."""
  if not 0 <= fraction <= 1:
    raise UserError(
      f'--heldout_fraction={fraction}: must be from 0 to 1, as in 0.005'
    )


@contextlib.contextmanager
def _locked(directory: pathlib.Path, log) -> Iterator[None]:
  """Locks a directory for this process; the lock ends with the process."""
  path = directory / _LOCK
  while True:
    file = _open_lock(path)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log(f'another process is preparing {directory}: waiting for it')
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as e:
      log(
        f'cannot lock {directory} ({e.strerror}): make sure that no other '
        'process prepares it'
      )
    # The previous owner may have removed the lock file in the meantime.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file.fileno()), path.stat()):
        break
    file.close()
  try:
    yield
  finally:
    if not (directory / job_lib.STATE).exists():
      path.unlink(missing_ok=True)
    file.close()


def _open_lock(path: pathlib.Path):
  # Not through a link, and not a FIFO, which would wait for a reader.
  flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
  return open(os.open(path, flags | os.O_CLOEXEC, 0o666), 'rb')


def _start_or_resume(job: job_lib.Job, settings: dict) -> None:
  path = job.state / job_lib.SETTINGS
  if path.exists():
    previous = reading.read_json(path)
    _check_settings(previous, settings, job.directory)
  else:
    paths = sorted(job.directory.iterdir())
    others = [p for p in paths if not p.name.startswith('.')]
    if others:
      raise UserError(
        f'{job.directory} holds files that are not prepared data, such as '
        f'{others[0].name}: choose another directory'
      )
    job.state.mkdir(exist_ok=True)
    records.write_file(path, lambda f: f.write(json.dumps(settings).encode()))
  # Remove files that a killed process left unfinished.
  for unfinished in [
    *job.state.glob('.*'),
    *job.directory.glob('.tokenizer*'),
    *job.directory.glob('.special_tokens_map*'),
    *job.directory.glob(f'.{records.MANIFEST}.*'),
  ]:
    unfinished.unlink(missing_ok=True)


def _check_settings(previous: dict, settings: dict, directory) -> None:
  if not isinstance(previous, dict):
    previous = {}
  for name in sorted({*previous, *settings}):
    found, value = previous.get(name), settings.get(name)
    if found != value:
      raise UserError(
        f'{directory} was prepared with {name}={one_line(found, 40)}, not '
        f'{value}: delete it or choose another directory'
      )


def _do_parts(
  job: job_lib.Job,
  tokenizer: tokenizer_lib.Tokenizer,
  parts: Sequence[sources.Part],
  workers: int,
  elsewhere: Callable | None,
  log,
) -> None:
  """Makes the shards of all unfinished parts."""
  todo = [
    (i, part)
    for i, part in enumerate(parts)
    if not leftovers.is_done(job, i, tokenizer.vocab_size)
  ]
  done = len(parts) - len(todo)
  if done:
    log(f'resuming: {done} of {len(parts)} parts are done')
  if elsewhere:
    elsewhere(job, tokenizer, todo)
    return
  with _progress(parts, todo, log) as advance:
    if not workers:
      for i, part in todo:
        advance(part, shards.make_shard(job, tokenizer, i, part))
      return
    for part, tokens in workers_lib.make_shards(job, tokenizer, todo, workers):
      advance(part, tokens)


@contextlib.contextmanager
def _progress(parts, todo, log):
  """Shows progress in input bytes: a bar on a terminal, else lines of text."""
  total = sum(part.size for part in parts)
  before = total - sum(part.size for _, part in todo)
  done, tokens, started = before, 0, time.monotonic()
  reported, bar = started, None
  if sys.stderr.isatty():
    bar = tqdm.tqdm(
      total=total, initial=done, unit='B', unit_scale=True, dynamic_ncols=True
    )

  def advance(part, part_tokens):
    nonlocal done, tokens, reported
    done, tokens, now = done + part.size, tokens + part_tokens, time.monotonic()
    rate = f'{tokens / (now - started):,.0f} tokens/s'
    if bar:
      bar.update(part.size)
      bar.set_postfix_str(rate)
    elif now - reported > _PLAIN_REPORT_S:
      reported = now
      left = (total - done) * (now - started) / max(1, done - before) / 60
      log(
        f'{done / max(1, total):.0%} of {total / 1e6:,.0f} MB, {rate}, '
        f'{left:,.0f} min left'
      )

  try:
    yield advance
  finally:
    if bar:
      bar.close()
