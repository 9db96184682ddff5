"""Runs with annealed attention: phases, metrics, resume, meshes, bad input."""

import dataclasses
import functools
import shutil

import numpy as np
import pytest
import saved
import test_step
import tiny
from compiled import compilations

from maskdiff import config as config_lib
from maskdiff.checkpoints import checkpoint
from maskdiff.errors import UserError
from maskdiff.monitoring import metrics
from maskdiff.training import loop, phases, step

STEPS, LENGTH = 4, 16
TIMES = ('train/step_s', 'train/tokens_per_s')


def config(**changes):
  """Returns a config whose shares of open pairs are 1/3, 2/3, 1 and 1."""
  return tiny.config(
    {
      **tiny.TRAIN_KEYS,
      'objective.anneal_steps': 3,
      'model.predict_next': True,
      'train.steps': STEPS,
      'data.length': LENGTH,
      **changes,
    }
  )


@pytest.mark.parametrize(
  'anneal_steps, expected',
  [(0, [0] * 4), (1, [0] * 4), (2, [2, 0, 0, 0]), (4, [4, 4, 4, 0])],
)
def test_attention_is_annealed_before_the_last_of_the_steps(
  anneal_steps, expected
):
  c = config(**{'objective.anneal_steps': anneal_steps})
  config_lib.validate(c)
  plan, of_config = phases.phases(c), step.step_config(c)
  found = [phases.with_phase(of_config, phases.at(plan, i)) for i in range(4)]
  assert [p.objective.anneal_steps for p in found] == expected
  assert found[-1] == of_config


def test_evaluation_and_plans_are_bidirectional():
  """Both take the settings of `step_config`."""
  plain = config(**{'objective.anneal_steps': 0})
  assert step.step_config(config()) == step.step_config(plain)
  assert step.step_config(config()).objective.anneal_steps == 0


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'objective.name': 'block_diffusion', 'objective.block_length': 4},
      'anneal_steps=3 is for config.objective.name=masked_diffusion',
    ),
    (
      {'train.steps': 2},
      'more than config.train.steps=2, .*; set '
      '--config.objective.anneal_steps=2',
    ),
    (
      {'data.length': 2**17},
      'for rows of at most 65536 tokens, and config.data.length=131072',
    ),
  ],
)
def test_bad_annealing_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    config_lib.validate(config(**changes))


@pytest.mark.slow
def test_gradients_do_not_depend_on_mesh_or_microbatches():
  """Rows have documents, padding and prompts. The mesh shards all axes."""
  objective = dataclasses.replace(
    test_step.CONFINED, anneal_steps=10, train_steps=20
  )
  model = dataclasses.replace(test_step.MODEL, predict_next=True)
  gradients = functools.partial(
    test_step.gradients_on, model=model, objective=objective, progress=0.2
  )
  one, sums = gradients('one_device', microbatches=4)
  eight, others = gradients('fsdp2_sequence2_tensor2', microbatches=1)
  np.testing.assert_array_equal(sums.num_predicted, others.num_predicted)
  np.testing.assert_allclose(sums.total, others.total, rtol=2e-5)
  test_step.assert_close(eight, one)


@pytest.fixture(scope='module')
def whole(tokenizer, corpus, tmp_path_factory):
  """Returns a config, its run, a copy as killed after a step, and programs."""
  c = config(
    **{
      'optimizer.decay_steps': 1,
      'optimizer.warmup_steps': 1,
      'data.path': str(corpus),
      'data.tokenizer': tokenizer.path,
      'train.batch': 16,
      'train.log_every_steps': 1,
      'eval.every_steps': STEPS,
      'eval.batches': 1,
      'sample.prompts': (),
      'checkpoint.every_steps': 1,
    }
  )
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  killed, save = workdir.parent / 'killed', checkpoint.Checkpointer.save

  def save_and_copy(self, step, *args):
    save(self, step, *args)
    self._manager.wait_until_finished()
    if step == 1:
      shutil.copytree(workdir, killed)

  before = len(compilations)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint.Checkpointer, 'save', save_and_copy)
    loop.run(c, str(workdir))
  return c, workdir, killed, compilations[before:]


def rows_of(workdir):
  return [
    {k: v for k, v in row.items() if k not in TIMES}
    for row in metrics.read(workdir / 'metrics.jsonl')
  ]


@pytest.mark.slow
def test_both_phases_compile_before_the_first_step(whole):
  _, workdir, _, compiled = whole
  steps = [i for i, name in enumerate(compiled) if 'train_step' in name]
  assert len(steps) == 2 and steps[1] - steps[0] == 1
  rows = rows_of(workdir)
  shares = [r['train/open_pairs'] for r in rows if 'train/open_pairs' in r]
  np.testing.assert_allclose(shares, [1 / 3, 2 / 3, 1, 1], rtol=1e-6)
  losses = [r for r in rows if 'train/objective_nats_per_token' in r]
  assert len(losses) == STEPS  # not the bound
  assert not any('train/loss_nats_per_token' in r for r in rows)
  assert any('eval/loss_nats_per_token' in r for r in rows)


@pytest.mark.slow
def test_resume_within_annealing_is_bitwise_exact(whole):
  c, workdir, killed, _ = whole
  loop.run(c, str(killed))
  expected, found = saved.newest(workdir)[2], saved.newest(killed)[2]
  assert expected.keys() == found.keys()
  for name, array in expected.items():
    assert array.tobytes() == found[name].tobytes(), name
  assert rows_of(workdir) == rows_of(killed)
