"""Objectives in which attention stays within a document."""

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
  PACKED,
  STORED_ANSWER,
  STORED_DOC,
  TINY,
  log_probabilities,
  loss,
  make_canvas,
  packed,
  stored,
  strong_params,
  without_mask,
)

from maskdiff.data.rows import Rows
from maskdiff.objectives import masked_diffusion


@pytest.fixture(scope='module')
def params():
  return strong_params(TINY)


def log_p_and_nll(c, params, canvas):
  log_p = log_probabilities(TINY, params, canvas.inputs, canvas.labels)
  return without_mask(log_p), np.asarray(loss(c, TINY, params, canvas)[1])


def assert_equal_apart(whole, apart, doc=DOC):
  """Asserts that packing documents into one row changes no output.

  Args:
    whole: arrays [B, 10, ...] of the packed rows.
    apart: for each document the same arrays of rows that begin with it.
    doc: [10], document of each position.
  """
  for number, parts in enumerate(apart):
    for packed_part, part in zip(whole, parts, strict=True):
      packed_part = packed_part[:, number == doc]
      np.testing.assert_allclose(
        packed_part, part[:, : packed_part.shape[1]], rtol=1e-5, atol=1e-5
      )


def move_to_front(x, number, doc=DOC):
  """Moves the columns of one document to the front."""
  return np.concatenate([x[:, number == doc], x[:, number != doc]], axis=1)


def test_packed_documents_have_the_loss_of_separate_rows(params):
  """A separate row is a row that is cut at the end of the document."""
  random = np.random.default_rng(0)
  tokens, u = packed(16), random.random(16).astype(np.float32)
  noise = random.random(tokens.shape).astype(np.float32)
  row = masked_diffusion.corrupt(
    CONFINED, Rows(tokens), u, noise, np.full(16, len(DOC))
  )
  apart = [
    masked_diffusion.corrupt(
      CONFIG,
      Rows(move_to_front(tokens, n)),
      u,
      move_to_front(noise, n),
      np.full(16, sum(n == DOC)),
    )
    for n in range(3)
  ]
  whole = log_p_and_nll(CONFINED, params, row)
  assert (whole[1] > 0).any(axis=0).all()
  assert_equal_apart(whole, [log_p_and_nll(CONFIG, params, c) for c in apart])


def test_packed_documents_start_with_eos_instead_of_bos(params):
  def log_p_nll(c, tokens):
    canvas = make_canvas(c, tokens, jnp.arange(1), jax.random.key(0), 1)
    return log_p_and_nll(c, params, canvas)

  autoregressive = dataclasses.replace(CONFIG, name='autoregressive')
  confined = dataclasses.replace(CONFINED, name='autoregressive')
  tokens = packed(1)
  # Only the first document follows a bos. The documents after a document do
  # not matter, since it does not see them.
  starts = [CONFIG.bos_id, EOS, EOS]
  apart = [
    log_p_nll(
      dataclasses.replace(autoregressive, bos_id=start),
      move_to_front(tokens, n),
    )
    for n, start in enumerate(starts)
  ]
  assert_equal_apart(log_p_nll(confined, tokens), apart)


def apart_from_stored(x, number):
  """Moves the columns of one stored document to the front."""
  return move_to_front(x, number, STORED_DOC)


def test_stored_documents_have_the_loss_of_separate_rows(params):
  """Documents without eos, in no order, with padding between them."""
  random = np.random.default_rng(0)
  rows, u = stored(16), random.random(16).astype(np.float32)
  noise = random.random(rows.tokens.shape).astype(np.float32)
  row = masked_diffusion.corrupt(
    CONFINED, rows, u, noise, np.full(16, len(STORED_DOC))
  )
  apart = [
    masked_diffusion.corrupt(
      CONFIG,
      Rows(
        apart_from_stored(rows.tokens, n),
        answer=apart_from_stored(rows.answer, n),
      ),
      u,
      apart_from_stored(noise, n),
      np.full(16, sum(n == STORED_DOC)),
    )
    for n in range(3)
  ]
  whole = log_p_and_nll(CONFINED, params, row)
  np.testing.assert_array_equal(
    (whole[1] > 0).any(axis=0), STORED_ANSWER & (STORED_DOC >= 0)
  )
  assert_equal_apart(
    whole, [log_p_and_nll(CONFIG, params, c) for c in apart], STORED_DOC
  )


def test_stored_documents_start_with_bos(params):
  autoregressive = dataclasses.replace(CONFIG, name='autoregressive')
  confined = dataclasses.replace(CONFINED, name='autoregressive')

  def log_p_nll(c, rows):
    canvas = make_canvas(c, rows, jnp.arange(1), jax.random.key(0), 1)
    return log_p_and_nll(c, params, canvas)

  rows = stored(1)
  apart = [
    log_p_nll(
      autoregressive,
      Rows(
        jnp.asarray(apart_from_stored(rows.tokens, n)),
        answer=jnp.asarray(apart_from_stored(rows.answer, n)),
      ),
    )
    for n in range(3)
  ]
  assert_equal_apart(log_p_nll(confined, rows), apart, STORED_DOC)


def test_masked_eos_still_ends_its_document():
  tokens, u = packed(2), np.full(2, 0.5, np.float32)
  noise = np.stack([np.zeros(len(DOC)), np.where(PACKED == EOS, 0, 1)])
  canvas = masked_diffusion.corrupt(
    CONFINED, Rows(tokens), u, noise, np.full(2, len(DOC))
  )
  assert not (canvas.inputs == EOS).any()
  np.testing.assert_array_equal(canvas.labels.doc, [DOC, DOC])
