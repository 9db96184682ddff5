"""Lines about the progress of a training claim nothing that is not known."""

import numpy as np
import pytest
import tiny

from maskdiff.training import evaluation, pretraining, step
from maskdiff.training.evaluation import Bound

ROW = {'train/learning_rate': 1e-3, 'train/tokens_per_s': 2000.0}


def test_row_without_an_applied_update_has_no_loss():
  """The loss of a skipped update may be finite; it has a line of its own."""
  line = pretraining.line(ROW)
  assert line == 'no update applied  lr 1.00e-03  2,000 tokens/s'
  line = pretraining.line(ROW | {'train/loss_nats_per_token': 2.5})
  assert line == 'loss 2.500 nats/token  lr 1.00e-03  2,000 tokens/s'


def test_one_batch_gives_no_standard_error():
  bound = Bound(2.0, None, 1.5, {})
  assert evaluation.summary(bound) == (
    'held-out bound 2.0000 nats/token, 1.5000 bits/byte; one batch gives no '
    'standard error'
  )
  assert bound.row() == {
    'eval/loss_nats_per_token': 2.0,
    'eval/bits_per_byte': 1.5,
  }
  bound = Bound(2.0, 0.25, 1.5, {})
  assert '2.0000 ± 0.2500 nats/token' in evaluation.summary(bound)
  assert bound.row()['eval/stderr_nats_per_token'] == 0.25


def test_standard_error_needs_two_batches_of_every_dataset(monkeypatch):
  c = step.step_config(tiny.config(tiny.TRAIN_KEYS))
  losses = iter([1.0, 3.0, 5.0, 1.0, 3.0, 1.0, 3.0, 2.0, 8.0])

  def eval_step(c, params, rows, key):
    loss = next(losses)
    ratio = np.zeros(step.RATIO_BUCKETS)
    return step.LossSums(1, 1, ratio, ratio, loss, 1, loss)

  monkeypatch.setattr(evaluation, 'jit_eval_step', eval_step)
  dataset = lambda name, batches: evaluation.Heldout(
    name, 0.5, 0.5, 1.0, [None] * batches
  )
  evaluate = lambda *sizes: evaluation.evaluate_mixture(
    c, None, [dataset(str(i), n) for i, n in enumerate(sizes)]
  )
  assert evaluate(2).stderr_nats_per_token == 1.0
  mixture = evaluate(1, 2)
  assert mixture.stderr_nats_per_token is None
  assert mixture.parts['0'].stderr_nats_per_token is None
  assert mixture.parts['1'].stderr_nats_per_token == 1.0
  assert evaluate(2, 2).stderr_nats_per_token == pytest.approx(
    np.hypot(0.5, 1.5)
  )
