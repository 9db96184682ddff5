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
below are the regimes in use. In each of them pos, block and reach are the same
in every row, and known before anything is compiled: `regime` says so, and how
they are made, so that attention can tell which parts of the rule never hold
and skip them.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Regime:
  """pos, block and reach of a row, the same for all rows.

  Static and hashable: equal regimes are compiled once.

  Attributes:
    make: (places, *sizes) -> pos, block and reach of each place, where places
      is [L] int, 0..L-1. A function of a module, since functions are compared
      by identity.
    sizes: what it takes besides.
  """

  make: Callable
  sizes: tuple[int, ...] = ()


def _bidirectional(place):
  return place, 0, 0


def _block_causal(place, block_length):
  return place, -1, (place // block_length + 1) * block_length


def _block_diffusion(place, block_length):
  half = len(place) // 2
  clean = place >= half
  pos = np.where(clean, place - half, place)
  block = pos // block_length
  return pos, np.where(clean, -1, block), (block + clean) * block_length


BIDIRECTIONAL = Regime(_bidirectional)  # sees all of its document
CAUSAL = Regime(_block_causal, (1,))  # sees it up to and including itself
GENERAL = None  # nothing promised: evaluate the rule


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['doc', 'pos', 'block', 'reach'],
  meta_fields=['regime', 'single'],
)
@dataclasses.dataclass(frozen=True)
class Labels:
  """The four integers of each position, [B, L] int32 each.

  Attributes:
    regime: the Regime that pos, block and reach follow, or GENERAL.
    single: whether a row is one document, and its padding at the ends.
  """

  doc: jax.Array
  pos: jax.Array
  block: jax.Array
  reach: jax.Array
  regime: Regime | None = GENERAL
  single: bool = False


@functools.lru_cache(maxsize=32)
def row(regime, length):
  """Labels of a whole row that is one document, [1, L] NumPy int32 each."""
  places = np.arange(length, dtype=np.int32)
  wide = lambda x: np.broadcast_to(np.asarray(x, np.int32), (1, length))
  pos, block, reach = map(wide, regime.make(places, *regime.sizes))
  return Labels(wide(0), pos, block, reach, regime, single=True)


def visible(query, key):
  """Evaluates the rule.

  Args:
    query: Labels with [B, L] fields, of JAX or NumPy.
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


def follow(regime, valid, doc=0):
  """The Labels of rows that follow a regime.

  Args:
    regime: Regime.
    valid: [B, L] bool, False on padding, which is a document of its own and
      stands at the ends of a row: valid positions are next to each other.
    doc: [B, L] int32 >= 0, the document of each position; a number when the
      row is a single one.
  """
  one = row(regime, valid.shape[1])
  wide = lambda x: jnp.broadcast_to(jnp.asarray(x), valid.shape)
  return Labels(
    doc=jnp.where(valid, jnp.asarray(doc, jnp.int32), -1),
    pos=wide(one.pos),
    block=wide(one.block),
    reach=wide(one.reach),
    regime=regime,
    single=isinstance(doc, int),
  )


def bidirectional(valid, doc=0):
  """Valid positions of a document all see each other (masked diffusion).

  Arguments as for `follow`.
  """
  return follow(BIDIRECTIONAL, valid, doc)


def causal(valid, doc=0):
  """Each valid position sees itself and those before it in its document.

  This is autoregression. Arguments as for `follow`.
  """
  return follow(CAUSAL, valid, doc)


def block_causal(valid, block_length, doc=0):
  """Each valid position sees its document up to the end of its own block.

  Blocks are counted from the start of the row, also where documents are
  packed; the last may be shorter. The other arguments are as for `follow`.
  """
  return follow(Regime(_block_causal, (block_length,)), valid, doc)


def block_diffusion(valid, block_length, doc=0):
  """Training of block diffusion: each row is its noisy and its clean copy.

  A noisy position sees its own noisy block and the clean blocks before it; a
  clean one sees clean blocks up to its own (arXiv 2503.09573). Both copies
  have positions 0..L-1. Blocks are counted as in `block_causal`.

  Args:
    valid: [B, L] bool, as for `follow`, of one copy.
    block_length: positions of a block.
    doc: [B, L] int32 or a number, as for `follow`, of one copy.

  Returns:
    Labels of [noisy ; clean], [B, 2 L].
  """
  twice = lambda x: jnp.concatenate([x, x], axis=1)
  labels = follow(
    Regime(_block_diffusion, (block_length,)),
    twice(valid),
    doc if isinstance(doc, int) else twice(doc),
  )
  # The padding of one copy lies in the middle of the row.
  return dataclasses.replace(labels, single=False)
