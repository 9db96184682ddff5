"""Vocabulary, merges and added tokens of a byte-level BPE, checked.

Each token of the vocabulary writes the bytes that it stands for as characters
(GPT-2's table). The values come from files that anybody may have written. The
functions return them in one form, or raise UserError.
"""

import unicodedata

from maskdiff.errors import UserError

MAX_ID = (1 << 21) - 1
MAX_ADDED = 1 << 16  # tokens
MAX_ADDED_CHARS = 1 << 20  # of all added tokens
# Characters of one added token. Python normalizes a run of combining marks in
# quadratic time.
MAX_CONTENT = 1000

FIX = (
  'set --config.data.tokenizer to another tokenizer.json, or to a model made '
  'by tokenizer/train.py'
)

_FLAGS = ('lstrip', 'rstrip', 'single_word', 'special', 'normalized')
_TYPES = {bool: 'true or false', str: 'a text', dict: 'an object'}


def malformed(name, problem):
  """Returns the UserError for a file that is not a tokenizer."""
  return UserError(f'{name} is not a tokenizer ({problem}): {FIX}')


def lossy(name, problem):
  """Returns the UserError for a tokenizer that does not keep every text."""
  return UserError(f'{name} changes some texts: {problem}; {FIX}')


def field(holder, key, kind, default, name):
  """Returns a field of the given type; the default if it is missing or null."""
  value = holder.get(key)
  if value is None and default is not None:
    return default
  if not isinstance(value, kind):
    raise malformed(name, f'{key} is not {_TYPES[kind]}: {value!r:.40}')
  return value


def token_bytes(token):
  """Returns the bytes that a token of the model stands for."""
  if CHARACTER_BYTES.keys() >= set(token):
    return bytes(CHARACTER_BYTES[c] for c in token)
  return token.encode()  # no text is encoded to this token


def _character_bytes() -> dict[str, int]:
  """Returns the byte that each character of a token stands for (GPT-2's table).

  Printable characters of Latin-1 stand for their own byte. The other bytes are
  written as the characters from U+0100 on.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = sorted(set(range(256)) - set(printable))
  table = {chr(byte): byte for byte in printable}
  return table | {chr(256 + i): byte for i, byte in enumerate(rest)}


CHARACTER_BYTES = _character_bytes()
# The other bytes do not occur in UTF-8.
_TEXT_BYTES = set(range(256)) - {0xC0, 0xC1} - set(range(0xF5, 0x100))


def vocabulary(model, name):
  """Returns the vocabulary of the model after checking its ids and bytes."""
  for key in ('continuing_subword_prefix', 'end_of_word_suffix'):
    if affix := field(model, key, str, '', name):
      raise lossy(name, f'its {key} {affix!r:.40} is not empty')
  vocabulary = model.get('vocab')
  if not isinstance(vocabulary, dict) or not vocabulary:
    raise malformed(name, 'vocab is not an object with tokens')
  for token, i in vocabulary.items():
    _check_id(i, token, name)
  if len(set(vocabulary.values())) < len(vocabulary):
    raise malformed(name, 'two tokens of vocab have the same id')
  present = {CHARACTER_BYTES[c] for c in CHARACTER_BYTES.keys() & vocabulary}
  if absent := _TEXT_BYTES - present:
    raise UserError(
      f'{name} has no token for {len(absent)} of the bytes that text is made '
      'of: train it with initial_alphabet=ByteLevel.alphabet(), or use another '
      'tokenizer'
    )
  return vocabulary


def _check_id(i, token, name):
  if type(i) is not int or not 0 <= i <= MAX_ID:
    raise malformed(
      name,
      f'the id of {token!r:.40} is {i!r:.40}, not an integer from 0 to '
      f'{MAX_ID}',
    )


def merges(model, name):
  """Returns the merges of the model as a list of pairs of tokens."""
  merges, vocabulary = model.get('merges'), model['vocab']
  if not isinstance(merges, list):
    raise malformed(name, 'merges is not a list')
  pairs = []
  for merge in merges:
    pair = merge.split(' ') if isinstance(merge, str) else merge
    if (
      not isinstance(pair, list)
      or len(pair) != 2
      or not all(isinstance(token, str) and token for token in pair)
    ):
      raise malformed(name, f'merges has {merge!r:.40}, not two tokens')
    first, second = pair
    for token in (first, second, first + second):
      if token not in vocabulary:
        raise malformed(
          name, f'a merge has {token!r:.40}, not a token of vocab'
        )
    pairs.append((first, second))
  return pairs


def added(value, name):
  """Returns the added tokens with all their fields, in the order of ids."""
  if value is None:
    return []
  if not isinstance(value, list):
    raise malformed(name, 'added_tokens is not a list')
  added, contents, size = [], set(), 0
  for token in value:
    if not isinstance(token, dict):
      raise malformed(name, 'an added token is not an object')
    content = field(token, 'content', str, None, name)
    if not content or content in contents:
      raise malformed(
        name, f'the added token {content!r:.40} is empty or twice'
      )
    if len(content) > MAX_CONTENT:
      raise malformed(
        name,
        f'the added token {content!r:.40} has more than {MAX_CONTENT:,} '
        'characters',
      )
    _check_id(token.get('id'), content, name)
    contents.add(content)
    size += len(content)
    flags = {k: field(token, k, bool, False, name) for k in _FLAGS[:-1]}
    normalized = field(token, 'normalized', bool, not flags['special'], name)
    added.append(
      dict(id=token['id'], content=content, normalized=normalized, **flags)
    )
  if len(added) > MAX_ADDED or size > MAX_ADDED_CHARS:
    raise malformed(
      name,
      f'it has more than {MAX_ADDED:,} added tokens, or more than '
      f'{MAX_ADDED_CHARS:,} characters in them',
    )
  return sorted(added, key=lambda token: token['id'])


def check_added(added, vocabulary, nfc, name):
  """Raises a UserError if added tokens share ids, or lose text."""
  tokens = {i: token for token, i in vocabulary.items()}
  for token in added:
    i, content = token['id'], token['content']
    if tokens.setdefault(i, content) != content:
      raise malformed(
        name, f'{content!r:.40} and another token have the id {i}'
      )
    if token['special']:
      continue
    if token['lstrip'] or token['rstrip']:
      raise lossy(
        name,
        f'set lstrip and rstrip of the added token {content!r:.40} to false',
      )
    if nfc and unicodedata.normalize('NFC', content) != content:
      raise lossy(name, f'the added token {content!r:.40} is not in NFC')


def without_special(added, vocabulary, merges, ignore_merges, name):
  """Returns the vocabulary that the model needs to encode texts.

  With `ignore_merges`, a word that is a token becomes this token. The special
  tokens are then left out, so that no text becomes one.

  Raises:
    UserError: the model can produce a special token from text, or an ordinary
      added token from another text.
  """
  reachable = {first + second for first, second in merges}
  reachable |= {token for token in vocabulary if len(token) == 1}
  reachable |= {token for pair in merges for token in pair}
  hidden = set()
  for token in added:
    content = token['content']
    if content not in vocabulary or not CHARACTER_BYTES.keys() >= set(content):
      continue
    if token['special'] and content in reachable:
      raise UserError(
        f'text could produce the special token {content!r:.40} of {name}, '
        f'because it is also a token of vocab: {FIX}'
      )
    if token['special'] and ignore_merges:
      hidden.add(content)
    if (
      not token['special']
      and (ignore_merges or content in reachable)
      and token_bytes(content) != content.encode()
    ):
      raise lossy(
        name, f'the added token {content!r:.40} is also another text in vocab'
      )
  return {t: i for t, i in vocabulary.items() if t not in hidden}
