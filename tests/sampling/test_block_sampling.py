"""Networks trained on blocks: filled block by block, with an exact cache."""

import dataclasses

import fake_networks
import jax
import numpy as np
import pytest
import sampled
import tiny
from slow import SLOW

from maskdiff.distributed import mesh
from maskdiff.errors import UserError
from maskdiff.model import transformer
from maskdiff.objectives import table
from maskdiff.sampling import layouts
from maskdiff.sampling.request import divide
from maskdiff.sampling.serve import RowRequest, serve
from maskdiff.sampling.settings import split

pytestmark = pytest.mark.usefixtures('two_lengths')
MASK, EOS, VOCAB, BLOCK = 4, 5, 16, 4
MODEL = tiny.model(vocab_size=VOCAB, embed=32, heads=4, kv_heads=2, mlp=48)
# Prompts that end within a block, at its end, and after one token.
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15, 7, 7, 9], [9, 8]]
ENCODE = lambda text: [7 + ord(letter) % 9 for letter in text]
REQUESTS = {
  'prompts': layouts.continue_prompts(PROMPTS, 11),
  'gaps': layouts.fill_gaps(
    ['ab{{5}}cde{{3}}', '{{2}}abcdefghijk{{1}}n{{9}}'], ENCODE
  ),
}
OPTIONS = {
  'greedy': {},
  'sampled': dict(temperature=0.9),
  'threshold': dict(remasking='threshold', threshold=0.3),
  'first_hitting': dict(remasking='first_hitting', temperature=1.0),
  'sub-blocks': dict(block_length=2),
  'token by token': dict(block_length=1),
}


def network_of(block_length=BLOCK, predict_next=False):
  """Returns a network with weights larger than initial ones."""
  params = transformer.init(MODEL, jax.random.key(0))
  params = jax.tree.map(lambda w: w * 2 if w.ndim > 1 else w, params)
  return fake_networks.network(
    dataclasses.replace(MODEL, predict_next=predict_next),
    params,
    mask_id=MASK,
    eos_id=EOS,
    objective='block_diffusion',
    block_length=block_length,
  )


NETWORK = network_of()
NETWORKS = {'own': NETWORK, 'next': network_of(predict_next=True)}


def values_of(name, **changes):
  return dict(block_length=BLOCK) | OPTIONS[name] | changes


# The division of a row into blocks


def test_blocks_of_a_row_are_those_of_its_positions():
  fill = np.array([0, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1], bool)
  block, index = divide(fill, 4, by_position=True)
  assert block[fill].tolist() == [0, 1, 1, 1, 2, 2]
  assert index[fill].tolist() == [0, 0, 1, 2, 0, 1]
  block, index = divide(fill, 4, by_position=False)
  assert block[fill].tolist() == [0, 0, 0, 0, 1, 1]
  assert index[fill].tolist() == [0, 1, 2, 3, 0, 1]
  assert (block[~fill] == -1).all() and (index[~fill] == 0).all()


@pytest.mark.slow
def test_rows_are_filled_block_by_block():
  values = values_of('greedy', steps=16, gen_length=16)
  request = layouts.continue_prompts([[7, 8, 9]], 16)
  filled_at = np.asarray(sampled.complete(NETWORK, values, request).filled_at)
  by_block = [filled_at[0, i : i + 4] for i in range(4, 16, 4)]
  assert filled_at[0, 3] == 1
  for before, after in zip(by_block, by_block[1:], strict=False):
    assert before.max() < after.min()


@pytest.mark.slow
def test_each_step_predicts_as_the_training_does():
  """The canvas of every step, as [noisy ; clean] with its block masked."""
  values = values_of('greedy')
  request = layouts.continue_prompts([[7, 8, 9]], 9)
  trace = sampled.trace(NETWORK, values, request)
  model = transformer.bind(MODEL, NETWORK.params)
  final = trace[-1]
  for before, after in zip(trace, trace[1:], strict=False):
    block = np.argmax(before[0] == MASK) // BLOCK
    masked = before == MASK
    valid = np.ones(final.shape, bool)
    # Later blocks are not seen, so their tokens may be those of the answer.
    inputs, labels = table.show_masked(NETWORK, final, masked, valid)
    logits = np.array(model.logits(model(inputs, labels)))[0, : final.shape[1]]
    logits[:, MASK] = -np.inf
    here = slice(block * BLOCK, (block + 1) * BLOCK)
    changed = np.flatnonzero(before[0] != after[0])
    assert set(changed) <= set(range(here.start, here.stop))
    np.testing.assert_array_equal(
      logits.argmax(axis=-1)[changed], after[0, changed]
    )


# The cache


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, option, predicted',
  [
    ('prompts', 'threshold', 'own'),
    SLOW('prompts', 'token by token', 'own'),
    SLOW('prompts', 'first_hitting', 'own'),
    SLOW('gaps', 'sub-blocks', 'own'),
    SLOW('gaps', 'greedy', 'own'),
    SLOW('gaps', 'threshold', 'next'),
  ],
)
def test_cache_changes_no_token(name, option, predicted):
  request, network = REQUESTS[name], NETWORKS[predicted]
  plain = sampled.complete(network, values_of(option), request)
  cached = sampled.complete(network, values_of(option, cache='prefix'), request)
  for field in ('canvas', 'filled_at', 'forwards'):
    np.testing.assert_array_equal(getattr(cached, field), getattr(plain, field))
  np.testing.assert_allclose(cached.confidence, plain.confidence, atol=1e-5)
  assert np.sum(cached.positions) < np.sum(plain.positions)


@pytest.mark.slow
@pytest.mark.parametrize(
  'predicted, size', [('own', BLOCK), SLOW('next', BLOCK // 2)]
)
def test_finished_block_enters_the_cache_without_a_pass_of_its_own(
  predicted, size
):
  """Two blocks per row and the prompt: the number of positions is exact."""
  values = dict(block_length=size, cache='prefix', steps=8, gen_length=8)
  request = layouts.continue_prompts([[7] * 8, [7] * 6], 8)
  carry = sampled.complete(NETWORKS[predicted], values, request)
  np.testing.assert_array_equal(carry.forwards, [8, 8])
  # The first pass of a block computes all of it, or the leading slot only.
  begin = lambda slots: 4 + (1 if predicted == 'next' else slots)
  aligned = (8 + 4) + 3 * 4 + begin(4) + 3 * 4
  # Slots 6 to 13: blocks of 2, 4 and 2 slots; the last ends with the row.
  split_block = 8 + 4 + begin(4) + 3 * 4 + begin(2) + 2
  np.testing.assert_array_equal(carry.positions, [aligned, split_block])


@pytest.mark.slow
def test_step_of_a_leading_slot_does_not_count():
  """Two steps for the other three slots of each block."""
  values = values_of('greedy', steps=4, gen_length=8)
  request = layouts.continue_prompts([[7] * 8], 8)
  carry = sampled.complete(NETWORKS['next'], values, request)
  filled_at = np.asarray(carry.filled_at)
  for block, steps in ((2, [1, 2, 2, 3]), (3, [4, 5, 5, 6])):
    of_block = filled_at[0, block * BLOCK : (block + 1) * BLOCK]
    assert of_block[0] == steps[0]
    assert sorted(of_block) == steps


@pytest.mark.slow
@pytest.mark.parametrize('cache', ['none', 'prefix'])
def test_rows_do_not_depend_on_the_batch(cache):
  """Rows of one length, so that one program serves all of them."""
  values = values_of('threshold', cache=cache, temperature=0.7)
  request = REQUESTS['prompts']
  together = sampled.complete(NETWORK, values, request)
  for order in ([1, 2, 0, 3], [2, 2, 1, 3]):
    mixed = request._replace(
      canvas=request.canvas[order],
      fill=request.fill[order],
      valid=request.valid[order],
      seeds=request.seeds[order],
    )
    found = sampled.complete(NETWORK, values, mixed)
    for field in ('canvas', 'forwards', 'positions'):
      np.testing.assert_array_equal(
        getattr(found, field), np.asarray(getattr(together, field))[order]
      )


@pytest.mark.slow
def test_cached_rows_on_a_mesh_equal_one_device():
  values = values_of('greedy', cache='prefix')
  request = REQUESTS['prompts']
  expected = sampled.complete(NETWORK, values, request).canvas
  with jax.set_mesh(mesh.make_mesh(fsdp=4, tensor=2)):
    actual = sampled.complete(NETWORK, values, request).canvas
  np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
  'option, predicted', [('threshold', 'own'), SLOW('sub-blocks', 'next')]
)
def test_served_rows_equal_rows_without_a_cache(option, predicted):
  """Rows join while others use their caches."""
  rows = [
    [*prompt, *[None] * n]
    for prompt, n in zip([*PROMPTS, [8, 7]], (3, 9, 6, 4, 7), strict=True)
  ]
  rows.append([7, None, None, 9, 10, None, None])
  network = NETWORKS[predicted]
  c, settings = split(values_of(option, cache='prefix'))
  requests = [RowRequest(i, row, i, settings) for i, row in enumerate(rows)]
  found = {a.id: a for a in serve(network, c, requests, rows=2, length=16)}
  plain = sampled.complete(network, values_of(option), layouts.lay_out(rows))
  for i, row in enumerate(rows):
    assert found[i].error is None
    np.testing.assert_array_equal(
      found[i].recording.tokens, plain.canvas[i, : len(row)]
    )
    assert found[i].forwards == plain.forwards[i]


@pytest.mark.slow
def test_open_length_ends_at_eos(all_lengths):
  """Nothing after the block of the first eos is computed."""
  head = NETWORK.params['head'].at[:, EOS].multiply(4.0)
  network = dataclasses.replace(NETWORK, params=NETWORK.params | {'head': head})
  values = values_of('sampled', cache='prefix', stop_at_eos=True)
  request = layouts.continue_prompts(PROMPTS, 24)
  carry = sampled.complete(network, values, request)
  canvas, found = np.asarray(carry.canvas), 0
  for row, fill, filled_at in zip(
    canvas, request.fill, np.asarray(carry.filled_at), strict=True
  ):
    eos = np.flatnonzero(fill & (row == EOS))
    if eos.size and eos[0] < 16:
      found += 1
      after = np.arange(len(row)) >= (eos[0] // BLOCK + 1) * BLOCK
      assert (row[after & fill] == EOS).all()
      assert (filled_at[after & fill] == filled_at[fill].max()).all()
  assert found


# Errors


@pytest.mark.parametrize(
  'changes, problem',
  [
    (dict(block_length=3), 'block_length=3 does not divide the blocks of 4'),
    (dict(lookahead=1), 'lookahead=1: a model trained with objective'),
    (dict(guidance=0.5), 'guidance=0.5 needs a model trained with masked'),
    (dict(cache='dual'), 'its cache is exact; set cache=prefix'),
    (dict(cache='prefix', refresh=2), 'its cache is exact; set cache=prefix'),
  ],
)
def test_settings_that_do_not_fit_are_refused(changes, problem):
  with pytest.raises(UserError, match=problem):
    sampled.begin(NETWORK, values_of('greedy', **changes), REQUESTS['prompts'])
