"""Who may attend to whom: four integers per position and one rule.

Each position carries
  doc    the document it belongs to; positions of different documents never
         see each other. -1 is padding.
  pos    its place, which is also its rotary position. Only differences and
         order within a document matter, so it may count from anywhere.
  block  the noisy block it belongs to, or -1 if it is clean.
  reach  it sees clean positions before this one.

A query sees a key of its own document when the key is clean and
key.pos < query.reach, or noisy and key.block == query.block. The constructors
below are the regimes in use; `regime` tells attention, which may use a faster
representation of the same rule, what a constructor has promised.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

BIDIRECTIONAL = 'bidirectional'  # sees all of its document
CAUSAL = 'causal'  # sees its document up to and including itself
GENERAL = 'general'  # nothing promised: evaluate the rule


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['doc', 'pos', 'block', 'reach'],
  meta_fields=['regime'],
)
@dataclasses.dataclass(frozen=True)
class Labels:
  """The four integers of each position, [B, L] int32 each."""

  doc: jax.Array
  pos: jax.Array
  block: jax.Array
  reach: jax.Array
  regime: str = GENERAL


def visible(query, key):
  """Evaluates the rule.

  Args:
    query: Labels with [B, L] fields.
    key: Labels with [B, S] fields.

  Returns:
    [B, L, S] bool, True where the query sees the key.
  """
  q = jax.tree.map(lambda x: x[:, :, None], query)
  k = jax.tree.map(lambda x: x[:, None, :], key)
  clean = (k.block < 0) & (k.pos < q.reach)
  noisy = (k.block >= 0) & (k.block == q.block)
  return (q.doc == k.doc) & (clean | noisy)


def positions(batch, length):
  """Returns [B, L] int32: 0..L-1 in every row."""
  return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def documents(tokens, eos_id):
  """The document of each token of rows in which every document ends with eos.

  Args:
    tokens: [B, L] int32, clean.
    eos_id: belongs to the document that it ends.

  Returns:
    [B, L] int32: how many eos stand before the token in its row.
  """
  eos = (tokens == eos_id).astype(jnp.int32)
  return jnp.cumsum(eos, axis=1) - eos


def bidirectional(valid, doc=0):
  """Valid positions of a document all see each other (masked diffusion).

  Args:
    valid: [B, L] bool, False on padding, which is a document of its own.
    doc: [B, L] int32 >= 0, the document of each position; a number when the
      row is a single one.
  """
  zero = jnp.zeros(valid.shape, jnp.int32)
  return Labels(
    doc=jnp.where(valid, doc, -1),
    pos=positions(*valid.shape),
    block=zero,
    reach=zero,
    regime=BIDIRECTIONAL,
  )


def causal(valid, doc=0):
  """Each valid position sees itself and those before it in its document.

  This is autoregression. Arguments as for `bidirectional`.
  """
  pos = positions(*valid.shape)
  return Labels(
    doc=jnp.where(valid, doc, -1),
    pos=pos,
    block=jnp.full(valid.shape, -1, jnp.int32),
    reach=pos + 1,
    regime=CAUSAL,
  )
