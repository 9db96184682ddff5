"""Settings of a preparation that are the same for all parts, and its files."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

from maskdiff.data import packing
from maskdiff.data import rows as rows_lib
from maskdiff.data.documents import Document

# Folder of unfinished files and leftovers, deleted at the end.
STATE = '.prepare'
SETTINGS = 'settings.json'  # in this folder


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
    layout: arrangement of the documents in rows with columns; None: rows of
      tokens only.
    encode: yields the Documents of (part, tokenizer, numbers of skipped
      documents by reason); None: documents.of_text.
  """

  directory: pathlib.Path
  row_length: int
  heldout_fraction: float
  num_threads: int
  piece_chars: int = 0
  layout: packing.Layout | None = None
  encode: Callable[..., Iterator[Document]] | None = None

  @property
  def columns(self) -> dict[str, str]:
    """Dtype on disk of each column after the tokens; see Manifest.columns."""
    names = self.layout.columns if self.layout else ()
    return rows_lib.disk_dtypes(names, self.row_length)

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
