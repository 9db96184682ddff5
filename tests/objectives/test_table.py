"""Traits of objectives."""

import pathlib
import runpy

import pytest

from maskdiff.model.transformer import TransformerConfig
from maskdiff.objectives import table

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / '8b.py'


def test_flops_are_those_of_the_matrix_products():
  """2 per weight and token forward, twice as many backward; gains are free."""
  config = runpy.run_path(str(CONFIG))['get_config']()
  c, length = TransformerConfig(**config.model), 4096
  d, h, g, k = c.embed, c.heads, c.kv_heads, c.head_dim
  matrices = 2 * d * (h + 2 * g + h) * k + 3 * 2 * d * c.mlp
  scores_and_mix = 2 * 2 * length * h * k
  outside = 2 * d * c.vocab_size
  full = 3 * (c.layers * (matrices + scores_and_mix) + outside)
  causal = 3 * (c.layers * (matrices + scores_and_mix / 2) + outside)
  flops = lambda name: table.flops_per_token(name, c, length)
  assert flops('masked_diffusion') == pytest.approx(full, rel=1e-4)
  assert flops('autoregressive') == pytest.approx(causal, rel=1e-4)
