"""Text to token ids and back, without loss.

Two kinds of files: SentencePiece models as tokenizer/train.py makes them, and
Hugging Face's tokenizer.json where it is byte-level BPE (LLaDA, Qwen, Llama 3,
GPT-2), for which the package `tokenizers` is needed.

What is unusual: `decode` takes ids with masks anywhere among them, also
between the bytes of one character, because that is what a half-denoised canvas
looks like. It works on the bytes each id stands for, not on the libraries' own
decoders.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import secrets
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece

from maskdiff.data import byte_level
from maskdiff.data import sentencepiece_model as spm
from maskdiff.data.paths import local_path
from maskdiff.errors import UserError

# Both libraries take some hundred bytes of memory per character of a text, so
# longer texts are encoded in parts of at most this many characters, and at
# most so many at once.
PART_CHARS = 1 << 18
_CHARS_AT_ONCE = 1 << 22


# Cuts here do not change the tokens: before a space that follows anything but
# white space, and before a line break that follows a word. Learnt pieces have
# a space only at their beginning, and pre-tokenizers split there too; but some
# keep a line break with the punctuation before it. A run of white space stays
# whole, since how it is split depends on what follows it.
_LAST_CUT = re.compile(r'(?s:.+)(?:\S(?= )|[^\W_](?=\n))')

_MODEL = 'tokenizer.model'
_JSON = 'tokenizer.json'

_FIX = (
  'set --config.data.tokenizer to a model made by tokenizer/train.py, such as '
  'tokenizer/stdlib_4k.model, or to a byte-level tokenizer.json'
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A loaded tokenizer; make one with `load`.

  Attributes:
    path: the file it was loaded from.
    vocab_size: number of ids; valid ids are in [0, vocab_size). A model's
      vocabulary may be larger, and an id given to `with_ids` lie there.
    pad_id: the eos where the tokenizer has no pad.
    bos_id: None where it has none, as Qwen's.
    mask_id: likewise.
    fingerprint: 16 hex digits of the SHA-256 of the file.
    pieces: [vocab_size] the UTF-8 bytes each id stands for; empty for special
      ids and for ids without a token. A text's bytes are the joined pieces of
      its ids.
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
    """Token ids of a text, without bos or eos. Never a special id.

    `decode` gives the text back exactly, unless a tokenizer.json asks for
    Unicode normalization (Qwen's does: NFC); then it gives back the normalized
    text.

    Raises:
      ValueError: the text has lone surrogates, which no UTF-8 file holds.
    """
    return self.encode_batch([text], num_threads=1)[0]

  def encode_batch(
    self, texts: Sequence[str], num_threads: int
  ) -> list[list[int]]:
    """`encode` of every text, in order, on `num_threads` threads.

    For a tokenizer.json, more than one thread means as many as the machine
    has cores, or as RAYON_NUM_THREADS says.
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
    """The text that ids stand for; the inverse of `encode`.

    Special ids (pad, bos, eos, chat roles) are dropped, the mask id is shown
    as `mask_text`, and bytes that are not valid UTF-8 (a character with some
    of its bytes still masked) as the replacement character. So are ids from
    vocab_size on: a model's vocabulary may be larger than its tokenizer's.

    Raises:
      IndexError: an id is negative.
    """
    mask = mask_text.encode()
    ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), int)
    if ids.size and ids.min() < 0:
      raise IndexError('token ids must not be negative')

    pieces = (mask if i == self.mask_id else self.piece(i) for i in ids)
    return b''.join(pieces).decode('utf-8', errors='replace')

  def piece(self, i: int) -> bytes:
    """What `decode` joins: nothing for a special id, and for one that is in a
    model's vocabulary alone the replacement character."""
    return self.pieces[i] if i < self.vocab_size else spm.REPLACEMENT

  def __setstate__(self, state):
    self.__dict__.update(state)
    if not _is_sentencepiece(self.processor):
      # The one setting that the library's pickles forget.
      self.processor.encode_special_tokens = True


def load(path: str | pathlib.Path) -> Tokenizer:
  """A Tokenizer from a file, or from the directory that holds it.

  Of a directory, tokenizer.model is taken, else tokenizer.json, else the only
  .model file. Files whose names end in .json are Hugging Face's, all others
  SentencePiece's.

  A SentencePiece model must have the control symbols <pad>, <bos>, <eos> and
  <mask>. Of a tokenizer.json the special tokens are those that
  tokenizer_config.json or special_tokens_map.json beside it name (bos_token,
  eos_token, mask_token, pad_token), else added tokens with well-known names.
  What it has not is None, and `with_ids` fills it in; pad is eos then, and eos
  must be there.

  Raises:
    UserError: the file is missing or is of neither kind, cannot encode every
      text without loss, has no eos, or text could produce one of the special
      ids; or the package `tokenizers` is needed and absent.
  """
  path = _find(local_path(path))
  content = _read(path)
  if path.suffix == '.json':
    processor, pieces, ids = byte_level.read(path, content)
  else:
    processor, pieces, ids = spm.read(path, content)
  return Tokenizer(
    path=str(path),
    vocab_size=len(pieces),
    pad_id=ids['pad'],
    bos_id=ids['bos'],
    eos_id=ids['eos'],
    mask_id=ids['mask'],
    fingerprint=hashlib.sha256(content).hexdigest()[:16],
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
  """The same tokenizer with other special ids; None leaves one as it is.

  For what a tokenizer does not have, such as Qwen's mask. `copy` does not
  keep them: they belong to a config.

  Raises:
    UserError: text could produce the id, or the mask is also pad, bos or eos.
  """
  ids = dict(pad_id=pad_id, bos_id=bos_id, eos_id=eos_id, mask_id=mask_id)
  given = {name: i for name, i in ids.items() if i is not None}
  size = tokenizer.vocab_size
  for name, i in given.items():
    if i < 0 or (i < size and tokenizer.pieces[i]):
      what = f'is the text {tokenizer.pieces[i]!r}' if i >= 0 else 'is no id'
      raise UserError(
        f'{name}={i} {what} in {tokenizer.path}: choose the id of a special '
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
  """The tokenizer with the special ids that it lacks taken from `ids`.

  Ids that the tokenizer has are not changed, even where `ids` differs.

  Args:
    ids: keyword arguments of `with_ids`, such as config.tokens.

  Raises:
    UserError: as `with_ids`.
  """
  missing = {
    name: i for name, i in ids.items() if getattr(tokenizer, name) is None
  }
  return with_ids(tokenizer, **missing)


def copy(tokenizer: Tokenizer, directory: str | pathlib.Path) -> None:
  """Puts the tokenizer's files where `load(directory)` gives an equal one.

  They get the names tokenizer.model or tokenizer.json, the latter with the
  files beside it that name its special tokens. Each appears in one step; one
  that is the same file already is left alone.

  Raises:
    UserError: the directory holds files of another tokenizer, or cannot be
      written.
  """
  source, directory = pathlib.Path(tokenizer.path), local_path(directory)
  if _is_sentencepiece(tokenizer.processor):
    files = {_MODEL: source}
  else:
    beside = {name: source.parent / name for name in byte_level.BESIDE}
    files = {_JSON: source}
    files |= {name: file for name, file in beside.items() if file.is_file()}
  for name in {_MODEL, _JSON, *byte_level.BESIDE} - files.keys():
    if (directory / name).exists():
      raise UserError(
        f'{directory} holds {name} of another tokenizer than {source}: delete '
        'it or use another directory'
      )
  for name, file in files.items():
    target = directory / name
    temporary = directory / f'.{name}.{secrets.token_hex(4)}'
    try:
      directory.mkdir(parents=True, exist_ok=True)
      if target.exists() and target.samefile(file):
        continue
      shutil.copyfile(file, temporary)
      os.replace(temporary, target)
    except OSError as e:
      with contextlib.suppress(OSError):
        temporary.unlink()
      raise UserError(
        f'cannot copy the tokenizer {source} to {directory} ({e.strerror}): '
        'use a directory that can be written'
      ) from e


def _groups(texts) -> Iterator[list[tuple[int, str]]]:
  """(Index of a text, part of it), as many as are encoded at once."""
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
  """Cuts a text so that its tokens are those of its parts, where it can.

  With BPE they are exactly. With a unigram model a choice between two almost
  equally likely ways may differ: the library adds up float32 from the start.
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
    # Where there is no good place, combining marks at least stay with what
    # they are to be composed with.
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


def _find(path: pathlib.Path) -> pathlib.Path:
  if not path.is_dir():
    return path
  for name in (_MODEL, _JSON):
    if (path / name).is_file():
      return path / name
  models = sorted(path.glob('*.model'))
  if len(models) != 1:
    raise UserError(
      f'{path} has neither {_MODEL} nor {_JSON}, and {len(models)} other '
      f'.model files: {_FIX}'
    )
  return models[0]


def _read(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as e:
    raise UserError(
      f'cannot read tokenizer {path} ({e.strerror}): {_FIX}'
    ) from e
