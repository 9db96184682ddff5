"""Annealed attention in the Canvas, and losses of DiffuLLaMA's code."""

import dataclasses

import golden_models
import golden_sdlm
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import GOLDEN
from objective_cases import CONFIG, make_canvas, random_tokens

from maskdiff.data.rows import Rows
from maskdiff.model import annealing, masks, transformer
from maskdiff.objectives import masked_diffusion
from maskdiff.objectives.canvas import canvas_loss

STEPS, LENGTH, BATCH = 20, 16, 4
ANNEALED = dataclasses.replace(CONFIG, anneal_steps=10, train_steps=STEPS)


def golden(case):
  """Returns the arrays of a case by the rest of the name, and the mask id."""
  with np.load(GOLDEN / 'a2d.npz') as arrays:
    prefix = f'diffullama.{case}.'
    found = {
      key.removeprefix(prefix): arrays[key]
      for key in arrays
      if key.startswith(prefix)
    }
    return found, int(arrays['ids'][0])


@pytest.mark.parametrize('case', range(5))
def test_golden_losses_with_partly_open_masks(monkeypatch, case):
  """The drawn mask is the golden one; the loss is a mean over masked tokens.

  Shifted outputs do not predict the first token. The gradient of the first case
  is compared by parameter.
  """
  arrays, mask_id = golden(case)
  drawn, shift = arrays['attention'], bool(arrays['shift'])
  length = len(drawn)
  monkeypatch.setattr(
    annealing,
    'is_open',
    lambda number, key: jnp.asarray(drawn)[annealing.position(number), key],
  )
  network = golden_models.block_network(block_length=4, predict_next=shift)
  c = dataclasses.replace(CONFIG, mask_id=mask_id, predict_mask=True)
  tokens, t = arrays['input_ids'], arrays['t']
  masked = (arrays['u'] < t[:, None]) & ~arrays['src_mask']
  canvas = masked_diffusion.with_masks(
    c,
    Rows(jnp.asarray(tokens)),
    jnp.asarray(t)[:, None],
    jnp.asarray(masked),
    jnp.full(len(tokens), length),
  )
  labels = masks.annealed(canvas.labels, jnp.arange(length))
  np.testing.assert_array_equal(masks.visible(labels, labels)[0], drawn)
  first = 1 if shift else 0
  scale = (np.arange(length) >= first) / masked[:, first:].sum()
  canvas = dataclasses.replace(
    canvas, labels=labels, weights=canvas.weights * scale
  )

  def loss(params):
    return canvas_loss(c, transformer.bind(network.config, params), canvas)[0]

  with jax.default_matmul_precision('highest'):
    if case:
      found = jax.jit(loss)(network.params)
    else:
      found, gradients = jax.jit(jax.value_and_grad(loss))(network.params)
  np.testing.assert_allclose(found, arrays['loss'], rtol=1e-5)
  if case == 0:
    total = float(arrays['gradnorm_total'])
    for name, norm in golden_sdlm.gradient_norms(gradients).items():
      expected = arrays[f'gradnorm.{name}']
      assert norm == pytest.approx(expected, rel=1e-4, abs=1e-6 * total), name


@pytest.mark.parametrize('case', range(5))
def test_share_of_open_pairs_is_that_of_diffullama(case):
  arrays, _ = golden(case)
  step, steps = int(arrays['global_step']), int(arrays['anneal_steps'])
  c = dataclasses.replace(CONFIG, anneal_steps=steps, train_steps=60)
  share = c.share_open(jnp.float32(step) / 60)
  assert share == pytest.approx(min(1, (step + 1) / steps), abs=1e-7)
  above = ~np.tri(len(arrays['attention']), dtype=bool)
  found = arrays['attention'][above].mean()
  assert abs(found - share) <= 3 * np.sqrt(share * (1 - share) / above.sum())


def canvas_at(c, step, rows=None, numbers=None):
  """Returns the Canvas of a step of a training of STEPS steps."""
  rows = Rows(random_tokens(BATCH, LENGTH)) if rows is None else rows
  numbers = jnp.arange(BATCH) if numbers is None else numbers
  key = jax.random.fold_in(jax.random.key(0), step)
  return make_canvas(c, rows, numbers, key, BATCH, jnp.float32(step) / STEPS)


def visible(canvas):
  return np.asarray(masks.visible(canvas.labels, canvas.labels))


def test_only_the_attention_of_a_canvas_is_annealed():
  found, plain = canvas_at(ANNEALED, 4), canvas_at(CONFIG, 4)
  for name in ('inputs', 'targets', 'weights', 'num_tokens', 'mask_ratio'):
    np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
  assert found.labels.regime == masks.ANNEALED
  assert plain.labels.regime == masks.BIDIRECTIONAL
  assert not ANNEALED.is_bound(0.2) and CONFIG.is_bound(0.2)


def test_mask_of_a_step_is_the_same_for_all_rows_and_microbatches():
  rows = Rows(random_tokens(BATCH, LENGTH))
  whole = visible(canvas_at(ANNEALED, 4, rows))
  assert (whole == whole[:1]).all()
  part = jax.tree.map(lambda x: x[2:], rows)
  found = visible(canvas_at(ANNEALED, 4, part, jnp.arange(2, BATCH)))
  np.testing.assert_array_equal(found, whole[2:])
  assert (visible(canvas_at(ANNEALED, 5)) != whole).any()


def test_last_annealed_step_is_bidirectional_to_the_bit():
  shares = [visible(canvas_at(ANNEALED, step)).mean() for step in (0, 4, 8)]
  assert shares == sorted(shares) and shares[0] < 0.7 < shares[2]
  for step in (9, 15):
    np.testing.assert_array_equal(
      visible(canvas_at(ANNEALED, step)), visible(canvas_at(CONFIG, step))
    )


def test_documents_and_padding_stay_apart():
  doc = jnp.asarray([[0] * 5 + [1] * 8 + [-1] * 3] * BATCH, jnp.int32)
  rows = Rows(random_tokens(BATCH, LENGTH), doc)
  c = dataclasses.replace(ANNEALED, attend_within='document')
  found = visible(canvas_at(c, 4, rows))
  apart = np.asarray(doc[:, :, None] != doc[:, None, :])
  assert not found[apart].any()
  whole = visible(canvas_at(ANNEALED, 4))
  np.testing.assert_array_equal(found, whole & ~apart)
