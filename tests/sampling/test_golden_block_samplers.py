"""Networks trained on blocks, against the samplers of SDAR and Fast-dLLM v2."""

import golden_models
import numpy as np
import pytest
import sampled
from slow import SLOW

from maskdiff.sampling import layouts


@pytest.fixture(scope='module')
def golden():
  with np.load(golden_models.GOLDEN / 'block_sampler.npz') as file:
    return dict(file)


def case_of(golden, name):
  """Returns the arrays of a case, without the axis of its one row."""
  prefix = f'{name}.'
  return {
    key.removeprefix(prefix): value[0] if value.ndim == 2 else value.item()
    for key, value in golden.items()
    if key.startswith(prefix) and value.ndim != 1
  }


def row_of(case, length):
  """Returns the prompt of a case and slots, in total `length`."""
  prompt = case['prompt'].tolist()
  return [*prompt, *[None] * (length - len(prompt))]


# SDAR


def sdar_settings(cases):
  """Returns the settings with which the tokens are those of SDAR.

  SDAR's steps are per block; here `steps` is per text, of up to 4 blocks.
  """
  (rule,) = {case['strategy'] for case in cases}
  sizes, steps = (
    np.array([case[name] for case in cases]) for name in ('block_size', 'steps')
  )
  size = sizes[0]
  if rule == 0:  # sequential: the leftmost slot
    assert (sizes == size).all() and (steps == size).all()
    return dict(block_length=1)
  blocks = [-(-(len(x['out']) - len(x['prompt'])) // size) for x in cases]
  return dict(
    block_length=size,
    remasking=('low_confidence', 'quota_and_threshold')[rule - 1],
    threshold=np.array([case['threshold'] for case in cases]),
    steps=steps * np.array(blocks),
  )


@pytest.mark.parametrize('numbers', [(0,), SLOW((1, 4)), SLOW((2, 3))])
def test_tokens_equal_sdar(golden, numbers):
  """SDAR makes a pass more for the prompt, and for each finished block.

  These passes store keys. Here the first pass over the next block stores those
  of a finished block, and the last block is not stored.
  """
  cases = [case_of(golden, f'sdar.{number}') for number in numbers]
  size = cases[0]['block_size']
  network = golden_models.block_network(size)
  lengths = [len(case['out']) for case in cases]
  request = layouts.lay_out(list(map(row_of, cases, lengths)))
  carry = sampled.complete(network, sdar_settings(cases), request)
  for i, case in enumerate(cases):
    np.testing.assert_array_equal(carry.canvas[i, : lengths[i]], case['out'])
    finished = lengths[i] // size - len(case['prompt']) // size
    assert case['forwards'] == carry.forwards[i] + finished + 1


# Fast-dLLM v2


@pytest.fixture(scope='module', params=['none', SLOW('prefix')])
def fast_dllm_v2(request, golden):
  """Returns the cases and the last Carry.

  One more row has the first block of the first output as its prompt.
  """
  cases = [case_of(golden, f'fastv2.{number}') for number in range(6)]
  size, part = cases[0]['block_size'], cases[0]['sub_block_size']
  for case in cases:
    assert (case['block_size'], case['sub_block_size']) == (size, part)
  cases.append(cases[0] | dict(prompt=cases[0]['out'][:size]))
  # Its outputs end after the first token of a block.
  lengths = [
    (len(x['prompt']) // size + x['max_new_tokens'] // size) * size + 1
    for x in cases[:-1]
  ]
  lengths.append(lengths[0])
  values = dict(
    block_length=part,
    remasking='threshold',
    threshold=np.array([case['threshold'] for case in cases]),
    stop_at_eos=np.array([case['stop'] >= 0 for case in cases]),
    cache=request.param,
  )
  network = golden_models.block_network(size, predict_next=True)
  rows = list(map(row_of, cases, lengths))
  return cases, sampled.complete(network, values, layouts.lay_out(rows))


def test_tokens_equal_fast_dllm_v2(fast_dllm_v2):
  """Its output is cut after a stop token; here eos fills the row."""
  cases, carry = fast_dllm_v2
  for canvas, case in zip(np.asarray(carry.canvas), cases[:-1], strict=False):
    expected = case['out']
    np.testing.assert_array_equal(canvas[: len(expected)], expected)


def test_forward_passes_are_those_of_fast_dllm_v2(fast_dllm_v2):
  """It computes the whole blocks of a longer prompt in a pass of their own.

  Only if they are all of the prompt does this pass also predict a token.
  """
  cases, carry = fast_dllm_v2
  for case, forwards in zip(cases[:-1], carry.forwards, strict=False):
    tail = len(case['prompt']) % case['block_size']
    prefill = len(case['prompt']) > case['block_size'] and tail > 0
    assert forwards == case['forwards'] - prefill


def test_prompt_of_one_block_is_seen_unlike_fast_dllm_v2(fast_dllm_v2):
  """Its code skips the pass over such a prompt, and ignores it."""
  cases, carry = fast_dllm_v2
  expected = cases[-1]['out']
  np.testing.assert_array_equal(carry.canvas[-1, : len(expected)], expected)
