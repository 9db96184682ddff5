"""An HTML page that replays how texts were denoised, in a single file.

The page has the token of each position and the step that committed it.
`replay.html` is the template.
"""

import importlib.resources
import json

import numpy as np

from maskdiff.sampling.recording import num_steps
from maskdiff.sampling.request import divide

MASK_TEXT = '\u2591'


def page(recordings, tokenizer, titles, settings):
  """Returns the page that replays recordings side by side.

  Args:
    recordings: list of recording.Recording, one per text.
    tokenizer: data.tokenizer.Tokenizer.
    titles: list of str, one per text.
    settings: dict of settings to list on the page, in this order. It must
      contain `block_length` and `confidence`.

  Returns:
    HTML in ASCII that fetches nothing. Its text at step t is
    `tokenizer.decode` of `recording.canvas_after` t steps.
  """
  last = max(map(num_steps, recordings))
  data = {
    'steps': last,
    'mask': MASK_TEXT,
    'measure': {'probability': 'confidence'}.get(
      settings['confidence'], f'confidence ({settings["confidence"]})'
    ),
    'settings': [[key, str(value)] for key, value in settings.items()],
    'texts': [
      _text(recording, tokenizer, title, settings, last)
      for recording, title in zip(recordings, titles, strict=True)
    ],
  }
  # ASCII reads the same in any encoding. Without <, a text cannot end the
  # script element that contains it.
  encoded = json.dumps(
    data, ensure_ascii=True, separators=(',', ':'), allow_nan=False
  )
  encoded = encoded.replace('<', '\\u003c')
  template = importlib.resources.files('maskdiff.sampling').joinpath(
    'replay.html'
  )
  before, after = template.read_text('utf-8').split('@RECORDING@')
  return before + encoded + after


def _text(recording, tokenizer, title, settings, last):
  """Returns the data of a text for the page; lists have one entry per token."""
  tokens, fill, steps, confidence = recording
  by_position = settings.get('trained_on_blocks_of', 0) > 0
  blocks, _ = divide(fill, settings['block_length'], by_position)
  steps = np.where(fill & (steps == 0), last + 1, steps)  # still masked
  return {
    'title': title,
    'ids': tokens.tolist(),
    'pieces': [_piece(tokenizer, int(i)) for i in tokens],
    'steps': steps.tolist(),
    'confidence': [
      round(float(x), 4) if np.isfinite(x) else None for x in confidence
    ],
    'blocks': blocks.tolist(),
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
