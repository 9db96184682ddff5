"""Recordings of filled rows: the step and the confidence of every slot.

Committed tokens are never revised. The canvas after any denoising step
therefore follows from the filled row and the step of each slot.
"""

from typing import NamedTuple

import jax
import numpy as np


class Recording(NamedTuple):
  """A row of n tokens, without padding, and how its slots were filled."""

  tokens: np.ndarray  # [n] int32; the mask token where no token was committed
  fill: np.ndarray  # [n] bool, True on slots
  # [n] int32: the denoising step that filled the slot, counted from 1 over the
  # whole row. 0 on given tokens, and on slots without a token.
  steps: np.ndarray
  # [n] float32: confidence of the token when it was committed. NaN on given
  # tokens, on slots without a token, and on slots that were filled with eos
  # because an eos came before.
  confidence: np.ndarray


def of_rows(carry, fill, valid):
  """Returns a list with the Recording of each row.

  Args:
    carry: Carry, from `sampler.complete`.
    fill: [B, L] bool, True on slots.
    valid: [B, L] bool, False on padding.
  """
  arrays = jax.device_get((carry.canvas, carry.filled_at, carry.confidence))
  return [
    Recording(canvas[ok], slots[ok], steps[ok], confidence[ok])
    for canvas, steps, confidence, slots, ok in zip(
      *arrays, np.asarray(fill), np.asarray(valid), strict=True
    )
  ]


def num_steps(recording):
  """Returns the number of denoising steps that filled a slot of the row."""
  return int(recording.steps.max(initial=0))


def canvas_after(recording, step, mask_id):
  """Returns the row after a number of denoising steps, [n] int32.

  Args:
    recording: Recording.
    step: 0: before the first step; `num_steps` or more: the filled row.
    mask_id: id of the mask token.
  """
  return np.where(recording.steps > step, mask_id, recording.tokens)
