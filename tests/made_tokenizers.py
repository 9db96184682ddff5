"""Makes small byte-level tokenizers, in both forms of Hugging Face."""

import json

from tokenizers import pre_tokenizers

from maskdiff.data import split_patterns

MERGES = (
  ('d', 'e'),
  ('de', 'f'),
  ('\u0120', 't'),
  ('\u0120t', 'h'),
  ('\u0120th', 'e'),
  ('i', 'n'),
  ('\u0120', '\u0120'),
  ('1', '2'),
)
SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
DREAM = (*SPECIAL, '<|beginoftext|>', '<|mask|>')
BYTE_LEVEL = {
  'type': 'ByteLevel',
  'add_prefix_space': False,
  'trim_offsets': False,
  'use_regex': False,
}


def vocabulary():
  """Returns ids of all bytes and of the results of MERGES."""
  tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokens += [first + second for first, second in MERGES]
  return {token: i for i, token in enumerate(tokens)}


def added(contents=SPECIAL, **changes):
  """Returns entries of added_tokens after the vocabulary."""
  flags = ('lstrip', 'rstrip', 'normalized', 'single_word')
  first = len(vocabulary())
  return [
    dict.fromkeys(flags, False)
    | {'id': first + i, 'content': content, 'special': True}
    | changes
    for i, content in enumerate(contents)
  ]


def split(pattern=split_patterns.QWEN2, behavior='Isolated', kind='Regex'):
  """Returns a Split step of a pre_tokenizer."""
  return {
    'type': 'Split',
    'pattern': {kind: pattern},
    'behavior': behavior,
    'invert': False,
  }


def sequence(*steps):
  """Returns a pre_tokenizer of several steps."""
  return {'type': 'Sequence', 'pretokenizers': list(steps)}


def spec(**changes):
  """Returns the value of a tokenizer.json with some entries replaced."""
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': added(),
    'normalizer': None,
    'pre_tokenizer': sequence(split(), BYTE_LEVEL),
    'post_processor': None,
    'decoder': None,
    'model': model(),
  } | changes


def model(**changes):
  """Returns the model of a tokenizer.json with some entries replaced."""
  merges = [list(merge) for merge in MERGES]
  return {'type': 'BPE', 'vocab': vocabulary(), 'merges': merges} | changes


def write_json(folder, value, config=None):
  """Writes a tokenizer.json, and a tokenizer_config.json if there is one."""
  folder.mkdir(exist_ok=True, parents=True)
  (folder / 'tokenizer.json').write_text(json.dumps(value))
  if config is not None:
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


def dream_config(contents=DREAM):
  """Returns a tokenizer_config.json as Dream publishes it."""
  decoder = {str(token.pop('id')): token for token in added(contents)}
  return {
    'add_bos_token': False,
    'add_prefix_space': False,
    'added_tokens_decoder': decoder,
    'additional_special_tokens': ['<|beginoftext|>', '<|mask|>'],
    'bos_token': '<|beginoftext|>',
    'eos_token': '<|endoftext|>',
    'mask_token': '<|mask|>',
    'pad_token': '<|endoftext|>',
    'tokenizer_class': 'DreamTokenizer',
    'unk_token': None,
  }


def write_vocabulary(folder, config, vocab=None):
  """Writes vocab.json, merges.txt and tokenizer_config.json."""
  folder.mkdir(exist_ok=True, parents=True)
  vocab = vocabulary() if vocab is None else vocab
  (folder / 'vocab.json').write_text(json.dumps(vocab, ensure_ascii=False))
  lines = ['#version: 0.2', *(' '.join(merge) for merge in MERGES)]
  (folder / 'merges.txt').write_text('\n'.join(lines) + '\n')
  if config is not None:
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder
