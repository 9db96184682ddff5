"""Sampling with a KV cache, and with slots hidden by `lookahead`."""

import dataclasses
import itertools

import fake_networks
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled
import tiny

from maskdiff.distributed import mesh
from maskdiff.errors import UserError
from maskdiff.model import transformer
from maskdiff.sampling import layouts
from maskdiff.sampling.serve import RowRequest, serve
from maskdiff.sampling.settings import split

pytestmark = pytest.mark.usefixtures('two_lengths')
MASK, EOS, VOCAB = 4, 5, 16
TINY = tiny.model(
  vocab_size=VOCAB, embed=32, heads=4, kv_heads=2, mlp=48, tie_embeddings=True
)
PLAIN = dict(
  steps=12,
  block_length=4,
  temperature=0.0,
  remasking='low_confidence',
  gen_length=12,
)
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15, 7, 7, 9]]


def config(**changes):
  return {**PLAIN, **changes}


def network_of(config, params):
  return fake_networks.network(config, params, mask_id=MASK, eos_id=EOS)


@pytest.fixture(scope='module')
def params():
  """Returns weights larger than initial ones, for less uniform predictions."""
  tree = transformer.init(TINY, jax.random.key(0))
  return jax.tree.map(lambda w: w * 2 if w.ndim > 1 else w, tree)


@pytest.fixture(scope='module')
def network(params):
  return network_of(TINY, params)


# The recorded runs of Fast-dLLM


def fast_dllm_request(name, mode, variant):
  """Returns arguments of `generate`, recorded canvases and pass lengths."""
  with np.load(golden_models.GOLDEN / 'fast_dllm.npz') as file:
    of = lambda key: file[f'{name}.{mode}.{key}']
    request = layouts.continue_prompts(
      of('prompt').tolist(), int(of('gen_length'))
    )
    c = config(
      steps=int(of('steps')),
      block_length=int(of('block_length')),
      gen_length=0,
      cache={'nocache': 'none'}.get(variant, variant),
    )
    tau, canvases = float(of('threshold')), of(f'{variant}.trace')
    lengths = of(f'{variant}.forward_lengths')
    mask_id = int(file[f'{name}.ids'][0])
  if tau >= 0:
    c |= dict(remasking='threshold', threshold=tau)
  network = fake_networks.network(
    *golden_models.load(name), predict_mask=True, mask_id=mask_id
  )
  return (network, c, request), canvases, lengths


VARIANTS = ('nocache', 'prefix', 'dual')


@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('name', ['model_a', 'model_b'])
@pytest.mark.parametrize('mode', ['quota8', 'tau0', 'tau0.5', 'tau0.9'])
def test_canvases_and_counts_equal_fast_dllm(mode, name, variant):
  """Compares the canvas of every step, forward passes and positions.

  Fast-dLLM also computes blocks that are already complete. These passes change
  nothing and are left out.
  """
  request, recorded, lengths = fast_dllm_request(name, mode, variant)
  changed = [(a != b).any() for a, b in itertools.pairwise(recorded)]
  np.testing.assert_array_equal(
    sampled.trace(*request)[:, 0], recorded[[True, *changed]]
  )
  carry = sampled.complete(*request)
  assert int(carry.forwards[0]) == int(carry.calls) == sum(changed)
  assert int(carry.positions[0]) == sum(lengths[changed])
  if variant == 'nocache':
    assert all(changed)
  elif mode == 'tau0':  # one step fills a block; Fast-dLLM makes another pass
    assert len(lengths) == 2 * sum(changed)


REQUESTS = {
  'prompts': lambda: layouts.continue_prompts(PROMPTS, 12),
  'gaps': lambda: layouts.fill_gaps(
    ['ab{{5}}cde{{3}}', '{{2}}abcdefghijk{{1}}n{{9}}'],
    lambda text: [7 + ord(letter) % 9 for letter in text],
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  'cache, layout, options',
  [
    ('dual', 'prompts', dict()),
    ('prefix', 'gaps', dict(guidance=0.7, steps=6)),
    ('dual', 'gaps', dict(remasking='threshold', threshold=0.3)),
    ('prefix', 'prompts', dict(temperature=0.8, lookahead=1)),
  ],
)
def test_cache_refreshed_every_step_changes_nothing(
  network, cache, layout, options
):
  request, cached = REQUESTS[layout](), dict(cache=cache, refresh=1)
  plain = sampled.complete(network, config(**options), request)
  cached = sampled.complete(network, config(**cached, **options), request)
  for field in ('canvas', 'forwards', 'positions'):
    np.testing.assert_array_equal(getattr(plain, field), getattr(cached, field))


@pytest.mark.slow
@pytest.mark.parametrize('cache, refresh', [('prefix', 0), ('dual', 3)])
def test_cache_saves_positions(all_lengths, network, cache, refresh):
  """Samples twelve slots in blocks of four, one slot per step."""
  c = config(cache=cache, refresh=refresh)
  request = layouts.continue_prompts(PROMPTS, 12)
  carry = sampled.complete(network, c, request)
  assert carry.forwards.tolist() == [12] * 3
  assert int(carry.calls) == 12
  steps = [step % refresh if refresh else step for step in range(4)]
  for row, prompt in enumerate(PROMPTS):
    whole = len(prompt) + 12
    windows = [4] * 3 if cache == 'dual' else [12, 8, 4]
    expected = sum(w if s else whole for w in windows for s in steps)
    assert int(carry.positions[row]) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
  'options',
  [
    dict(cache='prefix', remasking='threshold', threshold=0.3),
    dict(cache='dual', refresh=2, temperature=0.9, guidance=0.6),
    dict(cache='dual', lookahead=1, remasking='ancestral'),
    dict(lookahead=0, stop_at_eos=True, temperature=0.8),
  ],
  ids=lambda o: '-'.join(f'{k}={v}' for k, v in o.items()),
)
def test_rows_do_not_depend_on_the_batch(network, options):
  c = config(**options)
  request = layouts.continue_prompts(PROMPTS, 12)
  together = sampled.complete(network, c, request)
  for row in (1,):
    alone = layouts.continue_prompts([PROMPTS[row]], 12, [row])
    alone = sampled.complete(network, c, alone)
    for field in ('canvas', 'filled_at'):
      np.testing.assert_array_equal(
        getattr(alone, field)[0],
        getattr(together, field)[row][request.valid[row]],
      )
    assert alone.forwards[0] == together.forwards[row]
    assert alone.positions[0] == together.positions[row]


GAPS = [
  'a{{9}}',
  'abcdefg{{16}}',
  '{{3}}ab{{4}}c',
  'abc{{12}}',
  '{{1}}',
]


@pytest.mark.slow
@pytest.mark.parametrize(
  'cache', ['dual', pytest.param('prefix', marks=pytest.mark.slow)]
)
def test_served_rows_with_a_cache_do_not_depend_on_the_batch(params, cache):
  """Rows differ in length, and join the batch while a cache is in use."""
  # Lower confidence, so that cached keys lead to other tokens.
  network = network_of(
    TINY, jax.tree.map(lambda w: w * 0.75 if w.ndim > 1 else w, params)
  )
  encode = lambda text: [7 + ord(letter) % 9 for letter in text]
  c = config(
    steps=16,
    gen_length=16,
    remasking='threshold',
    threshold=0.3,
    temperature=0.8,
    cache=cache,
    refresh=0,
  )
  request = layouts.fill_gaps(GAPS, encode)
  program, settings = split(c)
  asked = [
    RowRequest(i, layouts.gap_row(text, encode), i, settings)
    for i, text in enumerate(GAPS)
  ]
  length = request.canvas.shape[1]
  found = {a.id: a for a in serve(network, program, asked, 2, length)}
  assert sorted(found) == list(range(len(GAPS)))
  for row, answer in found.items():
    alone = layouts.fill_gaps([GAPS[row]], encode, [row])
    # Padded to one length, so that one program serves all rows.
    alone = layouts.widen(alone, length)
    alone = sampled.complete(network, c, alone)
    valid = request.valid[row]
    tokens = answer.recording.tokens
    np.testing.assert_array_equal(tokens, alone.canvas[0][valid])
    assert answer.forwards == alone.forwards[0]
    assert answer.positions == alone.positions[0]
  # The cache was in use: results without it differ.
  without = {**c, 'cache': 'none'}
  plain = sampled.complete(network, without, request)
  tokens = [found[row].recording.tokens for row in range(len(GAPS))]
  without = np.asarray(plain.canvas)[request.valid]
  assert (np.concatenate(tokens) != without).any()
  assert sum(a.positions for a in found.values()) < plain.positions.sum()


@pytest.mark.slow
@pytest.mark.parametrize('cache', ['none', 'dual'])
def test_mesh_equals_one_device(network, cache):
  """Heads and windows need not divide evenly among the devices."""
  c = config(cache=cache)
  request = layouts.continue_prompts([*PROMPTS, [8, 8]], 12)
  expected = sampled.complete(network, c, request)
  for sizes in (dict(fsdp=4, tensor=2), dict(tensor=4, sequence=2)):
    with jax.set_mesh(mesh.make_mesh(**{'fsdp': 1} | sizes)):
      np.testing.assert_array_equal(
        sampled.complete(network, c, request).canvas, expected.canvas
      )


# Slots hidden by lookahead


def count_seen(given, tokens, valid):
  """Returns logits for token 3 + n, where n is the number of visible masks."""
  seen = ((tokens == MASK) & valid).sum(axis=1)
  logits = 9.0 * jax.nn.one_hot(seen + 3, VOCAB)
  return jnp.broadcast_to(logits[:, None], (*tokens.shape, VOCAB))


@pytest.mark.slow
@pytest.mark.parametrize(
  'lookahead, seen',
  [(-1, [12, 8, 4]), (0, [4, 4, 4]), (1, [8, 8, 4])],
)
def test_lookahead_limits_the_visible_masks(monkeypatch, lookahead, seen):
  fake_networks.put_in(monkeypatch)
  network = fake_networks.network(count_seen, predict_mask=True, mask_id=MASK)
  c = config(lookahead=lookahead, steps=3)
  request = layouts.continue_prompts([[7], [8, 8, 8]], 12)
  carry = sampled.complete(network, c, request)
  for row, prompt in enumerate([1, 3]):
    answer = carry.canvas[row][prompt : prompt + 12]
    assert answer.tolist() == (np.repeat(seen, 4) + 3).tolist()


@pytest.mark.slow
def test_hidden_slots_have_no_influence(network):
  """Equals one request per block, with a canvas that ends at the block."""
  c = config(lookahead=0)
  request = layouts.continue_prompts(PROMPTS[:1], 12)
  carry = sampled.complete(network, c, request)
  tokens, positions = PROMPTS[0], 0
  for _ in range(3):
    block = layouts.continue_prompts([tokens], 4)
    one = sampled.complete(network, config(steps=4, gen_length=4), block)
    tokens = one.canvas[0].tolist()
    positions += int(one.positions[0])
  assert carry.canvas[0].tolist() == tokens
  assert int(carry.positions[0]) == positions


@pytest.mark.slow
def test_unused_slots_cost_nothing(all_lengths, monkeypatch):
  """With stop_at_eos and lookahead, gen_length does not change the work."""
  found = []
  for room in (12, 48):
    c = config(steps=room, gen_length=room, lookahead=0, stop_at_eos=True)
    request = layouts.continue_prompts([[7, 9]], room)
    network = network_of(
      lambda answer, tokens, valid: (
        9.0 * jax.nn.one_hot(answer[: tokens.shape[1]], VOCAB)[None]
      ),
      jnp.full(64, 9).at[7].set(EOS),
    )
    shapes = sampled.begin(network, c, request)[2]
    assert shapes[0][0] < 2 + 12
    with monkeypatch.context() as patch:
      fake_networks.put_in(patch)
      found.append(sampled.complete(network, c, request))
  assert found[0].forwards.tolist() == found[1].forwards.tolist() == [6]
  assert found[0].positions.tolist() == found[1].positions.tolist()


# Refusals


@pytest.mark.parametrize(
  'options, problem',
  [
    (dict(cache='fast'), "cache='fast': choose one of"),
    (dict(refresh=2), 'refresh=2 .*: set cache=dual or cache=prefix'),
    (dict(cache='dual', refresh=-1), 'refresh=-1'),
    (
      dict(objective='autoregressive', block_length=1, cache='dual'),
      'cache is exact; set cache=prefix and refresh=0',
    ),
    (
      dict(
        objective='autoregressive', block_length=1, cache='prefix', refresh=2
      ),
      'refresh=2: .* set cache=prefix and refresh=0',
    ),
  ],
)
def test_incompatible_settings_are_refused(network, options, problem):
  options = dict(options)
  objective = options.pop('objective', 'masked_diffusion')
  network = dataclasses.replace(network, objective=objective)
  request = layouts.continue_prompts(PROMPTS, 12)
  with pytest.raises(UserError, match=problem):
    sampled.complete(network, config(**options), request)


def test_lookahead_refuses_gaps(network):
  with pytest.raises(UserError, match='lookahead=0 hides slots at the end'):
    sampled.complete(network, config(lookahead=0), REQUESTS['gaps']())
