"""Turns parts of the input into shards of rows.

`make_shard` writes the training documents of one part as a shard. Held-out
documents, and tokens at the end that do not fill a row, go to a small file of
leftovers. A part is done (`is_done`) when both files are written. `conclude`
turns the leftovers of all parts into the held-out shard and a last training
shard, and returns the manifest.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from maskdiff.data import manifest_fields, readers, records, sources
from maskdiff.data.tokenizer import Tokenizer
from maskdiff.errors import UserError
from maskdiff.files import paths, reading

# Folder of unfinished files and leftovers, deleted at the end.
STATE = '.prepare'
SETTINGS = 'settings.json'  # in this folder
_TEXT_CHARS = 1 << 20  # characters encoded at once
_BLOCK_TOKENS = 1 << 20  # tokens written at once

_LEFTOVERS = ('about', 'heldout', 'tail', 'counts')


class TooShort(UserError):
  """The text does not fill one row. No shard was written."""


@dataclasses.dataclass(frozen=True)
class Job:
  """Settings that are the same for all parts.

  Attributes:
    directory: directory of the shards.
    row_length: tokens per row.
    heldout_fraction: share of the documents in the split 'heldout'.
    num_threads: threads that encode text in one process.
    piece_chars: cut longer documents into pieces of at most so many characters,
      each of which then counts as a document; 0 keeps documents whole.
  """

  directory: pathlib.Path
  row_length: int
  heldout_fraction: float
  num_threads: int
  piece_chars: int = 0

  @property
  def state(self) -> pathlib.Path:
    """Directory of unfinished files and leftovers."""
    return self.directory / STATE

  def leftovers(self, number: int) -> pathlib.Path:
    """File of the leftovers of a part, written after its shard."""
    return self.state / f'{number:05d}.npz'

  def shard(self, split: str, number: int) -> pathlib.Path:
    """File of a shard."""
    return self.directory / f'{split}-{number:05d}.array_record'


def is_done(job: Job, number: int, vocab_size: int) -> bool:
  """Returns whether a part has its leftovers and a shard of the right size.

  A part whose leftovers are damaged, or not of the form that `make_shard`
  writes, is not done.
  """
  try:
    with reading.open_regular(job.leftovers(number)) as file:
      with np.load(file) as arrays:
        # Reading all arrays checks their checksums.
        about, *others = [arrays[name] for name in _LEFTOVERS]
    dtype = np.dtype(records.token_dtype(vocab_size))
    for array, kind in zip(others, (dtype, dtype, np.int64), strict=True):
      if array.ndim != 1 or array.dtype != kind:
        return False
    *tokens, counts = others
    if len(counts) != vocab_size or any(
      (t >= vocab_size).any() for t in tokens
    ):
      return False
    shard = _about(str(about))['shard']
    path = job.shard('train', number)
    if not shard:
      return True
    with reading.open_regular(paths.inside(job.directory, path.name)) as file:
      size = os.fstat(file.fileno()).st_size
    return shard['file'] == path.name and size == shard['bytes']
  except Exception:  # a damaged zip file raises many types
    return False


def _about(text: str) -> dict:
  """Parses and checks the entry `about` of the leftovers of a part.

  Raises:
    ValueError: it does not have the form that `make_shard` writes.
  """
  about = reading.parse_json(text, 'about')
  if about['shard']:
    manifest_fields.check_shard(about['shard'], 'about.shard')
  numbers = [*about['documents'].values(), *about['skipped'].values()]
  if about['documents'].keys() != set(records.SPLITS) or not all(
    type(n) is int and n >= 0 for n in numbers
  ):
    raise ValueError('about: numbers of documents')
  return about


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
    The number of tokens of the part.

  Raises:
    UserError: input is damaged, or more than half of it is not text.
    OSError: the disk is full or not writable.
  """
  dtype = records.token_dtype(tokenizer.vocab_size)
  counts = np.zeros(tokenizer.vocab_size, np.int64)
  documents = dict.fromkeys(records.SPLITS, 0)
  skipped, heldout, tail = {}, [], []

  def train_tokens() -> Iterator[np.ndarray]:
    texts = pieces(documents_of(part, skipped), job.piece_chars)
    for text, ids in _encoded(texts, tokenizer, job.num_threads):
      tokens = np.fromiter(
        itertools.chain(ids, (tokenizer.eos_id,)), dtype, len(ids) + 1
      )
      if hash_fraction(text) < job.heldout_fraction:
        documents['heldout'] += 1
        heldout.append(tokens)
      else:
        documents['train'] += 1
        yield tokens

  def blocks() -> Iterator[np.ndarray]:
    for block in _cut(train_tokens(), job.row_length, dtype, tail):
      counts[:] += np.bincount(block.ravel(), minlength=len(counts))
      yield block

  path = job.shard('train', number)
  shard = records.write_shard(path, blocks(), job.state)
  heldout = np.concatenate([np.zeros(0, dtype), *heldout])
  (tail,) = tail
  about = {
    'shard': dataclasses.asdict(shard) if shard else None,
    'documents': documents,
    'skipped': skipped,
  }
  records.write_file(
    job.leftovers(number),
    lambda f: np.savez_compressed(
      f,
      about=np.array(json.dumps(about)),
      heldout=heldout,
      tail=tail,
      counts=counts,
    ),
  )
  return int(counts.sum()) + len(heldout) + len(tail)


def documents_of(part: sources.Part, skipped: dict) -> Iterator[str]:
  """Yields the texts of a part; counts skipped documents in `skipped`.

  Raises:
    UserError: input is damaged, or more than half of it is not text.
  """
  readable, unreadable = 0, 0
  for document in sources.read(part):
    if not isinstance(document, readers.Skipped):
      readable += 1
      yield document
      continue
    skipped[document.reason] = skipped.get(document.reason, 0) + 1
    unreadable += document.reason != readers.EMPTY
    if unreadable >= 100 and unreadable > readable:
      raise UserError(
        f'more than half of the documents before {document.where} cannot be '
        f'read ({document.reason}): check the format of that file'
      )


def pieces(texts: Iterable[str], chars: int) -> Iterator[str]:
  """Yields parts of at most `chars` characters, cut at line ends if possible.

  Longer lines are cut anywhere. With chars=0, texts stay whole.
  """
  for text in texts:
    if not chars:
      yield text
      continue
    start = 0
    while start < len(text):
      stop = start + chars
      if stop < len(text):
        stop = text.rfind('\n', start, stop) + 1 or stop
      yield text[start:stop]
      start = stop


def _encoded(
  documents: Iterable[str], tokenizer, num_threads: int
) -> Iterator[tuple[str, list[int]]]:
  """Yields texts and their ids."""
  texts, chars = [], 0

  def encoded():
    ids = tokenizer.encode_batch(texts, num_threads)
    return list(zip(texts, ids, strict=True))

  for document in documents:
    texts.append(document)
    chars += len(document)
    if chars >= _TEXT_CHARS:
      yield from encoded()
      texts, chars = [], 0
  yield from encoded()


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
    TooShort: the text does not fill one row.
    OSError: the disk is full or not writable.
  """
  parts = range(len(plan.parts))
  counts = {
    split: np.zeros(tokenizer.vocab_size, np.int64) for split in records.SPLITS
  }
  abouts = []
  for number in parts:
    with np.load(job.leftovers(number)) as arrays:
      abouts.append(json.loads(str(arrays['about'])))
      counts['train'] += arrays['counts']

  def blocks(split: str, array: str) -> Iterator[np.ndarray]:
    leftovers = (np.load(job.leftovers(number))[array] for number in parts)
    dtype = records.token_dtype(tokenizer.vocab_size)
    for block in _cut(leftovers, job.row_length, dtype, []):
      counts[split] += np.bincount(
        block.ravel(), minlength=tokenizer.vocab_size
      )
      yield block

  write = lambda split, array, number: records.write_shard(
    job.shard(split, number), blocks(split, array), job.state
  )
  shards = {
    'train': [records.Shard(**a['shard']) for a in abouts if a['shard']],
    'heldout': [],
  }
  shards['train'] += filter(None, [write('train', 'tail', len(parts))])
  shards['heldout'] += filter(None, [write('heldout', 'heldout', 0)])
  documents = {
    split: sum(about['documents'][split] for about in abouts)
    for split in records.SPLITS
  }
  if not any(shards.values()):
    raise _too_short(job, parts, sum(documents.values()))

  skipped = {}
  for reason, count in (x for a in abouts for x in a['skipped'].items()):
    skipped[reason] = skipped.get(reason, 0) + count
  piece_bytes = np.array([len(piece) for piece in tokenizer.pieces])
  return records.Manifest(
    format_version=records.FORMAT_VERSION,
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
        tokens=int(counts[split].sum()),
        text_bytes=int(counts[split] @ piece_bytes),
        documents=documents[split],
        unigram_entropy_nats=unigram_entropy(counts[split]),
      )
      for split in records.SPLITS
    },
  )


def _too_short(job: Job, parts: range, documents: int) -> TooShort:
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
