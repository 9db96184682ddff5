"""An HTML page that replays how texts were denoised, in a single file.

A Recording has the canvas of every step. Committed tokens are never revised, so
the page needs only the final token of each position and the step that committed
it. `replay.html` is the template.
"""

import importlib.resources
import json
from typing import NamedTuple

import numpy as np

MASK_TEXT = '\u2591'


class Recording(NamedTuple):
  """The states that `sampler.walk` yields for B texts in T steps."""

  canvases: np.ndarray  # [T + 1, B, L] int32, before every step and at the end
  # [T + 1, B, L] float32; entry t has the confidence of the tokens that step t
  # committed, and NaN elsewhere. Entry 0 is NaN.
  confidence: np.ndarray
  fill: np.ndarray  # [B, L] bool, the slots
  valid: np.ndarray  # [B, L] bool, False on padding


def page(recording, tokenizer, titles, settings):
  """Returns the page that replays a recording.

  Args:
    recording: Recording.
    tokenizer: data.tokenizer.Tokenizer.
    titles: B strings, one per text.
    settings: dict of settings to list on the page, in this order. It must
      contain `block_length` and `confidence`.

  Returns:
    HTML in ASCII that fetches nothing. Its text at step t is
    `tokenizer.decode` of canvas t.
  """
  data = {
    'steps': len(recording.canvases) - 1,
    'mask': MASK_TEXT,
    'measure': {'probability': 'confidence'}.get(
      settings['confidence'], f'confidence ({settings["confidence"]})'
    ),
    'settings': [[key, str(value)] for key, value in settings.items()],
    'texts': [
      _text(recording, row, tokenizer, title, settings['block_length'])
      for row, title in enumerate(titles)
    ],
  }
  # ASCII reads the same in any encoding. Without <, a text cannot end the
  # script element that contains it.
  encoded = json.dumps(data, ensure_ascii=True, separators=(',', ':'))
  encoded = encoded.replace('<', '\\u003c')
  template = importlib.resources.files('maskdiff.sampling').joinpath(
    'replay.html'
  )
  before, after = template.read_text('utf-8').split('@RECORDING@')
  return before + encoded + after


def steps(recording):
  """Returns the step at which each slot was filled.

  Returns:
    [B, L] int: 0 on given tokens, T + 1 on slots that are still masked.
  """
  canvases, confidence, fill, _ = recording
  # A committed mask token does not change the canvas, but has a confidence. A
  # slot that is filled with eos after an eos has no confidence.
  filled = ~np.isnan(confidence[1:]) | (canvases[1:] != canvases[:-1])
  step = np.where(filled.any(axis=0), filled.argmax(axis=0) + 1, len(canvases))
  return np.where(fill, step, 0)


def _text(recording, row, tokenizer, title, block_length):
  """Returns the data of a text for the page; lists have one entry per token."""
  valid = recording.valid[row]
  ids = recording.canvases[-1, row, valid]
  fill = recording.fill[row, valid]
  step = steps(recording)[row, valid]
  confidence = recording.confidence[:, row, valid]
  # Given tokens, and slots still masked (T + 1), take entry 0, which is NaN.
  confidence = np.take_along_axis(
    confidence, step[None] % len(confidence), axis=0
  )[0]
  return {
    'title': title,
    'ids': ids.tolist(),
    'pieces': [_piece(tokenizer, int(i)) for i in ids],
    'steps': step.tolist(),
    'confidence': [
      None if np.isnan(x) else round(float(x), 4) for x in confidence
    ],
    'blocks': np.where(fill, (fill.cumsum() - 1) // block_length, -1).tolist(),
  }


def _piece(tokenizer, i):
  """Returns the text of a token for the page.

  Returns:
    str; a list of bytes if they are not valid UTF-8 without their neighbours;
    or {'label': name} for a special token.
  """
  if i == tokenizer.mask_id:
    return MASK_TEXT
  piece = tokenizer.piece(i)
  if not piece:
    kinds = ('eos', 'bos', 'pad')
    names = [k for k in kinds if i == getattr(tokenizer, f'{k}_id')]
    return {'label': f'<{(*names, i)[0]}>'}
  try:
    return piece.decode()
  except UnicodeDecodeError:
    return list(piece)
