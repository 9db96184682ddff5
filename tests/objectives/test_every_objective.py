"""Properties of every objective in the table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import (
  CONFIG,
  CONFINED,
  DOC,
  EOS,
  STORED_ANSWER,
  STORED_DOC,
  TINY,
  canvas_of,
  log_probabilities,
  make_canvas,
  packed,
  random_tokens,
  stored,
  strong_params,
)

from maskdiff.data.rows import Rows
from maskdiff.model import masks, transformer
from maskdiff.objectives import table


@pytest.mark.parametrize('name', table.OBJECTIVES)
def test_noise_of_a_row_does_not_depend_on_the_batch(name):
  c = dataclasses.replace(CONFIG, name=name, random_length_fraction=0.5)
  tokens, key = random_tokens(64, 512), jax.random.key(0)
  rows = Rows(tokens, tokens - 1, tokens != 1)  # a third is padding
  whole = make_canvas(c, rows, jnp.arange(64), key, 64)
  numbers = np.array([7, 0, 40, 41])
  some = jax.tree.map(lambda x: x[numbers], rows)
  part = make_canvas(c, some, numbers, key, 64)
  jax.tree.map(
    lambda p, w: np.testing.assert_array_equal(p, w[numbers]), part, whole
  )


# The rows of a drafter are autoregressive; test_drafting.py has its windows.
@pytest.mark.parametrize('within', ['row', 'document'])
@pytest.mark.parametrize(
  'name', [name for name, o in table.OBJECTIVES.items() if not o.drafts]
)
def test_padding_is_never_seen_predicted_or_counted(name, within):
  """Padding within a row, after it, and in place of an answer."""
  c = dataclasses.replace(CONFIG, name=name, attend_within=within)
  text = STORED_DOC >= 0

  def outputs(rows):
    canvas = make_canvas(c, rows, jnp.arange(2), jax.random.key(0), 2)
    assert not np.asarray(canvas.weights)[:, ~(text & STORED_ANSWER)].any()
    assert (canvas.num_tokens == (text & STORED_ANSWER).sum()).all()
    log_p = log_probabilities(
      TINY, strong_params(TINY), canvas.inputs, canvas.labels
    )
    return log_p[:, : len(text)]

  rows = stored(2)
  before = np.asarray(outputs(rows))
  other = jnp.where(jnp.asarray(text), rows.tokens, (rows.tokens + 1) % 3)
  after = np.asarray(outputs(rows._replace(tokens=other)))
  np.testing.assert_array_equal(before[:, text], after[:, text])


@pytest.mark.parametrize('name', table.OBJECTIVES)
def test_output_depends_on_its_own_document_only(name):
  c = dataclasses.replace(CONFINED, name=name)
  canvas = make_canvas(c, packed(2), jnp.arange(2), jax.random.key(0), 2)
  # Each position has its own token, so the gradient by the embedding of a
  # token is the gradient by one input.
  length = len(DOC)
  inputs = jnp.tile(jnp.arange(length), canvas.inputs.shape[1] // length)[None]
  labels = jax.tree.map(lambda x: x[:1], canvas.labels)
  config = dataclasses.replace(TINY, vocab_size=length)
  params = strong_params(config)
  direction = np.random.default_rng(1).normal(size=config.embed)

  def outputs(embed):
    network = transformer.bind(config, {**params, 'embed': embed})
    return network(inputs, labels)[0, :length] @ direction

  gradients = jax.jit(jax.jacrev(outputs))(params['embed'])  # [L, L, D]
  same = DOC[:, None] == DOC
  block = np.arange(length) // c.block_length
  expected = {
    'any': same,
    'left_to_right': np.tril(same),
    'blocks': same & (block <= block[:, None]),
  }[table.OBJECTIVES[name].order]
  np.testing.assert_array_equal((gradients != 0).any(axis=-1), expected)


@pytest.mark.parametrize('name', table.OBJECTIVES)
def test_confined_attention_changes_document_labels_only(name):
  c = dataclasses.replace(CONFIG, name=name, random_length_fraction=0.5)
  tokens, row = canvas_of(c)
  _, confined = canvas_of(dataclasses.replace(c, attend_within='document'))
  copies = row.inputs.shape[1] // tokens.shape[1]
  doc = np.tile(np.asarray(masks.documents(tokens, EOS)), copies)
  padding = np.asarray(row.labels.doc) == -1
  cuts_rows = name in ('masked_diffusion', 'block_diffusion')
  assert padding.any() == cuts_rows
  np.testing.assert_array_equal(row.labels.doc, np.where(padding, -1, 0))
  np.testing.assert_array_equal(confined.labels.doc, np.where(padding, -1, doc))
  labels = dataclasses.replace(
    confined.labels, doc=row.labels.doc, single=row.labels.single
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    dataclasses.replace(confined, labels=labels),
    row,
  )
