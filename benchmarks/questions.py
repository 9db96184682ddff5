"""Held-out prompts of speculation.py, for a model of configs/speculation.py."""

from typing import NamedTuple

import copying  # the file beside this one
import numpy as np

from maskdiff.data import row_reader
from maskdiff.training import inputs

SLOTS = 64  # tokens of an answer


class Question(NamedTuple):
  """A prompt with the text that follows it; token lists."""

  prompt: list
  answer: list


def corpus(model, number):
  """Returns Questions of held-out rows of the embedded corpus."""
  (data,) = inputs.open_data(model.config, model.tokenizer, 'embedded')
  source = row_reader.RowSource(data.directory, data.manifest, 'heldout')
  rows = np.linspace(0, len(source) - 1, number).astype(int)
  tokens = source.read(rows.tolist()).tokens.tolist()
  return [Question(row[:-SLOTS], row[-SLOTS:]) for row in tokens]


def copies(model, number):
  """Returns Questions of the copying task, whose answers are two copies."""
  encode = model.tokenizer.encode
  return [
    Question(encode(line['prompt']), encode(line['answer']))
    for line in copying.questions(0, number)
  ]


TASKS = {'corpus': corpus, 'copying': copies}
