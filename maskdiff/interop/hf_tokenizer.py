"""The tokenizer of a Hugging Face folder, with the ids of its config.json."""

import os

from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.data import tokenizer_files
from maskdiff.errors import UserError
from maskdiff.interop import config_json, mask_token

TOKENIZERS = (tokenizer_files.JSON, tokenizer_files.MODEL)


def open_tokenizer(published, mask_id=None, may_grow=False):
  """Loads the tokenizer of a folder, with the token ids of its config.json.

  Args:
    published: hf.Published.
    mask_id: replaces the mask id of the folder.
    may_grow: whether the mask id of an autoregressive network may lie beyond
      its embedding; see mask_token.choose_id.

  Returns:
    data.tokenizer.Tokenizer with all ids; None if the folder has no tokenizer.

  Raises:
    UserError: the kind of tokenizer is not supported, or the tokenizer does not
      fit the model.
  """
  folder = published.folder
  if not has_tokenizer(folder):
    return None
  tokenizer = tokenizer_lib.load(folder)
  config = os.path.join(folder, config_json.CONFIG)
  embed = published.tensors[published.family.names['embed']]
  if tokenizer.vocab_size > embed.shape[0]:
    raise UserError(
      f'{tokenizer.path} has {tokenizer.vocab_size} ids, but {embed} has '
      f'{embed.shape[0]} rows: it is not the tokenizer of this model'
    )
  ids = {
    name: token_id(published.config, name.replace('_id', '_token_id'), known)
    for name, known in (
      ('bos_id', tokenizer.bos_id),
      ('eos_id', tokenizer.eos_id),
    )
  }
  for name, i in ids.items():
    if i is not None and not (
      0 <= i < tokenizer.vocab_size and not tokenizer.pieces[i]
    ):
      raise UserError(
        f'{config}: {name.replace("_id", "_token_id")}={i} is not a special '
        f'token of {tokenizer.path}, which has {tokenizer.vocab_size} ids: it '
        'is not the tokenizer of this model'
      )
  if ids['bos_id'] is None:
    ids['bos_id'] = ids['eos_id']
  if mask_id is None:
    mask = token_id(published.config, 'mask_token_id', None)
  else:
    mask = mask_id
  mask = tokenizer.mask_id if mask is None else mask
  if mask is None and published.family.has_mask_token:
    raise UserError(f'{config} has no mask_token_id: add it or give --mask_id')
  rows = embed.shape[0]
  if mask is None and may_grow:
    used = {tokenizer.pad_id, *ids.values()}
    mask = mask_token.choose_id(tokenizer, rows, used)
    rows = mask_token.grown_rows(rows, mask)
  elif mask is None:
    mask = _spare_id(tokenizer, rows, ids, config)
  if not 0 <= mask < rows:
    raise UserError(
      f'mask_id={mask} is not a row of {embed}, which has {embed.shape[0]}'
    )
  return tokenizer_lib.with_ids(tokenizer, mask_id=mask, **ids)


def token_id(config, key, preferred):
  """Returns a token id of config.json, where a key may have a list of ids.

  Args:
    config: dict, contents of config.json.
    key: such as 'eos_token_id'.
    preferred: the id to return if it is in the list, or if the key is missing.

  Raises:
    UserError: the value is neither an integer nor a list of integers.
  """
  value = config.get(key)
  values = value if isinstance(value, list) else [value]
  if value is None or not values:
    return preferred
  if not all(type(i) is int for i in values):
    raise UserError(
      f'{config_json.CONFIG} has {key}={value!r:.40}: set it to the id of a '
      'token'
    )
  return preferred if preferred in values else values[0]


def has_tokenizer(folder):
  """Returns whether a folder has the files of a tokenizer."""
  exists = lambda name: os.path.exists(os.path.join(folder, name))
  return any(map(exists, TOKENIZERS)) or (
    exists(tokenizer_files.VOCABULARY) and exists(tokenizer_files.MERGES)
  )


def _spare_id(tokenizer, rows, ids, config):
  """Returns an id that no text uses, as mask id of a network without one.

  Args:
    tokenizer: data.tokenizer.Tokenizer.
    rows: number of rows of the embedding.
    ids: dict of the other special ids.
    config: path of config.json, for error messages.
  """
  if rows > tokenizer.vocab_size:
    return tokenizer.vocab_size
  used = {tokenizer.pad_id, *ids.values()}
  free = [i for i, piece in enumerate(tokenizer.pieces) if not piece]
  free = [i for i in free if i not in used]
  if not free:
    raise UserError(
      f'{config} has no mask_token_id, and {tokenizer.path} has no unused '
      'special token; training with --config configs/published.py:'
      f'{os.path.dirname(config)} adds a row to the embedding'
    )
  return free[-1]
