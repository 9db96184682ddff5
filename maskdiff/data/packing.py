"""Arranges documents in rows with the columns doc and answer.

- cut: documents follow one another, and a document may continue in the next
  row. For plain text.
- packed: a row holds whole documents. Each document goes to the first open row
  that has room for it (first fit).
- padded: a row holds one document. Documents of similar length form a group,
  and all of a group end with eos at the length of the longest one, as in
  LLaDA's fine-tuning, where the group is the batch (arXiv 2502.09992, B.1).
  These eos are answers.
- pairs: a row holds the two documents of a preference, the chosen and the
  rejected answer, each in its half: `align` is half of the row length.

With `align`, every document starts at a multiple of so many tokens. If it is
the block length of block diffusion, no block has tokens of two documents. The
gap before the next document is padding, or with `fill_eos` eos that belong to
the answer, as in SDAR.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from maskdiff.data import rows as rows_lib
from maskdiff.data.documents import Document
from maskdiff.data.rows import Rows
from maskdiff.errors import UserError

NAMES = ('cut', 'packed', 'padded', 'pairs')
# Rows that first fit keeps open. More rows leave less padding and take longer.
OPEN_ROWS = 256
GROUPS_AT_ONCE = 256  # groups of padded documents that are sorted together
_ROWS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Layout:
  """How documents are arranged in rows.

  Attributes:
    name: one of NAMES.
    align: every document starts at a multiple of so many tokens.
    fill_eos: whether the gap before the next document is eos of the answer.
    group: documents of a group of 'padded'.
  """

  name: str
  align: int = 1
  fill_eos: bool = False
  group: int = 1

  @property
  def columns(self) -> tuple[str, ...]:
    """Names of the columns of the rows, after the tokens."""
    return ('doc',) if self.name == 'cut' else rows_lib.COLUMNS

  @property
  def settings(self) -> dict[str, Any]:
    """The settings that decide the rows, for a manifest."""
    return {
      'layout': self.name,
      'align': self.align,
      'fill_eos': self.fill_eos,
      'group': self.group,
    }


def check(layout: Layout, row_length: int) -> None:
  """Raises UserError if the row length is not a multiple of `align`."""
  if layout.name == 'pairs' and 2 * layout.align != row_length:
    raise UserError(
      f'--row_length={row_length} must be even: a row has both answers'
    )
  if layout.align < 1 or row_length % layout.align:
    raise UserError(
      f'--align={layout.align} does not divide --row_length={row_length}: '
      'choose a divisor, or another row length'
    )


def rows(
  layout: Layout,
  documents: Iterable[Document],
  row_length: int,
  *,
  eos_id: int,
  pad_id: int,
) -> Iterator[Rows]:
  """Yields blocks of rows, NumPy arrays [R, L], of documents.

  The rows depend on the documents and their order only.

  Args:
    layout: Layout.
    documents: documents; of at most row_length tokens, except for 'cut'.
    row_length: L.
    eos_id: fills documents.
    pad_id: token of the padding. Its doc is -1, so it is never seen.
  """
  if layout.fill_eos:
    documents = (_extended(d, _up(d, layout), eos_id) for d in documents)
  arrange = {
    'cut': _cut,
    'packed': _first_fit,
    'padded': _padded,
    'pairs': _pairs,
  }[layout.name]
  placed = arrange(layout, documents, row_length, eos_id)
  for some in _batches(placed, _ROWS_AT_ONCE):
    yield _block(some, layout, row_length, pad_id)


def summary(manifest) -> str:
  """Returns the shares of padding and of eos, and truncations, as one line.

  Eos that fill an answer come after its own eos.

  Args:
    manifest: records.Manifest with statistics.
  """
  splits = manifest.splits.values()
  positions = sum(split.rows for split in splits) * manifest.row_length
  answers = sum(split.tokens for split in splits)
  found = manifest.statistics
  share = lambda name, total: f'{found.get(name, 0) / max(1, total):.1%}'
  return (
    f'{answers:,} tokens with a loss, of which {share("answer_eos", answers)} '
    f'are eos ({share("filled_eos", answers)} fill answers); '
    f'{positions:,} positions, of which {share("padding", positions)} are '
    f'padding; {found.get("truncated", 0):,} documents truncated'
  )


def _batches(items: Iterable, size: int) -> Iterator[list]:
  """Yields lists of `size` items; the last one may be shorter."""
  items = iter(items)
  while batch := list(itertools.islice(items, size)):
    yield batch


def _up(document: Document, layout: Layout) -> int:
  """Returns the length of a document with the gap that follows it."""
  return -(-len(document.tokens) // layout.align) * layout.align


def _extended(document: Document, length: int, eos_id: int) -> Document:
  """Returns a document with eos added up to a length; they are answers."""
  gap = length - len(document.tokens)
  tokens = np.pad(document.tokens, (0, gap), constant_values=eos_id)
  answer = np.pad(document.answer, (0, gap), constant_values=True)
  return document._replace(tokens=tokens, answer=answer)


def _cut(layout, documents, row_length, eos_id):
  """Yields rows as lists of documents, some cut; each with its gap after it."""
  del eos_id
  row, used = [], 0
  for document in documents:
    rest = document.tokens
    while len(rest):
      row.append(document._replace(tokens=rest[: row_length - used]))
      used += _up(row[-1], layout)
      rest = rest[len(row[-1].tokens) :]
      if used == row_length:
        yield row
        row, used = [], 0
  if row:
    yield row


def _first_fit(layout, documents, row_length, eos_id):
  """Yields rows as lists of whole documents."""
  del eos_id
  open_rows, free = [], []
  for document in documents:
    size = _up(document, layout)
    at = next((i for i, room in enumerate(free) if room >= size), len(free))
    if at == len(free):
      if len(free) == OPEN_ROWS:
        fullest = min(range(len(free)), key=free.__getitem__)
        del free[fullest]
        yield open_rows.pop(fullest)
        at -= 1
      open_rows.append([])
      free.append(row_length)
    open_rows[at].append(document)
    free[at] -= size
    if not free[at]:
      del free[at]
      yield open_rows.pop(at)
  yield from open_rows


def _padded(layout, documents, row_length, eos_id):
  """Yields rows of one document, sorted by length within a part of them."""
  window = layout.group * GROUPS_AT_ONCE
  for some in _batches(documents, window):
    by_length = sorted(some, key=lambda document: len(document.tokens))
    for group in _batches(by_length, layout.group):
      longest = min(row_length, _up(group[-1], layout))
      yield from ([_extended(d, longest, eos_id)] for d in group)


def _pairs(layout, documents, row_length, eos_id):
  """Yields rows of two documents."""
  del layout, row_length, eos_id
  yield from _batches(documents, 2)


def _block(placed, layout, row_length, pad_id) -> Rows:
  """Returns Rows of rows that are lists of documents."""
  block = rows_lib.empty((len(placed), row_length), layout.columns)
  block.tokens[:], block.doc[:] = pad_id, rows_lib.PADDING
  if block.answer is not None:
    block.answer[:] = False
  for row, documents in enumerate(placed):
    start = 0
    for number, document in enumerate(documents):
      text = slice(start, start + len(document.tokens))
      block.tokens[row, text] = document.tokens
      block.doc[row, text] = number
      if block.answer is not None:
        block.answer[row, text] = document.answer
      start += _up(document, layout)
  return block
