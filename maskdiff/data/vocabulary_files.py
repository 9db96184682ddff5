"""vocab.json and merges.txt, in the form of a tokenizer.json.

These two files hold the vocabulary of a byte-level BPE. The class that
tokenizer_config.json names determines how texts are split and normalized, and
`added_tokens_decoder` in that file, or an added_tokens.json, has the other
tokens.
"""

import pathlib
from typing import NamedTuple

from maskdiff.data import bpe_vocabulary as bpe
from maskdiff.data import split_patterns
from maskdiff.data.tokenizer_files import (
  ADDED,
  BESIDE,
  MERGES,
  SPECIAL,
  read_beside,
  with_fix,
)
from maskdiff.errors import UserError
from maskdiff.files import folder as folder_lib
from maskdiff.files import reading


class _Class(NamedTuple):
  """A tokenizer class of published code.

  Attributes:
    pattern: by which it splits texts.
    nfc: whether it normalizes texts to NFC.
    eos: its eos token, if tokenizer_config.json has none.
  """

  pattern: str
  nfc: bool
  eos: str


_QWEN2 = _Class(split_patterns.QWEN2, nfc=True, eos='<|endoftext|>')
# Names without the ending Fast.
CLASSES = {
  # transformers, models/gpt2/tokenization_gpt2.py
  'GPT2Tokenizer': _Class(split_patterns.GPT2, nfc=False, eos='<|endoftext|>'),
  # transformers, models/qwen2/tokenization_qwen2.py
  'Qwen2Tokenizer': _QWEN2,
  # tokenization_dream.py of Dream-org/Dream-v0-Base-7B
  'DreamTokenizer': _QWEN2,
}


def as_tokenizer_json(path: pathlib.Path, vocabulary) -> dict:
  """Returns the value of the tokenizer.json of the same tokenizer.

  The value is not checked; see tokenizer_json.parts.

  Args:
    path: path of the vocab.json.
    vocabulary: value of the vocab.json.

  Raises:
    UserError: a file is missing or malformed, or names no class of CLASSES.
  """
  config = read_beside(path)
  tokenizer = _class(path, config)
  merges = _merges(path.parent / MERGES)
  if not isinstance(vocabulary, dict):
    raise bpe.malformed(path, 'it is not an object with tokens')
  split = {
    'type': 'Split',
    'pattern': {'Regex': tokenizer.pattern},
    'behavior': 'Isolated',
    'invert': False,
  }
  byte_level = {
    'type': 'ByteLevel',
    'add_prefix_space': (
      tokenizer.pattern == split_patterns.GPT2
      and config.get('add_prefix_space', False)
    ),
    'trim_offsets': False,
    'use_regex': False,
  }
  return {
    'model': {'type': 'BPE', 'vocab': vocabulary, 'merges': merges},
    'normalizer': {'type': 'NFC'} if tokenizer.nfc else None,
    'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [split, byte_level]},
    'added_tokens': _added(
      path, vocabulary, {'eos_token': tokenizer.eos, **config}
    ),
  }


def _class(path, config):
  """Returns the _Class that tokenizer_config.json names."""
  name = config.get('tokenizer_class')
  known = isinstance(name, str) and CLASSES.get(name.removesuffix('Fast'))
  if not known:
    raise UserError(
      f'{path} needs a {BESIDE[-1]} beside it whose "tokenizer_class" is '
      f'{", ".join(CLASSES)}, not {name!r:.60}: the class determines how texts '
      'are split'
    )
  # transformers takes the pattern of Qwen3.5 from this key.
  if config.get('pretokenize_regex', known.pattern) != known.pattern:
    raise UserError(
      f'{path.parent / BESIDE[-1]} has a "pretokenize_regex" that is not the '
      f'pattern of {name}: use the tokenizer.json of this tokenizer'
    )
  return known


def _merges(path):
  """Returns the merges of a merges.txt as a list of texts with one space."""
  with with_fix(bpe.FIX):
    content = folder_lib.read_bytes(path.parent, path.name)
  try:
    lines = content.decode('utf-8-sig').split('\n')
  except UnicodeDecodeError as error:
    raise bpe.malformed(path, f'it is not UTF-8: {error}') from error
  if lines[0].startswith('#version:'):
    lines[0] = ''
  lines = [line.rstrip('\r') for line in lines]
  return [line for line in lines if line]


def _added(path, vocabulary, config):
  """Returns the value of `added_tokens` in a tokenizer.json."""
  special = [config[key] for key in sorted(SPECIAL & config.keys())]
  more = config.get('additional_special_tokens', [])
  for token in more if isinstance(more, list) else [more]:
    token = token.get('content') if isinstance(token, dict) else token
    if not isinstance(token, str):
      raise bpe.malformed(
        path.parent, 'additional_special_tokens are not texts'
      )
    special.append(token)
  decoder = config.get('added_tokens_decoder')
  if decoder is None:
    added = _added_tokens_file(path.parent / ADDED, special)
  elif isinstance(decoder, dict):
    added = [_entry(path, i, token) for i, token in decoder.items()]
  else:
    raise bpe.malformed(path.parent, 'added_tokens_decoder is not an object')
  contents = {token.get('content') for token in added if _has_text(token)}
  for token in dict.fromkeys(special):
    if token in contents:
      continue
    if token not in vocabulary:
      raise UserError(
        f'{path} has no id for the special token {token!r:.60}: add it to '
        f'"added_tokens_decoder" in {BESIDE[-1]}'
      )
    added.append({'id': vocabulary[token], 'content': token, 'special': True})
  return added


def _entry(path, i, token):
  """Returns an entry of added_tokens_decoder as an added token."""
  if not (i.isascii() and i.isdigit() and len(i) < 10):
    raise bpe.malformed(
      path.parent, f'{i!r:.40} in added_tokens_decoder is not an id'
    )
  if not isinstance(token, dict):
    raise bpe.malformed(
      path.parent, f'token {i} of added_tokens_decoder is not an object'
    )
  return {**token, 'id': int(i)}


def _has_text(token):
  return isinstance(token.get('content'), str)


def _added_tokens_file(path, special):
  """Returns the tokens of an added_tokens.json; [] if there is no such file."""
  if not path.is_file():
    return []
  with with_fix(bpe.FIX):
    content = folder_lib.read_bytes(path.parent, path.name)
    ids = reading.parse_json(content, str(path))
  if not isinstance(ids, dict):
    raise bpe.malformed(path, 'it is not an object with tokens')
  return [
    {'id': i, 'content': token, 'special': token in special}
    for token, i in ids.items()
  ]
