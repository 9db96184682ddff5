"""Reads byte-level BPE tokenizers of Hugging Face.

LLaDA, Qwen, Llama 3 and GPT-2 have a tokenizer.json. Dream has vocab.json and
merges.txt. Every token stands for bytes, written as characters by GPT-2's
table.

tokenizer_json.py checks the parts of the file. This module gives the package
`tokenizers` these parts only, not the file, so that no part is unchecked. Then
it looks up the special tokens, which text must never become.
"""

import contextlib
import hashlib
import json
import pathlib
import unicodedata

from maskdiff.data import bpe_vocabulary as bpe
from maskdiff.data import tokenizer_json, vocabulary_files
from maskdiff.data.tokenizer_files import (
  BESIDE,
  VOCABULARY,
  read_beside,
  with_fix,
)
from maskdiff.errors import UserError, one_line
from maskdiff.files import reading

# Names of special tokens, used if no file beside names one.
_WELL_KNOWN = {
  'bos': ('<|startoftext|>', '<|begin_of_text|>', '<s>', '<bos>'),
  'eos': ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>'),
  'mask': ('<|mdm_mask|>', '<|mask|>', '<mask>', '[MASK]'),
  'pad': ('<pad>', '<|pad|>'),
}


def encode_batch(processor, texts, num_threads: int) -> list[list[int]]:
  """Returns the token ids of every text, in order.

  Runs on one thread if num_threads is 1, else on one thread per core.
  """
  encode = processor.encode_batch_fast
  with _library_errors('the package tokenizers'):
    if num_threads == 1:
      return [encode([t], add_special_tokens=False)[0].ids for t in texts]
    return [e.ids for e in encode(texts, add_special_tokens=False)]


def special_tokens(processor) -> dict[str, int]:
  """Returns the ids of the special tokens by their texts."""
  added = processor.get_added_tokens_decoder()
  return {token.content: i for i, token in added.items() if token.special}


def read(path: pathlib.Path, content: bytes):
  """Reads a tokenizer.json, or a vocab.json with merges.txt beside it.

  Args:
    path: the file. Files beside it name the special tokens.
    content: bytes of the file.

  Returns:
    - `processor`: tokenizers.Tokenizer.
    - `pieces`: list of the bytes that each id stands for.
    - `ids`: dict with 'pad', 'bos', 'eos' and 'mask'; None for missing tokens.
    - `fingerprint`: SHA-256 of the file in hex; for a vocab.json, of all parts
      that determine ids.

  Raises:
    UserError: see tokenizer.load.
  """
  with with_fix(bpe.FIX):
    spec = reading.parse_json(content, str(path))
  if path.name == VOCABULARY:
    spec = vocabulary_files.as_tokenizer_json(path, spec)
    content = json.dumps(spec, sort_keys=True).encode()
  parts = tokenizer_json.parts(spec, path)
  processor = _processor(parts, path)
  pieces = _pieces(parts)
  _check_lossless(path, processor, pieces, parts.added)
  tokens = _special_tokens(path, parts.added)
  _check_special(path, processor, tokens, parts.added)
  ids = {token['content']: token['id'] for token in parts.added}
  ids = {kind: ids.get(token) for kind, token in tokens.items()}
  return processor, pieces, ids, hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def _library_errors(name):
  """Context manager: an error of the package tokenizers becomes a UserError.

  A panic in the package, which is written in Rust, is a BaseException.
  """
  try:
    yield
  except BaseException as error:
    panic = type(error).__name__ == 'PanicException'
    if not panic and not isinstance(error, Exception):
      raise  # KeyboardInterrupt
    raise UserError(
      f'{name} cannot be used ({one_line(error)}): {bpe.FIX}'
    ) from error


def _processor(parts, path):
  """Returns the tokenizers.Tokenizer that the checked parts describe."""
  try:
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers
  except ImportError as e:
    raise UserError(
      f'{path} needs the package tokenizers: pip install -r '
      'requirements-data.txt'
    ) from e
  with _library_errors(path):
    processor = tokenizers.Tokenizer(
      models.BPE(
        vocab=parts.vocabulary,
        merges=parts.merges,
        ignore_merges=parts.ignore_merges,
      )
    )
    if parts.nfc:
      processor.normalizer = normalizers.NFC()
    processor.pre_tokenizer = pre_tokenizers.Sequence(
      [_step(step) for step in parts.steps]
    )
    processor.add_tokens(
      [tokenizers.AddedToken(**_flags(t)) for t in parts.added]
    )
  # Text that looks like a special token stays text.
  processor.encode_special_tokens = True
  for token in parts.added:
    actual = processor.token_to_id(token['content'])
    if actual != token['id']:
      raise UserError(
        f'{path} gives {token["content"]!r:.40} the id {token["id"]}, but the '
        f'package tokenizers assigns {actual}: renumber added_tokens so that '
        'their ids follow the vocabulary without a gap'
      )
  return processor


def _flags(token):
  return {key: value for key, value in token.items() if key != 'id'}


def _step(step):
  """Returns a step of a pre_tokenizer as an object of the library."""
  from tokenizers import Regex, pre_tokenizers

  behavior = tokenizer_json.BEHAVIORS.get(step.get('behavior'), 'isolated')
  match step['type']:
    case 'ByteLevel':
      return pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=step.get('use_regex') is not False
      )
    case 'Split':
      ((kind, text),) = step['pattern'].items()
      pattern = Regex(text) if kind == 'Regex' else text
      return pre_tokenizers.Split(pattern, behavior, invert=step['invert'])
    case 'Digits':
      return pre_tokenizers.Digits(individual_digits=step['individual_digits'])
    case 'Punctuation':
      return pre_tokenizers.Punctuation(behavior)
  raise AssertionError(step)


def _pieces(parts):
  """Returns the bytes of each id; b'' for special ids and ids without token."""
  added = {token['id']: token for token in parts.added}
  pieces = [b''] * (1 + max(max(parts.vocabulary.values()), *added, 0))
  for token, i in parts.vocabulary.items():
    pieces[i] = bpe.token_bytes(token)
  for i, token in added.items():
    pieces[i] = b'' if token['special'] else token['content'].encode()
  return pieces


def _check_lossless(path, processor, pieces, added) -> None:
  """Checks with two texts that the joined pieces of their ids are the text.

  The parts of the file are known to lose no text. This check would find an
  error of the package.
  """
  points = [
    *range(0x800),
    *range(0x800, 0xD800, 0x100),
    *range(0xE000, 0x110000, 0x1000),
  ]
  ordinary = [token['content'] for token in added if not token['special']]
  probe = ' '.join(['  A b\n\n\tC 12 ', *map(chr, points), *ordinary, '\r\n  '])
  texts = [unicodedata.normalize('NFC', probe), 'a']
  encoded = encode_batch(processor, texts, num_threads=1)
  for text, ids in zip(texts, encoded, strict=True):
    if b''.join(pieces[i] for i in ids) != text.encode():
      raise bpe.lossy(path, 'a text of many characters is not its tokens')


def _special_tokens(path, added) -> dict[str, str | None]:
  """Returns the special token of each kind in _WELL_KNOWN, or None."""
  stated = read_beside(path)
  present = {token['content'] for token in added}
  tokens = {}
  for kind, names in _WELL_KNOWN.items():
    known = next((name for name in names if name in present), None)
    tokens[kind] = stated.get(f'{kind}_token') or known
  if not tokens['eos']:
    raise UserError(
      f'{path} has no eos token: name it as "eos_token" in a {BESIDE[-1]} '
      'in the same folder'
    )
  return tokens | {'pad': tokens['pad'] or tokens['eos']}


def _check_special(path, processor, tokens, added) -> None:
  special = {t['content']: t['id'] for t in added if t['special']}
  for kind, token in tokens.items():
    if token is None:
      continue
    (ids,) = encode_batch(processor, [token], num_threads=1)
    if token not in special or not set(ids).isdisjoint(special.values()):
      raise UserError(
        f'text could produce the {kind} token {token!r:.60} of {path}: give it '
        'an entry in added_tokens with "special": true'
      )
