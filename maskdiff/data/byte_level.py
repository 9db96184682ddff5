"""Hugging Face's tokenizer.json, where it is byte-level BPE.

So are the tokenizers of LLaDA, Qwen, Llama 3 and GPT-2. Every token stands for
bytes, written as characters (GPT-2's table); what reads the file is the package
`tokenizers`, and what is checked here is that no text is lost and that none
becomes a special token.
"""

import json
import pathlib
import unicodedata

from maskdiff.errors import UserError, one_line

# The files beside tokenizer.json that name its special tokens; the later wins.
BESIDE = ('special_tokens_map.json', 'tokenizer_config.json')

# Names of special tokens where those files do not tell. eos stands before pad,
# whose place it takes.
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
  """Ids of every text; more than one thread means one for every core."""
  encode = processor.encode_batch_fast
  if num_threads == 1:
    return [encode([t], add_special_tokens=False)[0].ids for t in texts]
  return [e.ids for e in encode(texts, add_special_tokens=False)]


def read(path: pathlib.Path, content: bytes):
  """Reads a tokenizer.json and the files beside it.

  Returns:
    - `processor`: tokenizers.Tokenizer.
    - `pieces`: list of the bytes that each id stands for.
    - `ids`: dict with 'pad', 'bos', 'eos' and 'mask'; None for what it lacks.

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
  # Settings that a training has left in the file; they would change texts.
  processor.no_truncation()
  processor.no_padding()
  processor.model.dropout = None
  # Text that looks like a special token stays text.
  processor.encode_special_tokens = True

  added = processor.get_added_tokens_decoder()
  for token in spec.get('added_tokens', []):
    got = processor.token_to_id(token['content'])
    if got != token['id']:
      raise UserError(
        f'{path} gives {token["content"]!r} the id {token["id"]}, but the '
        f'package tokenizers makes it {got}: let the ids of added_tokens '
        'follow the vocabulary without a gap'
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
  """The byte each character of a byte-level token stands for (GPT-2's table).

  Printable characters of Latin-1 are their own byte; the other bytes have the
  characters from U+0100 on.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = sorted(set(range(256)) - set(printable))
  table = {chr(byte): byte for byte in printable}
  return table | {chr(256 + i): byte for i, byte in enumerate(rest)}


_CHARACTER_BYTES = _character_bytes()


def _token_bytes(token: str) -> bytes:
  if _CHARACTER_BYTES.keys() >= set(token):
    return bytes(_CHARACTER_BYTES[c] for c in token)
  return token.encode()  # no text becomes this token


def _check_lossless(path, processor, pieces, added) -> None:
  """Checks on one text that pieces join to what was encoded.

  It has every byte that occurs in UTF-8, white space in odd places and the
  added tokens that text may hold.
  """
  points = [
    *range(0x800),
    *range(0x800, 0xD800, 0x100),
    *range(0xE000, 0x110000, 0x1000),
  ]
  mine = [token.content for token in added.values() if not token.special]
  probe = ' '.join(['  A b\n\n\tC 12 ', *map(chr, points), *mine, '\r\n  '])
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
        f'{path} does not give back every text: set add_prefix_space, lstrip '
        'and rstrip in it to false and remove normalizers other than NFC, or '
        'use another tokenizer'
      )


def _special_tokens(path, added) -> dict[str, str | None]:
  """The special token of each kind in _WELL_KNOWN, or None."""
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
      f'{path} has no eos: name it as "eos_token" in a {BESIDE[-1]} beside it'
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
        f'the {kind} token {text!r} of {path} is not special in it, so that '
        'text could produce it: give it an entry in added_tokens with '
        '"special": true'
      )
