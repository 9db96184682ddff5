"""Text to token ids and back, without loss.

Two kinds of files are supported: SentencePiece models made by
tokenizer/train.py, and byte-level BPE in a Hugging Face tokenizer.json (LLaDA,
Qwen, Llama 3, GPT-2) or in vocab.json and merges.txt (Dream), which needs the
package `tokenizers`.

A partly denoised canvas may have mask ids anywhere, even between the bytes of
one character. So `decode` joins the bytes of each id and does not use the
decoders of the libraries.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import secrets
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece

from maskdiff.data import byte_level, tokenizer_files
from maskdiff.data import sentencepiece_model as spm
from maskdiff.errors import UserError, one_line
from maskdiff.files import folder as folder_lib
from maskdiff.files import reading
from maskdiff.files.paths import local_path

# Both libraries need some hundred bytes of memory per character of a text. Long
# texts are therefore encoded in parts of at most PART_CHARS characters, and one
# call of a library gets about _CHARS_AT_ONCE characters.
PART_CHARS = 1 << 18
_CHARS_AT_ONCE = 1 << 22


# Places where a cut does not change the tokens: before a space that follows a
# character other than white space, and before a line break that follows a word.
# Learned pieces have a space only at their beginning, and pre-tokenizers split
# before a space too. Some pre-tokenizers keep a line break with the punctuation
# before it. A run of white space is not cut, because its tokens depend on the
# text after it.
_LAST_CUT = re.compile(r'(?s:.+)(?:\S(?= )|[^\W_](?=\n))')


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A loaded tokenizer; make one with `load`.

  Attributes:
    path: the file that the tokenizer was loaded from.
    vocab_size: number of ids of the tokenizer, which are 0..vocab_size-1. The
      vocabulary of a model may be larger, and `with_ids` accepts its ids.
    pad_id: eos_id if the tokenizer has no pad token.
    bos_id: None if the tokenizer has no bos token (Qwen).
    eos_id: id of the end-of-text token.
    mask_id: None if the tokenizer has no mask token.
    fingerprint: 16 hex digits of the SHA-256 of the file; for a vocab.json, of
      all that determines its tokens.
    pieces: [vocab_size] the UTF-8 bytes that each id stands for; empty for
      special ids and for ids without a token. The joined pieces of the ids of a
      text are its bytes.
    processor: sentencepiece.SentencePieceProcessor or tokenizers.Tokenizer.
  """

  path: str = dataclasses.field(compare=False)
  vocab_size: int
  pad_id: int
  bos_id: int | None
  eos_id: int
  mask_id: int | None
  fingerprint: str
  pieces: tuple[bytes, ...] = dataclasses.field(repr=False)
  processor: Any = dataclasses.field(repr=False, compare=False)

  def encode(self, text: str) -> list[int]:
    """Returns the token ids of a text, without bos, eos or other special ids.

    `decode` inverts `encode` exactly. If a tokenizer.json normalizes Unicode
    (Qwen: NFC), `decode` returns the normalized text.

    Raises:
      ValueError: the text has lone surrogates, which UTF-8 cannot encode.
    """
    return self.encode_batch([text], num_threads=1)[0]

  def encode_batch(
    self, texts: Sequence[str], num_threads: int
  ) -> list[list[int]]:
    """Returns the token ids of every text, in order; see `encode`.

    A SentencePiece model uses num_threads threads. For a tokenizer.json, any
    num_threads above 1 means one thread per core, or RAYON_NUM_THREADS threads.
    """
    ids = [[] for _ in texts]
    for group in _groups(texts):
      parts = [part for _, part in group]
      if _is_sentencepiece(self.processor):
        encoded = spm.encode_batch(self.processor, parts, num_threads)
      else:
        encoded = byte_level.encode_batch(self.processor, parts, num_threads)
      for (i, _), part_ids in zip(group, encoded, strict=True):
        ids[i] += part_ids
    return ids

  def decode(self, ids: Iterable[int], mask_text: str = '\u2591') -> str:
    """Returns the text of token ids; the inverse of `encode`.

    Special ids (pad, bos, eos, chat roles) are dropped. The mask id becomes
    `mask_text`. The replacement character stands for bytes that are not valid
    UTF-8 (a character with some bytes still masked), and for ids >= vocab_size,
    which a model may predict if its vocabulary is larger.

    Raises:
      IndexError: an id is negative.
    """
    mask = mask_text.encode()
    ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), int)
    if ids.size and ids.min() < 0:
      raise IndexError('token ids must not be negative')

    pieces = (mask if i == self.mask_id else self.piece(i) for i in ids)
    return b''.join(pieces).decode('utf-8', errors='replace')

  def special_tokens(self) -> dict[str, int]:
    """Returns the ids of the special tokens by their texts, such as '<eos>'.

    `encode` never returns these ids.
    """
    module = spm if _is_sentencepiece(self.processor) else byte_level
    return module.special_tokens(self.processor)

  def piece(self, i: int) -> bytes:
    """Returns the bytes of an id: b'' for special ids.

    Ids >= vocab_size have the bytes of the replacement character.
    """
    return self.pieces[i] if i < self.vocab_size else spm.REPLACEMENT

  def __setstate__(self, state):
    self.__dict__.update(state)
    if not _is_sentencepiece(self.processor):
      # Pickles of the library do not store this setting.
      self.processor.encode_special_tokens = True


def load(path: str | pathlib.Path) -> Tokenizer:
  """Loads a Tokenizer from a file or from its directory.

  In a directory, the file is tokenizer.model, else tokenizer.json, else
  vocab.json with merges.txt, else the only .model file. A file whose name ends
  in .json is read as a Hugging Face tokenizer, any other file as a
  SentencePiece model.

  A SentencePiece model must have the control symbols <pad>, <bos>, <eos> and
  <mask>. For a Hugging Face tokenizer, the files tokenizer_config.json or
  special_tokens_map.json in the same folder name the special tokens (bos_token,
  eos_token, mask_token, pad_token); otherwise added tokens with well-known
  names are used. The eos token is required. A missing pad token is replaced by
  eos. Missing bos and mask tokens are None; `with_ids` sets them.

  Raises:
    UserError: the file is missing, is of neither kind, may not encode every
      text without loss or in linear time, has no eos, or has a special id that
      text could produce; or the package `tokenizers` is needed and not
      installed.
  """
  try:
    return _load(local_path(path))
  except UserError as error:
    if str(error).isprintable():
      raise
    # Names of files may have control characters.
    raise UserError(one_line(error, length=1000)) from error


def _load(path):
  with tokenizer_files.with_fix(spm.FIX):
    if path.is_dir():
      path = tokenizer_files.find(path)
      content = folder_lib.read_bytes(path.parent, path.name)
    else:
      content = reading.read_bytes(path)
  if path.suffix == '.json':
    processor, pieces, ids, digest = byte_level.read(path, content)
  else:
    processor, pieces, ids = spm.read(path, content)
    digest = hashlib.sha256(content).hexdigest()
  return Tokenizer(
    path=str(path),
    vocab_size=len(pieces),
    pad_id=ids['pad'],
    bos_id=ids['bos'],
    eos_id=ids['eos'],
    mask_id=ids['mask'],
    fingerprint=digest[:16],
    pieces=tuple(pieces),
    processor=processor,
  )


def with_ids(
  tokenizer: Tokenizer,
  *,
  pad_id: int | None = None,
  bos_id: int | None = None,
  eos_id: int | None = None,
  mask_id: int | None = None,
) -> Tokenizer:
  """Returns the tokenizer with other special ids; None keeps an id.

  This supplies special tokens that a tokenizer lacks, such as Qwen's mask.
  `copy` does not save these ids, because they belong to a config.

  Raises:
    UserError: text could produce the id, or the mask is also pad, bos or eos.
  """
  ids = dict(pad_id=pad_id, bos_id=bos_id, eos_id=eos_id, mask_id=mask_id)
  given = {name: i for name, i in ids.items() if i is not None}
  size = tokenizer.vocab_size
  for name, i in given.items():
    if i < 0 or (i < size and tokenizer.pieces[i]):
      problem = (
        f'is the text {tokenizer.pieces[i]!r}' if i >= 0 else 'is not an id'
      )
      raise UserError(
        f'{name}={i} {problem} in {tokenizer.path}: choose the id of a special '
        f'token, or one that is not in its vocabulary ({size} or more)'
      )
  changed = dataclasses.replace(tokenizer, **given)
  others = {n: getattr(changed, n) for n in ('pad_id', 'bos_id', 'eos_id')}
  same = [name for name, i in others.items() if i == changed.mask_id]
  if same and changed.mask_id is not None:
    raise UserError(
      f'mask_id={changed.mask_id} is also the {same[0]} of {tokenizer.path}: '
      'choose a mask_id of its own'
    )
  return changed


def with_missing_ids(
  tokenizer: Tokenizer, ids: Mapping[str, int | None]
) -> Tokenizer:
  """Returns the tokenizer with its missing special ids set from `ids`.

  Ids that the tokenizer has do not change, even if `ids` differs.

  Args:
    ids: keyword arguments of `with_ids`, such as config.tokens; bos_id=-1
      stands for no bos.

  Raises:
    UserError: as `with_ids`.
  """
  missing = {
    name: i
    for name, i in ids.items()
    if getattr(tokenizer, name) is None and not (name == 'bos_id' and i == -1)
  }
  return with_ids(tokenizer, **missing)


def with_pieces(tokenizer: Tokenizer, pieces: Mapping[int, bytes]) -> Tokenizer:
  """Returns the tokenizer with other bytes for some ids, for `decode`."""
  changed = (pieces.get(i, piece) for i, piece in enumerate(tokenizer.pieces))
  return dataclasses.replace(tokenizer, pieces=tuple(changed))


def copy(tokenizer: Tokenizer, directory: str | pathlib.Path) -> None:
  """Copies the files of a tokenizer to a directory, for `load(directory)`.

  A SentencePiece model is named tokenizer.model in the copy, other files keep
  their names. The files that name special tokens are copied too. Each file is
  written atomically.

  Raises:
    UserError: the directory holds files of another tokenizer, or is not
      writable; or a file is a link that leaves the folder of the tokenizer.
  """
  source, directory = pathlib.Path(tokenizer.path), local_path(directory)
  if _is_sentencepiece(tokenizer.processor):
    files = {tokenizer_files.MODEL: source}
  else:
    files = tokenizer_files.of_byte_level(source)
  for name in tokenizer_files.OTHERS - files.keys():
    if (directory / name).exists():
      raise UserError(
        f'{directory} holds {name} of another tokenizer than {source}: delete '
        'it or use another directory'
      )
  for name, file in files.items():
    target = directory / name
    # The user may have named a link, but others made the files beside it.
    content = (
      reading.read_bytes(file)
      if file == source
      else folder_lib.read_bytes(file.parent, file.name)
    )
    temporary = directory / f'.{name}.{secrets.token_hex(4)}'
    try:
      directory.mkdir(parents=True, exist_ok=True)
      if target.is_file() and target.read_bytes() == content:
        continue
      temporary.write_bytes(content)
      os.replace(temporary, target)
    except OSError as e:
      with contextlib.suppress(OSError):
        temporary.unlink()
      raise UserError(
        f'cannot copy the tokenizer {source} to {directory} ({e.strerror}): '
        'choose a writable directory'
      ) from e


def _groups(texts) -> Iterator[list[tuple[int, str]]]:
  """Yields lists of (index of a text, part of it), encoded in one call."""
  group, size = [], 0
  for i, text in enumerate(texts):
    for part in _parts(text):
      group.append((i, part))
      size += len(part)
      if size >= _CHARS_AT_ONCE:
        yield group
        group, size = [], 0
  if group:
    yield group


def _parts(text: str) -> Iterator[str]:
  """Yields parts of a text whose tokens are, if possible, those of the text.

  With BPE the tokens are equal, if a good place for a cut exists. A unigram
  model may choose differently between two almost equally likely segmentations,
  because the library adds up float32 scores from the start of its input.

  Raises:
    ValueError: the text has lone surrogates.
  """
  try:
    text.isascii() or text.encode()
  except UnicodeEncodeError as e:
    raise ValueError(
      f'the text has a lone surrogate at character {e.start}, which UTF-8 '
      'cannot hold'
    ) from e
  start = 0
  while len(text) > start + PART_CHARS:
    stop = start + PART_CHARS
    cut = _LAST_CUT.match(text, start, stop + 1)
    # Without a good place, at least keep combining marks with their letters.
    stop = cut.end() if cut else _before_marks(text, stop)
    yield text[start:stop]
    start = stop
  yield text[start:]


def _before_marks(text: str, stop: int) -> int:
  for i in range(stop, stop - 16, -1):
    if not unicodedata.category(text[i]).startswith('M'):
      return i
  return stop


def _is_sentencepiece(processor) -> bool:
  return isinstance(processor, sentencepiece.SentencePieceProcessor)
