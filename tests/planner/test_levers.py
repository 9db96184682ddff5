"""Config keys that lower the memory of a plan that does not fit."""

import pytest

from maskdiff import config
from maskdiff.planner import levers


def evaluation_levers(**values):
  c = config.default()
  c.update_from_flattened_dict(values)
  sizes = {'replica': 1, 'fsdp': 8, 'sequence': 1, 'tensor': 1}
  return levers.evaluation_levers(c, {'num_slices': 1}, sizes)


@pytest.mark.parametrize(
  'batch, batches, lever',
  [
    (32, 8, '--config.eval.batch=16 --config.eval.batches=16: 2 rows'),
    (40, 8, '--config.eval.batch=16 --config.eval.batches=20: 2 rows'),
    (24, 3, '--config.eval.batch=8 --config.eval.batches=9: 1 rows'),
  ],
)
def test_lever_of_an_evaluation_is_a_batch_that_the_mesh_divides(
  batch, batches, lever
):
  first, *rest = evaluation_levers(
    **{'eval.batch': batch, 'eval.batches': batches}
  )
  assert first.startswith(lever)
  assert not any('eval.batch' in r or 'remat' in r for r in rest)


def test_batch_of_one_row_per_chip_has_no_lever():
  assert not any(
    'eval.batch' in lever for lever in evaluation_levers(**{'eval.batch': 8})
  )


def train_levers(sizes=None, rows=4.0, slices=1, **values):
  c = config.default()
  c.update_from_flattened_dict(values)
  sizes = {'replica': 1, 'fsdp': 8, 'sequence': 1, 'tensor': 1} | (sizes or {})
  plan = {'rows_per_chip': rows, 'num_slices': slices}
  return ' | '.join(levers.levers(c, plan, sizes))


def test_levers_name_keys_and_values():
  text = train_levers(
    **{
      'model.remat': 'minimal',
      'model.vocab_size': 128_000,
      'objective.loss_chunk_tokens': 1024,
      'train.ema_decay': 0.9999,
    }
  )
  # 32 rows on 8 chips: 4 at once; two microbatches leave 2.
  assert '--config.train.microbatches=2: 2 rows per chip' in text
  assert 'full: keep fewer arrays of each layer' in text
  assert '--config.objective.loss_chunk_tokens=512: logits of 0.24' in text
  assert '--config.mesh.tensor=2' in text
  assert '--config.train.ema_decay=0: keep no moving average' in text
  assert 'replica' not in text


def test_levers_without_effect_are_left_out():
  text = train_levers({'fsdp': 1, 'replica': 8}, rows=1.0)
  assert 'microbatches' not in text
  assert 'remat' not in text  # it is full
  assert 'loss_chunk_tokens' not in text  # the vocabulary is small
  assert 'ema_decay' not in text
  assert 'tensor' not in text
  assert '--config.mesh.replica=1' in text
