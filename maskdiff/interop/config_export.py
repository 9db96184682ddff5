"""Writes the config.json of an exported model."""

from maskdiff.errors import UserError
from maskdiff.interop import config_json, families
from maskdiff.model import ntk


def exported(model):
  """Returns families.FIELDS of a model as config.json can express them.

  NTK scaling is another rope_theta.

  Args:
    model: mapping with the keys families.FIELDS.
  """
  fields = {field: model[field] for field in families.FIELDS}
  scaling = fields['rope_scaling'] = tuple(fields['rope_scaling'])
  if len(scaling) == 2:
    fields['rope_theta'] = ntk.scaled_theta(
      fields['rope_theta'], fields['head_dim'], *scaling
    )
    fields['rope_scaling'] = ()
  return fields


def misfit(family, model):
  """Returns the first config value that a family does not support, or None.

  Args:
    family: families.Family.
    model: mapping with the keys families.FIELDS.

  Returns:
    str such as 'config.model.qk_norm=True'; None if the family fits.
  """
  model = exported(model)
  for field in ('qkv_bias', 'qk_norm'):
    if model[field] != getattr(family, field):
      return f'config.model.{field}={model[field]}'
  if model['rope_scaling'] and not family.scales_rope:
    return f'config.model.rope_scaling={model["rope_scaling"]}'
  if (
    not family.has_head_dim
    and model['head_dim'] * model['heads'] != model['embed']
  ):
    return (
      f'config.model.head_dim={model["head_dim"]}, which is not embed / heads'
    )
  return None


def published_config(
  family, model, tokens, length, dtype, original=None, block_length=0
):
  """Returns the contents of config.json for a model, a dict.

  Args:
    family: families.Family that supports the model.
    model: mapping with the keys families.FIELDS.
    tokens: mapping with mask_id, bos_id and eos_id.
    length: longest context, in tokens.
    dtype: name of the weights' dtype.
    original: contents of the config.json of the folder that the model was
      converted from, or None. Entries that still describe the model are kept.
    block_length: tokens of a block or window, for a family with a block_key.
  """
  known = None
  if original is not None:
    try:
      known = config_json.model_of(family, original, config_json.CONFIG)
    except UserError:
      original = None
  base = dict(original or family.template)
  fields = {
    **exported(model),
    'length': length,
    'block_length': block_length,
    'dtype': dtype,
  }
  changed = {f for f in fields if known is None or known[f] != fields[f]}
  if not original:
    base |= {
      'architectures': [family.architectures[0]],
      'model_type': family.model_type,
      'bos_token_id': (
        tokens['bos_id'] if tokens['bos_id'] >= 0 else tokens['eos_id']
      ),
      'eos_token_id': tokens['eos_id'],
      'pad_token_id': tokens['eos_id'],
    }
    if family.has_mask_token:
      base[family.mask_key] = tokens['mask_id']
  base |= {family.keys[f]: fields[f] for f in family.keys if f in changed}
  if family.block_key and 'block_length' in changed:
    base[family.block_key] = block_length
  if 'vocab_size' in changed:
    base['vocab_size'] = fields['vocab_size']
  if 'head_dim' in changed and family.has_head_dim:
    base['head_dim'] = fields['head_dim']
  if changed & {'rope_theta', 'rope_scaling'}:
    base.pop('rope_parameters', None)
    base['rope_theta'] = fields['rope_theta']
    if fields['rope_scaling']:
      factor, low, high, context = fields['rope_scaling']
      base['rope_scaling'] = {
        'factor': factor,
        'high_freq_factor': high,
        'low_freq_factor': low,
        'original_max_position_embeddings': int(context),
        'rope_type': 'llama3',
      }
    elif family.scales_rope:
      base['rope_scaling'] = None
  if 'dtype' in changed:
    base.pop('dtype', None)
    base['torch_dtype'] = dtype
  return base
