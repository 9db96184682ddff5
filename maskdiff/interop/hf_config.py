"""Configs of runs with the model of a Hugging Face folder."""

import os

from maskdiff import config as config_lib
from maskdiff.config import data, sample
from maskdiff.errors import UserError, inline
from maskdiff.interop import config_json, families, hf_tokenizer, mask_token
from maskdiff.objectives.table import OBJECTIVES

LENGTH_TOKENS = 'length_tokens'  # our key in config.json, [[length, id], ...]
# Our key in config.json: documents begin with bos, unlike those of the family.
BEGINS_WITH_BOS = 'begins_with_bos'
_IDS = ('mask_id', 'bos_id', 'eos_id')


def run_config(published, tokenizer, mask_id=None):
  """Returns the ConfigDict of a run with a folder's model.

  Args:
    published: Published.
    tokenizer: from hf_tokenizer.open_tokenizer, or None.
    mask_id: id of the mask token, if there is no tokenizer; default: that of
      config.json.

  Raises:
    UserError: the config is not valid; or without a tokenizer, nothing gives
      the ids of the mask token and of eos.
  """
  c = weights_config(published)
  if tokenizer is None and mask_id is not None:
    c.tokens.mask_id = mask_id
  if tokenizer is not None:
    fill(c, published, tokenizer)
  config = inline(os.path.join(published.folder, config_json.CONFIG))
  for name, fix in (
    ('mask_id', 'give the id with --mask_id'),
    ('eos_id', 'add it'),
  ):
    if c.tokens[name] < 0:
      key = name.replace('_id', '_token_id')
      raise UserError(
        f'{config} has no {key}, and the folder has no tokenizer that is '
        f'read: {fix}'
      )
  config_lib.validate(c)
  return c


def weights_config(published):
  """Returns the config of `run_config` as far as config.json gives it.

  Token ids that config.json does not give are -1, which no network accepts.

  Args:
    published: Published.
  """
  c = config_lib.default()
  _fill_model(c, published)
  c.data.length = published.model['length']
  compute = published.model['dtype']
  c.model.dtype = 'bfloat16' if compute == 'bfloat16' else 'float32'
  set_objective(c, published)
  # Published losses and samplers do not exclude the mask token.
  c.objective.predict_mask = True
  mask = published.config.get('mask_token_id')
  eos = hf_tokenizer.token_id(published.config, 'eos_token_id', -1)
  c.tokens.update(
    mask_id=-1 if mask is None else mask,
    eos_id=eos,
    bos_id=hf_tokenizer.token_id(published.config, 'bos_token_id', eos),
  )
  if not _begins_with_bos(published):
    c.tokens.bos_id = -1
  return c


def set_objective(c, published):
  """Sets the objective of a config, and its blocks, to those of a folder.

  Args:
    c: ConfigDict, changed in place.
    published: Published.
  """
  c.objective.name = published.family.objective
  length = published.model['block_length']
  if OBJECTIVES[c.objective.name].windows:
    c.objective.window_length = length
    sample.fit_rule(c)
  elif length:
    c.objective.block_length = length


def start(c, published, unmasked=False):
  """Fills a config for a run that starts from the network of a folder.

  Sets the model, the token ids, the tokenizer and the objective. Llama and Qwen
  become masked diffusion models whose outputs predict the next position, as
  Dream was made, and get a mask token.

  Args:
    c: ConfigDict, changed in place.
    published: Published.
    unmasked: keep an autoregressive network autoregressive, without a mask
      token.

  Raises:
    UserError: the folder has no tokenizer.
  """
  family = published.family
  tokenizer = hf_tokenizer.open_tokenizer(published, may_grow=not unmasked)
  if tokenizer is None:
    raise UserError(f'{inline(published.folder)} has no tokenizer')
  fill(c, published, tokenizer)
  if family.has_mask_token:
    set_objective(c, published)
  elif unmasked:
    c.objective.name = family.objective
  else:
    c.model.vocab_size = mask_token.grown_rows(
      c.model.vocab_size, c.tokens.mask_id
    )
    c.model.predict_next = True


def fill(c, published, tokenizer):
  """Copies the model, token ids and tokenizer of a folder into a config.

  Args:
    c: ConfigDict, changed in place.
    published: Published.
    tokenizer: from hf_tokenizer.open_tokenizer.
  """
  _fill_model(c, published)
  c.tokens.update({name: getattr(tokenizer, name) for name in _IDS})
  if not _begins_with_bos(published):
    c.tokens.bos_id = -1
  c.data.tokenizer = tokenizer.path
  c.sample.eot_id = _end_of_turn(published, tokenizer)


def own_keys(config, family):
  """Returns our keys of a config.json, with None for those it does not need.

  Args:
    config: ConfigDict of the run.
    family: families.Family that its model is written as.
  """
  has_bos = config.tokens.bos_id >= 0
  return {
    LENGTH_TOKENS: config.data.length_tokens or None,
    BEGINS_WITH_BOS: True if has_bos and not family.has_bos else None,
  }


def _begins_with_bos(published):
  found = published.config.get(BEGINS_WITH_BOS, published.family.has_bos)
  if not isinstance(found, bool):
    raise UserError(
      f'{inline(os.path.join(published.folder, config_json.CONFIG))} has '
      f'{BEGINS_WITH_BOS}={found!r:.60}: must be true or false'
    )
  return found


def _fill_model(c, published):
  for field in (*families.FIELDS, 'predict_next'):
    c.model[field] = published.model[field]
  named = published.config.get(LENGTH_TOKENS, [])
  is_list = isinstance(named, list) and all(isinstance(x, list) for x in named)
  c.data.length_tokens = tuple(map(tuple, named)) if is_list else (named,)
  data.check(c)


def _end_of_turn(published, tokenizer):
  """Returns the id of the family's end-of-turn token; -1 without one."""
  # A SentencePiece processor returns the id of <unk> for unknown tokens.
  id_of = getattr(tokenizer.processor, 'token_to_id', lambda token: None)
  i = id_of(published.family.end_of_turn)
  return i if i is not None and i < published.model['vocab_size'] else -1
