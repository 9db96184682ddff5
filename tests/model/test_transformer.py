"""The network: golden files, visibility, remat policies, meshes."""

import dataclasses
import functools
import math

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskdiff.distributed import mesh
from maskdiff.model import layers, masks, transformer
from maskdiff.model.attention import attend

TINY = tiny.model(layers=3, heads=4, kv_heads=2, mlp=32)
LLADA_8B = dataclasses.replace(
  TINY,
  vocab_size=126464,
  embed=4096,
  layers=32,
  heads=32,
  kv_heads=32,
  head_dim=128,
  mlp=12288,
)
LLADA_1B = dataclasses.replace(
  LLADA_8B,
  embed=2048,
  layers=22,
  heads=32,
  kv_heads=4,
  head_dim=64,
  mlp=5634,
)
MESHES = {
  'fsdp8': dict(fsdp=8),
  'replica2_fsdp2_tensor2': dict(replica=2, fsdp=2, tensor=2),
  'fsdp2_sequence2_tensor2': dict(fsdp=2, sequence=2, tensor=2),
}


@functools.partial(jax.jit, static_argnums=0)
def layer(config, weights, x, labels):
  """Applies one layer."""
  rotation = layers.rope(labels.pos, config.head_dim, config.rope_theta)
  attention = lambda q, k, v: attend(q, k, v, labels, labels, config.attention)
  return layers.block(config, weights, x, rotation, attention)[0]


def bidirectional(tokens):
  return masks.bidirectional(jnp.ones(tokens.shape, bool))


def random_tokens(config, batch=2, length=6, seed=0):
  random = np.random.default_rng(seed)
  return jnp.asarray(
    random.integers(0, config.vocab_size, (batch, length)), jnp.int32
  )


def draw_params(config):
  """Returns random weights and gains; a gain of 1 could hide an error."""
  random = np.random.default_rng(1)

  def draw(path, x):
    if path[-1].key.startswith('norm'):
      return random.uniform(0.8, 1.2, x.shape).astype(np.float32)
    return 0.2 * random.normal(size=x.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, transformer.shapes(config))


@pytest.fixture(scope='module')
def tiny_params():
  return draw_params(TINY)


# Golden files


@pytest.fixture(scope='module', params=['model_a', 'model_b'])
def golden(request):
  """Returns (config, parameters, arrays of forward.npz) of a golden model."""
  config, params = golden_models.load(request.param)
  with np.load(golden_models.GOLDEN / 'forward.npz') as arrays:
    prefix = request.param + '.'
    own = {
      key.removeprefix(prefix): value
      for key, value in arrays.items()
      if key.startswith(prefix)
    }
  return config, params, own


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens, labels):
  network = transformer.bind(config, params)
  return network.logits(network(tokens, labels))


def test_logits_are_those_of_llada(golden):
  config, params, arrays = golden
  ids = jnp.asarray(arrays['plain_ids'])
  np.testing.assert_allclose(
    logits(config, params, ids, bidirectional(ids)),
    arrays['plain_logits'],
    rtol=0,
    atol=2e-4,
  )


def test_each_layer_gives_the_hidden_states_of_llada(golden):
  """Each layer gets the recorded input of LLaDA's layer."""
  config, params, arrays = golden
  ids = jnp.asarray(arrays['plain_ids'])
  labels = bidirectional(ids)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  recorded = lambda n: jnp.asarray(arrays[f'plain_hidden_{n}'])
  close(layers.lookup(params['embed'], ids, 'float32'), recorded(0))
  for n in range(config.layers):
    weights = jax.tree.map(lambda w, n=n: w[n], params['blocks'])
    out = layer(config, weights, recorded(n), labels)
    if n == config.layers - 1:
      out = layers.rms_norm(out, params['norm'], config.norm_eps)
    close(out, recorded(n + 1))


def test_left_padding_is_hidden_as_in_llada(golden):
  config, params, arrays = golden
  ids = jnp.asarray(arrays['pad_ids'])
  real = arrays['pad_mask'] == 1
  assert not real.all()
  out = np.asarray(
    logits(config, params, ids, masks.bidirectional(jnp.asarray(real)))
  )
  np.testing.assert_allclose(
    out[real], arrays['pad_logits'][real], rtol=0, atol=2e-4
  )


def test_visible_padding_changes_the_logits(golden):
  """Negative control: the same rows without an attention mask."""
  config, params, arrays = golden
  ids = jnp.asarray(arrays['pad_ids'])
  out = np.asarray(logits(config, params, ids, bidirectional(ids)))[:, -2:]
  expected = arrays['pad_logits_ignoring_mask']
  np.testing.assert_allclose(out, expected, rtol=0, atol=2e-4)
  padded = (arrays['pad_mask'] == 0).any(axis=1)
  hidden = arrays['pad_logits'][:, -2:]
  assert np.abs(out - hidden)[padded].max() > 0.1


# The layers


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(config, params, tokens):
  def loss(params):
    network = transformer.bind(config, params)
    out = network.logits(network(tokens, bidirectional(tokens)))
    log_p = jax.nn.log_softmax(out)
    return -jnp.take_along_axis(log_p, tokens[..., None], -1).mean()

  return jax.value_and_grad(loss)(params)


def assert_close(actual, expected, accuracy=1e-5):
  """Compares trees, relative to the largest entry of each expected leaf."""

  def compare(path, a, e):
    a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
    np.testing.assert_allclose(
      a,
      e,
      rtol=0,
      atol=accuracy * np.abs(e).max(),
      err_msg=jax.tree_util.keystr(path),
    )

  jax.tree_util.tree_map_with_path(compare, actual, expected)


def test_scan_equals_a_loop_over_the_layers(tiny_params):
  tokens = random_tokens(TINY)
  labels = bidirectional(tokens)
  x = tiny_params['embed'][tokens]
  for n in range(TINY.layers):
    weights = jax.tree.map(lambda w, n=n: w[n], tiny_params['blocks'])
    x = layer(TINY, weights, x, labels)
  expected = layers.rms_norm(x, tiny_params['norm'], TINY.norm_eps)
  assert_close(transformer.bind(TINY, tiny_params)(tokens, labels), expected)


@pytest.mark.parametrize(
  'remat', sorted({*transformer.REMAT_POLICIES} - {'none'})
)
def test_rematerialisation_changes_neither_loss_nor_gradients(
  remat, tiny_params
):
  tokens = random_tokens(TINY)
  expected = loss_and_gradients(TINY, tiny_params, tokens)
  config = dataclasses.replace(TINY, remat=remat)
  assert_close(loss_and_gradients(config, tiny_params, tokens), expected)


def test_rotary_scores_depend_on_the_distance_only():
  random = np.random.default_rng(0)
  q, k = (jnp.asarray(random.normal(size=8), jnp.float32) for _ in 'qk')

  def score(at_q, at_k):
    rotate = lambda x, pos: layers.rotate(
      x[None, None, None], layers.rope(jnp.array([[pos]]), 8, 1e4)
    )
    return jnp.vdot(rotate(q, at_q), rotate(k, at_k))

  np.testing.assert_allclose(score(5, 2), score(105, 102), rtol=1e-4)
  np.testing.assert_allclose(score(7, 7), jnp.vdot(q, k), rtol=1e-4)
  assert abs(score(5, 2) - score(2, 5)) > 1e-3


def test_bfloat16_network_stays_close_to_float32(tiny_params):
  tokens = random_tokens(TINY)
  half = dataclasses.replace(TINY, dtype='bfloat16')
  network = transformer.bind(half, tiny_params)
  hidden = network(tokens, bidirectional(tokens))
  assert hidden.dtype == jnp.bfloat16
  assert network.logits(hidden).dtype == jnp.float32
  exact = transformer.bind(TINY, tiny_params)(tokens, bidirectional(tokens))
  assert_close(hidden, exact, 0.05)


# Visibility


PADDED = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], bool)


@pytest.mark.parametrize('make', [masks.bidirectional, masks.causal])
def test_gradient_is_zero_exactly_where_not_visible(make, tiny_params):
  """Both rules are transitive, so more layers add no visible pair."""
  labels = make(jnp.asarray(PADDED))
  batch, length = PADDED.shape
  random = np.random.default_rng(0)
  x = jnp.asarray(random.normal(size=(batch, length, TINY.embed)), jnp.float32)
  probe = jnp.asarray(random.normal(size=TINY.embed), jnp.float32)

  def outputs(x):
    one = lambda x, w: (layer(TINY, w, x, labels), None)
    return jax.lax.scan(one, x, tiny_params['blocks'])[0] @ probe

  jacobian = jax.jit(jax.jacrev(outputs))(x)  # [B, L, B, L, D]
  influence = np.abs(jacobian).max(axis=-1)
  visible = np.asarray(masks.visible(labels, labels))
  for b in range(batch):
    np.testing.assert_array_equal(influence[b, :, b] != 0, visible[b])
    assert not influence[b, :, 1 - b].any()  # nor across rows


# Counting


@pytest.mark.parametrize(
  'config, total, inner',
  [(LLADA_8B, 8015581, 6979588), (LLADA_1B, 1487243, 969247)],
  ids=['8B', '1B'],
)
def test_parameter_counts_are_those_of_llada(config, total, inner):
  """In thousands, from arXiv 2502.09992 appendix B.2; exactly, by formula.

  Nothing is allocated: the 8B model would take 32 GB.
  """
  n, d, v = config.layers, config.embed, config.vocab_size
  d_kv = config.kv_heads * config.head_dim
  formula = n * (2 * d**2 + 2 * d * d_kv + 3 * d * config.mlp) + (2 * n + 1) * d
  assert transformer.num_params(config) == (formula + 2 * v * d, formula)
  assert round(formula / 1000) == inner
  assert round((formula + 2 * v * d) / 1000) == total


def test_tied_embeddings_save_one_vocabulary_matrix():
  tied = dataclasses.replace(TINY, tie_embeddings=True)
  total, inner = transformer.num_params(TINY)
  matrix = TINY.vocab_size * TINY.embed
  assert transformer.num_params(tied) == (total - matrix, inner)
  assert 'head' not in transformer.shapes(tied)


def test_tied_network_projects_with_the_embedding(tiny_params):
  tied = dataclasses.replace(TINY, tie_embeddings=True)
  shared = {k: v for k, v in tiny_params.items() if k != 'head'}
  untied = {**shared, 'head': tiny_params['embed'].T}
  tokens = random_tokens(TINY)
  loss, gradients = loss_and_gradients(tied, shared, tokens)
  expected, parts = loss_and_gradients(TINY, untied, tokens)
  parts['embed'] += parts.pop('head').T
  assert_close((loss, gradients), (expected, parts))


# The declaration


@pytest.mark.parametrize('tie', [False, True])
def test_every_dimension_has_a_logical_axis(tie):
  config = dataclasses.replace(TINY, tie_embeddings=tie)
  shapes, axes = transformer.shapes(config), transformer.axes(config)
  sizes = dict(
    layers=config.layers,
    embed=config.embed,
    heads=config.heads,
    kv_heads=config.kv_heads,
    head_dim=config.head_dim,
    mlp=config.mlp,
    vocab=config.vocab_size,
  )
  jax.tree.map(
    lambda x, a: np.testing.assert_equal(x.shape, tuple(sizes[n] for n in a)),
    shapes,
    axes,
  )
  initialised = jax.eval_shape(
    functools.partial(transformer.init, config), jax.random.key(0)
  )
  same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
  assert jax.tree.all(jax.tree.map(same, initialised, shapes))


@pytest.mark.parametrize('sizes', MESHES.values(), ids=MESHES)
def test_norms_are_whole_and_matrices_are_split_on_every_mesh(sizes):
  m = mesh.make_mesh(**sizes)
  shapes = transformer.shapes(TINY)
  placed = mesh.param_shardings(m, transformer.axes(TINY), shapes)
  parts = math.prod(m.shape[a] for a in (*mesh.STATE_AXES, 'tensor'))
  for path, sharding in jax.tree_util.tree_leaves_with_path(placed):
    name = path[-1].key
    shape = functools.reduce(lambda t, k: t[k.key], path, shapes).shape
    shard = sharding.shard_shape(shape)
    expected = 1 if name.startswith('norm') else parts
    assert np.prod(shape) == expected * np.prod(shard), name


def test_initial_scale_is_that_of_the_fan_in():
  """LLaDA's default is 1/sqrt(fan in), for outputs also times 1/sqrt(2 N)."""
  c = dataclasses.replace(
    TINY, vocab_size=512, embed=128, mlp=256, heads=8, head_dim=32
  )
  params = jax.jit(functools.partial(transformer.init, c))(jax.random.key(1))
  into, out = c.embed**-0.5, (2 * c.layers) ** -0.5
  expected = {
    'embed': into,
    'head': into,
    'blocks': {
      **dict.fromkeys(('q', 'k', 'v', 'gate', 'up'), into),
      'o': out * (c.heads * c.head_dim) ** -0.5,
      'down': out * c.mlp**-0.5,
      'norm1': 0,
      'norm2': 0,
    },
    'norm': 0,
  }
  cut = 0.98658  # std of a normal that is cut at 3 standard deviations

  def check(path, x, std):
    name = jax.tree_util.keystr(path)
    if std == 0:
      np.testing.assert_array_equal(x, 1, err_msg=name)
      return
    np.testing.assert_allclose(x.std(), cut * std, rtol=0.02, err_msg=name)
    assert abs(x.mean()) < 5 * std / np.sqrt(x.size), name
    assert 2.5 * std < jnp.abs(x).max() <= 3 * std * (1 + 1e-6), name

  jax.tree_util.tree_map_with_path(check, params, expected)
  blocks = params['blocks']
  assert (blocks['gate'] != blocks['up']).mean() > 0.99
  assert (blocks['q'][0] != blocks['q'][1]).mean() > 0.99


def test_zero_outputs_change_only_the_output_projections():
  c = dataclasses.replace(TINY, zero_outputs=True)
  key = jax.random.key(1)
  params, usual = transformer.init(c, key), transformer.init(TINY, key)
  for name in ('o', 'down'):
    assert not params['blocks'].pop(name).any()
    assert usual['blocks'].pop(name).all()
  jax.tree.map(np.testing.assert_array_equal, params, usual)


def test_layers_with_zero_outputs_are_the_identity_and_learn():
  c = dataclasses.replace(TINY, zero_outputs=True)
  params = transformer.init(c, jax.random.key(1))
  tokens = random_tokens(c, length=8)
  found = logits(c, params, tokens, bidirectional(tokens))
  x = layers.rms_norm(params['embed'][tokens], params['norm'], c.norm_eps)
  np.testing.assert_allclose(found, x @ params['head'], rtol=1e-5, atol=1e-5)
  gradient = jax.grad(
    lambda p: logits(c, p, tokens, bidirectional(tokens)).std()
  )(params)
  assert gradient['blocks']['o'].all() and gradient['blocks']['down'].all()


# Embedding


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('sizes', [None, *MESHES.values()], ids=str)
def test_lookup_and_its_gradient_are_those_of_indexing(sizes, dtype):
  """Any length; the gradient sums repeated tokens in float32."""
  random = np.random.default_rng(0)
  table = jnp.asarray(random.normal(size=(24, 16)), jnp.float32)
  tokens = jnp.asarray(random.integers(0, 24, (8, 31)), jnp.int32)
  tokens = tokens.at[:, ::2].set(3)  # half of them are one token
  g = jnp.asarray(random.normal(size=(8, 31, 16)), dtype)

  def evaluate(embed, g):
    out, pullback = jax.vjp(lambda table: embed(table, tokens), table)
    return out, pullback(g)[0]

  lookup = lambda table, tokens: layers.lookup(table, tokens, dtype)
  if sizes:
    with jax.set_mesh(mesh.make_mesh(**sizes)):
      out, gradient = jax.jit(functools.partial(evaluate, lookup))(g)
  else:
    out, gradient = evaluate(lookup, g)
  expected, exact = evaluate(
    lambda table, tokens: table[tokens], g.astype(jnp.float32)
  )
  np.testing.assert_array_equal(out, expected.astype(dtype))
  assert gradient.dtype == jnp.float32
  assert_close(gradient, exact, 1e-6)


# Features of other model families


EVERYTHING = dataclasses.replace(
  TINY,
  qkv_bias=True,
  qk_norm=True,
  rope_scaling=(8.0, 1.0, 4.0, 16.0),
  predict_next=True,
)


def test_optional_weights_are_absent_by_default(tiny_params):
  more = set(transformer.shapes(EVERYTHING)['blocks']) - set(
    tiny_params['blocks']
  )
  assert more == {'q_bias', 'k_bias', 'v_bias', 'q_norm', 'k_norm'}


def test_optional_features_work_on_a_mesh_and_have_gradients():
  params = draw_params(EVERYTHING)
  tokens = random_tokens(EVERYTHING, length=8)

  @jax.jit
  def loss(params):
    out = logits(EVERYTHING, params, tokens, bidirectional(tokens))
    return jnp.sum(jnp.sin(out))

  whole = jax.value_and_grad(loss)(params)
  devices = mesh.make_mesh(fsdp=2, sequence=2, tensor=2)
  shardings = mesh.param_shardings(
    devices, transformer.axes(EVERYTHING), transformer.shapes(EVERYTHING)
  )
  with jax.set_mesh(devices):
    split = jax.value_and_grad(loss)(jax.device_put(params, shardings))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
  jax.tree.map(close, whole, split)
  for path, gradient in jax.tree_util.tree_leaves_with_path(whole[1]):
    assert np.abs(gradient).max() > 1e-3, path


def test_biases_and_gains_are_neither_split_nor_decayed():
  for name, axes in transformer.axes(EVERYTHING)['blocks'].items():
    if name.endswith(('_bias', '_norm')):
      assert not mesh.is_matrix(axes)


def test_predict_next_shifts_outputs_to_the_next_position():
  """The first position of a document keeps its own output."""
  config = dataclasses.replace(TINY, predict_next=True)
  params, tokens = draw_params(TINY), random_tokens(TINY, length=8)
  valid = jnp.array([[False] * 2 + [True] * 6, [True] * 7 + [False]])
  doc = jnp.array([[0] * 5 + [1] * 3, [0] * 4 + [1] * 4])
  labels = masks.bidirectional(valid, doc)
  plain, shifted = (
    np.asarray(transformer.bind(c, params)(tokens, labels))
    for c in (TINY, config)
  )
  source = np.array([[0, 1, 2, 2, 3, 5, 5, 6], [0, 0, 1, 2, 4, 4, 5, 7]])
  for row, index in enumerate(source):
    real = np.asarray(valid[row])
    np.testing.assert_array_equal(shifted[row][real], plain[row][index][real])


def test_predict_next_reads_the_first_token_of_a_block_from_the_clean_copy():
  """Rows are [noisy ; clean]: the block before is complete, as in sampling.

  The first position of each copy keeps its own output. So does every position
  whose left neighbour is of another document.
  """
  config = dataclasses.replace(TINY, predict_next=True)
  params, tokens = draw_params(TINY), random_tokens(TINY, length=12)
  doc = jnp.array([[0] * 6, [0, 0, 0, 0, 0, 1]])
  labels = masks.block_diffusion(jnp.ones((2, 6), bool), 3, doc)
  plain, shifted = (
    np.asarray(transformer.bind(c, params)(tokens, labels))
    for c in (TINY, config)
  )
  source = np.array(
    [
      [0, 0, 1, 8, 3, 4, 6, 6, 7, 8, 9, 10],
      [0, 0, 1, 8, 3, 5, 6, 6, 7, 8, 9, 11],
    ]
  )
  for row, index in enumerate(source):
    np.testing.assert_array_equal(shifted[row], plain[row][index])
