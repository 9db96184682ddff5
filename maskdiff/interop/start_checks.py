"""Checks of the model that config.init_from names, against the new run."""

from maskdiff.distributed import runtime
from maskdiff.errors import UserError
from maskdiff.model import transformer
from maskdiff.objectives.table import OBJECTIVES


def check(path, stored, config):
  """Raises UserError if a run cannot start from a model of another objective.

  Args:
    path: work directory or Hugging Face folder of the model.
    stored: ConfigDict of the model.
    config: ConfigDict of the new run.
  """
  _check_window(path, stored, config)
  _check_next_token(path, stored, config)


def _check_window(path, stored, config):
  """Raises UserError if a model was trained on windows of another length."""
  found, given = stored.objective, config.objective
  windows = lambda o: OBJECTIVES[o.name].windows
  if not (windows(found) and windows(given)):
    return
  if found.window_length != given.window_length:
    raise UserError(
      f'--config.init_from={path} was trained with config.objective.'
      f'window_length={found.window_length}, not {given.window_length}; set '
      f'--config.objective.window_length={found.window_length}, or start from '
      'an autoregressive model'
    )


def _check_next_token(path, stored, config):
  """Raises UserError if the network of a drafter predicts no next tokens.

  A network that is trained together with its drafter may be of any kind.
  """
  found = OBJECTIVES[stored.objective.name]
  if not transformer.from_config(config).drafter.frozen:
    return
  if not found.left_to_right or found.windows:
    raise UserError(
      f'--config.init_from={path} was trained with config.objective.name='
      f'{stored.objective.name}, and a drafter needs a network that predicts '
      'the next token; start from an autoregressive model, or train both with '
      '--config.objective.autoregressive_weight=1'
    )


def report_shift(stored, config):
  """Prints a line if a position of the network now predicts another token."""
  predicts_next = lambda c: (
    c.model.predict_next or OBJECTIVES[c.objective.name].left_to_right
  )
  before, now = predicts_next(stored), predicts_next(config)
  if before and not now:
    runtime.print_once(
      f'{config.init_from} predicts the next token, and this run trains it to '
      'predict the token at each position; config.model.predict_next=True '
      'keeps its outputs, where the objective supports it'
    )
  elif now and not before:
    runtime.print_once(
      f'{config.init_from} predicts the token at each position, and this run '
      'trains it to predict the next token'
    )
