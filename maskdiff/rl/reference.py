"""The reference network, from which divergences are computed."""

import functools
import hashlib

import jax

from maskdiff.checkpoints.fingerprint import fingerprint
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import leaves, load
from maskdiff.model import transformer


def is_base(config):
  """Returns whether the reference is the base of the policy's adapters."""
  return config.lora.rank > 0 and not config.policy.reference


def load_reference(config, mesh):
  """Loads the parameters of the reference; None if they are the base.

  The base of adapters does not change, so it is no second copy.

  Args:
    config: ConfigDict.
    mesh: device mesh.

  Raises:
    UserError: the reference has another architecture, or cannot be loaded.
  """
  if is_base(config):
    return None
  path = config.policy.reference
  changed = config.copy_and_resolve_references()
  changed.lora.rank = 0
  if path:
    changed.init_from, changed.init_from_ema = path, False
  try:
    params = load.warm_start(changed, mesh)
  except UserError as error:
    raise UserError(f'the reference of policy optimization: {error}') from error
  dtype = config.policy.reference_dtype
  c = transformer.from_config(changed)
  shardings = mesh_lib.param_shardings(
    mesh, transformer.axes(c), transformer.shapes(c)
  )
  cast = functools.partial(leaves.cast, dtype=dtype)
  return jax.jit(cast, out_shardings=shardings, donate_argnums=0)(params)


def digest(params):
  """Returns 16 hex digits of the values of a parameter tree."""
  sums = jax.jit(lambda tree: jax.tree.map(fingerprint, tree))(params)
  text = str([int(x) for x in jax.tree.leaves(sums)])
  return hashlib.sha256(text.encode()).hexdigest()[:16]
