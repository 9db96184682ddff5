"""Longest prefix and self-speculative decoding, against the code of SDLM."""

import collections
import re

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled
from slow import SLOW

from maskdiff.model import masks, transformer
from maskdiff.objectives import sdlm
from maskdiff.sampling import candidates, layouts, passes, remasking

with np.load(golden_models.GOLDEN / 'sdlm.npz') as file:
  GOLDEN = dict(file)


def named(pattern):
  """Returns the parts of names of arrays that match a group of a pattern."""
  found = (re.fullmatch(pattern, name) for name in GOLDEN)
  return sorted({match[1] for match in found if match})


def groups():
  """Returns lists of cases that one program computes as a batch."""
  found = collections.defaultdict(list)
  for name in named(r'gen\.(.*)\.D'):
    fields = ('self_speculative', 'D', 'entropy_conf')
    found[tuple(GOLDEN[f'gen.{name}.{x}'].item() for x in fields)].append(name)
  return sorted(found.values(), key=len, reverse=True)


@pytest.fixture(autouse=True)
def one_shape(monkeypatch):
  """Compiles the passes for one length only."""
  monkeypatch.setattr(passes, 'MAX_SHAPES', 1)


def settings_of(cases):
  """Returns the network and the settings of golden generations."""
  values = dict(block_length=1, stop_at_eos=True)
  first = cases[0]
  if first('self_speculative'):
    values['remasking'] = 'speculative'
  else:
    values['remasking'] = 'longest_prefix'
    values['threshold'] = np.array(
      [1.0 if c('keep_first') else float(c('threshold')) for c in cases]
    )
    if first('entropy_conf'):
      values['confidence'] = 'entropy'
  return golden_models.window_network(int(first('D'))), values


@pytest.mark.parametrize('names', [*groups()[:2], *map(SLOW, groups()[2:])])
def test_tokens_and_passes_equal_published_code(names):
  """Published code drops eos, and may exceed the length within a window.

  Speculative decoding commits the first token of a draft with the pass that
  made it, and published code with the next pass.
  """
  cases = [
    lambda field, name=name: GOLDEN[f'gen.{name}.{field}'] for name in names
  ]
  network, values = settings_of(cases)
  prompts = [case('prompt')[0].tolist() for case in cases]
  stops = [len(case('out')) < case('max_gen_len') for case in cases]
  rows = [
    [*prompt, *[None] * (len(case('out')) + 8 * stop)]
    for prompt, case, stop in zip(prompts, cases, stops, strict=True)
  ]
  request = layouts.lay_out(rows)
  carry = sampled.complete(network, values | dict(cache='prefix'), request)
  for i, case in enumerate(cases):
    answer = request.fill[i]
    tokens = np.asarray(carry.canvas)[i, answer]
    out = case('out')
    np.testing.assert_array_equal(tokens[: len(out)], out)
    if stops[i]:
      assert (tokens[len(out) :] == network.eos_id).all()
    by_step = np.bincount(np.asarray(carry.filled_at)[i, answer])[1:]
    expected, total = case('accepted'), case('forward_steps')
    if case('self_speculative'):
      expected = np.array([1, *expected])
      assert total - 1 <= carry.forwards[i] <= total
    else:
      assert carry.forwards[i] == total
    # The last step is cut at the length of the row, or has an eos.
    number = min(len(by_step), len(expected)) - 1
    np.testing.assert_array_equal(by_step[:number], expected[:number])


def test_window_logits():
  prefix, expected = GOLDEN['window.prefix'], GOLDEN['window.logits']
  network = golden_models.window_network(expected.shape[1])
  start = prefix.shape[1] - 1
  inputs = jnp.asarray(prefix)
  with jax.default_matmul_precision('highest'):
    model = transformer.bind(network.config, network.params)
    tokens, labels = sdlm.windows(
      network, inputs, jnp.zeros_like(inputs), jnp.array([[start]])
    )
    clean = masks.causal(jnp.ones(inputs.shape, bool))
    hidden = model(
      jnp.concatenate([inputs, tokens], axis=1),
      masks.concatenate(clean, labels),
    )
    logits = model.logits(hidden)[0]
  window = slice(start + 1, None)
  np.testing.assert_allclose(logits[window], expected[0], atol=2e-4)
  causal = GOLDEN['window.causal_next_token_logits'][0]
  np.testing.assert_allclose(logits[start], causal, atol=2e-4)


@pytest.mark.parametrize('tau', named(r'rule\.tau(.*)\.accept_code'))
def test_rules(tau):
  confidence = jnp.asarray(GOLDEN['rule.confidence'])
  masked = jnp.ones(confidence.shape, bool)
  budget = jnp.full(len(confidence), float(tau), jnp.float32)
  for rule, name in (
    (remasking.longest_prefix, 'accept_code'),
    (remasking.cumulative_prefix, 'accept_paper'),
  ):
    committed = np.asarray(rule(confidence, masked, budget, None))
    assert (np.diff(committed.astype(int), axis=1) <= 0).all()  # a prefix
    expected = GOLDEN[f'rule.tau{tau}.{name}']
    np.testing.assert_array_equal(committed.sum(axis=1), expected)


@pytest.mark.parametrize('tau, number', [(1.0, 1), (1.5, 1), (-0.1, 4)])
def test_thresholds_out_of_range_keep_one_token_or_all(tau, number):
  confidence = jnp.array([[0.9, 1.0, 0.2, 0.0], [1.0, 1.0, 1.0, 1.0]])
  masked = jnp.ones(confidence.shape, bool)
  budget = jnp.full(2, tau)
  for rule in (remasking.longest_prefix, remasking.cumulative_prefix):
    committed = rule(confidence, masked, budget, None).sum(axis=1)
    np.testing.assert_array_equal(committed, number)


def test_confidences():
  logits, expected = jnp.asarray(GOLDEN['conf.logits']), GOLDEN['conf.token']
  token = candidates.best(logits)
  np.testing.assert_array_equal(token, expected)
  for name, published in (('probability', 'prob'), ('entropy', 'entropy')):
    found = candidates.CONFIDENCES[name](logits, token)
    np.testing.assert_allclose(found, GOLDEN[f'conf.{published}'], atol=1e-6)


@pytest.mark.parametrize('size', [*map(int, named(r'tree\.D(.*)\.allowed'))])
def test_tree_of_published_code_sees_the_same_tokens(size):
  """Published branches have copies of the draft; here they share one.

  Every row of a window sees the same tokens, named by their positions, and the
  same window. Rows of copies are those of the shared draft.
  """
  allowed = GOLDEN[f'tree.D{size}.allowed']
  past, new = GOLDEN[f'tree.D{size}.past_new']
  prefix = past + new
  # Position and branch of each key; -1: of the prefix; -2: the inert duplicate.
  keys = [(i, -1) for i in range(prefix)] + [(prefix - 1, -2)]
  for branch in range(size):
    keys += [(prefix + i, branch) for i in range(branch + size)]
  in_window = [
    branch >= 0 and position - prefix >= branch for position, branch in keys
  ]
  # The windows begin after the prefix: window 0 has its anchor, the first token
  # of the draft, at position `prefix`.
  draft = jnp.arange(prefix + size, dtype=jnp.int32)[None]
  starts = prefix + jnp.arange(size)[None]
  labels = masks.concatenate(
    masks.causal(jnp.ones(draft.shape, bool)),
    masks.windows(jnp.zeros_like(starts), starts, size),
  )
  seen = np.asarray(masks.visible(labels, labels)[0])
  pos = np.asarray(labels.pos[0])
  for row in range(allowed.shape[0]):
    number = past + row
    position, branch = keys[number]
    if branch == -2:
      continue
    found = {
      (keys[k][0], in_window[k])
      for k in np.flatnonzero(allowed[row])
      if keys[k][1] != -2
    }
    own = position
    if in_window[number]:
      own = prefix + size + branch * size + position - prefix - branch
    expected = {
      (int(pos[k]), bool(k >= prefix + size)) for k in np.flatnonzero(seen[own])
    }
    assert found == expected, (row, position, branch)
