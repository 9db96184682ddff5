"""The visibility rule of masks.py, pair by pair, in every regime."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdiff.model import masks
from maskdiff.model.masks import Labels

# Rows with padding at neither, either and both ends.
VALID = np.array(
  [
    [1, 1, 1, 1, 1, 1],
    [0, 0, 1, 1, 1, 1],
    [1, 1, 1, 0, 0, 0],
    [0, 1, 1, 1, 0, 0],
  ],
  bool,
)
CONSTRUCTORS = (
  masks.bidirectional,
  masks.causal,
  lambda *a: masks.block_causal(a[0], 2, *a[1:]),
)


def labels(pos, block, reach, doc=0):
  """Returns the Labels of one row; a scalar applies to every position."""
  row = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.int32), (1, len(pos)))
  return Labels(row(doc), row(pos), row(block), row(reach))


def visible(query, key=None):
  return np.asarray(masks.visible(query, query if key is None else key))


def longhand(batch, length, rule):
  """Returns [batch, length, length] bool, rule(b, i, j) for all pairs."""
  return np.array(
    [
      [[rule(b, i, j) for j in range(length)] for i in range(length)]
      for b in range(batch)
    ]
  )


def both_valid(b, i, j):
  return VALID[b, i] and VALID[b, j]


def both_padding(b, i, j):
  return not VALID[b, i] and not VALID[b, j]


def test_bidirectional_sees_every_valid_position():
  expected = longhand(
    *VALID.shape, lambda b, i, j: both_valid(b, i, j) or both_padding(b, i, j)
  )
  np.testing.assert_array_equal(
    visible(masks.bidirectional(jnp.asarray(VALID))), expected
  )


def test_causal_sees_itself_and_positions_before():
  expected = longhand(
    *VALID.shape,
    lambda b, i, j: (both_valid(b, i, j) or both_padding(b, i, j)) and j <= i,
  )
  np.testing.assert_array_equal(
    visible(masks.causal(jnp.asarray(VALID))), expected
  )


# Documents in the rows of VALID; those of padding are not used.
DOC = np.array(
  [
    [0, 0, 0, 1, 2, 2],
    [0, 1, 1, 1, 1, 2],
    [0, 1, 1, 1, 2, 3],
    [0, 0, 0, 0, 1, 2],
  ]
)


@pytest.mark.parametrize('constructor', CONSTRUCTORS)
def test_documents_never_see_each_other(constructor):
  valid = jnp.asarray(VALID)
  whole = visible(constructor(valid))
  apart = longhand(
    *VALID.shape,
    lambda b, i, j: both_padding(b, i, j) or DOC[b, i] == DOC[b, j],
  )
  l = constructor(valid, jnp.asarray(DOC))
  np.testing.assert_array_equal(visible(l), whole & apart)
  np.testing.assert_array_equal(l.doc, np.where(VALID, DOC, -1))


def test_eos_belongs_to_its_document():
  x, eos = 7, 2
  tokens = jnp.array(
    [
      [x, x, eos, x, eos, x],
      [eos, eos, x, x, x, eos],
      [x, x, x, x, x, x],
    ]
  )
  expected = [
    [0, 0, 0, 1, 1, 2],
    [0, 1, 2, 2, 2, 2],
    [0, 0, 0, 0, 0, 0],
  ]
  np.testing.assert_array_equal(masks.documents(tokens, eos), expected)


@pytest.mark.parametrize('constructor', CONSTRUCTORS)
def test_valid_positions_and_padding_never_see_each_other(constructor):
  pairs = visible(constructor(jnp.asarray(VALID)))
  assert not pairs[VALID[:, :, None] != VALID[:, None, :]].any()


@pytest.mark.parametrize('constructor', CONSTRUCTORS)
def test_every_position_sees_at_least_itself(constructor):
  pairs = visible(constructor(jnp.asarray(VALID)))
  assert pairs.diagonal(axis1=1, axis2=2).all()


@pytest.mark.parametrize('doc', [0, jnp.asarray(DOC)], ids=['row', 'packed'])
def test_bidirectional_rule_is_equality_of_documents(doc):
  l = masks.bidirectional(jnp.asarray(VALID), doc)
  assert l.regime == masks.BIDIRECTIONAL
  same = np.asarray(l.doc[:, :, None] == l.doc[:, None, :])
  np.testing.assert_array_equal(visible(l), same)


@pytest.mark.parametrize('doc', [0, jnp.asarray(DOC)], ids=['row', 'packed'])
def test_causal_rule_is_order_within_documents(doc):
  l = masks.causal(jnp.asarray(VALID), doc)
  assert l.regime == masks.CAUSAL
  same = np.asarray(l.doc[:, :, None] == l.doc[:, None, :])
  np.testing.assert_array_equal(visible(l), np.tril(same))


# Rules for valid positions i and j of the same document.
DEFINITIONS = {
  'bidirectional': (masks.bidirectional, lambda i, j: True),
  'causal': (masks.causal, lambda i, j: j <= i),
  'block-causal': (
    lambda *a: masks.block_causal(a[0], 2, *a[1:]),
    lambda i, j: j // 2 <= i // 2,
  ),
  'uneven blocks': (
    lambda *a: masks.block_causal(a[0], 4, *a[1:]),
    lambda i, j: j // 4 <= i // 4,
  ),
}


@pytest.mark.parametrize('doc', [0, jnp.asarray(DOC)], ids=['row', 'packed'])
@pytest.mark.parametrize('name', DEFINITIONS)
def test_regimes_are_their_definitions(name, doc):
  constructor, sees = DEFINITIONS[name]
  l = constructor(jnp.asarray(VALID), doc)
  same = np.asarray(l.doc[:, :, None] == l.doc[:, None, :])
  np.testing.assert_array_equal(
    visible(l), same & longhand(*VALID.shape, lambda b, i, j: sees(i, j))
  )


@pytest.mark.parametrize('doc', [0, jnp.asarray(DOC)], ids=['row', 'packed'])
@pytest.mark.parametrize('size', [1, 2, 3, 4, 6])
def test_block_diffusion_is_bd3_lm_within_documents(size, doc):
  n = VALID.shape[1]
  l = masks.block_diffusion(jnp.asarray(VALID), size, doc)
  own = np.where(VALID, doc, -1)
  np.testing.assert_array_equal(l.doc, np.concatenate([own, own], axis=1))
  np.testing.assert_array_equal(l.pos[0], [*range(n), *range(n)])

  def sees(b, i, j):
    q_noisy, k_noisy = i < n, j < n
    q_block, k_block = i % n // size, j % n // size
    if own[b, i % n] != own[b, j % n]:
      return False
    if q_noisy and k_noisy:
      return q_block == k_block
    if q_noisy:
      return q_block > k_block
    return not k_noisy and q_block >= k_block

  np.testing.assert_array_equal(visible(l), longhand(len(VALID), 2 * n, sees))
  assert visible(l).diagonal(axis1=1, axis2=2).all()


@pytest.mark.parametrize(
  'make, again, other',
  [
    (masks.bidirectional, masks.bidirectional, masks.causal),
    (
      lambda v: masks.block_causal(v, 2),
      lambda v: masks.block_causal(v, 2),
      lambda v: masks.block_causal(v, 3),
    ),
    (
      lambda v: masks.block_diffusion(v, 2),
      lambda v: masks.block_diffusion(v, 2),
      lambda v: masks.block_diffusion(v, 3),
    ),
  ],
)
def test_regime_is_static_and_equal_in_all_rows(make, again, other):
  valid = jnp.asarray(VALID)
  l = make(valid)
  row = masks.row(l.regime, l.pos.shape[1])
  for name in ('pos', 'block', 'reach'):
    array = getattr(l, name)
    np.testing.assert_array_equal(
      array, np.broadcast_to(getattr(row, name), array.shape)
    )
    assert array.dtype == jnp.int32
  assert l.regime == again(valid).regime != other(valid).regime
  assert hash(l.regime) == hash(again(valid).regime)


def test_equal_regimes_are_traced_once():
  traced = []

  @jax.jit
  def f(l):
    traced.append(l.regime)
    return l.pos

  for size in (2, 2, 3):
    f(masks.block_causal(jnp.asarray(VALID), size))
  assert [regime.sizes for regime in traced] == [(2,), (3,)]


def test_block_causal_of_1_is_the_causal_regime():
  assert masks.block_causal(jnp.asarray(VALID), 1).regime == masks.CAUSAL


def test_labels_say_whether_a_row_is_one_document():
  valid, doc = jnp.asarray(VALID), jnp.asarray(DOC)
  for constructor in CONSTRUCTORS:
    assert constructor(valid).single
    assert not constructor(valid, doc).single
    # Even if all positions are one document: an array is traced.
    assert not constructor(valid, 0 * doc).single
  assert not masks.block_diffusion(valid, 2).single
  assert not labels(np.arange(4), 0, 0).single


def test_hand_built_labels_are_general():
  assert labels(np.arange(4), 0, 0).regime == masks.GENERAL


def test_packed_documents_do_not_see_each_other():
  doc, pos = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 2, 0, 1, 0])
  same = doc[:, None] == doc
  np.testing.assert_array_equal(visible(labels(pos, 0, 0, doc))[0], same)
  np.testing.assert_array_equal(
    visible(labels(pos, -1, pos + 1, doc))[0], np.tril(same)
  )


def block_causal(n, size):
  pos = np.arange(n)
  return labels(pos, -1, (pos // size + 1) * size)


@pytest.mark.parametrize('size', [1, 2, 3, 6])
def test_block_causal_sees_up_to_the_end_of_its_block(size):
  expected = longhand(1, 6, lambda b, i, j: j // size <= i // size)
  np.testing.assert_array_equal(visible(block_causal(6, size)), expected)


def test_block_causal_spans_causal_to_bidirectional():
  valid = jnp.ones((1, 6), bool)
  np.testing.assert_array_equal(
    visible(block_causal(6, 1)), visible(masks.causal(valid))
  )
  np.testing.assert_array_equal(
    visible(block_causal(6, 6)), visible(masks.bidirectional(valid))
  )


def noisy_then_clean(n, size):
  """Returns the Labels of block-diffusion training, [noisy ; clean], [2 n]."""
  pos = np.arange(n)
  own = pos // size
  return labels(
    pos=np.concatenate([pos, pos]),
    block=np.concatenate([own, np.full(n, -1)]),
    reach=np.concatenate([own * size, (own + 1) * size]),
  )


@pytest.mark.parametrize('n, size', [(6, 1), (6, 2), (6, 3), (6, 6), (8, 4)])
def test_block_diffusion_training_mask_is_that_of_bd3_lm(n, size):
  """arXiv 2503.09573: exactly three kinds of pairs are visible."""

  def rule(b, i, j):
    q_noisy, k_noisy = i < n, j < n
    q_block, k_block = i % n // size, j % n // size
    return (
      (q_block == k_block and q_noisy == k_noisy)
      or (q_noisy and not k_noisy and q_block > k_block)
      or (not q_noisy and not k_noisy and q_block >= k_block)
    )

  np.testing.assert_array_equal(
    visible(noisy_then_clean(n, size)), longhand(1, 2 * n, rule)
  )


def test_block_diffusion_mask_has_the_row_sums_of_the_original_code():
  rows = visible(noisy_then_clean(6, 2))[0].sum(axis=1)
  np.testing.assert_array_equal(rows, [2, 2, 4, 4, 6, 6] * 2)


def test_sdlm_windows_see_the_clean_tokens_before_their_anchor():
  """Clean tokens are causal; a window sees itself and the tokens before it."""
  n, size, anchors = 6, 3, [1, 4]
  windows = [np.arange(a, a + size) for a in anchors]
  pos = np.concatenate([np.arange(n), *windows])
  number = np.repeat([-1, 0, 1], [n, size, size])
  start = np.repeat(anchors, size)
  pairs = visible(
    labels(pos, number, np.concatenate([np.arange(n) + 1, start]))
  )

  def rule(b, i, j):
    if j < n:
      return j <= i if i < n else j < anchors[number[i]]
    return i >= n and number[i] == number[j]

  np.testing.assert_array_equal(pairs, longhand(1, len(pos), rule))


def test_canvas_sees_all_of_its_cache_and_itself():
  cache, canvas, size = np.arange(4), np.arange(4, 7), 3
  query = labels(canvas, 0, canvas[0])
  key = jax.tree.map(
    lambda a, b: jnp.concatenate([a, b], axis=1),
    labels(cache, -1, cache + 1),
    query,
  )
  np.testing.assert_array_equal(
    visible(query, key), np.ones((1, size, 7), bool)
  )
