"""The text of an answer, as far as all tokens from its beginning are committed.

The text only grows, and ends before the first end token or stop text. Both are
found token by token, so the text does not depend on the number of tokens that
are committed between two calls.
"""

import codecs

from maskdiff.sampling.recording import Recording

MASK = '\u2591'  # as in Tokenizer.decode


class Committed:
  """The committed text of one answer.

  Attributes:
    tokens: number of committed tokens, up to the end of the text.
    finish: 'stop' if the text has ended, 'length' if all slots are filled
      without an end, and None before.
  """

  def __init__(self, tokenizer, mask_id, end_ids, stop=()):
    """Starts with an empty text.

    Args:
      tokenizer: data.tokenizer.Tokenizer.
      mask_id: id of the mask token, which some networks predict.
      end_ids: ids of tokens that end the answer.
      stop: texts that end the answer; it does not contain them.
    """
    self.tokens, self.finish = 0, None
    self._piece, self._mask_id = tokenizer.piece, mask_id
    self._end_ids, self._stop = end_ids, stop
    # Bytes of a character may be spread over several tokens.
    self._decoder = codecs.getincrementaldecoder('utf-8')('replace')
    self._text, self._returned, self._cut = '', 0, False
    self._held = max(map(len, stop), default=1) - 1

  def advance(self, recording: Recording, filled: bool) -> str:
    """Returns the text that has been committed since the last call.

    The beginning of a stop text is kept back until its next token is known.

    Args:
      recording: Recording of the row.
      filled: whether the row is filled.
    """
    committed = recording.steps[recording.fill] > 0
    # Index of the first masked slot.
    prefix = len(committed) if committed.all() else int(committed.argmin())
    tokens = recording.tokens[recording.fill]
    for token in tokens[self.tokens : prefix].tolist():
      if token in self._end_ids:
        self.finish = 'stop'
      else:
        self.tokens += 1
        self._append(token)
      if self.finish:
        break
    if filled and not self.finish:
      self.finish = 'length'
    if self.finish and not self._cut:
      self._add(self._decoder.decode(b'', final=True))
    end = len(self._text) - (0 if self.finish else self._held)
    new = self._text[self._returned : end]
    self._returned += len(new)
    return new

  def _append(self, token):
    is_mask = token == self._mask_id
    piece = MASK.encode() if is_mask else self._piece(token)
    self._add(self._decoder.decode(piece))

  def _add(self, text):
    searched = max(len(self._text) - self._held, 0)
    self._text += text
    found = [self._text.find(stop, searched) for stop in self._stop]
    if places := [place for place in found if place >= 0]:
      self._text, self._cut = self._text[: min(places)], True
      self.finish = 'stop'
