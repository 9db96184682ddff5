"""Leftovers of a part: what its shard does not hold.

They are the held-out documents, the tokens that do not fill a row, the counts
of tokens and documents, and the entry of the shard. They are written after the
shard, so a part with leftovers is done.
"""

import json
import os
from collections.abc import Iterator

import numpy as np

from maskdiff.data import manifest_fields, records
from maskdiff.data.documents import Document
from maskdiff.data.job import Job
from maskdiff.files import paths, reading


def is_done(job: Job, number: int, vocab_size: int) -> bool:
  """Returns whether a part has its leftovers and a shard of the right size.

  A part whose leftovers are damaged, or not of the form that `make_shard`
  writes, is not done.
  """
  try:
    dtype = np.dtype(records.token_dtype(vocab_size))
    kinds = {'heldout': dtype, 'tail': dtype, 'counts': np.int64}
    if job.layout:
      kinds |= {'lengths': np.int64, 'answer': bool}
    with reading.open_regular(job.leftovers(number)) as file:
      with np.load(file) as arrays:
        # Reading all arrays checks their checksums.
        about = _about(str(arrays['about']))
        found = {name: arrays[name] for name in kinds}
    for name, kind in kinds.items():
      if found[name].ndim != 1 or found[name].dtype != kind:
        return False
    if len(found['counts']) != vocab_size or any(
      (found[name] >= vocab_size).any() for name in ('heldout', 'tail')
    ):
      return False
    if job.layout:
      size = len(found['heldout'])
      ends = np.cumsum(found['lengths'])[-1:].tolist() or [0]
      if ends != [size] or len(found['answer']) != size:
        return False
    shard = about['shard']
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
  tables = [about[name] for name in ('documents', 'skipped', 'statistics')]
  numbers = [n for table in tables for n in table.values()]
  if about['documents'].keys() != set(records.SPLITS) or not all(
    type(n) is int and n >= 0 for n in numbers
  ):
    raise ValueError('about: numbers of documents')
  return about


def write(
  job: Job,
  number: int,
  about: dict,
  heldout: list[Document],
  tail: np.ndarray,
  counts: np.ndarray,
  dtype: str,
) -> None:
  """Writes the leftovers of a part.

  Args:
    job: Job.
    number: index of the part in the plan.
    about: JSON values: shard, documents, skipped and statistics.
    heldout: held-out documents.
    tail: [n] tokens after the last row.
    counts: [vocab_size] int64, the tokens of the shard by id.
    dtype: dtype of tokens on disk.

  Raises:
    OSError: the disk is full or not writable.
  """
  join = lambda arrays, dtype: np.concatenate(
    [np.zeros(0, dtype), *arrays]
  ).astype(dtype)
  arrays = {
    'about': np.array(json.dumps(about)),
    'heldout': join((d.tokens for d in heldout), dtype),
    'tail': tail,
    'counts': counts,
  }
  if job.layout:
    ones = lambda d: np.ones(len(d.tokens), bool)
    answers = (ones(d) if d.answer is None else d.answer for d in heldout)
    arrays['answer'] = join(answers, bool)
    arrays['lengths'] = np.array([len(d.tokens) for d in heldout], np.int64)
  records.write_file(
    job.leftovers(number), lambda f: np.savez_compressed(f, **arrays)
  )


def heldout_documents(job: Job, parts: range) -> Iterator[Document]:
  """Yields the held-out documents of all parts.

  Without a layout, the documents of a part are joined to a single one.
  """
  for number in parts:
    with np.load(job.leftovers(number)) as arrays:
      tokens = arrays['heldout']
      if not job.layout:
        yield Document('', tokens)
        continue
      ends = np.cumsum(arrays['lengths'])[:-1]
      answer = arrays['answer']
    if len(tokens):
      for pair in zip(
        np.split(tokens, ends), np.split(answer, ends), strict=True
      ):
        yield Document('', *pair)
