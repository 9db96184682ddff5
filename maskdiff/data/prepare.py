"""Documents to token rows on disk, once: parallel, resumable, deterministic.

The input is cut into parts (data.sources), and one process at a time turns one
part into one shard and a small file of leftovers (data.shards). A preparation
that is killed goes on with the parts that are not done, and neither that nor
the number of workers shows in the result, file by file.
"""

import concurrent.futures
import contextlib
import fcntl
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import tqdm

from maskdiff.data import records, row_reader, shards, sources
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.data.paths import local_path
from maskdiff.errors import UserError

# Of the embedded corpus: one document in 20 is never trained on.
EMBEDDED_HELDOUT_FRACTION = 0.05

_LOCK = '.prepare.lock'
_PLAIN_REPORT_S = 10.0  # between lines where there is no terminal


def prepare(
  plan: sources.Plan,
  tokenizer: tokenizer_lib.Tokenizer,
  directory: str | pathlib.Path,
  *,
  row_length: int,
  heldout_fraction: float,
  workers: int,
  log: Callable[[str], None] = print,
) -> records.Manifest:
  """Writes the documents of a plan as rows of row_length tokens.

  Each document is followed by eos. The training documents of a part stand one
  after the other and are cut into rows, so a long one goes on in the next row;
  what is left of all parts is joined in the same way, and of each split less
  than a row is dropped at its very end.

  Calling it again after an interruption goes on; when all is there, it returns
  at once. Two processes may call it at the same time: one waits.

  Args:
    plan: from sources.plan.
    heldout_fraction: share of the documents that goes to the split 'heldout',
      chosen by a hash of the text, so that copies of one stay on one side.
    workers: processes; 0 uses this one, with a thread for every core.
    log: takes lines of progress.

  Returns:
    The manifest. The tokenizer's files are copied beside it.

  Raises:
    UserError: there is not one row, the disk is full or not writable, the
      directory was prepared from something else, input is damaged, or a worker
      was killed.
  """
  directory = local_path(directory)
  settings = {
    'input': plan.fingerprint,
    'tokenizer': tokenizer.fingerprint,
    'eos_id': tokenizer.eos_id,
    'row_length': row_length,
    'heldout_fraction': heldout_fraction,
  }
  job = shards.Job(
    directory,
    row_length,
    heldout_fraction,
    num_threads=1 if workers else os.cpu_count() or 1,
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
      _start_or_go_on(job, settings)
      tokenizer_lib.copy(tokenizer, directory)
      _do_parts(job, tokenizer, plan.parts, workers, log)
      manifest = shards.conclude(job, plan, tokenizer, settings)
      records.write_manifest(directory, manifest)
      shutil.rmtree(job.state, ignore_errors=True)
      return manifest
  except OSError as e:
    raise UserError(
      f'cannot write prepared data to {directory} ({e.strerror or e}): free '
      'some space or choose another place, and run again; finished parts are '
      'kept'
    ) from e


def embedded(
  tokenizer: tokenizer_lib.Tokenizer,
  cache_dir: str | pathlib.Path,
  row_length: int,
  log: Callable[[str], None] = print,
) -> pathlib.Path:
  """A directory with the rows of the embedded corpus; prepared on first use.

  Its name holds the Python version, the tokenizer's fingerprint and the row
  length, so different ones live side by side in cache_dir.

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
      f'{e} (here --row_length is --config.data.length, and the place is '
      '--config.data.cache_dir)'
    ) from e
  log(f'data: {summary(manifest)}; {time.perf_counter() - start:.1f} s')
  return directory


def summary(manifest: records.Manifest) -> str:
  """One line: rows, tokens, documents, bytes per token, what was left out."""
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
    + (f' ({skipped} left out)' if skipped else '')
  )


@contextlib.contextmanager
def _locked(directory: pathlib.Path, log) -> Iterator[None]:
  """Only one process at a time; a lock that dies with its process."""
  path = directory / _LOCK
  while True:
    file = open(path, 'a')
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      log(f'another process is preparing {directory}: waiting for it')
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as e:
      log(
        f'{directory} cannot be locked ({e.strerror}): see to it that no other '
        'process prepares it'
      )
    # The one before may have removed the file that this one waited for.
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file.fileno()), path.stat()):
        break
    file.close()
  try:
    yield
  finally:
    if not (directory / shards.STATE).exists():
      path.unlink(missing_ok=True)
    file.close()


def _start_or_go_on(job: shards.Job, settings: dict) -> None:
  path = job.state / 'settings.json'
  if path.exists():
    found = json.loads(path.read_text(encoding='utf-8'))
    _check_settings(found, settings, job.directory)
  else:
    found = sorted(job.directory.iterdir())
    others = [p for p in found if not p.name.startswith('.')]
    if others:
      raise UserError(
        f'{job.directory} is not empty and holds no prepared data (there is '
        f'{others[0].name}): choose another directory'
      )
    job.state.mkdir(exist_ok=True)
    records.write_file(path, lambda f: f.write(json.dumps(settings).encode()))
  # What a killed process was writing, there or in the directory itself.
  for unfinished in [
    *job.state.glob('.*'),
    *job.directory.glob('.tokenizer*'),
    *job.directory.glob('.special_tokens_map*'),
    *job.directory.glob(f'.{records.MANIFEST}.*'),
  ]:
    unfinished.unlink(missing_ok=True)


def _check_settings(found: dict, settings: dict, directory) -> None:
  for name, now in settings.items():
    if found.get(name) != now:
      raise UserError(
        f'{directory} was prepared with {name}={found.get(name)}, not {now}: '
        'delete it or choose another directory'
      )


def _do_parts(
  job: shards.Job,
  tokenizer: tokenizer_lib.Tokenizer,
  parts: Sequence[sources.Part],
  workers: int,
  log,
) -> None:
  """Does every part that is not done yet."""
  todo = [
    (i, part) for i, part in enumerate(parts) if not shards.is_done(job, i)
  ]
  done = len(parts) - len(todo)
  if done:
    log(f'going on: {done} of {len(parts)} parts are done')
  with _progress(parts, todo, log) as advance:
    if not workers:
      for i, part in todo:
        advance(part, shards.make_shard(job, tokenizer, i, part))
      return
    # Spawned, since a fork of a process with threads may hang.
    pool = concurrent.futures.ProcessPoolExecutor(
      min(workers, max(1, len(todo))),
      multiprocessing.get_context('spawn'),
      initializer=_start_worker,
      initargs=(job, tokenizer),
    )
    try:
      try:
        futures = {pool.submit(_worker, i, part): part for i, part in todo}
      except (OSError, ValueError) as e:
        # Starting a worker while the pool is torn down for another's death.
        raise concurrent.futures.process.BrokenProcessPool from e
      for future in concurrent.futures.as_completed(futures):
        advance(futures[future], future.result())
    except concurrent.futures.process.BrokenProcessPool as e:
      raise UserError(
        'a worker was killed, perhaps for memory: run again to go on, with '
        'fewer --workers if there was not enough'
      ) from e
    finally:
      pool.shutdown(wait=False, cancel_futures=True)
      for process in multiprocessing.active_children():
        process.terminate()


@contextlib.contextmanager
def _progress(parts, todo, log):
  """A bar on a terminal, else a line every few seconds, of input bytes."""
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


_worker_setup = None  # of a worker process: its Job and Tokenizer


def _start_worker(job: shards.Job, tokenizer: tokenizer_lib.Tokenizer) -> None:
  global _worker_setup
  # An interrupt is the parent's to handle, and the parent's end is ours: a
  # killed one leaves its workers waiting for good.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  threading.Thread(
    target=lambda: (parent.join(), os._exit(1)), daemon=True
  ).start()
  _worker_setup = job, tokenizer


def _worker(number: int, part: sources.Part) -> int:
  return shards.make_shard(*_worker_setup, number, part)
