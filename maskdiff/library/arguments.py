"""Checks of single arguments: texts, token ids, seeds, keys, arrays.

Checks read values on the host. Inside jit, where arguments may be traced
arrays, only their shapes and dtypes are checked.
"""

import numbers

import jax
import numpy as np

from maskdiff.errors import UserError, one_line


def ids_of(model, text, name='prompt'):
  """Returns the token ids of a text, or a checked list of token ids.

  Args:
    model: Model.
    text: str; or a list or array of int.
    name: name of the argument, for messages.

  Raises:
    UserError: the model has no tokenizer for a text, the text is not Unicode,
      or an id is not an integer in the vocabulary.
  """
  if isinstance(text, str):
    if model.tokenizer is None:
      raise UserError(
        f'{name} {text[:40]!r} is a text, but the model was loaded without a '
        'tokenizer: give token ids'
      )
    try:
      return model.tokenizer.encode(text)
    except ValueError as error:
      raise UserError(f'{name} {text[:40]!r}: {error}') from error
  ids = array_of_ids(text, name, 1)
  check_ids(model, ids, name)
  return ids.tolist()


def texts_of(texts, name='prompts'):
  """Returns a list of texts or token lists, after a check that it is a list.

  Raises:
    UserError: it is one text, a number or not iterable, or it is empty.
  """
  if isinstance(texts, (str, bytes)) or not hasattr(texts, '__iter__'):
    raise UserError(f'{name}={shown(texts)}: give a list, one element per row')
  texts = list(texts)
  if not texts:
    raise UserError(f'{name} is empty: give at least one element')
  return texts


def seeds_of(seed, size):
  """Returns one seed per row.

  Args:
    seed: int, the seed of the first row, which grows by 1 per row; or a list or
      array of `size` int.
    size: number of rows.

  Raises:
    UserError: a seed is not an integer in [0, 2^32), or the list has another
      length.
  """
  if getattr(getattr(seed, 'dtype', None), 'kind', None) in ('i', 'u'):
    seed = np.asarray(seed).tolist()
  seeds = [seed + i for i in range(size)] if _is_whole(seed) else seed
  if not isinstance(seeds, (list, tuple, range)) or len(seeds) != size:
    raise UserError(
      f'seed={shown(seed)}: give an integer, or a list of {size}, one per row'
    )
  for value in seeds:
    if not _is_whole(value) or not 0 <= value < 2**32:
      raise UserError(f'seed={shown(value)} must be an integer in [0, {2**32})')
  return [int(value) for value in seeds]


def key_of(key):
  """Returns a PRNG key; an integer is the seed of the key.

  Raises:
    UserError: it is neither.
  """
  if _is_whole(key) and 0 <= key < 2**32:
    return jax.random.key(key)
  is_key = isinstance(key, jax.Array) and jax.numpy.issubdtype(
    key.dtype, jax.dtypes.prng_key
  )
  if not is_key or key.ndim:
    raise UserError(
      f'key={shown(key)}: give one key of jax.random.key, or an integer in '
      f'[0, {2**32})'
    )
  return key


def check_whole(**values):
  """Raises a UserError if a value is not an integer of at least 1."""
  for name, value in values.items():
    if not _is_whole(value) or value < 1:
      raise UserError(f'{name}={shown(value)} must be an integer of at least 1')


def checked(name, x, shape, kind):
  """Returns an array after a check of its shape and the kind of its dtype."""
  try:
    x = x if isinstance(x, jax.Array) else np.asarray(x)
  except ValueError as error:  # lists of unequal lengths
    raise UserError(f'{name}: give values of shape {list(shape)}') from error
  if x.shape != tuple(shape) or x.dtype.kind not in kind:
    expected = {'b': 'bool', 'i': 'int', 'f': 'float'}[kind[0]]
    raise UserError(
      f'{name} is {x.dtype} of shape {list(x.shape)}: give {expected} of shape '
      f'{list(shape)}'
    )
  return x


def check_in_unit(name, x, used=True):
  """Raises a UserError if a used value of an array is outside of [0, 1)."""
  if traced(x) or traced(used):
    return
  x = np.asarray(x)
  outside = x[~((x >= 0) & (x < 1)) & used]  # also NaN
  if outside.size:
    raise UserError(f'{name} has the value {outside[0]}: give values in [0, 1)')


def check_ids(model, ids, name):
  """Raises a UserError if an id of an array is not in the vocabulary."""
  vocab_size = model.config.model.vocab_size
  outside = ids[(ids < 0) | (ids >= vocab_size)]
  if outside.size:
    raise UserError(
      f'{name}: token id {outside[0]} is outside of the vocabulary, '
      f'[0, {vocab_size})'
    )


def array_of_ids(x, name, ndim):
  """Returns an array of integers of any size with `ndim` axes."""
  try:
    x = x if isinstance(x, jax.Array) else np.asarray(x)
  except ValueError as error:  # lists of unequal lengths
    raise UserError(f'{name}: token ids must be integers') from error
  if x.ndim == ndim == 1 and not x.size:
    return np.zeros(0, np.int32)
  if x.ndim != ndim or x.dtype.kind not in 'iu':
    raise UserError(
      f'{name} is {x.dtype} of shape {list(x.shape)}: token ids must be '
      f'integers with {ndim} {"axis" if ndim == 1 else "axes"}'
    )
  return x if traced(x) else np.asarray(x)


def traced(x):
  """Returns whether an array is traced by JAX, so that it has no values."""
  return isinstance(x, jax.core.Tracer)


def python_value(value):
  """Returns a NumPy or JAX scalar as a Python value; others unchanged."""
  is_scalar = hasattr(value, 'item') and not getattr(value, 'ndim', 0)
  return value.item() if is_scalar else value


def shown(value):
  """Returns a value as it stands in a message: one line, shortened."""
  return one_line(repr(value), 100)


def _is_whole(x):
  return isinstance(x, numbers.Integral) and not isinstance(x, bool)
