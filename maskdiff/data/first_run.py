"""From text to the command that trains on it, without further choices.

`choose` picks the row length and the held-out share for the amount of text.
`train_tokenizer` trains a tokenizer on the other documents. `command` returns
the command line of a first run on prepared rows, whose values fit the rows;
`fine_tuning` does so for conversations.
"""

import dataclasses
import os
import pathlib
import shlex
from collections.abc import Iterable, Iterator, Mapping

from maskdiff.config import keys
from maskdiff.data import (
  documents,
  manifest_fields,
  prepare,
  records,
  samples,
  shards,
  sources,
  tokenizer_training,
)
from maskdiff.data import job as job_lib
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.errors import UserError
from maskdiff.files import paths, reading

# Smallest first. The first share that holds out enough text is chosen.
_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
_MAX_SHARE = 0.4  # of the text

# Row length by the least amount of text, in bytes.
_ROW_LENGTHS = (
  (64 << 20, 1024),
  (1 << 16, 128),
  (1 << 14, 64),
  (1 << 13, 32),
  (0, 16),
)
_BYTES_PER_TOKEN = 5  # more than most tokenizers reach

_EVAL_ROWS = 512  # evaluated by a first run, if the text has as many
_CLONE = pathlib.Path(__file__).parents[2]
_CONFIG = 'configs/tiny.py'
_LENGTH = 128  # of the rows of _CONFIG
_SFT = 'launch/finetune.py', 'configs/sft.py'
_PREFERENCES = 'launch/preferences.py', 'configs/preferences.py'
_BATCHES = 50  # of an epoch of a fine-tuning, at least
_MIN_LENGTH = 16

# The text beyond this amount hardly changes the choices.
_SCANNED_BYTES, _SCANNED_DOCUMENTS = 64 << 20, 1000
_PIECES = 200  # into which the text is cut if whole documents are too few
_MIN_PIECE_CHARS, _MAX_PIECE_CHARS = 64, 4096


@dataclasses.dataclass(frozen=True)
class Choices:
  """How text is prepared; see prepare.prepare."""

  row_length: int
  heldout_fraction: float
  piece_chars: int = 0


def choose(
  plan: sources.Plan,
  row_length: int | None = None,
  heldout_fraction: float | None = None,
  piece_chars: int | None = None,
) -> Choices:
  """Chooses how to prepare some text; values other than None are kept.

  The held-out share is large enough for an evaluation. If a few documents hold
  most of the text, they are cut into pieces, some of which are held out.

  Raises:
    UserError: the text is damaged, or a value is out of bounds.
  """
  if heldout_fraction is not None:
    prepare.check_heldout_fraction(heldout_fraction)
  shares = _SHARES if heldout_fraction is None else (heldout_fraction,)
  size, chars, held_out = _scan(plan, shares, piece_chars or 0)
  if row_length is None:
    row_length = next(n for least, n in _ROW_LENGTHS if size >= least)
  # A row for each of 8 devices and the rest that does not fill a row, or as
  # much as is useful.
  row_bytes = row_length * _BYTES_PER_TOKEN
  wanted = max(9 * row_bytes, min(size // 20, _EVAL_ROWS * row_bytes))
  tries = (0, _piece_chars(chars)) if piece_chars is None else (piece_chars,)
  for number, piece_chars in enumerate(tries):
    if number:
      size, _, held_out = _scan(plan, shares, piece_chars)
    for share, held_out_bytes in zip(shares, held_out, strict=True):
      if wanted <= held_out_bytes <= _MAX_SHARE * size:
        return Choices(row_length, share, piece_chars)
  # Very little text: as much as leaves most of it for training.
  fit = [s for s, n in zip(shares, held_out, strict=True) if n <= size / 3]
  share = fit[-1] if fit else shares[0]
  return Choices(row_length, share, tries[-1] * (heldout_fraction != 0))


def _piece_chars(chars: int) -> int:
  return max(_MIN_PIECE_CHARS, min(chars // _PIECES, _MAX_PIECE_CHARS))


def _texts(plan: sources.Plan, piece_chars: int) -> Iterator[str]:
  for part in plan.parts:
    yield from documents.pieces(documents.texts_of(part, {}), piece_chars)


def _scan(plan, shares, piece_chars: int) -> tuple[int, int, list[int]]:
  """Counts text: its bytes, its characters, and held-out bytes by share."""
  size, chars, held_out = 0, 0, [0] * len(shares)
  for number, text in enumerate(_texts(plan, piece_chars)):
    if size >= _SCANNED_BYTES and number >= _SCANNED_DOCUMENTS:
      break
    text_bytes, fraction = len(text.encode()), shards.hash_fraction(text)
    size, chars = size + text_bytes, chars + len(text)
    for i, share in enumerate(shares):
      held_out[i] += text_bytes * (fraction < share)
  return size, chars, held_out


def train_tokenizer(
  plan: sources.Plan,
  choices: Choices,
  vocab_size: int | None,
  path: pathlib.Path,
) -> tokenizer_lib.Tokenizer:
  """Trains a tokenizer on the documents that are not held out.

  Args:
    plan: the text.
    choices: how it will be prepared.
    vocab_size: number of token ids. None chooses it by the amount of text.
    path: file to write, a SentencePiece model.

  Returns:
    The Tokenizer.

  Raises:
    UserError: as tokenizer_training.train_on.
  """
  training = (
    text
    for text in _texts(plan, choices.piece_chars)
    if shards.hash_fraction(text) >= choices.heldout_fraction
  )
  path.write_bytes(tokenizer_training.train_on(training, vocab_size))
  return tokenizer_lib.load(path)


def stored(
  directory: str | os.PathLike,
) -> tuple[tokenizer_lib.Tokenizer, Choices] | None:
  """Returns tokenizer and choices of an earlier preparation.

  Returns None if the directory holds no preparation, finished or unfinished.

  Raises:
    UserError: its files are damaged.
  """
  directory = paths.local_path(directory)
  state = directory / job_lib.STATE / job_lib.SETTINGS
  if (directory / records.MANIFEST).exists():
    settings = records.read_manifest(directory).settings
  elif state.exists():
    settings = reading.read_json(state)
  else:
    return None
  names = ('row_length', 'heldout_fraction', 'piece_chars')
  settings = settings if isinstance(settings, dict) else {}
  values = [settings.get(name, 0) for name in names]
  row_length, heldout_fraction, piece_chars = values
  # True is an int, and NaN is not between two numbers.
  if not (
    type(row_length) is type(piece_chars) is int
    and type(heldout_fraction) in (int, float)
    and 1 <= row_length <= manifest_fields.MAX_ROW_LENGTH
    and 0 <= heldout_fraction <= 1
    and piece_chars >= 0
  ):
    raise UserError(
      f'{directory} holds rows of another kind: choose another --out'
    )
  choices = Choices(*values)
  if not (directory / 'tokenizer.model').exists():
    return None  # killed before the tokenizer was copied
  return tokenizer_lib.load(directory), choices


def fit_vocabulary(
  tokenizer: tokenizer_lib.Tokenizer, tokens: Mapping[str, int], vocab_size: int
) -> dict[str, int]:
  """Returns the keys of a config that a tokenizer does not fit.

  Args:
    tokenizer: the tokenizer as loaded, perhaps without a mask or bos token.
    tokens: config.tokens, the special ids by name.
    vocab_size: config.model.vocab_size.

  Returns:
    Dict from dotted keys to the values that fit. A token that the tokenizer
    lacks keeps the id of the config, if no text has this id.
  """
  changes, needed = {}, tokenizer.vocab_size
  others = tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id
  for name, given in tokens.items():
    value = getattr(tokenizer, name)
    if name == 'bos_id' and given == -1:  # a network without bos
      continue
    if value is None:
      is_text = _is_text(tokenizer, given)
      clashes = name == 'mask_id' and given in others
      value = needed if is_text or clashes else given
    needed = max(needed, value + 1)
    if value != given:
      changes[f'tokens.{name}'] = value
  if needed > vocab_size:
    changes['model.vocab_size'] = needed
  return changes


def _is_text(tokenizer: tokenizer_lib.Tokenizer, value: int) -> bool:
  """Returns whether a text may contain an id, or the id is negative."""
  return value < 0 or (
    value < tokenizer.vocab_size and bool(tokenizer.pieces[value])
  )


def command(
  directory: str, manifest: records.Manifest, tokenizer: tokenizer_lib.Tokenizer
) -> str | None:
  """Returns a command that trains the smallest config on prepared rows.

  Its row length, evaluation, vocabulary and token ids fit the rows. Outside of
  the clone, the paths of script and config are absolute. Returns None if the
  held-out rows do not fill a batch of two rows.
  """
  length = next(
    (n for n in range(_LENGTH, _MIN_LENGTH, -1) if not manifest.row_length % n),
    manifest.row_length,
  )
  heldout, train = (
    samples.num_samples(manifest.splits[name].rows, manifest.row_length, length)
    for name in ('heldout', 'train')
  )
  if heldout < 2 or not train:
    return None
  tokens = {n: k.default for n, k in keys.SECTIONS['tokens'].items()}
  values = {
    'data.path': directory,
    'data.tokenizer': directory,
    'data.length': length,
    **fit_vocabulary(tokenizer, tokens, 0),
    **_evaluation(heldout),
  }
  values['sample.prompts'] = '("",)'  # that of the config is Python
  if length < keys.KEYS['sample.gen_length'].default:
    values['sample.gen_length'] = length
  return _launch('launch/pretrain.py', _CONFIG, directory, values)


def fine_tuning(
  directory: str, manifest: records.Manifest, models: Iterable[str]
) -> str:
  """Returns how to fine-tune a model on prepared conversations: a command.

  Batch and evaluation fit the rows. Without enough rows, the text says so.

  Args:
    directory: directory of the rows.
    manifest: their Manifest.
    models: paths; the first that is the folder of a model is fine-tuned.
  """
  heldout, train = (manifest.splits[name].rows for name in ('heldout', 'train'))
  if heldout < 2 or not train:
    return (
      'note: a fine-tuning needs two held-out rows and a training row: prepare '
      'more conversations, or another --out with a larger --heldout_fraction'
    )
  is_model = lambda path: os.path.isfile(os.path.join(path, 'config.json'))
  model = next(filter(is_model, models), 'MODEL')
  batch = _power_of_two(max(2, min(256, train // _BATCHES)))
  values = {
    'init_from': model,
    'data.path': directory,
    'train.batch': batch,
    **_evaluation(heldout),
  }
  pairs = manifest.settings.get('layout') == 'pairs'
  command = _launch(*(_PREFERENCES if pairs else _SFT), directory, values)
  where = ', MODEL being one with their tokenizer' * (model == 'MODEL')
  return f'to fine-tune a model on these rows{where}:\n{command}'


def _evaluation(heldout: int) -> dict[str, int]:
  """Returns the keys of an evaluation on a number of held-out rows, over 1."""
  # An even number, since evaluation draws times for pairs of rows.
  batch = _power_of_two(min(heldout, 32))
  return {
    'eval.batch': batch,
    'eval.batches': min(heldout // batch, _EVAL_ROWS // batch),
  }


def _power_of_two(most: int) -> int:
  """Returns the largest power of two that is at most `most`."""
  return 1 << (most.bit_length() - 1)


def _launch(
  script: str, config: str, directory: str, values: Mapping[str, object]
) -> str:
  """Returns a command line; paths outside of the clone are absolute."""
  flags = (f'--config.{k}={v}' for k, v in values.items())
  workdir = f'runs/{pathlib.Path(directory).resolve().name}'
  clone = pathlib.Path('' if os.path.exists(config) else _CLONE)
  words = ['python', str(clone / script)]
  words += ['--config', str(clone / config), '--workdir', workdir, *flags]
  return shlex.join(words)
