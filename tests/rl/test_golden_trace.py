"""TraceRL equals its published code, with full and with block attention."""

import dataclasses
import functools

import golden_models
import golden_rl
import numpy as np
import pytest
from golden_rl import NAMES, arrays, case, cases

from maskdiff.likelihood.device_queries import RowQueries
from maskdiff.rl import advantages, batch, copies, table, trace, values
from maskdiff.rl.policy_loss import LogProbs

TRACE, RANDOM, COUPLED = range(3)  # `method` of the golden file


def test_steps_are_those_at_which_tokens_appear():
  of = case('tracerl', 'stepmap')
  found = trace.steps_of(of['history'][:, None], int(of['mask_id']))
  np.testing.assert_array_equal(
    found[0, int(of['prompt_len']) :], of['step_map']
  )


@pytest.mark.parametrize(
  'i',
  sorted(
    {k.split('.')[1] for k in arrays('tracerl') if k.startswith('collapse')}
  ),
)
def test_merged_steps_are_labelled_as_recorded(i):
  of = case('tracerl', f'collapse.{i}')
  steps = of['steps'][None]
  number = trace.merged(steps, np.ones(steps.shape, bool), int(of['shrink']))
  label = [steps[number == k].max() for k in number[0]]
  np.testing.assert_array_equal(label, of['merged'])


@pytest.mark.parametrize(
  'i',
  sorted(
    {k.split('.')[1] for k in arrays('tracerl') if k.startswith('zscore')}
  ),
)
def test_advantages_equal_tracerl(i):
  of = case('tracerl', f'zscore.{i}')
  correct = of['correct'].astype(np.float32)
  found = advantages.advantages(
    correct, len(correct), 'group_mean', 'population'
  )
  np.testing.assert_allclose(found, of['reward'], atol=1e-6)


@pytest.mark.parametrize('i', cases('tracerl', 'gae'))
def test_targets_of_the_value_network_equal_tracerl(i):
  of = case('tracerl', i)
  steps, where = of['step_map'], of['trainable']
  rewards = (
    of['token_reward']
    if 'token_reward' in of
    else values.at_last_step(of['reward'], steps, where)
  )
  found = values.returns_and_advantages(
    rewards, of['value'], steps, where, of['gamma'], of['lambda']
  )
  np.testing.assert_allclose(found[0], of['return'], atol=1e-5)
  np.testing.assert_allclose(found[1], of['advantage'], atol=1e-5)


def check(network, rows, queries, of, name, reward, inputs, **changes):
  """Compares masks, log-probabilities, loss and gradient with a case.

  Args:
    network: Network.
    rows: Batch.
    queries: RowQueries.
    of: recorded arrays; those of rows belong to copies that score a token,
      sequence by sequence.
    name: of the method.
    reward: [B], the advantages.
    inputs: [N, L], recorded inputs of the answers; the mask token elsewhere
      means nothing.
    **changes: of the Settings.
  """
  order = np.argwhere(np.array(queries.scored).any(axis=2).T)  # [N, (b, n)]
  if int(of['method']) and 'row' in of and rows_by_draw(of):
    order = order[np.lexsort((order[:, 0], order[:, 1]))]
  copy, row = order[:, 1], order[:, 0]
  np.testing.assert_array_equal(row, of['row'])
  of_copies = lambda x: np.array(x)[copy, row]
  np.testing.assert_array_equal(
    of_copies(queries.masked)[:, -inputs.shape[1] :], inputs == network.mask_id
  )
  shift = rows.tokens.shape[1] - of['loss_mask'].shape[1]
  np.testing.assert_array_equal(
    of_copies(queries.scored)[:, shift:], of['loss_mask']
  )
  found, _ = golden_rl.log_probs(network, rows, queries)
  scored = of_copies(queries.scored)
  wide = lambda x: np.pad(x, ((0, 0), (shift, 0)))
  np.testing.assert_allclose(
    of_copies(found)[scored], wide(of['logps'])[scored], atol=2e-4
  )
  old = np.zeros(found.shape, np.float32)
  old[copy, row] = wide(of['old'])
  s = table.settings(name, **changes)
  value, _, derivative = golden_rl.loss(
    name, s, LogProbs(found, old), queries, rows, reward
  )
  golden_rl.check_loss(value, of['loss'])
  golden_rl.check_gradient(network, rows, queries, derivative, of)


def rows_by_draw(of):
  """Returns whether the rows of a case are ordered by draw, not by sequence."""
  return (np.diff(of['row']) < 0).any()


@pytest.mark.parametrize('i', cases('tracerl', 'full'))
@pytest.mark.parametrize('name', NAMES)
def test_full_attention_equals_tracerl(name, i):
  shared = case('tracerl', name)
  of = case('tracerl', f'{name}.{i}')
  rows = golden_rl.batch_of(
    shared['ids'], shared['prompt_len'], steps=shared['step_map']
  )
  rows = rows._replace(
    counted=batch.until_eos(
      rows.tokens, rows.answer, int(shared['pad_id']), int(of['post_num'])
    )
  )
  network = golden_rl.network(name)
  method = int(of['method'])
  if method == TRACE:
    method_name = 'tracerl'
    s = table.settings('tracerl', shrink=int(of['shrink']))
    queries = trace.along_trace(network, s, rows, None, None)
  else:
    method_name = 'random_masks'
    s = table.settings('random_masks', coupled=method == COUPLED)
    number = len(rows.tokens)
    times = of['t'].reshape(number, -1).T
    noise = of['u'].reshape(number, -1, rows.tokens.shape[1]).swapaxes(0, 1)
    queries = copies.random_mask_copies(s, rows, times, noise)
  check(
    network, rows, queries, of, method_name, shared['reward'],
    of['noisy'][:, int(shared['prompt_len']) :],
    clip_low=float(of['eps']),
    clip_high=float(of['eps']),
    kl_weight=float(of['beta']),
    kl='k3' if of['k3'] else 'k1',
  )  # fmt: skip


def block_batch(of, pad_id):
  """Returns a Batch whose prompts end at the end of a block."""
  start, size = int(of['prompt_len']), int(of['block_size'])
  shift = -start % size
  ids = np.pad(of['ids'], ((0, 0), (shift, 0)), constant_values=pad_id)
  start += shift
  rows = golden_rl.batch_of(ids, start, steps=of['step_map'])
  valid = np.cumsum(ids != pad_id, axis=1) > 0
  return rows._replace(
    valid=valid,
    counted=np.array(
      batch.until_eos(ids, rows.answer, pad_id, min(int(of['post_num']), 0))
    ),
  )


@functools.cache
def block_network(size):
  network = golden_models.block_network(size)
  return dataclasses.replace(
    network, mask_id=int(arrays('tracerl')['block.ids'][0])
  )


@pytest.mark.parametrize('i', cases('tracerl', 'block'))
def test_block_attention_equals_tracerl(i):
  of = case('tracerl', i)
  rows = block_batch(of, int(arrays('tracerl')['block.ids'][1]))
  network = block_network(int(of['block_size']))
  slots = of['step_map'].shape[1]
  inputs = of['input_ids'][:, -slots:]
  if int(of['method']) == TRACE:
    s = table.settings(
      'tracerl_blocks',
      shrink=int(of['shrink']),
      padding_per_copy=max(int(of['post_num']), 0),
    )
    queries = trace.along_trace(network, s, rows, None, None)
  else:  # the random numbers are not recorded
    number = np.bincount(of['row'])
    assert len(set(number)) == 1
    order = np.argsort(of['row'], kind='stable')
    masked = np.zeros((number[0], *rows.tokens.shape), bool)
    masked[..., -slots:] = (
      (inputs == network.mask_id)[order]
      .reshape(-1, number[0], slots)
      .swapaxes(0, 1)
    )
    queries = RowQueries(
      masked, masked & rows.counted, np.ones(masked.shape[:2], np.float32)
    )
  check(
    network, rows, queries, of, 'tracerl_blocks', of['reward'], inputs,
    clip_low=0.2, clip_high=0.2, kl_weight=0.01,
  )  # fmt: skip


def test_every_token_is_scored_in_one_copy():
  """Full attention has a copy per merged step; blocks have fewer."""
  steps = np.random.default_rng(0).permuted(
    np.tile(np.arange(12), (5, 1)), axis=1
  )
  rows = golden_rl.batch_of(np.zeros((5, 15), np.int32), 3, steps=steps)
  for size, shrink, copies_ in ((0, 1, 12), (0, 5, 3), (0, 12, 1), (3, 1, 3)):
    s = table.settings('tracerl', shrink=shrink)
    network = dataclasses.replace(
      golden_rl.network('model_a'), block_length=size
    )
    queries = trace.along_trace(network, s, rows, None, None)
    np.testing.assert_array_equal(queries.scored.sum(axis=0), rows.answer)
    assert np.array(queries.scored).any(axis=(1, 2)).sum() == copies_
  # One copy masks the whole answer.
  s = table.settings('tracerl', shrink=12, copies=1)
  queries = trace.along_trace(golden_rl.network('model_a'), s, rows, None, None)
  np.testing.assert_array_equal(queries.masked[0], rows.answer)
