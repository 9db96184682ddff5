"""Opens Hugging Face folders as leaves, and writes them from leaves.

Opening a folder checks that it has exactly the tensors that config.json
implies, with the right shapes. Weights are read later, by slices.
hf_tokenizer.py opens the tokenizer.
"""

import functools
import os
import shutil
from typing import NamedTuple

import numpy as np

from maskdiff import config as config_lib
from maskdiff.checkpoints import manifest
from maskdiff.errors import UserError
from maskdiff.interop import families, hf_tokenizer, safetensors
from maskdiff.interop.leaves import PART_BYTES, Leaf
from maskdiff.model import transformer

# Subfolder of a converted work directory with small files of the source folder.
PUBLISHED = 'published'
MAX_SHARD_BYTES = 5 << 30
MAX_COPIED_BYTES = 64 << 20  # larger files are not copied between folders
_WEIGHTS = ('.safetensors', '.bin', '.pt', '.pth', '.h5', '.msgpack', '.gguf')
_IDS = ('mask_id', 'bos_id', 'eos_id')


class Published(NamedTuple):
  """An opened Hugging Face folder.

  Attributes:
    folder: path of the folder.
    family: families.Family.
    config: contents of config.json, a dict.
    model: dict from families.model_of.
    tensors: dict of safetensors.Tensor by published name.
    leaves: dict of Leaf by name in the parameter tree.
    notes: lines to print for the user.
  """

  folder: str
  family: families.Family
  config: dict
  model: dict
  tensors: dict
  leaves: dict
  notes: list


def open_folder(folder):
  """Opens and checks a Hugging Face folder, without reading weights.

  Returns:
    Published.

  Raises:
    UserError: the architecture is unknown or not supported; a tensor is
      missing, unexpected or has another shape; or a file is damaged.
  """
  path = os.path.join(folder, families.CONFIG)
  config = families.read_config(folder)
  family = families.detect(config, path)
  model = families.model_of(family, config, path)
  tensors = safetensors.read_folder(folder)
  opened = Published(folder, family, config, model, tensors, {}, [])
  used = set()
  for name, shape in shapes(model).items():
    stack = name.startswith('blocks/')
    layer_shape = shape[1:] if stack else shape
    layers = [
      _find(opened, published, families.published_shape(name, layer_shape))
      for published in families.names(family, name, model['layers'])
    ]
    used |= {tensor.name for tensor in layers}
    first = layers[0]
    for tensor in layers:
      if tensor.dtype != first.dtype:
        raise UserError(
          f'{tensor} is {tensor.dtype}, but {first} is {first.dtype}: layers '
          'must have one dtype'
        )
    read = functools.partial(_read, name, layers, layer_shape, stack)
    opened.leaves[name] = Leaf(shape, first.dtype, read)
  _check_unused(opened, used)
  return opened


def shapes(model):
  """Returns the shapes of a model's parameters, a dict by name.

  Args:
    model: mapping with the keys families.FIELDS.
  """
  c = transformer.TransformerConfig(
    **{field: model[field] for field in families.FIELDS},
    dtype='float32',
    remat='none',
    attention='xla',
  )
  named = manifest.flat(transformer.shapes(c))
  return {name: leaf.shape for name, leaf in named.items()}


def _find(opened, name, shape):
  """Returns the tensor with a published name, after checking its shape."""
  tensor = opened.tensors.get(name)
  config = os.path.join(opened.folder, families.CONFIG)
  if tensor is None:
    files = sorted({t.path for t in opened.tensors.values()})
    raise UserError(
      f'{name} is missing: {config} requires it, but it is not in '
      f'{", ".join(files[:3])}{", ..." * (len(files) > 3)}'
    )
  if tensor.shape != shape:
    raise UserError(
      f'{tensor} has shape {list(tensor.shape)}, but {config} implies '
      f'{list(shape)}'
    )
  return tensor


def _check_unused(opened, used):
  """Raises a UserError if a tensor is not a parameter of the model.

  A head that repeats tied embeddings is only noted.

  Args:
    opened: Published; a line may be added to its notes.
    used: set of the published names of all parameters.
  """
  family, layers = opened.family, opened.model['layers']
  derived = {p.format(n=n) for p in family.derived for n in range(layers)}
  for name in opened.tensors.keys() - used - derived:
    tensor = opened.tensors[name]
    if name != family.names['head']:  # a tied model has no head of its own
      raise UserError(
        f'{tensor} is not a parameter of a {family.architectures[0]} of '
        f'{layers} layers: remove it, or correct the number of layers in '
        f'{os.path.join(opened.folder, families.CONFIG)}'
      )
    embed = opened.tensors[family.names['embed']]
    if not _equal(tensor, embed):
      raise UserError(
        f'{tensor} differs from {embed}, though '
        f'{family.keys["tie_embeddings"]} is true in '
        f'{os.path.join(opened.folder, families.CONFIG)}: set it to false'
      )
    opened.notes.append(f'{tensor} repeats {embed.name} and is left out')


def _equal(a, b):
  if (a.shape, a.dtype) != (b.shape, b.dtype):
    return False
  rows = max(1, PART_BYTES // max(1, a.num_bytes // max(1, a.shape[0])))
  return all(
    # Compare bytes, since NaN is not equal to itself.
    a.view()[i : i + rows].tobytes() == b.view()[i : i + rows].tobytes()
    for i in range(0, a.shape[0], rows)
  )


def _read(name, tensors, shape, stack, index):
  """Reads a slice of a parameter; see Leaf.read.

  Args:
    name: name of the parameter.
    tensors: list of safetensors.Tensor, one per layer for a stack, else one.
    shape: shape of one tensor in the parameter tree, without a layer axis.
    stack: whether the parameter has a layer axis.
    index: tuple of slices.
  """
  view = lambda tensor: families.from_published(name, tensor.view(), shape)
  if not stack:
    return view(tensors[0])[index]
  layers = tensors[index[0]]
  out = None
  for i, tensor in enumerate(layers):
    part = view(tensor)[index[1:]]
    if out is None:
      out = np.empty((len(layers), *part.shape), part.dtype)
    out[i] = part
  return out


def run_config(published, tokenizer):
  """Returns the ConfigDict of a run with a folder's model.

  Args:
    published: Published.
    tokenizer: from hf_tokenizer.open_tokenizer, or None.

  Raises:
    UserError: the config is not valid, for example its token ids.
  """
  c = config_lib.default()
  fill(c, published, tokenizer)
  c.data.length = published.model['length']
  compute = published.model['dtype']
  c.model.dtype = 'bfloat16' if compute == 'bfloat16' else 'float32'
  c.objective.name = published.family.objective
  # Published losses and samplers do not exclude the mask token.
  c.objective.predict_mask = True
  config_lib.validate(c)
  return c


def fill(c, published, tokenizer):
  """Copies the model, token ids and tokenizer of a folder into a config.

  Args:
    c: ConfigDict, changed in place.
    published: Published.
    tokenizer: from hf_tokenizer.open_tokenizer, or None.
  """
  for field in (*families.FIELDS, 'predict_next'):
    c.model[field] = published.model[field]
  if tokenizer is not None:
    c.tokens.update({name: getattr(tokenizer, name) for name in _IDS})
    c.data.tokenizer = tokenizer.path
    return
  last = published.model['vocab_size'] - 1
  mask = published.config.get('mask_token_id')
  eos = hf_tokenizer.token_id(published.config, 'eos_token_id', 0)
  c.tokens.update(
    mask_id=last if mask is None else mask,
    eos_id=eos,
    bos_id=hf_tokenizer.token_id(published.config, 'bos_token_id', eos),
  )


def copy_published_files(source, target, leave_out=()):
  """Copies the small files of a folder, except weights and hidden files.

  Examples are chat templates and generation configs. Files above
  MAX_COPIED_BYTES are not copied.

  Args:
    source: folder.
    target: folder, created if it does not exist.
    leave_out: names of files that are not copied.

  Raises:
    UserError: a file cannot be written.
  """
  with safetensors.writing(target):
    os.makedirs(target, exist_ok=True)
    for entry in sorted(os.scandir(source), key=lambda e: e.name):
      if (
        entry.is_file()
        and not entry.name.startswith('.')
        and entry.name not in leave_out
        and not entry.name.endswith((*_WEIGHTS, '.index.json'))
        and entry.stat().st_size <= MAX_COPIED_BYTES
      ):
        shutil.copyfile(entry.path, os.path.join(target, entry.name))


def write_weights(folder, family, leaves, dtype=None, max_bytes=None):
  """Writes leaves as safetensors under their published names.

  Args:
    folder: an existing folder.
    family: families.Family.
    leaves: dict of Leaf by name in the parameter tree.
    dtype: numpy dtype of the written tensors; default: as stored.
    max_bytes: largest file; default: MAX_SHARD_BYTES.

  Raises:
    UserError: a file cannot be written.
  """
  tensors = []
  for name, leaf in leaves.items():
    stack = name.startswith('blocks/')
    layer_shape = leaf.shape[1:] if stack else leaf.shape
    shape = families.published_shape(name, layer_shape)
    to = np.dtype(dtype or leaf.dtype)
    layers = leaf.shape[0] if stack else 1
    for n, published in enumerate(families.names(family, name, layers)):
      parts = functools.partial(_published_parts, name, leaf, stack, n, to)
      tensors.append(safetensors.New(published, to, shape, parts))
  safetensors.write_folder(folder, tensors, max_bytes or MAX_SHARD_BYTES)


def _published_parts(name, leaf, stack, n, dtype):
  """Yields a published tensor in parts of at most PART_BYTES.

  Parts are cut along the first axis of the published tensor. For a matrix, this
  axis is the first output axis of the leaf.

  Args:
    name: name of the parameter.
    leaf: Leaf.
    stack: whether the leaf has a layer axis.
    n: index of the layer.
    dtype: numpy dtype of the parts.
  """
  layer = (slice(n, n + 1),) if stack else ()
  axes = leaf.shape[len(layer) :]
  inputs = families.LINEAR.get(name)
  cut = inputs or 0  # the first output axis
  size = np.prod(axes, dtype=np.int64) * leaf.dtype.itemsize
  rows = max(1, int(axes[cut] * PART_BYTES // max(1, size)))
  for start in range(0, axes[cut], rows):
    index = [slice(None)] * len(axes)
    index[cut] = slice(start, start + rows)
    part = leaf.read((*layer, *index))
    part = families.to_published(name, part[0] if stack else part)
    yield np.ascontiguousarray(part, dtype)
