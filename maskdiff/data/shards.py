"""Turns parts of the input into shards of rows.

`make_shard` writes the training documents of one part as a shard. Held-out
documents, and tokens at the end that do not fill a row, go to a small file of
leftovers. A part is done when both files are written. `conclude` turns the
leftovers of all parts into the held-out shard and a last training shard, and
returns the manifest.

Without a Layout, rows hold tokens only, and documents are concatenated and cut.
With one (packing.py), rows have more columns, and the last row of a part is
padded.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator

import numpy as np

from maskdiff.data import documents, leftovers, packing, records, sources
from maskdiff.data import rows as rows_lib
from maskdiff.data.documents import Document
from maskdiff.data.job import Job
from maskdiff.data.tokenizer import Tokenizer
from maskdiff.errors import UserError

_BLOCK_TOKENS = 1 << 20  # tokens written at once

# Statistics of rows with a Layout, in the leftovers and in the manifest.
# 'filled_eos' are the eos of answers after the first eos of an answer.
STATISTICS = ('padding', 'answer_eos', 'filled_eos', 'truncated')


class TooShort(UserError):
  """The text does not fill one row. No shard was written."""


def make_shard(
  job: Job, tokenizer: Tokenizer, number: int, part: sources.Part
) -> int:
  """Writes the shard of a part, then its leftovers.

  Args:
    job: Job.
    tokenizer: Tokenizer.
    number: index of the part in the plan.
    part: the part.

  Returns:
    The number of tokens of the part that carry a loss.

  Raises:
    UserError: input is damaged, or more than half of it is not text.
    OSError: the disk is full or not writable.
  """
  encode = job.encode or functools.partial(
    documents.of_text, num_threads=job.num_threads, piece_chars=job.piece_chars
  )
  tally = _Tally(tokenizer)
  numbers = dict.fromkeys(records.SPLITS, 0)
  skipped, heldout, tail = {}, [], []

  def training() -> Iterator[Document]:
    for document in encode(part, tokenizer, skipped):
      tally.statistics['truncated'] += document.truncated
      if hash_fraction(document.key) < job.heldout_fraction:
        numbers['heldout'] += 1
        heldout.append(document)
      else:
        numbers['train'] += 1
        yield document

  path = job.shard('train', number)
  blocks = _blocks(job, training(), tokenizer, tally, tail)
  shard = records.write_shard(path, blocks, job.state)
  about = {
    'shard': dataclasses.asdict(shard) if shard else None,
    'documents': numbers,
    'skipped': skipped,
    'statistics': tally.statistics,
  }
  dtype = records.token_dtype(tokenizer.vocab_size)
  leftovers.write(job, number, about, heldout, tail[0], tally.counts, dtype)
  sizes = [len(tokens) for tokens in (*(d.tokens for d in heldout), tail[0])]
  return int(tally.counts.sum()) + sum(sizes)


class _Tally:
  """Counts the tokens of rows.

  Attributes:
    counts: [vocab_size] int64, the tokens that carry a loss, by id.
    statistics: numbers of tokens by name, see STATISTICS.
  """

  def __init__(self, tokenizer):
    self.counts = np.zeros(tokenizer.vocab_size, np.int64)
    self.statistics = dict.fromkeys(STATISTICS, 0)
    self._eos_id = tokenizer.eos_id

  def add(self, rows: rows_lib.Rows) -> None:
    learned = rows.tokens.ravel()
    if rows.doc is not None:
      valid = rows.doc != rows_lib.PADDING
      self.statistics['padding'] += int(np.count_nonzero(~valid))
      if rows.answer is not None:
        valid = valid & rows.answer
      learned = rows.tokens[valid]
      eos = valid & (rows.tokens == self._eos_id)
      again = eos[:, 1:] & eos[:, :-1] & (rows.doc[:, 1:] == rows.doc[:, :-1])
      self.statistics['answer_eos'] += int(np.count_nonzero(eos))
      self.statistics['filled_eos'] += int(np.count_nonzero(again))
    self.counts += np.bincount(learned, minlength=len(self.counts))


def _blocks(
  job: Job, given: Iterable[Document], tokenizer, tally: _Tally, tail: list
) -> Iterator[np.ndarray]:
  """Yields blocks of rows of documents, for records.write_shard.

  Args:
    job: Job.
    given: documents.
    tokenizer: Tokenizer.
    tally: counts the tokens of the rows.
    tail: list that receives the tokens after the last row.
  """
  dtype = records.token_dtype(tokenizer.vocab_size)
  if job.layout is None:
    chunks = (document.tokens for document in given)
    for block in _cut(chunks, job.row_length, dtype, tail):
      tally.add(rows_lib.Rows(block))
      yield block
    return
  ids = dict(eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
  for rows in packing.rows(job.layout, given, job.row_length, **ids):
    tally.add(rows)
    yield rows_lib.pack(rows, dtype, job.columns)
  tail.append(np.zeros(0, dtype))


def _cut(chunks, row_length: int, dtype, rest: list) -> Iterator[np.ndarray]:
  """Yields [R, row_length] blocks; at the end appends the tail to `rest`."""
  pending, size = [np.zeros(0, dtype)], 0
  for chunk in chunks:
    pending.append(chunk)
    size += len(chunk)
    if size >= max(_BLOCK_TOKENS, row_length):
      tokens = np.concatenate(pending)
      whole = size - size % row_length
      yield tokens[:whole].reshape(-1, row_length)
      pending, size = [tokens[whole:]], size - whole
  tokens = np.concatenate(pending)
  whole = size - size % row_length
  if whole:
    yield tokens[:whole].reshape(-1, row_length)
  rest.append(tokens[whole:])


def conclude(
  job: Job, plan: sources.Plan, tokenizer: Tokenizer, settings: dict
) -> records.Manifest:
  """Writes the shards of the leftovers and returns the manifest.

  Raises:
    TooShort: the text does not fill one row, or a split has none to learn.
    OSError: the disk is full or not writable.
  """
  parts = range(len(plan.parts))
  tallies = {split: _Tally(tokenizer) for split in records.SPLITS}
  abouts = []
  for number in parts:
    with np.load(job.leftovers(number)) as arrays:
      abouts.append(json.loads(str(arrays['about'])))
      tallies['train'].counts += arrays['counts']

  def write(split, given, number):
    blocks = _blocks(job, given, tokenizer, tallies[split], [])
    return records.write_shard(job.shard(split, number), blocks, job.state)

  tails = (
    Document('', np.load(job.leftovers(number))['tail']) for number in parts
  )
  shards = {
    'train': [records.Shard(**a['shard']) for a in abouts if a['shard']],
    'heldout': [],
  }
  if job.layout is None:
    shards['train'] += filter(None, [write('train', tails, len(parts))])
  heldout = leftovers.heldout_documents(job, parts)
  shards['heldout'] += filter(None, [write('heldout', heldout, 0)])
  numbers = _sums(about['documents'] for about in abouts)
  skipped = _sums(about['skipped'] for about in abouts)
  if not any(shards.values()):
    raise _too_short(job, parts, sum(numbers.values()), skipped)
  piece_bytes = np.array([len(piece) for piece in tokenizer.pieces])
  text_bytes = {s: int(t.counts @ piece_bytes) for s, t in tallies.items()}
  for split in records.SPLITS:
    if shards[split] and not text_bytes[split]:
      raise TooShort(
        f'the split {split!r} has no text to learn: all of its answers are '
        'empty; give more text, or set --heldout_fraction=0'
      )
  statistics = _sums(
    [
      *(about['statistics'] for about in abouts),
      *(tally.statistics for tally in tallies.values()),
    ]
  )
  return records.Manifest(
    format_version=(
      records.COLUMNS_VERSION if job.layout else records.FORMAT_VERSION
    ),
    source=plan.description,
    settings=settings,
    tokenizer_fingerprint=tokenizer.fingerprint,
    vocab_size=tokenizer.vocab_size,
    eos_id=tokenizer.eos_id,
    row_length=job.row_length,
    dtype=records.token_dtype(tokenizer.vocab_size),
    skipped=skipped,
    splits={
      split: records.Split(
        shards=tuple(shards[split]),
        rows=sum(shard.rows for shard in shards[split]),
        tokens=int(tally.counts.sum()),
        text_bytes=text_bytes[split],
        documents=numbers[split],
        unigram_entropy_nats=unigram_entropy(tally.counts),
      )
      for split, tally in tallies.items()
    },
    columns=job.columns,
    statistics=statistics if job.layout else {},
  )


def _sums(tables: Iterable[dict[str, int]]) -> dict[str, int]:
  """Returns the sums of tables of numbers, in the order of their names."""
  sums = {}
  for name, number in (x for table in tables for x in table.items()):
    sums[name] = sums.get(name, 0) + number
  return sums


def _too_short(job: Job, parts: range, documents: int, skipped) -> TooShort:
  if job.layout:
    reasons = ', '.join(f'{n:,} {reason}' for reason, n in skipped.items())
    return TooShort(
      f'there is no document to write (skipped: {reasons or "none"}): give '
      'other input, or a longer --row_length'
    )
  tokens = 0
  for number in parts:
    with np.load(job.leftovers(number)) as arrays:
      tokens += len(arrays['tail'])
  fix = 'give more text'
  if tokens >= 4:
    fix += f', or set --row_length={1 << ((tokens // 4).bit_length() - 1)}'
  return TooShort(
    f'{documents} documents do not fill one row of {job.row_length} tokens '
    f'(training text has {tokens}): {fix}'
  )


def unigram_entropy(counts: np.ndarray) -> float:
  probability = counts[counts > 0] / max(1, counts.sum())
  return float(0 - probability @ np.log(probability))


def hash_fraction(text: str) -> float:
  """Returns the hash of a text as a number in [0, 1).

  A document is held out if it is below Job.heldout_fraction.
  """
  # Python's `hash` of a string differs between processes.
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'big') / 2**64
