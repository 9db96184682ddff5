"""Inputs and checks of the losses over the vocabulary, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from maskdiff.distributed import mesh

B, L, D, V = 8, 8, 16, 32
T = B * L
# Selected positions, [T] bool.
SELECTED = {
  'half': np.arange(T) % 2 == 1,
  'random': np.sin(np.arange(T) ** 2) > 0,
  'one': np.arange(T) == 37,
  'one_row': np.arange(T) // L == 5,
  'all': np.ones(T, bool),
  'none': np.zeros(T, bool),
}
MESHES = {
  'one_device': dict(fsdp=1),
  'fsdp8': dict(fsdp=8),
  'replica2_fsdp2_tensor2': dict(replica=2, fsdp=2, tensor=2),
  'fsdp2_sequence2_tensor2': dict(fsdp=2, sequence=2, tensor=2),
  'tensor8': dict(fsdp=1, tensor=8),
}


def set_mesh(sizes):
  """Returns the context of a mesh of these sizes on the first devices."""
  devices = jax.devices()[: np.prod(list(sizes.values()))]
  return jax.set_mesh(mesh.make_mesh(**sizes, devices=devices))


def example(selected='half', dtype=jnp.float32):
  """Returns hidden, head, targets and weights; no target is the last token."""
  random = np.random.default_rng(0)
  hidden = random.normal(size=(B, L, D))
  head = random.normal(size=(D, V)) / 2
  targets = random.integers(0, V - 1, (B, L))
  weights = np.where(SELECTED[selected], random.uniform(0.5, 20, T), 0)
  return (
    jnp.asarray(hidden, dtype),
    jnp.asarray(head, jnp.float32),
    jnp.asarray(targets, jnp.int32),
    jnp.asarray(weights.reshape(B, L), jnp.float32),
  )


def dense_nll(hidden, head, targets, where, exclude):
  """Returns the nll of the tokens in `where`, from all logits at once."""
  logits = jnp.einsum('bld,dv->blv', hidden, head)
  if exclude is not None:
    logits = logits.at[..., exclude].set(-jnp.inf)
  log_p = jax.nn.log_softmax(logits)
  nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
  return jnp.where(where, nll, 0)


def assert_close(actual, expected, accuracy=2e-6):
  """Compares arrays, relative to the largest entry of the expected one."""
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    a, e = (np.asarray(x, np.float32) for x in (a, e))
    atol = accuracy * max(np.abs(e).max(), 1e-6)
    np.testing.assert_allclose(a, e, rtol=0, atol=atol)


def equations(jaxpr):
  """Yields all equations of a jaxpr and its inner jaxprs."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)


def array_sizes(jaxpr):
  """Yields the sizes of all arrays of a jaxpr and its inner jaxprs."""
  for equation in equations(jaxpr):
    yield from (v.aval.size for v in equation.outvars)
