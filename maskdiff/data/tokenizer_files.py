"""Names of the files of a tokenizer, and reads of those beside it.

tokenizer.model          a SentencePiece model
tokenizer.json           a byte-level BPE
vocab.json, merges.txt   a byte-level BPE without its special tokens
BESIDE                   special tokens of a byte-level BPE
"""

import contextlib
import pathlib

from maskdiff.data import bpe_vocabulary as bpe
from maskdiff.data import sentencepiece_model as spm
from maskdiff.errors import UserError
from maskdiff.files import folder as folder_lib
from maskdiff.files import reading

MODEL = 'tokenizer.model'
JSON = 'tokenizer.json'
VOCABULARY = 'vocab.json'
MERGES = 'merges.txt'
# Files next to a tokenizer.json that name its special tokens. The last file
# takes precedence.
BESIDE = ('special_tokens_map.json', 'tokenizer_config.json')
SPECIAL = {f'{kind}_token' for kind in ('bos', 'eos', 'mask', 'pad', 'unk')}
# Ids of tokens that vocab.json lacks, in older folders.
ADDED = 'added_tokens.json'
CHAT_TEMPLATE = 'chat_template.jinja'

# If one of these files is in a directory, it belongs to its tokenizer.
OTHERS = {MODEL, JSON, *BESIDE}


@contextlib.contextmanager
def with_fix(fix):
  """Context manager: appends to the message of a UserError what to do."""
  try:
    yield
  except UserError as error:
    raise UserError(f'{error}: {fix}') from error


def find(folder: pathlib.Path) -> pathlib.Path:
  """Returns the file of the tokenizer of a folder.

  Args:
    folder: path of the folder.

  Returns:
    tokenizer.model, else tokenizer.json, else vocab.json if merges.txt is
    beside it, else the only .model file. A tokenizer.model that is a tiktoken
    file counts only if the folder has no other tokenizer.

  Raises:
    UserError: the folder has no tokenizer, or several .model files.
  """
  known = (MODEL, JSON, VOCABULARY, MERGES)
  names = {name for name in known if (folder / name).is_file()}
  found = [name for name in (MODEL, JSON) if name in names]
  if {VOCABULARY, MERGES} <= names:
    found.append(VOCABULARY)
  if len(found) > 1 and found[0] == MODEL and _is_tiktoken(folder / MODEL):
    del found[0]
  if found:
    return folder / found[0]
  models = sorted(folder.glob('*.model'))
  if len(models) != 1:
    raise UserError(
      f'{folder} has neither {MODEL} nor {JSON}, and {len(models)} other '
      '.model files'
    )
  return models[0]


def _is_tiktoken(path):
  with reading.open_regular(path) as file:
    return spm.is_tiktoken(file.read(1000))


def _beside(path: pathlib.Path) -> list[str]:
  """Returns the existing files of BESIDE in the folder of a tokenizer."""
  return [name for name in BESIDE if (path.parent / name).is_file()]


def of_byte_level(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the files of a tokenizer, by the name that a copy of each has.

  Args:
    path: its tokenizer.json, under any name, or its vocab.json.
  """
  names = _beside(path)
  if path.name == VOCABULARY:
    names += [MERGES, *([ADDED] if (path.parent / ADDED).is_file() else [])]
    files = {VOCABULARY: path}
  else:
    files = {JSON: path}
  return files | {name: path.parent / name for name in names}


def read_beside(path: pathlib.Path) -> dict:
  """Returns the fields of the files of BESIDE; special tokens as texts.

  Args:
    path: file of a tokenizer in the same folder.

  Raises:
    UserError: a file is not a JSON object, or a link that leaves the folder; or
      a special token is not a text.
  """
  stated = {}
  for name in _beside(path):
    file = path.parent / name
    with with_fix(bpe.FIX):
      content = folder_lib.read_bytes(path.parent, name)
      found = reading.parse_json(content, str(file))
    if not isinstance(found, dict):
      raise UserError(f'{file} does not hold a JSON object: {bpe.FIX}')
    for key in SPECIAL & found.keys():
      value = found[key]
      value = value.get('content') if isinstance(value, dict) else value
      if not isinstance(value, (str, type(None))):
        raise UserError(
          f'{file} has the {key} {value!r:.40}, which is not a text: {bpe.FIX}'
        )
      found[key] = value
    stated |= {key: value for key, value in found.items() if value}
  return stated
