"""Caches that change no token: of left-to-right networks, and of one layer.

The keys of a network with one layer depend on their own tokens only, so an
approximate cache is exact for it while the tokens outside a window do not
change.
"""

import contextlib
import dataclasses
import itertools
import types

import fake_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled
import tiny

from maskdiff.distributed import mesh
from maskdiff.model import cache as cache_lib
from maskdiff.model import masks, transformer
from maskdiff.sampling import layouts, passes, sampler
from maskdiff.sampling.serve import RowRequest, serve
from maskdiff.sampling.settings import SamplerConfig, split

pytestmark = pytest.mark.usefixtures('two_lengths')
MASK, EOS, VOCAB = 4, 5, 16
MODEL = tiny.model(vocab_size=VOCAB, embed=32, heads=4, kv_heads=2, mlp=48)
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15, 7, 7, 9]]
ENCODE = lambda text: [7 + ord(letter) % 9 for letter in text]
REQUESTS = {
  'prompts': layouts.continue_prompts(PROMPTS, 12),
  'gaps': layouts.fill_gaps(
    ['ab{{5}}cde{{3}}', '{{2}}abcdefghijk{{1}}n{{9}}'], ENCODE
  ),
}


def network_of(**changes):
  """Returns a network with weights larger than initial ones."""
  fields = {k: changes.pop(k) for k in ('objective',) if k in changes}
  config = dataclasses.replace(MODEL, **changes)
  params = transformer.init(config, jax.random.key(0))
  params = jax.tree.map(lambda w: w * 2 if w.ndim > 1 else w, params)
  return fake_networks.network(
    config, params, mask_id=MASK, eos_id=EOS, **fields
  )


AUTOREGRESSIVE = network_of(objective='autoregressive')
ONE_BY_ONE = dict(block_length=1)  # one step per slot
CACHED = ONE_BY_ONE | dict(cache='prefix')


@pytest.mark.parametrize('temperature', [0.0, 0.9])
@pytest.mark.parametrize('name', REQUESTS)
def test_autoregressive_cache_changes_no_token(name, temperature):
  request, options = REQUESTS[name], dict(temperature=temperature)
  plain = sampled.complete(AUTOREGRESSIVE, ONE_BY_ONE | options, request)
  cached = sampled.complete(AUTOREGRESSIVE, CACHED | options, request)
  for field in ('canvas', 'filled_at', 'forwards'):
    np.testing.assert_array_equal(getattr(cached, field), getattr(plain, field))
  np.testing.assert_allclose(cached.confidence, plain.confidence, atol=1e-5)
  valid = request.valid.sum(axis=1)
  # A row is computed whole at its start and after given tokens.
  starts = request.fill & ~np.pad(request.fill, ((0, 0), (1, 0)))[:, :-1]
  slots, starts = request.fill.sum(axis=1), starts.sum(axis=1)
  np.testing.assert_array_equal(
    cached.positions, starts * valid + slots - starts
  )


@pytest.mark.slow
def test_hidden_slots_shorten_the_first_pass(all_lengths):
  """With lookahead=0 the first pass of a row ends at its first slot."""
  request, lengths = REQUESTS['prompts'], np.array(list(map(len, PROMPTS)))
  cached = sampled.complete(AUTOREGRESSIVE, CACHED, request)
  hidden = sampled.complete(AUTOREGRESSIVE, CACHED | dict(lookahead=0), request)
  np.testing.assert_array_equal(hidden.canvas, cached.canvas)
  np.testing.assert_array_equal(hidden.positions, lengths + 12)


@pytest.mark.slow
def test_autoregressive_cache_on_a_mesh_equals_one_device():
  request = REQUESTS['prompts']
  expected = sampled.complete(AUTOREGRESSIVE, CACHED, request).canvas
  with jax.set_mesh(mesh.make_mesh(fsdp=4, tensor=2)):
    actual = sampled.complete(AUTOREGRESSIVE, CACHED, request).canvas
  np.testing.assert_array_equal(actual, expected)


def test_bfloat16_rows_with_a_cache_do_not_depend_on_the_batch():
  """Rows of one length, so that one program serves all of them."""
  network = network_of(objective='autoregressive', dtype='bfloat16')
  network = dataclasses.replace(
    network, params=jax.tree.map(lambda w: w.astype('bfloat16'), network.params)
  )
  request, values = REQUESTS['prompts'], CACHED | dict(temperature=0.7)
  together = np.asarray(sampled.complete(network, values, request).canvas)
  for order in ([1, 2, 0], [2, 2, 1]):
    mixed = request._replace(
      canvas=request.canvas[order],
      fill=request.fill[order],
      valid=request.valid[order],
      seeds=request.seeds[order],
    )
    np.testing.assert_array_equal(
      sampled.complete(network, values, mixed).canvas, together[order]
    )


GUIDED = dict(guidance=0.7, remasking='threshold', threshold=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, predict_next, options',
  [
    ('prompts', False, dict(cache='dual')),
    ('gaps', False, dict(cache='prefix')),
    ('prompts', True, dict(cache='dual', **GUIDED)),
    ('gaps', True, dict(cache='dual')),
    ('prompts', True, dict(cache='prefix', lookahead=1)),
    ('gaps', True, dict(cache='prefix', temperature=0.8)),
  ],
)
def test_cache_of_one_layer_changes_no_token(name, predict_next, options):
  network = network_of(layers=1, predict_next=predict_next)
  values = dict(block_length=4) | options
  cached = sampled.complete(network, values, REQUESTS[name])
  plain = sampled.complete(network, values | dict(cache='none'), REQUESTS[name])
  np.testing.assert_array_equal(cached.canvas, plain.canvas)
  np.testing.assert_array_equal(cached.filled_at, plain.filled_at)
  np.testing.assert_allclose(cached.confidence, plain.confidence, atol=1e-5)
  assert np.sum(cached.positions) < np.sum(plain.positions)


def test_window_has_the_position_before_each_run_of_slots():
  network = types.SimpleNamespace(
    objective='masked_diffusion',
    config=types.SimpleNamespace(predict_next=True),
    block_length=0,
    ahead=0,
  )
  slots = np.array([[4, 5, 6, 7], [0, 1, 5, 6], [3, 8, 9, 12], [9, 11, 12, 12]])
  c, length = SamplerConfig(cache='dual'), 12
  ((_, size),) = passes.shapes(network, c, length, slots[:, None])
  assert size == 8
  positions, columns = passes.window(network, c, (length, size), slots)
  found = [row[(row >= 0) & (row < length)].tolist() for row in positions]
  assert found == [
    [3, 4, 5, 6, 7],
    [0, 1, 4, 5, 6],
    [2, 3, 7, 8, 9],
    [8, 9, 10, 11],
  ]
  for row, slot in np.argwhere(slots < length):
    assert positions[row, columns[row, slot]] == slots[row, slot]
  ((_, size),) = passes.shapes(network, c, length, slots[:1, None])
  assert size == 5


@pytest.mark.slow
@pytest.mark.parametrize('temperature', [0.0, 0.8])
def test_served_rows_with_an_exact_cache_equal_rows_without(temperature):
  """Rows join while others use their caches; one pass fills a row's cache."""
  rows = [
    [*prompt, *[None] * n]
    for prompt, n in zip([*PROMPTS, [9], [8, 7]], (3, 9, 6, 4, 7), strict=True)
  ]
  rows.append([7, None, None, 9, 10, None, None])
  c, settings = split(CACHED | dict(temperature=temperature))
  requests = [RowRequest(i, row, i, settings) for i, row in enumerate(rows)]
  answers = serve(AUTOREGRESSIVE, c, requests, rows=2, length=16)
  found = {answer.id: answer for answer in answers}
  assert sorted(found) == list(range(len(rows)))
  together = layouts.lay_out(rows)
  options = ONE_BY_ONE | dict(temperature=temperature)
  plain = sampled.complete(AUTOREGRESSIVE, options, together)
  for i, row in enumerate(rows):
    answer = found[i]
    assert answer.error is None
    np.testing.assert_array_equal(
      answer.recording.tokens, plain.canvas[i, : len(row)]
    )
    assert answer.forwards == plain.forwards[i]
    slots = np.array([token is None for token in row])
    starts = (slots & ~np.pad(slots, (1, 0))[:-1]).sum()
    assert answer.positions == starts * len(row) + slots.sum() - starts


def rows_of(lengths, slots):
  return [[7] * length + [None] * slots for length in lengths]


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [None, dict(fsdp=4, tensor=2)])
def test_server_with_a_cache_compiles_one_program(sizes):
  c, settings = split(CACHED | dict(lookahead=0))
  rows = rows_of([3, 1, 5, 2, 4], 6)
  requests = [RowRequest(i, row, i, settings) for i, row in enumerate(rows)]
  sampler.run.clear_cache()
  devices = mesh.make_mesh(**sizes) if sizes else None
  with jax.set_mesh(devices) if sizes else contextlib.nullcontext():
    answers = list(serve(AUTOREGRESSIVE, c, requests, rows=2, length=16))
  assert len(answers) == 5 and not any(a.error for a in answers)
  assert sampler.run._cache_size() == 1


@pytest.mark.slow
def test_broken_row_does_not_break_the_next_request_of_its_row():
  """The keys of the first request are NaN; the second is shorter."""
  embed = AUTOREGRESSIVE.params['embed'].at[15].set(jnp.nan)
  network = dataclasses.replace(
    AUTOREGRESSIVE, params=AUTOREGRESSIVE.params | {'embed': embed}
  )
  c, settings = split(CACHED | dict(lookahead=0, logits_eos_inf=True))
  rows = [[7] * 20 + [15] * 8 + [None] * 4, *rows_of([3], 26)]
  requests = [RowRequest(i, row, i, settings) for i, row in enumerate(rows)]
  broken, after = serve(network, c, requests, rows=1, length=32)
  (alone,) = serve(network, c, requests[1:], rows=1, length=32)
  assert broken.error and not alone.error and not after.error
  np.testing.assert_array_equal(after.recording.tokens, alone.recording.tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
  'objective, values, row',
  [
    ('masked_diffusion', dict(block_length=4, cache='dual'), [7] + [None] * 8),
    ('autoregressive', CACHED, [7, None, None, 8, None, 9, None]),
  ],
)
def test_row_that_needs_another_pass_is_not_starved(objective, values, row):
  """Short requests join all the time and use their caches."""
  network = network_of(objective=objective)
  c, settings = split(values)
  long = RowRequest('long', row, 0, settings)

  def requests():
    yield long
    for i in itertools.count():
      yield RowRequest(i, rows_of([2], 3 + i % 2)[0], i, settings)

  answers = serve(network, c, requests(), rows=3, length=16)
  found = [answer.id for answer in itertools.islice(answers, 12)]
  assert 'long' in found


def test_appending_copies_no_cache():
  """A step writes one position per row, not the arrays of all positions."""
  labels = masks.causal(np.ones((4, 512), bool))
  cache = cache_lib.empty(MODEL, labels)
  step = jax.jit(cache_lib.write, donate_argnums=0)
  new = jnp.zeros((*cache.k.shape[:3], 1, cache.k.shape[4]))
  places = jnp.zeros((4, 1), jnp.int32)
  window = masks.take(labels, places)
  compiled = step.lower(cache, places, new, new, window).compile()
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < cache.k.nbytes / 8
