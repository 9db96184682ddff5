"""Questions of held-out rows, and exact match of sampled answers."""

import types

import numpy as np
import tiny

from maskdiff.data.rows import Rows
from maskdiff.evals import answered
from maskdiff.posttraining import heldout_answers
from maskdiff.posttraining.heldout_answers import Question

EOS = 2


def test_each_document_asks_for_its_last_answer():
  rows = Rows(
    tokens=np.array(
      [[5, 6, 7, EOS, 8, 9, 10, EOS, 0], [3, 4, 5, 6, 7, 8, 9, 9, 9]]
    ),
    doc=np.array([[0, 0, 0, 0, 1, 1, 1, 1, -1], [0] * 9]),
    answer=np.array(
      [[0, 0, 1, 1, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 1, 1, 0, 0]], bool
    ),
  )
  assert heldout_answers.of_rows(rows, EOS) == [
    Question([5, 6], [7]),
    Question([8], [9, 10]),
    Question([3, 4, 5, 6, 7], [8, 9]),  # of two turns, the second
  ]
  without = rows._replace(doc=None, answer=np.zeros((2, 9), bool))
  assert not heldout_answers.of_rows(without, EOS)


def test_exact_match_compares_tokens_before_eos(monkeypatch, tokenizer):
  """Every prompt gets slots for the longest answer and an eos."""
  config = tiny.config({**tiny.TRAIN_KEYS, 'data.tokenizer': tokenizer.path})
  questions = [Question([5, 6], [7]), Question([8], [9, 10])]
  seen = []

  def complete(model, c, requests, batch):
    seen.extend(requests)
    return types.SimpleNamespace(tokens=[[7], [9, 11]])

  monkeypatch.setattr(answered, 'complete', complete)
  share, texts = heldout_answers.exact_match(
    config, None, tokenizer, None, questions
  )
  assert share == 0.5 and len(texts) == 2
  assert [r.row for r in seen] == [[5, 6, *[None] * 3], [8, *[None] * 3]]
  assert {int(r.settings.steps) for r in seen} == {3}
