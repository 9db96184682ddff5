"""Adds a mask token to an autoregressive network and to its tokenizer."""

import json
import os
import re

import jax.numpy as jnp

from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.data import tokenizer_files
from maskdiff.errors import UserError
from maskdiff.files import atomic, reading
from maskdiff.interop import safetensors
from maskdiff.objectives.table import OBJECTIVES

NAME = '<|mask|>'  # as in Dream
# A grown vocabulary is a multiple of this number, so that a mesh can split it.
ROWS = 128
# Names of special tokens that a publisher left without a meaning.
_SPARE = re.compile('reserved|unused', re.IGNORECASE)


def choose_id(tokenizer, rows, used):
  """Returns the id of a mask token for a network that has none.

  The first row of the embedding beyond the tokenizer's ids; else the last
  special token that is reserved by its name; else the id after the last row,
  which `grown_rows` adds.

  Args:
    tokenizer: data.tokenizer.Tokenizer.
    rows: number of rows of the embedding.
    used: ids of other special tokens.
  """
  if rows > tokenizer.vocab_size:
    return tokenizer.vocab_size
  for i in range(tokenizer.vocab_size - 1, -1, -1):
    if i in used or tokenizer.pieces[i]:
      continue
    # A SentencePiece model always has a mask token.
    if _SPARE.search(tokenizer.processor.id_to_token(i) or ''):
      return i
  return tokenizer.vocab_size


def grown_rows(rows, mask_id):
  """Returns the vocabulary size that has a mask id: `rows`, or more rows.

  Args:
    rows: number of rows of the embedding.
    mask_id: id of the mask token.
  """
  return rows if mask_id < rows else -(-(mask_id + 1) // ROWS) * ROWS


def initialize(ends, mask_id, vocab_size):
  """Returns embeddings in which the mask token has a mean embedding.

  Its input and output embeddings become the mean of the output embeddings of
  all other ids, as in SDLM: autoregressive training drives the embeddings of
  unused ids to 0 (LLaDA 2.0). So do all rows that are added. Since exp is
  convex, each of them adds at most 1 / V to the sum of a softmax over V ids.

  Args:
    ends: dict of the parameters `embed`, [V, D], and `head`, [D, V], which
      tied embeddings lack.
    mask_id: id of the mask token, below vocab_size.
    vocab_size: number of rows of the result, at least V.
  """
  tied = 'head' not in ends
  output = ends['embed'] if tied else ends['head'].T
  rows = len(output)
  others = (jnp.arange(rows) != mask_id).astype(output.dtype)
  mean = others @ output / others.sum()
  new = jnp.arange(vocab_size)
  new = ((new == mask_id) | (new >= rows))[:, None]

  def fill(matrix):
    return jnp.where(
      new, mean, jnp.pad(matrix, ((0, vocab_size - rows), (0, 0)))
    )

  filled = {'embed': fill(ends['embed'])}
  return filled if tied else {**filled, 'head': fill(output).T}


def is_added(config, tokenizer):
  """Returns whether a run has a mask token that its tokenizer does not name.

  Args:
    config: ConfigDict of the run.
    tokenizer: data.tokenizer.Tokenizer.
  """
  has_mask_token = OBJECTIVES[config.objective.name].has_mask_token
  return has_mask_token and tokenizer.mask_id is None


def extend_tokenizer(folder, tokenizer, config):
  """Gives the tokenizer of an export the mask token of its network.

  A new id becomes the added special token NAME. A special token that exists
  keeps its name. `mask_token` in tokenizer_config.json names the token, so
  that transformers knows it too.

  Args:
    folder: folder with a copy of the tokenizer's files.
    tokenizer: data.tokenizer.Tokenizer of these files.
    config: ConfigDict of the run.

  Returns:
    A line for the user: the token, or the reason why it cannot be added. None
    if the tokenizer needs none.

  Raises:
    UserError: a file cannot be written.
  """
  if not is_added(config, tokenizer):
    return None
  mask_id, size = config.tokens.mask_id, tokenizer.vocab_size
  processor = tokenizer.processor
  name = NAME if mask_id >= size else processor.id_to_token(mask_id)
  problem = None
  if mask_id > size or name is None:
    problem = f'its next free id is {size}, not {mask_id}'
  elif mask_id == size and processor.token_to_id(NAME) is not None:
    problem = f'its vocabulary has the text {NAME!r}'
  elif mask_id == size and processor.get_vocab_size() != size:
    problem = 'its ids have gaps'
  if problem:
    return (
      f'note: the mask token, id {mask_id}, cannot be added to the tokenizer: '
      f'{problem}'
    )
  token = {
    'content': name,
    'lstrip': False,
    'normalized': False,
    'rstrip': False,
    'single_word': False,
    'special': True,
  }
  at = lambda file: os.path.join(folder, file)
  config_file = at(tokenizer_files.BESIDE[-1])
  config = _read(config_file)
  if mask_id == size and os.path.exists(at(tokenizer_files.JSON)):
    spec = _read(at(tokenizer_files.JSON))
    added = [*(spec.get('added_tokens') or []), {'id': mask_id, **token}]
    _write(at(tokenizer_files.JSON), {**spec, 'added_tokens': added})
  elif mask_id == size and config.get('added_tokens_decoder') is None:
    added = _read(at(tokenizer_files.ADDED))
    _write(at(tokenizer_files.ADDED), {**added, name: mask_id})
  decoder = config.get('added_tokens_decoder')
  if isinstance(decoder, dict):
    config['added_tokens_decoder'] = {str(mask_id): token} | decoder
  _write(config_file, {**config, 'mask_token': name})
  if tokenizer_lib.load(folder).mask_id != mask_id:
    raise UserError(
      f'{folder} does not load with the mask token {name!r}: use a tokenizer '
      'that names its mask token'
    )
  return f'the tokenizer names the mask token: {name!r}, id {mask_id}'


def _read(path):
  """Returns the object of a checked JSON file; {} if it does not exist."""
  return reading.read_json(path) if os.path.exists(path) else {}


def _write(path, value):
  """Writes a JSON file with the permissions that it has."""
  content = json.dumps(value, indent=2) + '\n'
  with safetensors.writing(path):
    mode = os.stat(path).st_mode & 0o666 if os.path.exists(path) else 0o666
    atomic.write_if_changed(path, content.encode(), mode)
