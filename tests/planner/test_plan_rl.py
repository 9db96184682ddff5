"""Plans of policy optimization, without the TPU compiler."""

import types

import jax
import numpy as np
import pytest
import tiny

from maskdiff import config as config_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.distributed.chips import parse_topology
from maskdiff.errors import UserError
from maskdiff.model import masks, transformer
from maskdiff.planner import (
  copies_rl,
  plan_rl,
  plan_sample,
  pricing,
  tables,
  target_rl,
)
from maskdiff.planner.fields import FIELDS

GIB = 2**30
KEYS = {
  **tiny.TRAIN_KEYS,
  'tokens.mask_id': 3,
  'policy.prompts': 4,
  'policy.group': 4,
  'policy.inner_steps': 3,
  'policy.sampling_rows': 6,
  'policy.reference_dtype': 'bfloat16',
  'train.steps': 12,
  'train.batch': 2,  # a plan has the answers of a round
  'eval.batch': 8,
  'data.length': 16,
  'sample.gen_length': 6,
  'sample.block_length': 6,
  'sample.steps': 6,
}


def open_target(c, topology, num_slices=1):
  """Returns a target with the devices of this machine."""
  chip, _ = parse_topology(topology)
  mesh = mesh_lib.make_mesh(**c.mesh)
  machine = types.SimpleNamespace(chip=chip, num_slices=num_slices)
  return types.SimpleNamespace(
    topology=topology, mesh=mesh, machine=machine, chip=chip
  )


def opened(**changes):
  changes = {key.replace('__', '.'): value for key, value in changes.items()}
  c = tiny.config(KEYS | {'train.batch': 16} | changes)
  return target_rl.open_round(c, open_target(c, 'v5e:2x4'))


@pytest.fixture
def planned(monkeypatch):
  """planned(totals, **changes) returns a plan of programs with these GiB.

  The seconds of the copy of a parameter, a denoising step, the fixed
  log-probabilities and a train step are 1, 10, 100 and 1000.
  """

  def plan(totals, **changes):
    def priced(facts, name, seconds):
      total = totals.get(name, 1.0)
      if total is None:
        failed = {'status': 'does not compile', 'error': 'no VMEM'}
        return facts | failed
      fits = total <= facts['hbm_capacity_gib']
      return facts | {
        'status': 'fits' if fits else 'does not fit',
        'fits': fits,
        'hbm_total_gib': total,
        'hbm_arguments_gib': 0.25,
        'step_s': seconds,
        'compile_s': 2.0,
      }

    names = {'compile_copy': 1, 'compile_fixed': 100, 'compile_step': 1000}
    for name in names:
      monkeypatch.setattr(plan_rl, name, lambda *args, name=name: name)

    def price(facts, target, compile_program, *args):
      name = compile_program()
      return priced(facts, name.removeprefix('compile_'), names[name])

    def sample(c, target, rows, prompt_tokens, params):
      assert (rows, prompt_tokens) == (6, 10)
      facts = pricing.facts(c, target, 'sample')
      p = priced(facts, 'sampling', 10)
      return p | {'latency_s': p['step_s'] and 6 * p['step_s']}

    monkeypatch.setattr(pricing, 'price', price)
    monkeypatch.setattr(plan_sample, 'plan_sample_on', sample)
    monkeypatch.setattr(plan_rl, 'open_target', open_target)
    c = tiny.config(KEYS)
    changes = {key.replace('__', '.'): value for key, value in changes.items()}
    c.update_from_flattened_dict(changes)
    return plan_rl.plan_rl(c, 'v5e:2x4')

  return plan


def arrays():
  return len(jax.tree.leaves(transformer.shapes(opened().setup.model)))


def test_a_round_has_the_time_of_its_programs(planned):
  p = planned({})
  assert p.keys() == FIELDS.keys()
  assert (p['mode'], p['status'], p['batch']) == ('rl', 'fits', 16)
  assert (p['copies'], p['inner_steps'], p['denoising_steps']) == (4, 3, 6)
  # 16 answers in rows of 6 take the sampler's steps three times.
  assert p['sampling_s'] == arrays() + 3 * 6 * 10
  assert (p['fixed_s'], p['training_s'], p['step_s']) == (100, 3000, 1000)
  assert p['round_s'] == p['sampling_s'] + 3100
  assert p['chip_hours'] == pytest.approx(4 * p['round_s'] * 8 / 3600)
  assert p['tokens_per_s'] == pytest.approx(16 * 6 / p['round_s'])
  text = tables.format_table(p)
  assert f'{p["round_s"]:.2f} s estimated = {p["sampling_s"]:.2f} samp' in text
  for line in (
    '16 answers in rows of 16 tokens; 6 denoising steps; 3 train steps on 4 '
    'copies per answer',
    'at the peak: FITS',
    'fixed log-probabilities',
  ):
    assert line in text


def test_one_train_step_without_a_divergence_needs_no_other_networks(planned):
  settings = (('kl_weight', 0.0),)
  p = planned({}, policy__inner_steps=1, policy__settings=settings)
  names = [program['name'] for program in p['programs']]
  assert names == ['copy', 'sampling', 'training']
  assert p['fixed_s'] == p['hbm_reference_gib'] == 0


def test_peaks_count_what_stays_in_memory(planned):
  """Each program has 1 GiB, of which its resident arguments count once."""
  p = planned({})
  r = opened()
  arrays = jax.tree.map(
    lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
    (
      r.state.params,
      (r.state.opt_state, r.state.guard),
      r.reference,
      r.copy,
    ),
  )
  held = [
    sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    for tree in arrays
  ]
  names = ('parameters', 'optimizer', 'reference', 'copy')
  found = [p[f'hbm_{name}_gib'] * GIB for name in names]
  assert found == held
  params = p['hbm_parameters_gib']
  held = params + p['hbm_optimizer_gib'] + p['hbm_reference_gib']
  copy, sampling, fixed, training = p['programs']
  assert sampling['hbm_total_gib'] == pytest.approx(1 + held)
  assert training['hbm_total_gib'] == pytest.approx(
    1 + p['hbm_reference_gib'], abs=1e-6
  )
  assert fixed['hbm_total_gib'] == pytest.approx(1 + p['hbm_optimizer_gib'])
  # The largest buffer is that of the smallest parameter: all have 1 GiB.
  assert 1 < copy['hbm_total_gib'] < 1 + held + p['hbm_copy_gib']
  assert p['hbm_total_gib'] == max(x['hbm_total_gib'] for x in p['programs'])


def test_adapters_have_no_reference(planned):
  p = planned({}, lora__rank=2)
  assert p['hbm_reference_gib'] == 0
  assert p['hbm_optimizer_gib'] < p['hbm_parameters_gib'] / 2
  assert [x['name'] for x in p['programs']][2] == 'fixed'
  other = planned({}, lora__rank=2, policy__reference='some/folder')
  assert other['hbm_reference_gib'] > 0


@pytest.mark.parametrize(
  'name, lever',
  [
    ('sampling', '--config.policy.sampling_dtype=bfloat16'),
    ('step', '--config.train.microbatches=2'),
    ('fixed', '--config.policy.reference_dtype=bfloat16'),
  ],
)
def test_program_that_does_not_fit_has_levers(planned, name, lever):
  p = planned(
    {name: 20.0},
    policy__sampling_dtype='float32',
    policy__reference_dtype='float32',
  )
  assert (p['status'], p['fits']) == ('does not fit', False)
  assert any(line.startswith(lever) for line in p['levers']), p['levers']
  assert len(p['levers']) == len(set(p['levers']))
  assert 'DOES NOT FIT' in tables.format_table(p)


def test_program_that_does_not_compile_is_named(planned):
  p = planned({'fixed': None})
  assert p['error'] == 'the program fixed: no VMEM'
  assert p['round_s'] is None and p['programs'][3]['run_s'] == 1000
  assert 'DOES NOT COMPILE  the program fixed' in tables.format_table(p)


def test_a_round_needs_room_for_a_prompt(planned):
  with pytest.raises(UserError, match='leaves no room'):
    planned({}, sample__gen_length=18, sample__steps=18)


def test_preference_learning_is_not_planned(planned):
  with pytest.raises(UserError, match='learns from pairs'):
    planned({}, policy__method='vrpo')


def test_loss_chunks_cover_each_slot_once_per_copy_and_complement():
  """Of 6 slots, a copy and its complement score 3 on average."""
  chunks = lambda **changes: copies_rl.loss_chunks(opened(**changes))
  one = dict(objective__loss_chunk_tokens=1, mesh__replica=1)
  alone = chunks(**one, mesh__fsdp=1, mesh__tensor=1, mesh__sequence=8)
  assert alone * 8 == pytest.approx(16 * 3, abs=4)
  # Each of eight devices has two rows, and the slowest counts.
  slowest = chunks(**one)
  assert 6 < slowest <= 12
  assert chunks(objective__loss_chunk_tokens=100) == 1
  assert 3 < chunks(**one, train__microbatches=2) < slowest


def test_made_rollout_has_full_answers_in_the_order_of_the_blocks():
  c = opened(sample__steps=3, sample__block_length=2).config
  found = copies_rl.made_rollout(c)
  np.testing.assert_array_equal(
    found['steps'][0], [0] * 10 + [1, 1, 2, 2, 3, 3]
  )
  assert found['slots'][0].tolist() == [10, 16]
  assert (found['tokens'] != c.tokens.eos_id).all()


def test_regime_of_masked_copies_is_that_of_the_network():
  regime = lambda r: copies_rl.regime(r.c.network, r.config.data.length)
  assert regime(opened()) == masks.BIDIRECTIONAL
  causal = opened(
    objective__name='autoregressive', sample__block_length=1, sample__steps=6
  )
  assert regime(causal) == masks.CAUSAL


def test_parameters_of_one_kind_are_compiled_once():
  r = opened()
  kinds = target_rl.parameters_to_copy(r)
  assert sum(kinds.values()) == arrays() > len(kinds)
  assert all(copy.dtype == 'bfloat16' for _, copy in kinds)


def test_config_keys_of_a_plan_are_not_changed():
  c = tiny.config(KEYS)
  before = config_lib.flatten(c)
  with pytest.raises(UserError):
    plan_rl.plan_rl(c, 'v5x:1x1')
  assert config_lib.flatten(c) == before
