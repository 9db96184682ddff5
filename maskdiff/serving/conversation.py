"""A conversation with a model: history, commands and the next answer."""

from maskdiff.errors import UserError, suggestion
from maskdiff.sampling import answers, layouts, lengths
from maskdiff.sampling.serve import Answer, RowRequest, serve
from maskdiff.sampling.settings import fit_blocks
from maskdiff.serving.asked import settings_of
from maskdiff.serving.committed import Committed

HELP = """\
/system TEXT  set the system message, or remove it, and begin again
/reset        begin again
/seed N       seed of the next answer; it grows by 1 per answer
/help         print this list
/quit         end, as Ctrl-D does
Other lines are messages. A message that begins with / is written with //."""


class Conversation:
  """The messages so far, and the seed of the next answer.

  Attributes:
    messages: list of dicts with role and content.
    seed: int.
    ended: whether the user has said /quit.
  """

  def __init__(self, system='', seed=0):
    """Begins a conversation; `system` is the system message, or ''."""
    self.seed, self.ended = seed, False
    self._begin(system)

  def _begin(self, system):
    self._system = system
    self.messages = [{'role': 'system', 'content': system}] * bool(system)

  def command(self, line):
    """Does what a line that begins with / says.

    Args:
      line: str.

    Returns:
      A text for the user.

    Raises:
      UserError: there is no such command, or its argument is not valid.
    """
    name, _, argument = line.partition(' ')
    argument = argument.strip()
    if name == '/help':
      return HELP
    if name == '/quit':
      self.ended = True
      return ''
    if name == '/system':
      self._begin(argument)
      return 'new conversation' + (
        ', with this system message' * bool(argument)
      )
    if name == '/reset':
      self._begin(self._system)
      return 'new conversation'
    if name == '/seed':
      if not argument.isdecimal() or int(argument[:20]) >= 2**32:
        raise UserError('/seed N: N must be a whole number below 2^32')
      self.seed = int(argument)
      return f'seed {self.seed}'
    names = ('/system', '/reset', '/seed', '/help', '/quit')
    raise UserError(
      f'there is no command {name:.40}{suggestion(name, names)}; /help lists '
      'them'
    )

  def answer(self, model, network, text):
    """Yields the parts of the answer to a message, and then adds both.

    Args:
      model: asked.Model with a Chat.
      network: Network.
      text: str, the message.

    Yields:
      (new, shown) after every denoising step: the text that has been committed
      since the last step, and the answer with masks.

    Raises:
      UserError: the conversation is too long, the template refuses the message,
        or the row failed. The message is then not added.
    """
    asked = [*self.messages, {'role': 'user', 'content': text}]
    prompt = model.chat.encode(asked)
    room, least = model.length - len(prompt), 1
    if model.predict_length:
      least += model.config.data.length_tokens[0][0]
    if room < least:
      raise UserError(
        f'the conversation has {len(prompt)} tokens, and the rows of the model '
        f'have {model.length}: begin again with /reset'
      )
    if model.predict_length:
      found = _predicted(model, network, prompt, self.seed)
      slots, row = found.slots, lengths.row(prompt, found)
    else:
      slots = min(model.values['gen_length'], room)
      row = layouts.prompt_row(prompt, slots)
    request = RowRequest(0, row, self.seed, settings_of(model, slots))
    longest = max(slots, model.values['gen_length'])
    c = fit_blocks(network, model.c, longest)
    length = answers.padded_length(len(row), model.length)
    end_ids = (network.eos_id, *model.chat.end_ids)
    committed = Committed(model.tokenizer, network.mask_id, end_ids)
    found = ''
    for item in serve(network, c, [request], 1, length, report_passes=1):
      filled = isinstance(item, Answer)
      if filled and item.error:
        raise item.error
      if not filled and not item.recordings:
        break  # the row has been filled
      recording = item.recording if filled else item.recordings[0]
      new = committed.advance(recording, filled)
      found += new
      yield new, _with_masks(model.tokenizer, recording, end_ids)
      if committed.finish:
        break
    self.messages = [*asked, {'role': 'assistant', 'content': found}]
    self.seed = (self.seed + 1) % 2**32


def _predicted(model, network, prompt, seed):
  """Returns the lengths.Length of the answer to a prompt."""
  (found,) = lengths.predict(
    network,
    model.c,
    model.config.data.length_tokens,
    [prompt],
    [seed],
    [settings_of(model, 1)],
    batch=1,
  )
  return found


def _with_masks(tokenizer, recording, end_ids):
  """Returns the text of an answer with masks, up to its first end token."""
  tokens = recording.tokens[recording.fill].tolist()
  committed = (recording.steps[recording.fill] > 0).tolist()
  ends = [
    i for i, token in enumerate(tokens) if committed[i] and token in end_ids
  ]
  return tokenizer.decode(tokens[: min(ends, default=len(tokens))])
