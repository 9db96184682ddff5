"""Parameters under published names: `to_published`, `from_published`."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from maskdiff.checkpoints import manifest
from maskdiff.errors import UserError, suggestion
from maskdiff.interop import convert, families, hf, tensor_layout


def to_published(model, family=None):
  """Returns the parameters under the names of a published architecture.

  Args:
    model: Model.
    family: name of the family, such as llada; default: the first that fits the
      model.

  Returns:
    dict from names of tensors, as in safetensors files of the family, to NumPy
    arrays of the published shapes, in the dtype of the parameters.

  Raises:
    UserError: the model does not fit the family, or any family.
  """
  family = _family(model, family)
  tensors = {}
  for name, array in manifest.flat(jax.device_get(model.params)).items():
    stack = name.startswith('blocks/')
    layers = array if stack else [array]
    for published, layer in zip(
      tensor_layout.names(family, name, len(layers)), layers, strict=True
    ):
      tensors[published] = np.ascontiguousarray(
        tensor_layout.to_published(name, layer)
      )
  return tensors


def from_published(model, tensors, family=None):
  """Returns the model with the parameters of published tensors.

  Args:
    model: Model, which determines shapes, dtypes and devices.
    tensors: dict from published names to arrays, as `to_published` returns it.
    family: see `to_published`.

  Raises:
    UserError: a tensor is missing, unknown or has another shape; or see
      `to_published`.
  """
  if not isinstance(tensors, Mapping):
    raise UserError('tensors: give a dict from published names to arrays')
  family, left = _family(model, family), dict(tensors)
  params = {}
  old = manifest.flat(model.params)
  for name, shape in hf.shapes(model.config.model).items():
    stack = name.startswith('blocks/')
    layer_shape = shape[1:] if stack else shape
    layers = [
      tensor_layout.from_published(
        name, _take(left, published, name, layer_shape), layer_shape
      )
      for published in tensor_layout.names(family, name, shape[0])
    ]
    array = np.stack(layers) if stack else layers[0]
    params[name] = jax.device_put(
      np.asarray(array, old[name].dtype), old[name].sharding
    )
  _check_left(model, family, left, tensors)
  return dataclasses.replace(model, params=manifest.nest(params))


def _take(left, published, name, shape):
  """Removes a tensor from a dict and returns it, after a check of its shape."""
  if published not in left:
    raise UserError(f'{published} is missing' + suggestion(published, left))
  tensor = np.asarray(left.pop(published))
  expected = tensor_layout.published_shape(name, shape)
  if tensor.shape != expected:
    raise UserError(
      f'{published} has shape {list(tensor.shape)}, but the model needs '
      f'{list(expected)}'
    )
  return tensor


def _check_left(model, family, left, tensors):
  """Raises a UserError if a tensor is not a parameter of the model.

  Constants are ignored, and so is a head that repeats tied embeddings.
  """
  layers = model.config.model.layers
  derived = {p.format(n=n) for p in family.derived for n in range(layers)}
  head, embed = (family.names[name] for name in ('head', 'embed'))
  for name in left.keys() - derived:
    if name == head and np.array_equal(left[head], tensors[embed]):
      continue
    raise UserError(
      f'{name} is not a parameter of this model as {family.architectures[0]}: '
      'remove it'
    )


def _family(model, name):
  if name is not None and name not in families.BY_NAME:
    raise UserError(
      f'family={name!r}: choose one of {", ".join(families.BY_NAME)}'
      + suggestion(name, families.BY_NAME)
    )
  return convert.choose_family(model.config, None, name)
