"""Reads the config.json of a Hugging Face folder."""

import os

from maskdiff.errors import UserError, inline
from maskdiff.files import folder as folder_lib
from maskdiff.interop import config_keys, families

CONFIG = 'config.json'
_DTYPES = ('float32', 'bfloat16', 'float16')
_MAX_CONFIG_BYTES = 4 << 20


def read_config(folder, subfolder=''):
  """Returns the config.json of a folder, a dict.

  Args:
    folder: path of the folder.
    subfolder: the folder within it that has the file; it must not be a link.

  Raises:
    UserError: the file cannot be read, is a link to a file outside the folder,
      or is not a JSON object.
  """
  name = os.path.join(subfolder, CONFIG)
  found = folder_lib.read_json(folder, name, _MAX_CONFIG_BYTES)
  if not isinstance(found, dict):
    raise UserError(f'{os.path.join(folder, name)!r} is not a JSON object')
  return found


def is_published(folder):
  """Returns whether a folder has the config.json of a Hugging Face model.

  Raises:
    UserError: config.json is a link to a file outside the folder.
  """
  try:
    found = read_config(folder)
  except UserError:
    if os.path.islink(os.path.join(folder, CONFIG)):
      raise
    return False
  return 'model_type' in found or 'architectures' in found


def detect(published, path):
  """Returns the families.Family of a config.json.

  Args:
    published: contents of config.json, a dict.
    path: path of config.json, for error messages.

  Raises:
    UserError: the architecture is not in families.FAMILIES.
  """
  names = published.get('architectures') or []
  if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
    raise UserError(
      f'{path}: architectures={config_keys.shown(names)} must be a list of '
      'names'
    )
  for family in families.FAMILIES:
    if family.marker and family.marker not in published:
      continue
    if set(names) & set(family.architectures) or (
      not names and published.get('model_type') == family.model_type
    ):
      return family
  architecture = ', '.join(names) or published.get('model_type')
  if 'moe' in str(architecture).lower():
    raise UserError(
      f'{path}: architecture {inline(architecture, 200)} is a mixture of '
      'experts, which is not supported: use a dense model'
    )
  known = ', '.join(family.architectures[0] for family in families.FAMILIES)
  raise UserError(
    f'{path}: architecture {inline(architecture, 200)} is not supported; '
    f'supported architectures: {known}'
  )


def model_of(family, published, path):
  """Reads the fields of the model from a config.json.

  Absent keys have the defaults of the published class, see config_keys.py.

  Args:
    family: families.Family.
    published: contents of config.json, a dict.
    path: path of config.json, for error messages.

  Returns:
    dict with the keys families.FIELDS, `predict_next`, `length` (the longest
    context, in tokens), `block_length` (0 if the family has none) and `dtype`
    (of the weights).

  Raises:
    UserError: a value is not supported, or of the wrong type.
  """
  defaults = config_keys.DEFAULTS[family.name]
  value_of = lambda key: published.get(key, defaults.get(key))
  for key, allowed in family.required.items():
    config_keys.check_allowed(published, key, defaults, allowed, path)
  known = (*family.keys.values(), *family.required, *family.ignored)
  config_keys.check_others(published, known, path)
  found = {}
  for field in ('embed', 'heads', 'layers', 'length', *_AFTER):
    key = family.keys[field]
    value = value_of(key)
    if value is None and field in _IF_NULL:
      value = _IF_NULL[field](found, value_of)
    found[field] = config_keys.size(value, field, key, path)
  tied = value_of(family.keys['tie_embeddings'])
  if not isinstance(tied, bool):
    raise UserError(
      f'{path}: {family.keys["tie_embeddings"]}={config_keys.shown(tied)} must '
      'be true or false'
    )
  eps = family.keys['norm_eps']
  found['norm_eps'] = config_keys.number(value_of(eps), eps, path, below=1)
  found['head_dim'] = _head_dim(family, published, found, path)
  found['rope_theta'], found['rope_scaling'] = _rope(family, published, path)
  config_keys.check_token_ids(published, found['vocab_size'], path)
  dtype = published.get('torch_dtype') or published.get('dtype') or 'float32'
  dtype = str(dtype).removeprefix('torch.')
  if dtype not in _DTYPES:
    raise UserError(
      f'{path}: torch_dtype={config_keys.shown(dtype)} is not supported, only '
      f'{", ".join(_DTYPES)}'
    )
  return {
    **found,
    'tie_embeddings': tied,
    'qkv_bias': family.qkv_bias,
    'qk_norm': family.qk_norm,
    'predict_next': family.predict_next,
    'block_length': _block_length(family, value_of, found['length'], path),
    'dtype': dtype,
  }


# Fields whose value may follow from those before them, if it is null.
_AFTER = ('kv_heads', 'mlp', 'vocab_size')
_IF_NULL = {
  'kv_heads': lambda found, value_of: found['heads'],
  'mlp': lambda found, value_of: _product(value_of('mlp_ratio'), found),
  'vocab_size': lambda found, value_of: value_of('vocab_size'),
}


def _block_length(family, value_of, length, path):
  """Returns the tokens of a block, a divisor of the context; 0 without one."""
  key = family.block_key
  if not key:
    return 0
  found = config_keys.size(value_of(key), 'length', key, path)
  if length % found:
    raise UserError(
      f'{path}: {key}={found} does not divide {family.keys["length"]}={length}'
    )
  return found


def _product(ratio, found):
  """Returns the hidden size of LLaDA's MLP; None for other families."""
  return ratio * found['embed'] if type(ratio) is int else ratio


def _head_dim(family, published, found, path):
  """Returns the size of a head, after checking it and the numbers of heads."""
  embed, heads = found['embed'], found['heads']
  given = published.get('head_dim')
  given = family.head_dim or None if given is None else given
  if given is None and embed % heads:
    raise UserError(
      f'{path}: {family.keys["embed"]}={embed} is not a multiple of {heads} '
      'heads'
    )
  head_dim = embed // heads if given is None else given
  config_keys.size(head_dim, 'head_dim', 'head_dim', path)
  if not family.has_head_dim and head_dim * heads != embed:
    raise UserError(
      f'{path}: head_dim={head_dim} is not supported, only '
      f'{family.keys["embed"]} / {family.keys["heads"]} = {embed / heads:g}'
    )
  if heads % found['kv_heads'] or head_dim % 2:
    raise UserError(
      f'{path}: {heads} heads are not a multiple of {found["kv_heads"]} '
      f'key-value heads, or the head size {head_dim} is odd'
    )
  return head_dim


def _rope(family, published, path):
  """Returns rope_theta and rope_scaling of the TransformerConfig."""
  # transformers 5 and later store both under one key.
  entry = published.get('rope_parameters') or {}
  scaling = published.get('rope_scaling') or {}
  for key, value in (('rope_parameters', entry), ('rope_scaling', scaling)):
    if not isinstance(value, dict):
      raise UserError(
        f'{path}: {key}={config_keys.shown(value)} must be an object'
      )
  if entry and scaling and entry != scaling:
    raise UserError(
      f'{path} has both rope_parameters and rope_scaling: remove one of them'
    )
  default = config_keys.DEFAULTS[family.name].get('rope_theta')
  theta = entry.get('rope_theta', published.get('rope_theta'))
  theta = config_keys.number(
    default if theta is None else theta, 'rope_theta', path
  )
  scaling = {
    key: value
    for key, value in (entry or scaling).items()
    if key != 'rope_theta' and value is not None
  }
  key = 'rope_parameters' if entry else 'rope_scaling'
  rotated = scaling.pop('partial_rotary_factor', 1)
  kind = scaling.pop('rope_type', None) or scaling.pop('type', None)
  if not config_keys.equal(rotated, 1) or (kind is None and scaling):
    raise UserError(
      f'{path}: {key}={config_keys.shown(published[key])} is not supported, '
      "only rope_type 'llama3' or 'default'"
    )
  if kind in (None, 'default'):
    return theta, ()
  if kind != 'llama3' or not family.scales_rope:
    raise UserError(
      f'{path}: rope_scaling of type {config_keys.shown(kind)} is not '
      'supported, only ' + ('llama3' if family.scales_rope else 'null')
    )
  keys = (
    'factor',
    'low_freq_factor',
    'high_freq_factor',
    'original_max_position_embeddings',
  )
  for key in keys:
    if key not in scaling:
      raise UserError(f'{path}: rope_scaling lacks {key!r}')
  numbers = tuple(
    config_keys.number(scaling[key], f'rope_scaling.{key}', path)
    for key in keys
  )
  if not numbers[1] < numbers[2]:
    raise UserError(
      f'{path}: rope_scaling needs low_freq_factor below high_freq_factor'
    )
  return theta, numbers
