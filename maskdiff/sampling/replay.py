"""A page that replays how texts were denoised: one file that needs no other.

A Recording has every canvas. Committed tokens are never revised, so the page
is given what stands at a position in the end and the step at which it came,
which is the same said in fewer words. `replay.html` shows it.
"""

import importlib.resources
import json
from typing import NamedTuple

import numpy as np

MASK_TEXT = '\u2591'


class Recording(NamedTuple):
  """What `sampler.walk` yields for B texts, T times after the first."""

  canvases: np.ndarray  # [T + 1, B, L] int32, before every step and at the end
  sure: np.ndarray  # [T + 1, B, L] float32, of what came at a step; else NaN
  fill: np.ndarray  # [B, L] bool, the slots
  valid: np.ndarray  # [B, L] bool, False on padding


def page(recording, tokenizer, titles, settings):
  """The recording as a page.

  Args:
    recording: Recording.
    tokenizer: data.tokenizer.Tokenizer.
    titles: B strings, one per text.
    settings: dict of what to tell of the settings, the most important first,
      with `block_length` and `confidence` among them.

  Returns:
    HTML in ASCII, with nothing in it that is fetched from elsewhere. Its text
    at step t is `tokenizer.decode` of canvas t.
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
  # In ASCII no letter of a text can be misread; and without < none of it can
  # end the script that it stands in.
  encoded = json.dumps(data, ensure_ascii=True, separators=(',', ':'))
  encoded = encoded.replace('<', '\\u003c')
  template = importlib.resources.files('maskdiff.sampling').joinpath(
    'replay.html'
  )
  before, after = template.read_text('utf-8').split('@RECORDING@')
  return before + encoded + after


def steps(recording):
  """When the slots were filled.

  Returns:
    [B, L] int: 0 on what was given, T + 1 where a mask is left.
  """
  canvases, sure, fill, _ = recording
  came = ~np.isnan(sure[1:]) | (canvases[1:] != canvases[:-1])  # [T, B, L]
  first = np.where(came.any(axis=0), came.argmax(axis=0) + 1, len(canvases))
  return np.where(fill, first, 0)


def _text(recording, row, tokenizer, title, block_length):
  """What the page is given of a text; lists have an entry per position."""
  here = recording.valid[row]
  ids = recording.canvases[-1, row, here]
  fill = recording.fill[row, here]
  filled = steps(recording)[row, here]
  sure = recording.sure[:, row, here]
  # A mask that is left takes the first entry, as what was given: NaN.
  sure = np.take_along_axis(sure, filled[None] % len(sure), axis=0)[0]
  return {
    'title': title,
    'ids': ids.tolist(),
    'pieces': [_piece(tokenizer, int(i)) for i in ids],
    'steps': filled.tolist(),
    'sure': [None if np.isnan(s) else round(float(s), 4) for s in sure],
    'blocks': np.where(fill, (fill.cumsum() - 1) // block_length, -1).tolist(),
  }


def _piece(tokenizer, i):
  """A string, or a list of bytes that alone are none, or a name."""
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
