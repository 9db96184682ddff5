"""NTK scaling of rotary positions: factors, closed form, one network."""

import math
import pathlib

import jax
import numpy as np
import page_tables
import pytest
import tiny

from maskdiff.config import scale_rows
from maskdiff.errors import UserError
from maskdiff.model import masks, ntk, transformer

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'long_rows.md'
# Factors on theta in OpenMOSS/LongLLaDA, eval/eval_llada_niah.py, by the tokens
# of a training row and of the longest row. They count one side of a token.
PUBLISHED = {
  'LLaDA': (4096, {8192: 4, 16384: 14, 24576: 31, 32768: 55}),
  'Llama 3': (8192, {16384: 4, 32768: 13}),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_half_the_lengths_give_the_published_factors(name):
  trained, factors = PUBLISHED[name]
  for length, factor in factors.items():
    theta = ntk.scaled_theta(5e5, 128, trained / 2, length / 2)
    assert math.ceil(theta / 5e5) == factor


@pytest.mark.parametrize(('row', 'sides'), [('2T, here', 2), ('T', 1)])
def test_page_has_the_factors(row, sides):
  rows = [
    page_tables.cells(line)
    for line in PAGE.read_text().splitlines()
    if line.startswith('| ')
  ]
  found = {name: values for name, *values in rows}
  for length, shown in zip(found['longest row N'], found[row], strict=True):
    half = int(length.replace(',', '')) * sides / 2
    factor = ntk.scaled_theta(5e5, 128, 4096 * sides / 2, half) / 5e5
    assert f'{factor:.1f}' == shown


@pytest.mark.parametrize(
  ('theta', 'head_dim', 'trained', 'length'),
  [(5e5, 128, 4096, 131072), (1e4, 64, 1024, 2048), (100.0, 32, 64, 256)],
)
def test_first_wavelength_that_training_did_not_cover_becomes_two_lengths(
  theta, head_dim, trained, length
):
  wavelengths = lambda base: (
    2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
  )
  covered = np.sum(wavelengths(theta) < 2 * trained)  # both sides of a token
  scaled = ntk.scaled_theta(theta, head_dim, trained, length)
  np.testing.assert_allclose(wavelengths(scaled)[covered], 2 * length)
  assert wavelengths(theta)[covered] > 2 * trained


def test_theta_never_decreases():
  """Without the limit it would, because the dimension is rounded up."""
  assert ntk.scaled_theta(5e5, 128, 4096, 4100) == 5e5


def test_scaled_network_is_a_network_with_another_theta():
  tokens = jax.random.randint(jax.random.key(0), (1, 64), 0, 24)
  labels = masks.bidirectional(tokens >= 0)

  def hidden(**changes):
    c, params = tiny.model(**changes), tiny.strong_params()
    return np.asarray(transformer.bind(c, params)(tokens, labels))

  theta = ntk.scaled_theta(10.0, 8, 16, 64)
  scaled = hidden(rope_theta=10.0, rope_scaling=(16, 64))
  np.testing.assert_array_equal(scaled, hidden(rope_theta=theta))
  assert np.abs(scaled - hidden(rope_theta=10.0)).max() > 0.01


def test_flags_set_the_scaling_and_the_length_of_rows():
  config = tiny.config({'data.length': 16})
  scale_rows(config, None)
  assert (config.model.rope_scaling, config.data.length) == ((), 16)
  scale_rows(config, ['16', '64'])
  assert (config.model.rope_scaling, config.data.length) == ((16, 64), 64)
  scale_rows(config, (16, 128))
  assert (config.model.rope_scaling, config.data.length) == ((16, 128), 128)
  with pytest.raises(UserError, match='only the second of two numbers can'):
    scale_rows(config, (128, 256))


LLAMA = {'model.rope_scaling': (8.0, 1.0, 4.0, 32.0)}


@pytest.mark.parametrize(
  ('keys', 'scaling', 'message'),
  [
    ({}, ['16'], 'must be two integers'),
    ({}, ['16', '64k'], 'must be two integers.* such as 4096,16384'),
    ({}, [16, 16], 'at least 4.* which are more'),
    ({}, [3, 64], 'at least 4'),
    ({}, [-64, -16], 'must be'),
    ({'objective.name': 'autoregressive'}, [16, 64], 'bidirectional attention'),
    ({'objective.name': 'block_diffusion'}, [16, 64], "'block_diffusion', or"),
    ({'model.rope_theta': 1.0}, [16, 64], 'rope_theta above 1, not 1.0'),
    (LLAMA, [16, 64], r'has config.model.rope_scaling=\(8.0, 1.0, 4.0, 32.0\)'),
  ],
)
def test_bad_scaling_is_one_line(keys, scaling, message):
  with pytest.raises(UserError, match=message) as error:
    scale_rows(tiny.config(keys), scaling)
  assert '\n' not in str(error.value)
