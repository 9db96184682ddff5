"""Plans of block lengths: phases, resume, metrics, bad plans."""

import shutil

import pytest
import saved
import tiny
from compiled import compilations

from maskdiff import config as config_lib
from maskdiff.checkpoints import checkpoint
from maskdiff.errors import UserError
from maskdiff.monitoring import metrics
from maskdiff.training import loop, phases

STEPS, LENGTH = 4, 16
# Block lengths of the four steps: 1, 1, 4, 4.
PLAN = ((0.0, 1), (0.4, 4))
TIMES = ('train/step_s', 'train/tokens_per_s')


def plan_config(plan, steps=STEPS, **changes):
  return tiny.config(
    {
      'objective.name': 'block_diffusion',
      'objective.block_length': plan[-1][1] if plan else 32,
      'objective.block_plan': plan,
      'train.steps': steps,
      'optimizer.warmup_steps': 0,
      'optimizer.decay_steps': 0,
      'data.length': 64,
      'sample.block_length': 4,
      **changes,
    }
  )


# LLaDA 2.0: blocks grow from 1 token to the row, and shrink to 32.
@pytest.mark.parametrize(
  'plan, steps, expected',
  [
    ((), 3, [32] * 3),
    (((0, 1), (0.2, 4), (0.4, 64), (0.8, 32)), 5, [1, 4, 64, 64, 32]),
    (((0.0, 1), (0.1, 4), (0.5, 8)), 3, [4, 4, 8]),  # no step for blocks of 1
    (((0.0, 2), (0.9, 4)), 2, [2, 2]),
    (PLAN, STEPS, [1, 1, 4, 4]),
  ],
)
def test_block_length_of_every_step(plan, steps, expected):
  config = plan_config(plan, steps)
  config_lib.validate(config)
  found = phases.phases(config)
  lengths = [phases.at(found, step).block_length for step in range(steps)]
  assert lengths == expected


BAD = {
  'another objective': (
    {'objective.name': 'masked_diffusion', 'objective.block_plan': ((0.0, 4),)},
    'block_plan=.* is for config.objective.name=block_diffusion',
  ),
  'no start': ({'objective.block_plan': ((0.1, 4),)}, 'begin with 0'),
  'not ascending': (
    {'objective.block_plan': ((0.0, 1), (0.5, 2), (0.5, 4))},
    'ascend below 1',
  ),
  'end': ({'objective.block_plan': ((0.0, 1), (1.0, 4))}, 'ascend below 1'),
  'not pairs': ({'objective.block_plan': (0.0, 4)}, 'must be .share, block'),
  'not a number': (
    {'objective.block_plan': (('0', 4),)},
    'must be .share, block',
  ),
  'no tokens': ({'objective.block_plan': ((0.0, 0),)}, 'must be .share, block'),
  'no divisor': (
    {'objective.block_plan': ((0.0, 3), (0.5, 4))},
    'the block length 3 does not divide config.data.length=64',
  ),
  'another last length': (
    {'objective.block_plan': ((0.0, 1), (0.5, 8))},
    'ends with the block length 8; set --config.objective.block_length=8',
  ),
}


@pytest.mark.parametrize('changes, message', BAD.values(), ids=BAD)
def test_bad_plan_is_refused(changes, message):
  config = plan_config((), **{'objective.block_length': 4, **changes})
  with pytest.raises(UserError, match=message):
    config_lib.validate(config)


@pytest.fixture(scope='module')
def make_config(tokenizer, corpus):
  def make(plan, **changes):
    return plan_config(
      plan,
      **{
        **tiny.TRAIN_KEYS,
        'optimizer.decay_steps': 1,
        'optimizer.warmup_steps': 1,
        'data.path': str(corpus),
        'data.tokenizer': tokenizer.path,
        'data.length': LENGTH,
        'train.batch': 16,
        'train.log_every_steps': 1,
        'eval.every_steps': STEPS,
        'eval.batches': 1,
        'sample.prompts': (),
        'checkpoint.every_steps': 1,
        'objective.random_length_fraction': 0.0,
        **changes,
      },
    )

  return make


def series(workdir, name):
  rows = metrics.read(workdir / 'metrics.jsonl')
  return [row[name] for row in rows if name in row]


@pytest.fixture(scope='module')
def whole(make_config, tmp_path_factory):
  """Returns a run with PLAN, and copies of it as killed after each step."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  copies, save = tmp_path_factory.mktemp('killed'), checkpoint.Checkpointer.save

  def save_and_copy(self, step, *args):
    save(self, step, *args)
    self._manager.wait_until_finished()
    shutil.copytree(workdir, copies / str(step))

  before = len(compilations)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint.Checkpointer, 'save', save_and_copy)
    loop.run(make_config(PLAN), str(workdir))
  return workdir, copies, compilations[before:]


@pytest.mark.slow
def test_every_length_compiles_once_before_the_first_step(whole):
  workdir, _, compiled = whole
  steps = [i for i, name in enumerate(compiled) if 'train_step' in name]
  assert len(steps) == 2
  assert steps[1] - steps[0] == 1  # nothing else compiles in between
  assert series(workdir, 'train/block_length') == [1, 1, 4, 4]
  # All tokens are masked in blocks of 1, and about half in others.
  shares = series(workdir, 'train/masked_share')
  assert shares[:2] == [1, 1] and max(shares[2:]) < 0.9


@pytest.mark.slow
def test_evaluation_has_the_last_block_length(whole):
  """Blocks of 1 token would have no masked token at a mask ratio of 0.1."""
  workdir, _, _ = whole
  assert len(series(workdir, 'eval/nll_at_mask_ratio_0.1')) == 2


# Before the change, and after it.
@pytest.mark.slow
@pytest.mark.parametrize('step, lengths', [(1, 2), (3, 1)])
def test_resume_within_a_plan_is_bitwise_exact(
  whole, make_config, step, lengths
):
  workdir, copies, _ = whole
  resumed = copies / str(step)
  before = len(compilations)
  loop.run(make_config(PLAN), str(resumed))
  names = compilations[before:]
  # Only the lengths of the remaining steps are compiled.
  assert sum('train_step' in name for name in names) == lengths
  expected, found = saved.newest(workdir)[2], saved.newest(resumed)[2]
  assert expected.keys() == found.keys()
  for name, array in expected.items():
    assert array.tobytes() == found[name].tobytes(), name
  rows = [
    [
      {k: v for k, v in row.items() if k not in TIMES}
      for row in metrics.read(path / 'metrics.jsonl')
    ]
    for path in (workdir, resumed)
  ]
  assert rows[0] == rows[1]
