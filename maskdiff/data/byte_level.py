"""Reads a byte-level BPE tokenizer.json of Hugging Face.

LLaDA, Qwen, Llama 3 and GPT-2 have such tokenizers. Every token stands for
bytes, written as characters by GPT-2's table. The package `tokenizers` reads
the file. This module checks that encoding loses no text, and that no text
becomes a special token.
"""

import json
import pathlib
import unicodedata

from maskdiff.errors import UserError, one_line

# Files next to tokenizer.json that name its special tokens. The last file takes
# precedence.
BESIDE = ('special_tokens_map.json', 'tokenizer_config.json')

# Names of special tokens, used if those files do not name one.
_WELL_KNOWN = {
  'bos': ('<|startoftext|>', '<|begin_of_text|>', '<s>', '<bos>'),
  'eos': ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>'),
  'mask': ('<|mdm_mask|>', '<|mask|>', '<mask>', '[MASK]'),
  'pad': ('<pad>', '<|pad|>'),
}

_FIX = (
  'set --config.data.tokenizer to another tokenizer.json, or to a model made '
  'by tokenizer/train.py'
)


def encode_batch(processor, texts, num_threads: int) -> list[list[int]]:
  """Returns the token ids of every text, in order.

  Runs on one thread if num_threads is 1, else on one thread per core.
  """
  encode = processor.encode_batch_fast
  if num_threads == 1:
    return [encode([t], add_special_tokens=False)[0].ids for t in texts]
  return [e.ids for e in encode(texts, add_special_tokens=False)]


def read(path: pathlib.Path, content: bytes):
  """Reads a tokenizer.json and the files beside it.

  Returns:
    - `processor`: tokenizers.Tokenizer.
    - `pieces`: list of the bytes that each id stands for.
    - `ids`: dict with 'pad', 'bos', 'eos' and 'mask'; None for missing tokens.

  Raises:
    UserError: see tokenizer.load.
  """
  try:
    import tokenizers
  except ImportError as e:
    raise UserError(
      f'{path} needs the package tokenizers: pip install -r '
      'requirements-data.txt'
    ) from e
  spec = _read_json(path, content)
  try:
    processor = tokenizers.Tokenizer.from_buffer(content)
  except Exception as e:  # the library raises nothing more specific
    raise UserError(
      f'{path} is not a tokenizer.json ({one_line(e)}): {_FIX}'
    ) from e
  first_step = spec.get('pre_tokenizer') or {}
  steps = [first_step, *first_step.get('pretokenizers', [])]
  if not isinstance(processor.model, tokenizers.models.BPE) or not any(
    step.get('type') == 'ByteLevel' for step in steps
  ):
    raise UserError(
      f'{path} is not byte-level BPE: use its SentencePiece .model if it has '
      'one, or another tokenizer'
    )
  # The file may hold settings of a training run, which would change texts.
  processor.no_truncation()
  processor.no_padding()
  processor.model.dropout = None
  # Text that looks like a special token stays text.
  processor.encode_special_tokens = True

  added = processor.get_added_tokens_decoder()
  for token in spec.get('added_tokens', []):
    actual = processor.token_to_id(token['content'])
    if actual != token['id']:
      raise UserError(
        f'{path} gives {token["content"]!r} the id {token["id"]}, but the '
        f'package tokenizers assigns {actual}: renumber added_tokens so that '
        'their ids follow the vocabulary without a gap'
      )
  vocabulary = processor.get_vocab(with_added_tokens=True)
  pieces = [b''] * (1 + max(vocabulary.values()))
  for token, i in vocabulary.items():
    if i not in added:
      pieces[i] = _token_bytes(token)
    elif not added[i].special:
      pieces[i] = token.encode()
  _check_lossless(path, processor, pieces, added)
  tokens = _special_tokens(path, added)
  _check_special(path, processor, tokens, added)
  ids = {kind: vocabulary.get(token) for kind, token in tokens.items()}
  return processor, pieces, ids


def _read_json(path: pathlib.Path, content: bytes | None = None) -> dict:
  try:
    found = json.loads(path.read_bytes() if content is None else content)
  except OSError as e:
    raise UserError(
      f'cannot read tokenizer {path} ({e.strerror}): {_FIX}'
    ) from e
  except ValueError as e:
    raise UserError(f'{path} is not valid JSON ({e}): {_FIX}') from e
  if not isinstance(found, dict):
    raise UserError(f'{path} does not hold a JSON object: {_FIX}')
  return found


def _character_bytes() -> dict[str, int]:
  """Returns the byte that each character of a token stands for (GPT-2's table).

  Printable characters of Latin-1 stand for their own byte. The other bytes are
  written as the characters from U+0100 on.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = sorted(set(range(256)) - set(printable))
  table = {chr(byte): byte for byte in printable}
  return table | {chr(256 + i): byte for i, byte in enumerate(rest)}


_CHARACTER_BYTES = _character_bytes()


def _token_bytes(token: str) -> bytes:
  if _CHARACTER_BYTES.keys() >= set(token):
    return bytes(_CHARACTER_BYTES[c] for c in token)
  return token.encode()  # no text is encoded to this token


def _check_lossless(path, processor, pieces, added) -> None:
  """Checks with one text that the joined pieces of its ids equal the text.

  The text has every byte that occurs in UTF-8, white space in unusual places,
  and the added tokens that are not special.
  """
  points = [
    *range(0x800),
    *range(0x800, 0xD800, 0x100),
    *range(0xE000, 0x110000, 0x1000),
  ]
  ordinary = [token.content for token in added.values() if not token.special]
  probe = ' '.join(['  A b\n\n\tC 12 ', *map(chr, points), *ordinary, '\r\n  '])
  probe = unicodedata.normalize('NFC', probe)
  absent = set(probe.encode()) - {p[0] for p in pieces if len(p) == 1}
  if absent:
    raise UserError(
      f'{path} has no token for {len(absent)} of the bytes that text is made '
      'of: train it with initial_alphabet=ByteLevel.alphabet(), or use another '
      'tokenizer'
    )
  # A prefix space is added only to texts that do not begin with a space.
  texts = [probe, 'a']
  encoded = encode_batch(processor, texts, num_threads=1)
  for text, ids in zip(texts, encoded, strict=True):
    if b''.join(pieces[i] for i in ids) != text.encode():
      raise UserError(
        f'{path} changes some texts: in this file set add_prefix_space, lstrip '
        'and rstrip to false and remove normalizers other than NFC, or use '
        'another tokenizer'
      )


def _special_tokens(path, added) -> dict[str, str | None]:
  """Returns the special token of each kind in _WELL_KNOWN, or None."""
  stated = {}
  for beside in (path.parent / name for name in BESIDE):
    if beside.is_file():
      found = _read_json(beside)
      stated |= {key: value for key, value in found.items() if value}
  present = {token.content for token in added.values()}
  tokens = {}
  for kind, names in _WELL_KNOWN.items():
    token = stated.get(f'{kind}_token')
    token = token.get('content') if isinstance(token, dict) else token
    known = next((name for name in names if name in present), None)
    tokens[kind] = token or known
  if not tokens['eos']:
    raise UserError(
      f'{path} has no eos token: name it as "eos_token" in a {BESIDE[-1]} '
      'in the same folder'
    )
  return tokens | {'pad': tokens['pad'] or tokens['eos']}


def _check_special(path, processor, tokens, added) -> None:
  special = {token.content: i for i, token in added.items() if token.special}
  for kind, token in tokens.items():
    if token is None:
      continue
    text = str(token)
    (ids,) = encode_batch(processor, [text], num_threads=1)
    if text not in special or not set(ids).isdisjoint(special.values()):
      raise UserError(
        f'text could produce the {kind} token {text!r} of {path}: give it an '
        'entry in added_tokens with "special": true'
      )
