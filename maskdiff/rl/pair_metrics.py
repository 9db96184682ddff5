"""Metrics of preference learning: of steps, and of held-out pairs."""

from maskdiff.monitoring.stage_file import Curve
from maskdiff.rl import round_metrics

PANELS = (
  Curve(
    'preference_accuracy',
    'Accuracy of preferences',
    'Share of the pairs of a batch with a positive margin.',
    'train/preference_accuracy',
    smooth=True,
    reduce='mean',
    from_zero=False,
  ),
  Curve(
    'heldout_preference_accuracy',
    'Held-out accuracy of preferences',
    'Share of held-out pairs with a positive margin.',
    'eval/preference_accuracy',
    from_zero=False,
  ),
  Curve(
    'heldout_margin',
    'Held-out margin',
    'Mean over held-out pairs, nats times preference_scale.',
    'eval/margin',
    from_zero=False,
  ),
  Curve(
    'heldout_chosen',
    'Bound of held-out chosen answers',
    'Nats per token. If it rises, chosen answers become less likely.',
    'eval/chosen_nats_per_token',
    from_zero=False,
  ),
)


def row(pairs, metrics, facts, step_s):
  """Returns the row of metrics of some steps; see `Stage.row`.

  Args:
    pairs: pairs of a batch.
    metrics: list of step.StepMetrics.
    facts: not used.
    step_s: seconds per step.
  """
  del facts
  found = round_metrics.of_steps(metrics)
  return found | {'train/pairs_per_s': pairs / step_s}


def line(row):
  """Returns loss, accuracy and margin of a row of metrics."""
  shown = (
    ('loss', 'train/preference_loss', '.4f'),
    ('accuracy', 'train/preference_accuracy', '.1%'),
    ('margin', 'train/margin', '.3f'),
    ('lr', 'train/learning_rate', '.2e'),
    ('pairs/s', 'train/pairs_per_s', ',.1f'),
  )
  return '  '.join(
    f'{name} {row[key]:{form}}' for name, key, form in shown if key in row
  )


def conclusion(row):
  """Returns accuracy, margin and bounds of held-out pairs, one line."""
  return (
    f'held-out preference accuracy {row["eval/preference_accuracy"]:.1%}, '
    f'margin {row["eval/margin"]:.3f}, chosen '
    f'{row["eval/chosen_nats_per_token"]:.3f} and rejected '
    f'{row["eval/rejected_nats_per_token"]:.3f} nats/token'
  )
