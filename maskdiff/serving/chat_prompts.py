"""The chat template of a model, for the prompts and the ends of its answers."""

import functools

from maskdiff.posttraining import chat, chat_tokens
from maskdiff.serving.asked import Chat


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
  return Chat(encode, chat_tokens.end_ids(encoder))
