"""Folders in Hugging Face's form: opened as leaves, and written from leaves.

Everything is checked when a folder is opened: the tensors that config.json asks
for are all there and no others, each with its shape, and the tokenizer goes
with them. Weights are read later, by slices.
"""

import functools
import os
import shutil
from typing import NamedTuple

import numpy as np

from maskdiff import config as config_lib
from maskdiff.checkpoints import manifest
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.errors import UserError
from maskdiff.interop import families, safetensors
from maskdiff.interop.leaves import PART_BYTES, Leaf
from maskdiff.model import transformer

PUBLISHED = 'published'  # the folder in a work directory
MAX_SHARD_BYTES = 5 << 30
# What is carried along are all files that are no weights, up to this size.
MAX_CARRIED_BYTES = 64 << 20
_WEIGHTS = ('.safetensors', '.bin', '.pt', '.pth', '.h5', '.msgpack', '.gguf')
# Files a tokenizer consists of; one with none of them has no tokenizer.
TOKENIZERS = ('tokenizer.json', 'tokenizer.model')
_IDS = ('mask_id', 'bos_id', 'eos_id')


class Published(NamedTuple):
  """An opened folder.

  Attributes:
    folder: path.
    family: families.Family.
    config: its config.json.
    model: from families.model_of.
    tensors: dict of safetensors.Tensor by published name.
    leaves: dict of Leaf by name here.
    notes: lines for the user.
  """

  folder: str
  family: families.Family
  config: dict
  model: dict
  tensors: dict
  leaves: dict
  notes: list


def open_folder(folder):
  """Opens and checks a folder, without reading weights.

  Raises:
    UserError: the architecture is unknown or not computed by this package, a
      tensor is missing, unexpected or of another shape, or a file is damaged.
  """
  path = os.path.join(folder, families.CONFIG)
  config = families.read_config(folder)
  family = families.detect(config, path)
  model = families.model_of(family, config, path)
  tensors = safetensors.read_folder(folder)
  found = Published(folder, family, config, model, tensors, {}, [])
  used = set()
  for name, shape in shapes(model).items():
    stack = name.startswith('blocks/')
    layer = shape[1:] if stack else shape
    own = [
      _find(found, published, families.published_shape(name, layer))
      for published in families.names(family, name, model['layers'])
    ]
    used |= {tensor.name for tensor in own}
    for tensor in own:
      if tensor.dtype != own[0].dtype:
        raise UserError(
          f'{tensor} is {tensor.dtype}, but {own[0]} is {own[0].dtype}: layers '
          'must have one dtype'
        )
    read = functools.partial(_read, name, own, layer, stack)
    found.leaves[name] = Leaf(shape, own[0].dtype, read)
  _check_rest(found, used)
  return found


def shapes(model):
  """Shapes of a model's parameters, a dict by name.

  Args:
    model: mapping with families.FIELDS.
  """
  c = transformer.TransformerConfig(
    **{field: model[field] for field in families.FIELDS},
    dtype='float32',
    remat='none',
    attention='xla',
  )
  named = manifest.flat(transformer.shapes(c))
  return {name: leaf.shape for name, leaf in named.items()}


def _find(found, name, shape):
  """The tensor of a name, if its shape is the one that the config implies."""
  tensor = found.tensors.get(name)
  config = os.path.join(found.folder, families.CONFIG)
  if tensor is None:
    files = sorted({t.path for t in found.tensors.values()})
    raise UserError(
      f'{name} is missing: it is not in {", ".join(files[:3])}'
      f'{", ..." * (len(files) > 3)}, and {config} asks for it'
    )
  if tensor.shape != shape:
    raise UserError(
      f'{tensor} has shape {list(tensor.shape)}, but {config} makes it '
      f'{list(shape)}'
    )
  return tensor


def _check_rest(found, used):
  """Refuses tensors that the model has no place for."""
  family, layers = found.family, found.model['layers']
  derived = {p.format(n=n) for p in family.derived for n in range(layers)}
  for name in found.tensors.keys() - used - derived:
    tensor = found.tensors[name]
    if name != family.names['head']:  # which a tied model does without
      raise UserError(
        f'{tensor} has no place in a {family.architectures[0]} of {layers} '
        'layers: remove it, or correct the number of layers in '
        f'{os.path.join(found.folder, families.CONFIG)}'
      )
    embed = found.tensors[family.names['embed']]
    if not _equal(tensor, embed):
      raise UserError(
        f'{tensor} differs from {embed}, though '
        f'{family.keys["tie_embeddings"]} is true in '
        f'{os.path.join(found.folder, families.CONFIG)}: set it to false'
      )
    found.notes.append(f'{tensor} repeats {embed.name} and is left out')


def _equal(a, b):
  if (a.shape, a.dtype) != (b.shape, b.dtype):
    return False
  rows = max(1, PART_BYTES // max(1, a.size // max(1, a.shape[0])))
  return all(
    # As bytes: NaN is like itself.
    a.view()[i : i + rows].tobytes() == b.view()[i : i + rows].tobytes()
    for i in range(0, a.shape[0], rows)
  )


def _read(name, tensors, shape, stack, index):
  """Reads part of a parameter; see Leaf.read.

  Args:
    name: of the parameter.
    tensors: its safetensors.Tensor, one for each layer if it is a stack.
    shape: of one of them, here.
    stack: whether it has an axis of layers.
    index: tuple of slices.
  """
  ours = lambda tensor: families.from_published(name, tensor.view(), shape)
  if not stack:
    return ours(tensors[0])[index]
  own = tensors[index[0]]
  out = None
  for i, tensor in enumerate(own):
    part = ours(tensor)[index[1:]]
    if out is None:
      out = np.empty((len(own), *part.shape), part.dtype)
    out[i] = part
  return out


def open_tokenizer(published, mask_id=None):
  """The tokenizer of a folder, with the ids of its config.json.

  Args:
    published: Published.
    mask_id: to use in place of the one that it has or lacks.

  Returns:
    data.tokenizer.Tokenizer with all ids; None if the folder has none.

  Raises:
    UserError: it is of a kind that cannot be read, or is not that of the model.
  """
  folder = published.folder
  if not any(os.path.exists(os.path.join(folder, n)) for n in TOKENIZERS):
    return None
  tokenizer = tokenizer_lib.load(folder)
  config = os.path.join(folder, families.CONFIG)
  embed = published.tensors[published.family.names['embed']]
  if tokenizer.vocab_size > embed.shape[0]:
    raise UserError(
      f'{tokenizer.path} has {tokenizer.vocab_size} ids, but {embed} has '
      f'{embed.shape[0]} rows: it is not the tokenizer of this model'
    )
  ids = {
    name: _id(published.config, name.replace('_id', '_token_id'), known)
    for name, known in (
      ('bos_id', tokenizer.bos_id),
      ('eos_id', tokenizer.eos_id),
    )
  }
  for name, i in ids.items():
    if i is not None and not (
      i < tokenizer.vocab_size and not tokenizer.pieces[i]
    ):
      raise UserError(
        f'{config}: {name.replace("_id", "_token_id")}={i} is no special token '
        f'of {tokenizer.path}, which has {tokenizer.vocab_size} ids: it is not '
        'the tokenizer of this model'
      )
  if ids['bos_id'] is None:
    ids['bos_id'] = ids['eos_id']
  mask = published.config.get('mask_token_id') if mask_id is None else mask_id
  mask = tokenizer.mask_id if mask is None else mask
  if mask is None:
    mask = _spare_id(tokenizer, embed.shape[0], ids, config)
  if not 0 <= mask < embed.shape[0]:
    raise UserError(f'mask_id={mask} is not in {embed}, of {embed.shape[0]}')
  return tokenizer_lib.with_ids(tokenizer, mask_id=mask, **ids)


def _id(config, key, preferred):
  """A token id of config.json, which may list several."""
  value = config.get(key)
  if isinstance(value, list):
    return preferred if preferred in value else next(iter(value), preferred)
  return preferred if value is None else value


def _spare_id(tokenizer, rows, ids, config):
  """An id that no text uses, for a network that never had a mask."""
  if rows > tokenizer.vocab_size:
    return tokenizer.vocab_size
  used = {tokenizer.pad_id, *ids.values()}
  free = [i for i, piece in enumerate(tokenizer.pieces) if not piece]
  free = [i for i in free if i not in used]
  if not free:
    raise UserError(
      f'{config} has no mask_token_id, and {tokenizer.path} no special token '
      'to spare for it: add a row to the embedding'
    )
  return free[-1]


def run_config(published, tokenizer):
  """The config of a run that has this model.

  Args:
    published: Published.
    tokenizer: from `open_tokenizer`, or None.

  Raises:
    UserError: without a tokenizer, config.json lacks an id.
  """
  c = config_lib.default()
  fill(c, published, tokenizer)
  c.data.length = published.model['length']
  compute = published.model['dtype']
  c.model.dtype = 'bfloat16' if compute == 'bfloat16' else 'float32'
  c.objective.name = published.family.objective
  # As in the published losses and samplers.
  c.objective.predict_mask = True
  config_lib.validate(c)
  return c


def fill(c, published, tokenizer):
  """Puts model, token ids and tokenizer of a folder into a config.

  Args:
    c: ConfigDict, changed in place.
    published: Published.
    tokenizer: from `open_tokenizer`, or None.
  """
  for field in (*families.FIELDS, 'predict_next'):
    c.model[field] = published.model[field]
  if tokenizer is not None:
    c.tokens.update({name: getattr(tokenizer, name) for name in _IDS})
    c.data.tokenizer = tokenizer.path
    return
  last = published.model['vocab_size'] - 1
  mask = published.config.get('mask_token_id')
  eos = _id(published.config, 'eos_token_id', 0)
  c.tokens.update(
    mask_id=last if mask is None else mask,
    eos_id=eos,
    bos_id=_id(published.config, 'bos_token_id', eos),
  )


def copy_published_files(source, target, leave_out=()):
  """Copies the files of a folder that are no weights, such as chat templates.

  Args:
    source: folder.
    target: folder, made if it is not there.
    leave_out: names of files.
  """
  with safetensors.writing(target):
    os.makedirs(target, exist_ok=True)
    for entry in sorted(os.scandir(source), key=lambda e: e.name):
      if (
        entry.is_file()
        and not entry.name.startswith('.')
        and entry.name not in leave_out
        and not entry.name.endswith((*_WEIGHTS, '.index.json'))
        and entry.stat().st_size <= MAX_CARRIED_BYTES
      ):
        shutil.copyfile(entry.path, os.path.join(target, entry.name))


def write_weights(folder, family, leaves, dtype=None, max_bytes=None):
  """Writes leaves under their published names, a layer at a time.

  Args:
    folder: that is there.
    family: families.Family.
    leaves: dict of Leaf by name here.
    dtype: numpy dtype of what is written, by default as stored.
    max_bytes: of a file, by default MAX_SHARD_BYTES.

  Raises:
    UserError: it cannot be written.
  """
  tensors = []
  for name, leaf in leaves.items():
    stack = name.startswith('blocks/')
    layer = leaf.shape[1:] if stack else leaf.shape
    shape = families.published_shape(name, layer)
    to = np.dtype(dtype or leaf.dtype)
    layers = leaf.shape[0] if stack else 1
    for n, published in enumerate(families.names(family, name, layers)):
      parts = functools.partial(_published_parts, name, leaf, stack, n, to)
      tensors.append(safetensors.New(published, to, shape, parts))
  safetensors.write_folder(folder, tensors, max_bytes or MAX_SHARD_BYTES)


def _published_parts(name, leaf, stack, n, dtype):
  """Yields a tensor by parts along the first axis that it has when published.

  That is the last axis here of a matrix, cut in parts of bounded size.
  """
  before = (slice(n, n + 1),) if stack else ()
  axes = leaf.shape[len(before) :]
  inputs = families.LINEAR.get(name)
  cut = 0 if inputs is None else inputs  # the first axis of the outputs
  size = np.prod(axes, dtype=np.int64) * leaf.dtype.itemsize
  rows = max(1, int(axes[cut] * PART_BYTES // max(1, size)))
  for start in range(0, axes[cut], rows):
    index = [slice(None)] * len(axes)
    index[cut] = slice(start, start + rows)
    part = leaf.read((*before, *index))
    part = families.to_published(name, part[0] if stack else part)
    yield np.ascontiguousarray(part, dtype)
