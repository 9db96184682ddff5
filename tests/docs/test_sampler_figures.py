"""Counts about the sampler in docs/speed.md follow from its benchmark."""

import pathlib
import sys

import page_tables

from maskdiff.model import transformer

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'benchmarks'))

import sampler as benchmark  # noqa: E402

ROWS = (
  "FLOPs of the loop's products, against the sampler's",
  'the same, if the sampler projected nothing',
)


def flops(model, canvas, projected):
  """Returns the FLOPs of a forward pass that projects some of its slots."""
  _, inner = transformer.num_params(model)
  scores = 2 * model.layers * canvas**2 * model.heads * model.head_dim
  head = model.vocab_size * model.embed
  return 2 * (inner * canvas + scores + head * projected)


def test_the_loop_has_so_many_more_flops_than_the_sampler():
  """The sampler projects a block, and the published loop the whole canvas."""
  page = (ROOT / 'docs' / 'speed.md').read_text()
  lines = map(page_tables.cells, page.splitlines())
  rows = {name: cells for name, *cells in lines if name in ROWS}
  ratios, bounds = [], []
  for model, shapes in benchmark.CASES:
    for prompt, gen_length, block_length, _ in shapes:
      canvas = prompt + gen_length
      loop = flops(model, canvas, canvas)
      ratios.append(f'{loop / flops(model, canvas, block_length):.2f}x')
      bounds.append(f'{loop / flops(model, canvas, 0):.2f}x')
  torch = rows.pop('against PyTorch 2.13 running the published loop')
  assert rows == dict(zip(ROWS, (ratios, bounds), strict=True))
