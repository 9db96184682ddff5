"""Writes work directories like those of launch/pretrain.py."""

import json

from maskdiff import config

BATCH, LENGTH = 8, 16


def write(workdir, rows, ledger=(), header='total  1,234\n', **changes):
  """Writes a work directory.

  Args:
    workdir: pathlib.Path to create.
    rows: dicts for metrics.jsonl.
    ledger: dicts for ledger.jsonl.
    header: text of header.txt.
    changes: config values that differ from the defaults, by key with __ for
      dots.

  Returns:
    workdir.
  """
  workdir.mkdir(parents=True)
  c = config.default()
  changes = {'train__batch': BATCH, 'data__length': LENGTH} | changes
  c.update_from_flattened_dict(
    {key.replace('__', '.'): value for key, value in changes.items()}
  )
  (workdir / 'config.json').write_text(json.dumps(c.to_dict()))
  (workdir / 'header.txt').write_text(header)
  for name, lines in (('metrics', rows), ('ledger', ledger)):
    if lines:
      text = ''.join(json.dumps(line) + '\n' for line in lines)
      (workdir / f'{name}.jsonl').write_text(text)
  return workdir


def train_row(step, loss, step_s=0.5, batch=BATCH, ratios=(), **more):
  """Returns a row of training metrics."""
  return {
    'step': step,
    'train/learning_rate': 1e-3,
    'train/step_s': step_s,
    'train/tokens_per_s': batch * LENGTH / step_s,
    'train/loss_nats_per_token': loss,
    'train/grad_norm': 2 * loss,
    'train/skipped_updates': 0,
    **{f'train/nll_at_mask_ratio_{r}': x for r, x in ratios},
    **{f'train/{key}': value for key, value in more.items()},
  }


def eval_row(step, loss, stderr=0.1, bits_per_nat=0.5, ratios=(), dataset=''):
  """Returns a row of evaluation metrics."""
  p = f'eval/{dataset}' if dataset else 'eval'
  return {
    'step': step,
    f'{p}/loss_nats_per_token': loss,
    f'{p}/stderr_nats_per_token': stderr,
    f'{p}/bits_per_byte': loss * bits_per_nat,
    **{f'{p}/nll_at_mask_ratio_{r}': x for r, x in ratios},
  }


def plan(**changes):
  """Returns the fields of launch/plan.py --json that the report reads."""
  return {
    'mode': 'train',
    'status': 'fits',
    'topology': 'v5e:2x4',
    'num_slices': 1,
    'chips': 8,
    'batch': BATCH,
    'length': LENGTH,
    'step_s': 0.4,
    'tokens_per_s': BATCH * LENGTH / 0.4,
    'mfu': 0.5,
    **changes,
  }
