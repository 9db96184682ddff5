"""Traits of objectives."""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest
from objective_cases import CONFIG, random_tokens

from maskdiff.data.rows import Rows
from maskdiff.model import masks, transformer
from maskdiff.model.lora import LoraConfig
from maskdiff.model.transformer import TransformerConfig
from maskdiff.objectives import table

LLADA = pathlib.Path(__file__).parents[2] / 'configs' / '8b.py'


def test_flops_are_those_of_the_matrix_products():
  """2 per weight and token forward, twice as many backward; gains are free."""
  config = runpy.run_path(str(LLADA))['get_config']()
  c, length = TransformerConfig(**config.model), 4096
  d, h, g, k = c.embed, c.heads, c.kv_heads, c.head_dim
  matrices = 2 * d * (h + 2 * g + h) * k + 3 * 2 * d * c.mlp
  scores_and_mix = 2 * 2 * length * h * k
  outside = 2 * d * c.vocab_size
  full = 3 * (c.layers * (matrices + scores_and_mix) + outside)
  causal = 3 * (c.layers * (matrices + scores_and_mix / 2) + outside)
  # A noisy copy sees half of the clean copy and its own block, and so does the
  # clean copy.
  block = 32
  pairs = 1 + block / length
  two_copies = 3 * (
    c.layers * (2 * matrices + pairs * scores_and_mix) + outside
  )

  def flops(name, block_length=block, **changes):
    objective = dataclasses.replace(
      CONFIG, name=name, block_length=block_length, **changes
    )
    return table.flops_per_token(objective, c, length)

  assert flops('masked_diffusion') == pytest.approx(full, rel=1e-4)
  assert flops('autoregressive') == pytest.approx(causal, rel=1e-4)
  assert flops('block_diffusion') == pytest.approx(two_copies, rel=1e-4)
  assert flops('block_diffusion', length) == flops('masked_diffusion')
  twice = flops('block_diffusion', complementary_masks=True)
  assert twice == 2 * flops('block_diffusion')


@pytest.mark.parametrize('name', table.OBJECTIVES)
@pytest.mark.parametrize(
  'block_length, clean_attention',
  [(1, 'block'), (2, 'block'), (8, 'block'), (2, 'causal')],
)
def test_pairs_and_copies_are_those_of_the_labels(
  name, block_length, clean_attention
):
  length = 8
  c = dataclasses.replace(
    CONFIG,
    name=name,
    block_length=block_length,
    clean_attention=clean_attention,
  )
  rows = Rows(random_tokens(2, length))
  canvas = table.make_canvas(c, rows, jnp.arange(2), jax.random.key(0), 2)
  seen = masks.visible(canvas.labels, canvas.labels)[0].sum()
  objective = table.OBJECTIVES[name]
  pairs = objective.visible_pairs(c, length)
  if objective.left_to_right:  # the diagonal is not counted
    seen -= length / 2
  assert pairs * length**2 == seen
  copies = objective.copies(c, length)
  assert canvas.inputs.shape == (2, copies * length)


def test_flops_of_adapters_leave_out_gradients_of_the_base():
  config = runpy.run_path(str(LLADA))['get_config']()
  full = TransformerConfig(**config.model)
  lora = dataclasses.replace(full, lora=LoraConfig(rank=32))
  found, whole = (table.flops_per_token(CONFIG, c, 4096) for c in (lora, full))
  _, inner = transformer.num_params(full)
  base = inner + full.vocab_size * full.embed
  adapters = transformer.num_adapter_params(lora)
  assert found == whole - 2 * base + 6 * adapters
  assert 0.6 < found / whole < 0.75
