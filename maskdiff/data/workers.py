"""Makes the shards of parts in worker processes of this machine."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence

from maskdiff.data import shards, sources
from maskdiff.data.job import Job
from maskdiff.data.tokenizer import Tokenizer
from maskdiff.errors import UserError


def make_shards(
  job: Job,
  tokenizer: Tokenizer,
  todo: Sequence[tuple[int, sources.Part]],
  workers: int,
) -> Iterator[tuple[sources.Part, int]]:
  """Yields each part when its shard is written, with its number of tokens.

  Args:
    job: Job.
    tokenizer: Tokenizer.
    todo: numbers of the parts in the plan, and the parts.
    workers: number of processes.

  Raises:
    UserError: a worker was killed, or see `shards.make_shard`.
  """
  # Spawn the workers: a fork of a process with threads may hang.
  pool = concurrent.futures.ProcessPoolExecutor(
    min(workers, max(1, len(todo))),
    multiprocessing.get_context('spawn'),
    initializer=_start,
    initargs=(job, tokenizer),
  )
  try:
    try:
      futures = {pool.submit(_work, i, part): part for i, part in todo}
    except (OSError, ValueError) as e:
      # A worker started while the pool shuts down because another was killed.
      raise concurrent.futures.process.BrokenProcessPool from e
    for future in concurrent.futures.as_completed(futures):
      yield futures[future], future.result()
  except concurrent.futures.process.BrokenProcessPool as e:
    raise UserError(
      'a worker was killed, perhaps for lack of memory: run again to '
      'resume, if necessary with fewer --workers'
    ) from e
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
      process.terminate()
      process.join()


_setup = None  # Job and Tokenizer of a worker process


def _start(job: Job, tokenizer: Tokenizer) -> None:
  global _setup
  # The parent handles interrupts. If the parent is killed, its workers would
  # wait forever, so each of them exits with it.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  threading.Thread(
    target=lambda: (parent.join(), os._exit(1)), daemon=True
  ).start()
  _setup = job, tokenizer


def _work(number: int, part: sources.Part) -> int:
  return shards.make_shard(*_setup, number, part)
