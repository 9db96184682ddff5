"""Makes rows with answers, and a run whose model can be fine-tuned."""

import json

import numpy as np
import untrained_run

from maskdiff.checkpoints import manifest
from maskdiff.data import row_writer
from maskdiff.data.rows import Rows

LENGTH = 16


def write_rows(directory, tokenizer, rows=64, length=LENGTH):
  """Writes rows whose second half repeats the first; it is the answer.

  Every fourth row ends in padding.
  """
  random = np.random.default_rng(0)
  letters = np.array(tokenizer.encode('abcdefgh')[:4])
  half = letters[random.integers(0, len(letters), (rows, length // 2))]
  tokens = np.concatenate([half, half], axis=1).astype(np.int32)
  tokens[:, -1] = tokenizer.eos_id
  answer = np.arange(length) >= length // 2
  answer = np.tile(answer, (rows, 1))
  doc = np.zeros((rows, length), np.int32)
  padding = np.zeros((rows, length), bool)
  padding[::4, -3:] = True
  tokens[padding], doc[padding], answer[padding] = tokenizer.pad_id, -1, False
  rows = Rows(tokens, doc, answer)
  quarter = len(tokens) // 4
  split = lambda part: [Rows(*(column[part] for column in rows))]
  row_writer.write_rows(
    directory,
    {
      'train': split(slice(quarter, None)),
      'heldout': split(slice(quarter)),
    },
    tokenizer,
    source='halves that repeat',
  )
  return directory


def save_model(path, tokenizer, **changes):
  """Writes a run with random parameters, and its config.json."""
  config = untrained_run.save(path, tokenizer, **changes)
  (path / 'config.json').write_text(json.dumps(manifest.config_json(config)))
  return path
