"""Samples answers to held-out prompts during a fine-tuning, for exact match."""

from typing import NamedTuple

import numpy as np

from maskdiff import config as config_lib
from maskdiff.data import pipeline
from maskdiff.data.rows import PADDING
from maskdiff.evals import answered
from maskdiff.interop.load import Model
from maskdiff.sampling import layouts
from maskdiff.sampling.serve import RowRequest
from maskdiff.sampling.settings import sampler_config

SHOWN = 4  # questions whose answers are written to the metrics


class Question(NamedTuple):
  """The tokens of a prompt, and the correct answer before its eos."""

  prompt: list
  answer: list


def read(config, datasets, eos_id):
  """Returns the first questions of the held-out rows, a list of Question.

  Args:
    config: ConfigDict; `eval.answers` is the largest number of questions.
    datasets: list of data.pipeline.Dataset; the first is read.
    eos_id: token that ends an answer.
  """
  found, number = [], config.eval.answers
  batches = pipeline.heldout_batches(
    datasets[0],
    batch=config.eval.batch,
    length=config.data.length,
    num_batches=config.eval.batches,
    rows=range(config.eval.batch),
    num_threads=0,
  )
  named = config.data.length_tokens
  length_ids = [i for _, i in named]
  for rows in batches:
    found += of_rows(rows, eos_id, length_ids)
    if len(found) >= number:
      break
  # All questions get slots for the longest answer and an eos.
  slots = num_slots(found[:number]) if found else 0
  if named:  # a prompt needs room for the shortest length and its token
    slots = max(slots, named[0][0] + 1)
  fit = [q for q in found if len(q.prompt) + slots <= config.data.length]
  return fit[:number]


def of_rows(rows, eos_id, length_ids=()):
  """Returns a Question for the last answer of each document of some rows.

  Args:
    rows: data.rows.Rows of NumPy arrays [R, L], with the column `answer`.
    eos_id: token that ends an answer.
    length_ids: tokens that name lengths; see length_tokens.py. Documents whose
      answer is a length are left out, and prompts do not have the length.
  """
  found = []
  doc = np.zeros_like(rows.tokens) if rows.doc is None else rows.doc
  for tokens, numbers, answer in zip(
    rows.tokens, doc, rows.answer, strict=True
  ):
    for number in np.unique(numbers[numbers != PADDING]):
      of_doc = numbers == number
      text, is_answer = tokens[of_doc], answer[of_doc]
      if not is_answer.any():
        continue
      end = np.flatnonzero(is_answer)[-1] + 1
      before = np.flatnonzero(~is_answer[:end])
      start = before[-1] + 1 if len(before) else 0
      prompt, expected = text[:start].tolist(), text[start:end].tolist()
      if expected[0] in length_ids:
        continue
      if prompt and prompt[-1] in length_ids:
        prompt.pop()
      if eos_id in expected:
        expected = expected[: expected.index(eos_id)]
      found.append(Question(prompt, expected))
  return found


def num_slots(questions):
  """Returns the slots of each question: the longest answer, and an eos."""
  return max(len(q.answer) for q in questions) + 1


def exact_match(config, params, tokenizer, mesh, questions):
  """Samples answers; returns the share of correct ones, and some texts.

  An answer is correct if its tokens before the first eos are those of the
  held-out row. The settings of the sampler are those of config.sample, with one
  denoising step per token. Every answer gets slots for the longest one and an
  eos, or the length that the model predicts if its rows have lengths. All
  processes must call this function.

  Args:
    config: ConfigDict of the run.
    params: parameter tree.
    tokenizer: data.tokenizer.Tokenizer.
    mesh: device mesh of the parameters.
    questions: list of Question, not empty.

  Returns:
    float, and a list of texts.
  """
  slots = num_slots(questions)
  config = config_lib.with_settings(config, {'gen_length': slots})
  c, settings = sampler_config(config)
  model = Model(config, tokenizer, params, mesh)
  if config.data.length_tokens:
    prompts = [question.prompt for question in questions]
    requests, _ = answered.with_lengths(
      model, c, {'gen_length': slots}, prompts, config.eval.batch
    )
  else:
    requests = [
      RowRequest(i, layouts.prompt_row(question.prompt, slots), i, settings)
      for i, question in enumerate(questions)
    ]
  found = answered.complete(model, c, requests, config.eval.batch).tokens
  correct = [
    answer == question.answer
    for answer, question in zip(found, questions, strict=True)
  ]
  texts = [
    tokenizer.decode(question.prompt + answer)
    for answer, question in zip(found[:SHOWN], questions, strict=False)
  ]
  return float(np.mean(correct)), texts
