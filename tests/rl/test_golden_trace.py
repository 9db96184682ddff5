"""TraceRL equals its published code, with full and with block attention."""

import dataclasses
import functools

import golden_models
import golden_rl
import numpy as np
import pytest
from golden_rl import NAMES, arrays, case, cases

from maskdiff.likelihood.device_queries import RowQueries
from maskdiff.rl import table, trace, values
from maskdiff.rl.policy_loss import LogProbs

TRACE, RANDOM, COUPLED = range(3)  # `method` of the golden file


def numbers(prefix):
  keys = [key.split('.') for key in arrays('tracerl')]
  return sorted({key[1] for key in keys if key[0] == prefix})


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
  answer = golden_rl.pad(np.ones(steps.shape, bool))
  number = trace.merged(golden_rl.pad(steps), answer, int(of['shrink']))
  number = np.array(number)[answer]
  label = [of['steps'][number == k].max() for k in number]
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
  found = golden_rl.advantages(
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


def check(network, rows, queries, of, name, reward, masked, **changes):
  """Compares masks, log-probabilities, loss and gradient with a case.

  Args:
    network: Network.
    rows: Batch.
    queries: RowQueries.
    of: recorded arrays; those of rows belong to copies that score a token,
      sequence by sequence or draw by draw.
    name: of the method.
    reward: [B], the advantages.
    masked: [N, slots] bool, recorded masks of the answers.
    **changes: of the Settings.
  """
  order = np.argwhere(np.array(queries.scored).any(axis=2).T)  # [N, (b, n)]
  if (np.diff(of['row']) < 0).any():  # draw by draw
    order = order[np.lexsort(order.T)]
  row, copy = order.T
  np.testing.assert_array_equal(row, of['row'])
  slots = masked.shape[1]
  at_slots = lambda x: np.array(x)[copy, row][rows.answer[row]].reshape(
    -1, slots
  )
  np.testing.assert_array_equal(at_slots(queries.masked), masked)
  scored = at_slots(queries.scored)
  np.testing.assert_array_equal(scored, of['loss_mask'][:, -slots:])
  found, _ = golden_rl.log_probs(network, rows, queries)
  np.testing.assert_allclose(
    at_slots(found)[scored], of['logps'][:, -slots:][scored], atol=2e-4
  )
  old = np.zeros(found.shape, np.float32)
  old[copy, row] = golden_rl.at_slots(
    rows._replace(answer=rows.answer[row], tokens=rows.tokens[row]),
    of['old'][:, -slots:],
  )
  s = table.settings(name, **changes)
  value, _, derivative = golden_rl.loss(
    name, s, LogProbs(found, old), queries, rows, reward
  )
  golden_rl.check_loss(value, of['loss'])
  golden_rl.check_gradient(network, rows, queries, derivative, of)


@pytest.mark.parametrize('i', cases('tracerl', 'full'))
@pytest.mark.parametrize('name', NAMES)
def test_full_attention_equals_tracerl(name, i):
  shared = case('tracerl', name)
  of = case('tracerl', f'{name}.{i}')
  rows = golden_rl.batch_of(
    shared['ids'], shared['prompt_len'], steps=shared['step_map']
  )
  counted = golden_rl.until_eos(
    rows.tokens, rows.answer, int(shared['pad_id']), int(of['post_num'])
  )
  rows = rows._replace(counted=counted)
  network = golden_rl.network(name)
  method = int(of['method'])
  if method == TRACE:
    method_name = 'tracerl'
    s = table.settings(
      'tracerl', shrink=int(of['shrink']), copies=rows.answer[0].sum()
    )
    queries = golden_rl.along_trace(network, s, rows, None, None)
  else:
    method_name = 'random_masks'
    s = table.settings('random_masks', coupled=method == COUPLED)
    number = len(rows.tokens)
    times = of['t'].reshape(number, -1).T
    noise = of['u'].reshape(number, len(times), -1).swapaxes(0, 1)
    queries = golden_rl.random_mask_copies(s, rows, times, golden_rl.pad(noise))
  check(
    network, rows, queries, of, method_name, shared['reward'],
    of['noisy'][:, int(shared['prompt_len']) :] == network.mask_id,
    clip_low=float(of['eps']),
    clip_high=float(of['eps']),
    kl_weight=float(of['beta']),
    kl='k3' if of['k3'] else 'k1',
  )  # fmt: skip


def block_batch(of, pad_id):
  """Returns a Batch whose prompts end at the end of a block."""
  shift = -int(of['prompt_len']) % int(of['block_size'])
  ids = np.pad(of['ids'], ((0, 0), (shift, 0)), constant_values=pad_id)
  rows = golden_rl.batch_of(
    ids,
    of['prompt_len'] + shift,
    valid=np.cumsum(ids != pad_id, axis=1) > 0,
    steps=of['step_map'],
  )
  counted = golden_rl.until_eos(
    rows.tokens, rows.answer, pad_id, min(int(of['post_num']), 0)
  )
  return rows._replace(counted=counted)


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
  hidden = of['input_ids'][:, -slots:] == network.mask_id
  if int(of['method']) == TRACE:
    s = table.settings(
      'tracerl_blocks',
      shrink=int(of['shrink']),
      copies=int(of['block_size']),
      padding_per_copy=max(int(of['post_num']), 0),
    )
    queries = golden_rl.along_trace(network, s, rows, None, None)
  else:  # the random numbers are not recorded
    order = np.argsort(of['row'], kind='stable')
    by_row = hidden[order].reshape(len(rows.tokens), -1, slots)
    masked = golden_rl.at_slots(rows, by_row.swapaxes(0, 1))
    queries = RowQueries(
      masked, masked & rows.counted, np.ones(masked.shape[:2], np.float32)
    )
  check(
    network, rows, queries, of, 'tracerl_blocks', of['reward'], hidden,
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
    queries = golden_rl.along_trace(network, s, rows, None, None)
    np.testing.assert_array_equal(queries.scored.sum(axis=0), rows.answer)
    assert np.array(queries.scored).any(axis=(1, 2)).sum() == copies_
  # One copy masks the whole answer.
  s = table.settings('tracerl', shrink=12, copies=1)
  queries = golden_rl.along_trace(
    golden_rl.network('model_a'), s, rows, None, None
  )
  np.testing.assert_array_equal(queries.masked[0], rows.answer)
