"""Attention masks as four integers per position and one visibility rule.

The four integers of a position:
  doc    the document it belongs to; -1 is padding. Positions of different
         documents never see each other.
  pos    its position in the document or the row, used for rotary embedding.
         Only differences and order within a document matter, so a document
         may start at any number.
  block  the noisy block it belongs to; -1 if its token is clean. Attention
         within block n is bidirectional, and causal within block -2 - n.
  reach  the position sees the clean positions with pos < reach.

The rule: a query sees a key of its own document if the key is clean and
key.pos < query.reach, or if the key is noisy and key.block == query.block. In a
causal block, key.pos must also be at most query.pos. In annealed attention,
each query also has a number, which opens later keys (annealing.py).

A regime is a fixed pattern of attention: bidirectional, causal, block-causal,
block diffusion, windows at a stride or annealed. Its pos, block and reach are
the same in every row and known before compilation, so an attention kernel can
skip the tiles in which no query sees any key. The constructors below make the
labels of each regime and record it in `Labels.regime`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.model import annealing


@dataclasses.dataclass(frozen=True)
class Regime:
  """A fixed pattern of attention: a function that makes pos, block and reach.

  A Regime is static and hashable: equal regimes are compiled once.

  Attributes:
    make: (index, *sizes) -> pos, block and reach of each position, where index
      is [L] int, 0..L-1. It must be a module-level function, because functions
      are compared by identity.
    sizes: the other arguments of `make`.
  """

  make: Callable
  sizes: tuple[int, ...] = ()


def _bidirectional(index):
  return index, 0, 0


def _block_causal(index, block_length):
  return index, -1, (index // block_length + 1) * block_length


def _annealed(index):
  return _block_causal(index, 1)


def _block_diffusion(index, block_length, clean_block=None):
  half = len(index) // 2
  clean = index >= half
  pos = np.where(clean, index - half, index)
  block = pos // block_length
  size = clean_block or block_length
  reach = np.where(clean, (pos // size + 1) * size, block * block_length)
  return pos, np.where(clean, -1, block), reach


def _causal_windows(index, window_length):
  pos, block, reach = _block_diffusion(index, window_length, 1)
  return pos, np.where(block < 0, block, window_block(block, True)), reach


def window_block(number, causal):
  """Returns `block` of windows with different numbers, which are 0 or above."""
  return -2 - number if causal else number


BIDIRECTIONAL = Regime(_bidirectional)
CAUSAL = Regime(_block_causal, (1,))  # blocks of one position
ANNEALED = Regime(_annealed)  # causal, and Labels.number opens later keys
GENERAL = None  # no regime: the rule must be evaluated


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['doc', 'pos', 'block', 'reach', 'number'],
  meta_fields=['regime', 'single'],
)
@dataclasses.dataclass(frozen=True)
class Labels:
  """The four integers of each position, [B, L] int32 each.

  Attributes:
    regime: the Regime of pos, block and reach, or GENERAL.
    single: whether each row is one document, with padding only at its ends.
    number: [B, L] int32, numbers of the queries in annealed attention; else
      None. All rows have the same.
  """

  doc: jax.Array
  pos: jax.Array
  block: jax.Array
  reach: jax.Array
  regime: Regime | None = GENERAL
  single: bool = False
  number: jax.Array | None = None


@functools.lru_cache(maxsize=32)
def row(regime, length):
  """Returns the Labels of a row that is one document, [1, L] NumPy int32."""
  index = np.arange(length, dtype=np.int32)
  wide = lambda x: np.broadcast_to(np.asarray(x, np.int32), (1, length))
  pos, block, reach = map(wide, regime.make(index, *regime.sizes))
  return Labels(wide(0), pos, block, reach, regime, single=True)


def visible(query, key):
  """Evaluates the rule for all pairs of a query and a key.

  Args:
    query: Labels with [B, L] fields, of JAX or NumPy.
    key: Labels with [B, S] fields.

  Returns:
    [B, L, S] bool, True where the query sees the key.
  """
  if query.regime == key.regime == BIDIRECTIONAL:
    return query.doc[:, :, None] == key.doc[:, None, :]
  q = jax.tree.map(lambda x: x[:, :, None], query)
  k = jax.tree.map(lambda x: x[:, None, :], key)
  before = k.pos < q.reach
  if q.number is not None:
    before |= annealing.is_open(q.number, k.pos)
  clean = (k.block == -1) & before
  noisy = (k.block != -1) & (k.block == q.block)
  noisy &= (k.block >= 0) | (k.pos <= q.pos)
  return (q.doc == k.doc) & (clean | noisy)


def continues_document(labels):
  """Returns [B, L] bool, whether the position before has the same `doc`."""
  before = jnp.pad(labels.doc[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  return labels.doc == before


def has_clean_copy(labels):
  """Returns whether the rows are [noisy ; clean], from `block_diffusion`."""
  return labels.regime is not None and labels.regime.make is _block_diffusion


def take(labels, positions):
  """Returns the Labels of some positions of each row.

  Args:
    labels: Labels, [B, L] each.
    positions: [B, W] int32 in [0, L).

  Returns:
    Labels, [B, W] each. Only the bidirectional regime stays, because the other
    regimes fix the label of each index.
  """
  rows = jnp.arange(len(positions))[:, None]
  regime = BIDIRECTIONAL if labels.regime == BIDIRECTIONAL else GENERAL
  taken = jax.tree.map(lambda x: x[rows, positions], labels)
  return dataclasses.replace(taken, regime=regime, single=False)


def documents(tokens, eos_id):
  """Returns the document number of each token of packed rows.

  Args:
    tokens: [B, L] int32, clean; every document ends with eos.
    eos_id: end-of-text token; it belongs to the document that it ends.

  Returns:
    [B, L] int32: the number of eos tokens before the token in its row.
  """
  eos = (tokens == eos_id).astype(jnp.int32)
  return jnp.cumsum(eos, axis=1) - eos


def make_labels(regime, valid, doc=0):
  """Returns the Labels of rows in a regime.

  Args:
    regime: Regime.
    valid: [B, L] bool, False on padding.
    doc: [B, L] int32, the document of each position, >= 0 where it is valid; or
      an int if each row is one document, whose positions must be contiguous.
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
  """Returns bidirectional Labels: a position sees all of its document.

  Arguments as for `make_labels`.
  """
  return make_labels(BIDIRECTIONAL, valid, doc)


def causal(valid, doc=0):
  """Returns causal Labels: a position sees itself and positions to its left.

  Arguments as for `make_labels`.
  """
  return make_labels(CAUSAL, valid, doc)


def annealed(labels, number):
  """Returns Labels between causal and bidirectional ones.

  A position sees itself, the positions to its left, and those to its right that
  its number opens, all of its own document.

  Args:
    labels: bidirectional Labels, [B, L].
    number: [L] int32, from `annealing.draw`.
  """
  causal = make_labels(ANNEALED, labels.doc >= 0)
  return dataclasses.replace(
    causal,
    doc=labels.doc,
    single=labels.single,
    number=jnp.broadcast_to(number, labels.doc.shape),
  )


def block_causal(valid, block_length, doc=0):
  """Returns block-causal Labels: a position sees up to the end of its block.

  Blocks of block_length positions are counted from the start of the row, also
  in packed rows; the last block may be shorter. The other arguments are as for
  `make_labels`.
  """
  return make_labels(Regime(_block_causal, (block_length,)), valid, doc)


def block_diffusion(valid, block_length, doc=0, causal=False):
  """Returns Labels for training block diffusion on [noisy ; clean] rows.

  A noisy and a clean copy of each row stand one after the other. A noisy
  position sees its own noisy block and the clean blocks before it. A clean
  position sees the clean blocks up to its own (arXiv 2503.09573), or the clean
  positions up to itself if `causal` is set. Both copies have positions 0..L-1.
  Blocks are counted as in `block_causal`.

  Args:
    valid: [B, L] bool, of one copy; as for `make_labels`.
    block_length: positions of a block.
    doc: [B, L] int32 or int, of one copy; as for `make_labels`.
    causal: whether attention within the clean copy is causal.

  Returns:
    Labels of [noisy ; clean], [B, 2 L].
  """
  sizes = (block_length, 1) if causal else (block_length,)
  twice = lambda x: jnp.concatenate([x, x], axis=1)
  labels = make_labels(
    Regime(_block_diffusion, sizes),
    twice(valid),
    doc if isinstance(doc, int) else twice(doc),
  )
  # The padding of one copy is in the middle of the row.
  return dataclasses.replace(labels, single=False)


def clean_or_noisy_blocks(noisy, valid, block_length, doc=0):
  """Returns Labels of rows whose blocks are clean and causal, or noisy.

  A clean position sees the clean positions up to itself. A noisy position sees
  its own block and the clean positions before the block, as in
  `block_diffusion` with `causal`. The labels follow no regime.

  Args:
    noisy: [B, L] bool; a block is noisy if one of its positions is.
    valid: [B, L] bool, False on padding.
    block_length: as for `block_causal`.
    doc: as for `make_labels`.
  """
  length = noisy.shape[1]
  labels = causal(valid, doc)
  block = labels.pos // block_length
  whole = jnp.pad(noisy, ((0, 0), (0, -length % block_length)))
  of_block = whole.reshape(len(noisy), -1, block_length).any(axis=2)
  noisy = jnp.repeat(of_block, block_length, axis=1)[:, :length]
  return dataclasses.replace(
    labels,
    block=jnp.where(noisy, block, -1),
    reach=jnp.where(noisy, block * block_length, labels.reach),
    regime=GENERAL,
    single=False,
  )


def strided_windows(doc, window_length, causal=False):
  """Returns Labels for training windows at a stride on [windows ; clean] rows.

  The windows divide the row. A position of a window sees its window and the
  clean positions before the window. A clean position sees the clean positions
  up to itself. Both copies have positions 0..L-1. All positions of a window
  have the document of its first position.

  Args:
    doc: [B, L] int32, the document of each position, -1 on padding.
    window_length: positions of a window, a divisor of L.
    causal: whether attention within a window is causal.

  Returns:
    Labels of [windows ; clean], [B, 2 L].
  """
  first = jnp.repeat(doc[:, ::window_length], window_length, axis=1)
  doc = jnp.concatenate([first, doc], axis=1)
  regime = (
    Regime(_causal_windows, (window_length,))
    if causal
    else Regime(_block_diffusion, (window_length, 1))
  )
  return make_labels(regime, doc >= 0, doc)


def windows(doc, starts, window_length, causal=False):
  """Returns Labels of windows that begin at given positions.

  A position of a window sees its window and the clean positions before the
  window, as in `strided_windows`.

  Args:
    doc: [B, K] int32, the document of each window; -1 hides the window.
    starts: [B, K] int32, the first position of each window.
    window_length: D, positions of a window.
    causal: as for `strided_windows`.

  Returns:
    Labels of [B, K D], which follow no regime.
  """
  batch, number = starts.shape
  wide = lambda x: jnp.broadcast_to(x, (batch, number, window_length)).reshape(
    batch, -1
  )
  block = jnp.arange(number, dtype=jnp.int32)
  return Labels(
    doc=wide(doc[..., None]),
    pos=wide(starts[..., None] + jnp.arange(window_length, dtype=jnp.int32)),
    block=wide(window_block(block, causal)[None, :, None]),
    reach=wide(starts[..., None]),
  )


def concatenate(*parts):
  """Returns the Labels of several parts of a row, which follow no regime."""
  join = lambda *x: jnp.concatenate(x, axis=1)
  plain = (
    dataclasses.replace(part, regime=GENERAL, single=False) for part in parts
  )
  return jax.tree.map(join, *plain)
