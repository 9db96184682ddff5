"""Opens Hugging Face folders as leaves, and writes them from leaves.

Opening a folder checks that it has exactly the tensors that config.json
implies, with the right shapes. Weights are read later, by slices.
hf_tokenizer.py opens the tokenizer.
"""

import functools
import json
import os
from typing import NamedTuple

import numpy as np

from maskdiff.checkpoints import manifest
from maskdiff.data import tokenizer_files
from maskdiff.errors import UserError, inline
from maskdiff.files import atomic, reading
from maskdiff.files import folder as folder_lib
from maskdiff.interop import (
  config_json,
  config_keys,
  families,
  safetensors,
  tensor_layout,
)
from maskdiff.interop.leaves import PART_BYTES, Leaf
from maskdiff.model import transformer

# Subfolder of a converted work directory with small files of the source folder.
PUBLISHED = 'published'
GENERATION = 'generation_config.json'  # with the tokens that end an answer
MAX_SHARD_BYTES = 5 << 30
MAX_COPIED_BYTES = 64 << 20  # larger files are not copied between folders
MAX_COPIED_TOTAL = 1 << 30  # bytes of all copied files
_WEIGHTS = ('.safetensors', '.bin', '.pt', '.pth', '.h5', '.msgpack', '.gguf')


class Published(NamedTuple):
  """An opened Hugging Face folder.

  Attributes:
    folder: path of the folder.
    family: families.Family.
    config: contents of config.json, a dict. An absent mask_token_id has the
      default of the published class, if that is an id of the model.
    model: dict from config_json.model_of.
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
      missing, unexpected or has another shape; a file is damaged; or a file
      that may be read or copied is a link to a file outside the folder.
  """
  folder = os.fspath(folder)
  path = inline(os.path.join(folder, config_json.CONFIG))
  config = config_json.read_config(folder)
  family = config_json.detect(config, path)
  model = config_json.model_of(family, config, path)
  mask = config_keys.DEFAULTS[family.name].get('mask_token_id')
  if mask is not None and mask < model['vocab_size']:
    config = {'mask_token_id': mask, **config}
  if family.mask_key in config:
    config = {**config, 'mask_token_id': config[family.mask_key]}
  folder_lib.check_links(folder, _small_files(folder))
  tensors = safetensors.read_folder(folder)
  opened = Published(folder, family, config, model, tensors, {}, [])
  used = set()
  for name, shape in shapes(model).items():
    stack = name.startswith('blocks/')
    layer_shape = shape[1:] if stack else shape
    layers = [
      _find(opened, published, tensor_layout.published_shape(name, layer_shape))
      for published in tensor_layout.names(family, name, model['layers'])
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


def check_leaves(leaves, model, where):
  """Raises a UserError unless leaves are the parameters of a model.

  Args:
    leaves: dict of Leaf by name.
    model: mapping with the keys families.FIELDS.
    where: path of the leaves, for the error message.
  """
  expected, found = shapes(model), {n: x.shape for n, x in leaves.items()}
  for name in sorted(expected.keys() | found.keys()):
    if expected.get(name) != found.get(name):
      raise UserError(
        f'{where!r} has the shape {found.get(name)} for {inline(name)}, but '
        f'the config of its model needs {expected.get(name)}: convert again'
      )


def _find(opened, name, shape):
  """Returns the tensor with a published name, after checking its shape."""
  tensor = opened.tensors.get(name)
  config = inline(os.path.join(opened.folder, config_json.CONFIG))
  if tensor is None:
    files = sorted({t.path for t in opened.tensors.values()})
    places = ', '.join(files[:3]) or opened.folder
    raise UserError(
      f'{name} is missing: {config} requires it, but it is not in '
      f'{inline(places)}{", ..." * (len(files) > 3)}'
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
  config = inline(os.path.join(opened.folder, config_json.CONFIG))
  derived = {p.format(n=n) for p in family.derived for n in range(layers)}
  for name in opened.tensors.keys() - used - derived:
    tensor = opened.tensors[name]
    if name != family.names['head']:  # a tied model has no head of its own
      raise UserError(
        f'{tensor} is not a parameter of a {family.architectures[0]} of '
        f'{layers} layers: remove it, or correct the number of layers in '
        f'{config}'
      )
    embed = opened.tensors[family.names['embed']]
    if not _equal(tensor, embed):
      raise UserError(
        f'{tensor} differs from {embed}, though '
        f'{family.keys["tie_embeddings"]} is true in {config}: set it to false'
      )
    opened.notes.append(
      f'{tensor} repeats {inline(embed.name)} and is left out'
    )


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
  view = lambda tensor: tensor_layout.from_published(name, tensor.view(), shape)
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


def copy_published_files(source, target, leave_out=(), subfolder=''):
  """Copies the small files of a folder, except weights and hidden files.

  Examples are chat templates and generation configs. Files above
  MAX_COPIED_BYTES are not copied. A copy has at most the permissions of its
  source.

  Args:
    source: folder.
    target: folder, created if it does not exist.
    leave_out: names of files that are not copied.
    subfolder: the folder within `source` whose files are copied; it must not be
      a link.

  Raises:
    UserError: a file cannot be read or written, or is a link to a file outside
      the folder; see files.folder. Or the files have more than MAX_COPIED_TOTAL
      bytes.
  """
  names, total = _small_files(source, subfolder), 0
  with safetensors.writing(target):
    os.makedirs(target, exist_ok=True)
  for name in names:
    if name in leave_out:
      continue
    with folder_lib.open_file(source, os.path.join(subfolder, name)) as file:
      state = os.fstat(file.fileno())
      if state.st_size > MAX_COPIED_BYTES:
        continue
      path = os.path.join(source, subfolder, name)
      content = reading.read_opened(file, path, MAX_COPIED_BYTES)
    total += len(content)
    if total > MAX_COPIED_TOTAL:
      raise UserError(
        f'{os.path.join(source, subfolder)!r} has more than '
        f'{MAX_COPIED_TOTAL:,} bytes of files that are not weights: remove '
        'those that do not belong to the model'
      )
    copy = os.path.join(target, name)
    with safetensors.writing(copy):
      atomic.write_if_changed(copy, content, state.st_mode & 0o666)


def copy_chat_files(workdir, folder):
  """Copies the chat template and the end tokens of a run to an export.

  Other entries of a generation_config.json that the folder has are kept.

  Args:
    workdir: work directory; without a template, nothing is copied.
    folder: an existing folder.

  Raises:
    UserError: a file cannot be read or written.
  """
  exists = lambda parent, name: os.path.exists(os.path.join(parent, name))
  template = tokenizer_files.CHAT_TEMPLATE
  if not exists(workdir, template):
    return
  files = {template: folder_lib.read_bytes(workdir, template)}
  if exists(workdir, GENERATION):
    values = {}
    for parent in (folder, workdir):
      found = exists(parent, GENERATION) and folder_lib.read_json(
        parent, GENERATION
      )
      values |= found if isinstance(found, dict) else {}
    files[GENERATION] = (json.dumps(values, indent=2) + '\n').encode()
  for name, content in files.items():
    path = os.path.join(folder, name)
    with safetensors.writing(path):
      atomic.write(path, content)


def _small_files(folder, subfolder=''):
  """Returns the names of files that are no weights, indices or hidden files."""
  return [
    name
    for name in folder_lib.file_names(folder, subfolder)
    if not name.endswith((*_WEIGHTS, '.index.json'))
  ]


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
    shape = tensor_layout.published_shape(name, layer_shape)
    to = np.dtype(dtype or leaf.dtype)
    layers = leaf.shape[0] if stack else 1
    for n, published in enumerate(tensor_layout.names(family, name, layers)):
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
  inputs = tensor_layout.LINEAR.get(name)
  cut = inputs or 0  # the first output axis
  size = np.prod(axes, dtype=np.int64) * leaf.dtype.itemsize
  rows = max(1, int(axes[cut] * PART_BYTES // max(1, size)))
  for start in range(0, axes[cut], rows):
    index = [slice(None)] * len(axes)
    index[cut] = slice(start, start + rows)
    part = leaf.read((*layer, *index))
    part = tensor_layout.to_published(name, part[0] if stack else part)
    yield np.ascontiguousarray(part, dtype)
