"""Trains the shipped tokenizer: SentencePiece BPE on the Python library.

    python tokenizer/train.py

Deterministic for one Python version. README.md in this folder tells what the
settings are for.
"""

import argparse
import hashlib
import io
import pathlib
from collections.abc import Iterator

import sentencepiece

from maskdiff.data import sources

HERE = pathlib.Path(__file__).resolve().parent

CONTROL = ['<mask>', '<system>', '<user>', '<assistant>', '<end_of_turn>']

# A line break and the indentation after it are one decision, so one token;
# and nothing else is ever glued to a line break. SentencePiece matches these
# after it has turned spaces into its own mark.
LINE_BREAKS = [
  '\n' * breaks + '\u2581' * spaces
  for breaks, spaces in [(1, n) for n in range(0, 25, 4)]
  + [(2, n) for n in (0, 4, 8)]
  + [(3, 0)]
]

# Tests and character tables make up two thirds of the library and read
# unlike other code, so only one file in 16 of them takes part.
RARE = {'test', 'tests', 'idle_test', 'encodings', 'pydoc_data'}
KEEP_ONE_IN = 16

CHUNK_CHARS = 4096


def taken(name: str) -> bool:
  """Whether a document takes part in the training, by its name."""
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  rare = not RARE.isdisjoint(name.split('/'))
  return not rare or int.from_bytes(digest, 'big') % KEEP_ONE_IN == 0


def chunks(text: str) -> Iterator[str]:
  """Cuts a text at line ends into parts of at most CHUNK_CHARS characters.

  Lines that are longer are cut anywhere: SentencePiece would drop them.
  """
  start = 0
  while start < len(text):
    stop = start + CHUNK_CHARS
    if stop < len(text):
      stop = text.rfind('\n', start, stop) + 1 or stop
    yield text[start:stop]
    start = stop


def train(vocab_size: int) -> bytes:
  """A serialized SentencePiece model, lossless on any text."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=(
      chunk
      for name, text in sources.embedded()
      if taken(name)
      for chunk in chunks(text)
    ),
    model_writer=model,
    model_type='bpe',
    vocab_size=vocab_size,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    allow_whitespace_only_pieces=True,
    byte_fallback=True,
    split_digits=True,
    character_coverage=0.9995,
    max_sentence_length=4 * CHUNK_CHARS,  # in bytes
    pad_id=0,
    bos_id=1,
    eos_id=2,
    unk_id=3,
    pad_piece='<pad>',
    bos_piece='<bos>',
    eos_piece='<eos>',
    unk_piece='<unk>',
    # Control symbols, so that no text can produce their ids.
    control_symbols=CONTROL,
    user_defined_symbols=LINE_BREAKS,
    # Stored in the model, so the same on every machine.
    num_threads=2,
    minloglevel=1,
  )
  return model.getvalue()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--vocab_size', type=int, default=4096)
  parser.add_argument(
    '--out', type=pathlib.Path, default=HERE / 'stdlib_4k.model'
  )
  flags = parser.parse_args()
  model = train(flags.vocab_size)
  flags.out.parent.mkdir(parents=True, exist_ok=True)
  flags.out.write_bytes(model)
  digest = hashlib.sha256(model).hexdigest()[:16]
  print(f'{flags.out}: {flags.vocab_size} pieces, fingerprint {digest}')


if __name__ == '__main__':
  main()
