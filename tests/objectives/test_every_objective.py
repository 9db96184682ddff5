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
  TINY,
  canvas_of,
  make_canvas,
  packed,
  strong_params,
)

from maskdiff.model import masks, transformer
from maskdiff.objectives import table


@pytest.mark.parametrize('name', table.OBJECTIVES)
def test_noise_of_a_row_does_not_depend_on_the_batch(name):
  c = dataclasses.replace(CONFIG, name=name, random_length_fraction=0.5)
  tokens, whole = canvas_of(c)
  rows = np.array([7, 0, 40, 41])
  part = make_canvas(c, tokens[rows], rows, jax.random.key(0), 64)
  jax.tree.map(
    lambda p, w: np.testing.assert_array_equal(p, w[rows]), part, whole
  )


@pytest.mark.parametrize('name', table.OBJECTIVES)
def test_output_depends_on_its_own_document_only(name):
  c = dataclasses.replace(CONFINED, name=name)
  canvas = make_canvas(c, packed(2), jnp.arange(2), jax.random.key(0), 2)
  # Each position has its own token, so the gradient by the embedding of a
  # token is the gradient by one input.
  length = len(DOC)
  inputs = jnp.tile(jnp.arange(length), (2, 1))
  config = dataclasses.replace(TINY, vocab_size=length)
  params = strong_params(config)
  direction = np.random.default_rng(1).normal(size=config.embed)

  def outputs(embed):
    network = transformer.bind(config, {**params, 'embed': embed})
    return network(inputs, canvas.labels)[0] @ direction

  gradients = jax.jit(jax.jacrev(outputs))(params['embed'])  # [L, L, D]
  same = DOC[:, None] == DOC
  expected = np.tril(same) if name == 'autoregressive' else same
  np.testing.assert_array_equal((gradients != 0).any(axis=-1), expected)


@pytest.mark.parametrize('name', table.OBJECTIVES)
def test_confined_attention_changes_document_labels_only(name):
  c = dataclasses.replace(CONFIG, name=name, random_length_fraction=0.5)
  tokens, row = canvas_of(c)
  _, confined = canvas_of(dataclasses.replace(c, attend_within='document'))
  doc = np.asarray(masks.documents(tokens, EOS))
  padding = np.asarray(row.labels.doc) == -1
  assert padding.any() == (name == 'masked_diffusion')
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
