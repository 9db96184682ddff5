"""Counts about the sampler in docs/speed.md follow from its benchmark."""

import pathlib
import sys

from page_tables import cells, number

from maskdiff.model import transformer

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'benchmarks'))

import sampler as benchmark  # noqa: E402

TORCH, MORE, MOST = (
  'against PyTorch 2.13 running the published loop',
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
  rows = {
    name: [number(cell.rstrip('x')) for cell in values]
    for name, *values in map(cells, page.splitlines())
    if name in (TORCH, MORE, MOST)
  }
  more, most = [], []
  for model, shapes in benchmark.CASES:
    for prompt, gen_length, block_length, _ in shapes:
      canvas = prompt + gen_length
      loop = flops(model, canvas, canvas)
      more.append(round(loop / flops(model, canvas, block_length), 2))
      most.append(round(loop / flops(model, canvas, 0), 2))
  assert (rows[MORE], rows[MOST]) == (more, most)
  lifted = [
    f'{ratio * high / low:.1f}x'
    for ratio, low, high in zip(rows[TORCH], more, most, strict=True)
  ]
  said = f'to {", ".join(lifted[:-1])} and {lifted[-1]}'
  assert said in ' '.join(page.split())
