"""The chat template of a model, for the prompts and the ends of its answers."""

import functools

from maskdiff.errors import UserError
from maskdiff.posttraining import chat, chat_tokens
from maskdiff.serving.asked import Chat

_TURNS = (
  {'role': 'user', 'content': 'a'},
  {'role': 'assistant', 'content': 'b'},
)


def open_chat(name, arguments, folder, tokenizer):
  """Returns the Chat of a model; None if it has no template.

  Args:
    name: name of a template, a folder with one, or a *.jinja file; None: the
      template of the model's folder.
    arguments: variables of the template, a JSON object as text; None: none.
    folder: folder of the model.
    tokenizer: data.tokenizer.Tokenizer.

  Raises:
    UserError: the template cannot be loaded.
  """
  if not name and chat.of_folder(folder) is None:
    return None
  template = chat.load(name or folder, arguments or '{}')
  encoder = chat_tokens.encoder(template, tokenizer, fixed_date=False)
  encode = functools.partial(chat_tokens.prompt_ids, encoder)
  return Chat(encode, _end_ids(encoder))


def _end_ids(encoder):
  """Returns the special tokens that end a turn, eos among them.

  Templates that cannot be used for training have no known end, except eos.
  """
  eos = encoder.tokenizer.eos_id
  try:
    encoded = chat_tokens.encode(encoder, _TURNS, [1])
  except UserError:
    return (eos,)
  special, ends = set(encoder.ids.values()), {eos}
  for token in encoded.tokens[encoded.answer][::-1].tolist():
    if token not in special:
      break
    ends.add(token)
  return tuple(sorted(ends))
