"""The parts of a byte-level BPE tokenizer.json, checked one by one.

The file may come from anybody. `parts` reads its JSON value without the package
`tokenizers`, and accepts only parts for which encoding loses no text:

- normalizer: none, or NFC. NFC changes texts, in the published way (Qwen).
- pre_tokenizer: steps that split a text and drop nothing, in linear time, and
  one ByteLevel step, which writes each byte as a character.
- model: BPE with a token for each byte. Every merge joins two tokens of the
  vocabulary to a third one, so the tokens of a text always spell its bytes.
- added_tokens: none swallows the spaces around it, and the model cannot produce
  a special one.
- decoder: none, or ByteLevel. It is not used, but another decoder means that
  the tokens stand for other texts.

Truncation, padding and the post-processor, which may add bos, are not used.
"""

from typing import NamedTuple

from maskdiff.data import bpe_vocabulary as bpe
from maskdiff.data import split_patterns
from maskdiff.errors import UserError

MAX_STEPS = 100  # of a normalizer, pre_tokenizer or decoder

# Steps of a pre_tokenizer that drop no text, with the type of each field.
_STEPS = {
  'ByteLevel': {'add_prefix_space': bool, 'trim_offsets': bool},
  'Split': {'pattern': dict, 'behavior': str, 'invert': bool},
  'Digits': {'individual_digits': bool},
  'Punctuation': {},
}
# Behaviors of a Split that drop no text, as the package tokenizers calls them.
BEHAVIORS = {
  'Isolated': 'isolated',
  'MergedWithPrevious': 'merged_with_previous',
  'MergedWithNext': 'merged_with_next',
  'Contiguous': 'contiguous',
}


class Parts(NamedTuple):
  """What a tokenizer.json says about ids.

  Attributes:
    vocabulary: dict, ids by token of the model; see bpe.without_special.
    merges: list of pairs of tokens.
    ignore_merges: whether a word that is a token is not split.
    nfc: whether texts are normalized to NFC.
    steps: list of dicts, the steps of the pre_tokenizer.
    added: list of dicts with `id`, `content` and flags, in the order of ids.
  """

  vocabulary: dict
  merges: list
  ignore_merges: bool
  nfc: bool
  steps: list
  added: list


def parts(spec, name):
  """Returns the Parts of a tokenizer.json.

  Args:
    spec: value of the file.
    name: path of the file, for error messages.

  Raises:
    UserError: a part is missing or malformed, loses text, may take more than
      linear time, or lets text become a special token.
  """
  if not isinstance(spec, dict) or not isinstance(spec.get('model'), dict):
    raise bpe.malformed(name, 'it has no model')
  model = spec['model']
  steps = _steps(spec.get('pre_tokenizer'), name)
  if model.get('type') != 'BPE' or not any(
    step['type'] == 'ByteLevel' for step in steps
  ):
    raise UserError(
      f'{name} is not byte-level BPE: use its SentencePiece .model if it has '
      'one, or another tokenizer'
    )
  for step in steps:
    _check_step(step, name)
  if [step['type'] for step in steps].count('ByteLevel') > 1:
    raise bpe.lossy(name, 'its pre_tokenizer has ByteLevel twice')
  _check_decoder(spec.get('decoder'), name)
  vocabulary, merges = bpe.vocabulary(model, name), bpe.merges(model, name)
  ignore_merges = bpe.field(model, 'ignore_merges', bool, False, name)
  nfc = _is_nfc(spec.get('normalizer'), name)
  added = bpe.added(spec.get('added_tokens'), name)
  bpe.check_added(added, vocabulary, nfc, name)
  vocabulary = bpe.without_special(
    added, vocabulary, merges, ignore_merges, name
  )
  return Parts(vocabulary, merges, ignore_merges, nfc, steps, added)


def _flat(value, children, what, name):
  """Returns the steps of a normalizer, pre_tokenizer or decoder in their order.

  Args:
    value: the step; null; or a Sequence of steps, of Sequences, and so on.
    children: the field of a Sequence that has the steps.
    what: field of the file, for error messages.
    name: path of the file.
  """
  waiting, steps = [] if value is None else [value], []
  while waiting:
    step = waiting.pop()
    if not isinstance(step, dict) or not isinstance(step.get('type'), str):
      raise bpe.malformed(name, f'{what} is not an object with a type')
    if step['type'] != 'Sequence':
      steps.append(step)
    elif isinstance(inner := step.get(children), list):
      waiting += reversed(inner)
    else:
      raise bpe.malformed(name, f'a Sequence of {what} has no list {children}')
    if len(steps) + len(waiting) > MAX_STEPS:
      raise bpe.malformed(name, f'{what} has more than {MAX_STEPS} steps')
  return steps


def _steps(value, name):
  return _flat(value, 'pretokenizers', 'pre_tokenizer', name)


def _check_step(step, name):
  """Raises a UserError unless a step of the pre_tokenizer drops no text."""
  kind = step['type']
  if kind not in _STEPS:
    raise bpe.lossy(
      name,
      f'its pre_tokenizer {kind!r:.40} is not one of {", ".join(_STEPS)}',
    )
  for key, of_type in _STEPS[kind].items():
    bpe.field(step, key, of_type, None, name)
  if kind == 'ByteLevel':
    bpe.field(step, 'use_regex', bool, True, name)
    if step['add_prefix_space']:
      raise bpe.lossy(name, 'set add_prefix_space of ByteLevel to false')
  if kind in ('Split', 'Punctuation'):
    behavior = bpe.field(step, 'behavior', str, 'Isolated', name)
    if behavior not in BEHAVIORS:
      raise bpe.lossy(
        name,
        f'its pre_tokenizer {kind}{_shown_pattern(step)} has the behavior '
        f'{behavior!r:.40}, not one of {", ".join(BEHAVIORS)}',
      )
  if kind == 'Split':
    _check_pattern(step, name)


def _shown_pattern(step):
  pattern = step.get('pattern') or {}
  return ''.join(f' of {text!r:.60}' for text in pattern.values())


def _check_pattern(step, name):
  """Raises a UserError unless the pattern of a Split takes linear time."""
  (kind, text), *more = step['pattern'].items() or [(None, None)]
  if more or kind not in ('String', 'Regex') or not isinstance(text, str):
    raise bpe.malformed(
      name, 'the pattern of a Split is not a String or a Regex'
    )
  if not text or len(text) > split_patterns.MAX_LENGTH:
    raise bpe.malformed(
      name,
      'the pattern of a Split is empty or longer than '
      f'{split_patterns.MAX_LENGTH:,} characters',
    )
  problem = split_patterns.problem(text) if kind == 'Regex' else None
  if problem:
    raise UserError(
      f'{name} has the pattern {text!r:.60} in its pre_tokenizer, which '
      f'{problem} and may take a time that is not proportional to the text: '
      f'{bpe.FIX}'
    )


def _is_nfc(value, name):
  """Returns whether the normalizer is NFC; False if there is none."""
  steps = _flat(value, 'normalizers', 'normalizer', name)
  for step in steps:
    if step['type'] != 'NFC':
      raise bpe.lossy(
        name,
        f'remove normalizers other than NFC ({step["type"]!r:.40})',
      )
  return bool(steps)


def _check_decoder(value, name):
  for step in _flat(value, 'decoders', 'decoder', name):
    if step['type'] not in ('ByteLevel', 'Fuse'):
      raise bpe.lossy(
        name, f'its decoder {step["type"]!r:.40} is not ByteLevel'
      )
