"""Compares preparation and input pipeline with the libraries under them.

python benchmarks/data.py [--copies 1] [--rounds 3]

(a) Preparation of the Python library as JSON lines, with one worker and with
    two, compared with SentencePiece encoding the same texts in one process and
    in two. The start-up time of workers is included. Then with a byte-level
    tokenizer.json of LLaDA's size, whose merges are learned from the library:
    tokens per second of CPU time, compared with the package tokenizers.
(b) Batches of the pipeline, compared with a loop that reads the same number of
    ArrayRecord rows in random order and discards them; and the number of steps
    per second of the 8B config that this supports on v5p-128, where each of 16
    hosts reads 80 rows per step.
(c) Time and memory until the first batch over 10^4, 10^6 and 10^9 simulated
    rows, at step 0 and at step 10^6.
"""

import argparse
import functools
import json
import multiprocessing
import pathlib
import resource
import statistics
import tempfile
import time
import tracemalloc

import numpy as np

from maskdiff.data import (
  prepare,
  records,
  row_reader,
  sources,
  split_patterns,
)
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.data.rows import Rows

MODEL = pathlib.Path(__file__).parents[1] / 'tokenizer' / 'stdlib_4k.model'
ROW_LENGTH = 4096
LARGE = 126_464  # ids of LLaDA's tokenizer
HOST_ROWS, GLOBAL_BATCH = 80, 1280
READ_ROWS = 4000


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--copies', type=int, default=1, help='copies of the corpus'
  )
  parser.add_argument('--rounds', type=int, default=3)
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as directory:
    directory = pathlib.Path(directory)
    preparation(directory, flags.copies, flags.rounds)
    large_vocabulary(directory, flags.rounds)
    reading(directory, flags.rounds)
  starting()


def preparation(directory, copies, rounds):
  texts = [text for _, text in sources.embedded() if text] * copies
  path = directory / 'library.jsonl'
  with open(path, 'w') as f:
    f.writelines(json.dumps({'text': text}) + '\n' for text in texts)
  tokenizer = tokenizer_lib.load(MODEL)
  plan = sources.plan([str(path)])
  seconds, tokens = {}, {}
  for n in range(rounds):
    for workers in (1, 2):
      name = 'bare', workers
      elapsed, tokens[name] = bare_encoding(texts, workers)
      seconds.setdefault(name, []).append(elapsed)
      name, out = ('prepared', workers), directory / f'rows-{workers}-{n}'
      began = time.perf_counter()
      manifest = prepare.prepare(
        plan,
        tokenizer,
        out,
        row_length=ROW_LENGTH,
        heldout_fraction=0.005,
        workers=workers,
        log=lambda line: None,
      )
      seconds.setdefault(name, []).append(time.perf_counter() - began)
      tokens[name] = sum(s.tokens for s in manifest.splits.values())
  rate = {k: tokens[k] / statistics.median(seconds[k]) for k in seconds}
  print(f'(a) preparation of {path.stat().st_size / 1e6:.0f} MB')
  for workers in (1, 2):
    prepared, bare = rate['prepared', workers], rate['bare', workers]
    print(
      f'    {workers} workers: {prepared:,.0f} tokens/s, plain SentencePiece '
      f'{bare:,.0f} tokens/s, ratio {prepared / bare:.2f}'
    )
  for name in ('prepared', 'bare'):
    gain = rate[name, 2] / rate[name, 1]
    print(f'    2 workers over 1, {name}: {gain:.2f}', flush=True)


def large_vocabulary(directory, rounds):
  """Prepares the library with a tokenizer.json of LLaDA's size.

  The CPU time of a preparation is that of its worker, with its start.
  """
  texts = [text for _, text in sources.embedded() if text]
  path, model = directory / 'library.jsonl', directory / 'tokenizer.json'
  with open(path, 'w') as f:
    f.writelines(json.dumps({'text': text}) + '\n' for text in texts)
  train_large(texts, model)
  tokenizer, plan = tokenizer_lib.load(model), sources.plan([str(path)])
  seconds = {'bare': [], 'prepared': []}
  for n in range(rounds):
    began = time.process_time()
    for text in texts:
      tokenizer.processor.encode_batch_fast([text], add_special_tokens=False)
    seconds['bare'].append(time.process_time() - began)
    began = cpu_of_children()
    manifest = prepare.prepare(
      plan,
      tokenizer,
      directory / f'large-{n}',
      row_length=ROW_LENGTH,
      heldout_fraction=0.005,
      workers=1,
      log=lambda line: None,
    )
    seconds['prepared'].append(cpu_of_children() - began)
  tokens = sum(split.tokens for split in manifest.splits.values())
  prepared, bare = (
    tokens / statistics.median(seconds[name]) for name in ('prepared', 'bare')
  )
  text_bytes = sum(split.text_bytes for split in manifest.splits.values())
  print(
    f'    tokenizer.json of {tokenizer.vocab_size:,} ids, '
    f'{text_bytes / tokens:.2f} bytes per token: {prepared:,.0f} tokens per '
    f'second of CPU time, plain tokenizers {bare:,.0f}, ratio '
    f'{prepared / bare:.2f}',
    flush=True,
  )


def train_large(texts, path):
  """Writes a byte-level tokenizer.json with LARGE ids, trained on texts."""
  import tokenizers
  from tokenizers import models, pre_tokenizers, trainers

  tokenizer = tokenizers.Tokenizer(models.BPE())
  pattern = tokenizers.Regex(split_patterns.QWEN2)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(pattern, 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=LARGE,
    special_tokens=['<|startoftext|>', '<|endoftext|>', '<|mdm_mask|>'],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.save(str(path))


def cpu_of_children():
  """Returns the CPU seconds of child processes that have ended."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def bare_encoding(texts, workers):
  """Returns seconds and tokens of encoding only, in `workers` processes."""
  context = multiprocessing.get_context('spawn')
  shares = [texts[i::workers] for i in range(workers)]
  barrier = context.Barrier(workers)
  with context.Pool(workers, start_bare, (barrier,)) as pool:
    results = pool.map(encode, shares, chunksize=1)
  return max(s for s, _ in results), sum(n for _, n in results)


def start_bare(barrier):
  import sentencepiece

  global ready, processor
  ready = barrier
  processor = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))


def encode(texts):
  ready.wait()
  began, tokens = time.perf_counter(), 0
  for start in range(0, len(texts), 64):
    batch = processor.encode(texts[start : start + 64], num_threads=1)
    tokens += sum(map(len, batch))
  return time.perf_counter() - began, tokens


def reading(directory, rounds):
  print(f'(b) reading rows of {ROW_LENGTH}, batches of {HOST_ROWS}')
  rng = np.random.default_rng(0)
  for vocab_size in (4096, LARGE):
    # Zipf frequencies, so that rows compress like real text.
    ids = np.minimum(rng.zipf(1.2, (READ_ROWS, ROW_LENGTH)), vocab_size) - 1
    rows = ids.astype(records.token_dtype(vocab_size))
    where = directory / f'rows-{vocab_size}'
    where.mkdir()
    shard = records.write_shard(where / 'train-00000.array_record', [rows])
    data = dataset(where, [shard], rows.dtype.name, vocab_size)
    functions = {
      'bare': functools.partial(bare_reads, where / shard.file),
      'no thread': functools.partial(take, data, 0),
      'two threads': functools.partial(take, data, 2),
    }
    seconds = {name: [] for name in functions}
    for _ in range(5 * rounds):
      for name, read in functions.items():
        began = time.perf_counter()
        read()
        seconds[name].append(time.perf_counter() - began)
    tokens = READ_ROWS * ROW_LENGTH
    rate = {k: tokens / statistics.median(s) for k, s in seconds.items()}
    for name in ('no thread', 'two threads'):
      print(
        f'    {rows.dtype.name}, {name}: {rate[name] / 1e6:,.0f} M tokens/s, '
        f'plain loop {rate["bare"] / 1e6:,.0f} M, ratio '
        f'{rate[name] / rate["bare"]:.2f}; supports '
        f'{rate[name] / (HOST_ROWS * ROW_LENGTH):,.0f} 8B steps/s',
        flush=True,
      )


def bare_reads(path):
  """Reads all rows in random order and discards them."""
  reader = records.array_record_module.ArrayRecordReader(
    str(path), options='readahead_buffer_size:0', file_reader_buffer_size=4096
  )
  for i in np.random.default_rng(0).permutation(READ_ROWS).tolist():
    reader.read(i, i + 1)


def take(data, num_threads):
  """Reads READ_ROWS rows as one of 16 hosts, with a new pipeline."""
  from maskdiff.data import pipeline  # not at the top: workers import this file

  batches = pipeline.train_batches(
    [data],
    global_batch=GLOBAL_BATCH,
    length=ROW_LENGTH,
    seed=0,
    start_sample=0,
    rows=range(HOST_ROWS),
    num_threads=num_threads,
  )
  for _ in range(READ_ROWS // HOST_ROWS):
    next(batches)
  batches.close()


def dataset(directory, shards, dtype, vocab_size):
  """Returns a pipeline.Dataset with the same shards for both splits."""
  from maskdiff.data import pipeline

  rows = sum(shard.rows for shard in shards)
  split = records.Split(tuple(shards), rows, rows * ROW_LENGTH, 1, 1, 0.0)
  manifest = records.Manifest(
    format_version=records.FORMAT_VERSION,
    source='benchmark',
    settings={},
    tokenizer_fingerprint='',
    vocab_size=vocab_size,
    eos_id=0,
    row_length=ROW_LENGTH,
    dtype=dtype,
    skipped={},
    splits={'train': split, 'heldout': split},
  )
  return pipeline.Dataset('benchmark', str(directory), 1.0, manifest)


class FakeRows:
  """A RowSource of any size whose rows are zeros."""

  def __init__(self, directory, manifest, split):
    self.row_length = manifest.row_length
    self._len = manifest.splits[split].rows

  def __len__(self):
    return self._len

  def read(self, rows):
    return Rows(np.zeros((len(rows), ROW_LENGTH), np.uint16))


def starting():
  from maskdiff.data import pipeline

  print('(c) until the first batch')
  row_reader.RowSource = FakeRows
  for rows in (10**4, 10**6, 10**9):
    shard = records.Shard('', rows, 0, '', '')
    data = dataset('', [shard], 'uint16', 4096)
    for step in (0, 10**6):

      def first(step=step, data=data):
        batches = pipeline.train_batches(
          [data],
          global_batch=GLOBAL_BATCH,
          length=ROW_LENGTH,
          seed=0,
          start_sample=step * GLOBAL_BATCH,
          rows=range(HOST_ROWS),
          num_threads=0,
        )
        return next(batches)

      times = []
      for _ in range(5):
        began = time.perf_counter()
        first()
        times.append(time.perf_counter() - began)
      tracemalloc.start()
      first()
      peak = tracemalloc.get_traced_memory()[1]
      tracemalloc.stop()
      print(
        f'    {rows:>13,} rows, step {step:>9,}: '
        f'{statistics.median(times) * 1e3:.1f} ms, {peak / 1e6:.1f} MB',
        flush=True,
      )


if __name__ == '__main__':
  main()
