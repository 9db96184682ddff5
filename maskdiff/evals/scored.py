"""Evaluation tasks on lines of text that are scored by likelihood.

Each line of a JSON lines file is an object:
  bound    {"prompt": ..., "answer": ...}, or {"text": ...} without a prompt
  greedy   {"prompt": ..., "answer": ...}
  choices  {"prompt": ..., "choices": [...], "answer": index of the right one}

A line with a prompt may have "suffix": ..., text that follows the answer. The
row is then prompt, answer and suffix, and only the answer is scored, given
prompt and suffix. The three texts are encoded separately, as in
evals/answered.py, so that the tokens of the answer do not depend on the text
around it.

A task takes the lines and a function that scores rows of tokens. It returns a
list with one dict per line, and a dict for all lines. As in LLaDA's evaluation
(eval_llada.py, _encode_pair), white space at the end of a prompt is moved to
the answer, where tokenizers expect it.
"""

from typing import NamedTuple

import numpy as np

from maskdiff.errors import UserError
from maskdiff.files import reading
from maskdiff.likelihood.bounds import corpus, lay_out
from maskdiff.likelihood.bracket import Bracket

MAX_MASK_BYTES = 4 << 30  # on the host


class Line(NamedTuple):
  """One example of an evaluation task."""

  where: str  # FILE:NUMBER, for error messages
  value: dict


def read(path, task):
  """Reads and checks the lines of an evaluation task.

  Args:
    path: JSON lines file, or /dev/stdin; empty lines are skipped.
    task: key of TASKS.

  Returns:
    list of Line, not empty.

  Raises:
    UserError: the file cannot be read or has no lines; or a line is not valid,
      in which case the message names file and line.
  """
  lines = [_parse(*line, task) for line in reading.lines(path)]
  if not lines:
    raise UserError(f'--data: {path!r} has no lines')
  return lines


def _parse(where, text, task):
  value = reading.parse_json(text, where)
  if not isinstance(value, dict):
    raise UserError(f'{where}: must be a JSON object')
  fields, scored_field = {'prompt': str, 'answer': str}, 'answer'
  if task == 'choices':
    fields = {'prompt': str, 'choices': list, 'answer': int}
    scored_field = 'choices'
  elif task == 'bound' and 'text' in value:
    fields, scored_field = {'text': str}, 'text'
  if 'text' in fields:
    # Training lines of launch/puzzles.py have text, prompt and answer.
    prompt_only = 'prompt' in value and 'answer' not in value
    if prompt_only or 'suffix' in value:
      name = 'prompt' if prompt_only else 'suffix'
      raise UserError(
        f'{where}: a line with text cannot have a {name}: write prompt, answer '
        'and suffix'
      )
  elif 'suffix' in value:
    fields['suffix'] = str
  if {k: type(v) for k, v in value.items() if k in fields} != fields:
    named = ', '.join(f'{k} ({t.__name__})' for k, t in fields.items())
    raise UserError(f'{where}: {task} needs {named}')
  texts = value[scored_field]
  texts = texts if task == 'choices' else [texts]
  if not all(isinstance(t, str) and t for t in texts):
    raise UserError(f'{where}: {scored_field} must be text that is not empty')
  if task == 'choices' and not 0 <= value['answer'] < len(texts):
    raise UserError(
      f'{where}: answer {value["answer"]} must be the index of one of the '
      f'{len(texts)} choices, counted from 0'
    )
  return Line(where, value)


def check_masks(answers, orders=0, samples=0):
  """Checks that the masks of an answer, and all values, fit into memory.

  Args:
    answers: queries.Answers.
    orders: number of random orders, with as many masks each as tokens.
    samples: number of masks that are drawn.

  Raises:
    UserError: they need more than about MAX_MASK_BYTES.
  """
  longest = int(answers.answer.sum(axis=1).max(initial=0))
  queries = orders * longest + samples
  # Two masks, a weight, an index and results of a query; a value for each row.
  size = queries * (2 * longest + 64 + 8 * len(answers.answer))
  if size > MAX_MASK_BYTES:
    flag, number = ('orders', orders) if orders else ('samples', samples)
    raise UserError(
      f'{flag}={number}: {len(answers.answer)} answers of up to {longest} '
      f'tokens would take {size / 2**30:,.0f} GiB of memory, more than the '
      f'limit of {MAX_MASK_BYTES >> 30} GiB; lower {flag}'
    )


def check_no_suffixes(lines):
  """Checks that no text follows an answer, for an autoregressive model.

  Raises:
    UserError: a line has a suffix that is not empty.
  """
  for line in lines:
    if line.value.get('suffix'):
      raise UserError(
        f'{line.where}: text follows the answer, but an autoregressive model '
        'sees only the text before it: remove the suffix, or score the line '
        'with a masked diffusion model'
      )


def bound(lines, tokenizer, context, score):
  """Computes the bound for answers or whole texts.

  A text longer than the context is cut into pieces, which are scored
  independently.

  Args:
    lines: list of Line.
    tokenizer: data.tokenizer.Tokenizer.
    context: largest number of tokens of a row.
    score: function from queries.Answers and one seed per row to a
      bounds.Estimate, or to a bracket.Bracket.

  Returns:
    - one dict per line: the bound in nats, its standard error (None if
      unknown), the number of tokens, and bits per byte. For a Bracket, also
      the lower bound in nats, its standard error, and the smallest number of
      effective orders.
    - dict for all lines: numbers of lines and tokens, and the values of
      bounds.corpus. For a Bracket, also the lower bound per token.

  Raises:
    UserError: prompt, answer and suffix of a line are longer than the context.
  """
  rows, line_of, num_bytes = [], [], np.zeros(len(lines), int)
  for i, line in enumerate(lines):
    if 'text' in line.value:
      num_bytes[i] = len(line.value['text'].encode())
      ids = tokenizer.encode(line.value['text'])
      starts = range(0, len(ids), context)
      pieces = [([], ids[start : start + context], []) for start in starts]
    else:
      *row, num_bytes[i] = _encode(
        line, line.value['answer'], tokenizer, context
      )
      pieces = [row]
    rows += pieces
    line_of += [i] * len(pieces)
  estimate = score(lay_out(*zip(*rows, strict=True)), range(len(rows)))
  estimate, bracket = (
    (estimate.lower, estimate)
    if isinstance(estimate, Bracket)
    else (estimate, None)
  )
  sum_by_line = lambda x: np.bincount(line_of, x, minlength=len(lines))
  nats = -sum_by_line(estimate.log_likelihood)
  stderr = np.sqrt(sum_by_line(estimate.stderr**2))
  num_tokens = sum_by_line([len(answer) for _, answer, _ in rows]).astype(int)
  results = [
    {
      'nats': float(nats[i]),
      'stderr_nats': _number(stderr[i]),
      'tokens': int(num_tokens[i]),
      'bits_per_byte': float(nats[i] / num_bytes[i] / np.log(2)),
    }
    for i in range(len(lines))
  ]
  total = corpus(estimate, int(num_tokens.sum()), int(num_bytes.sum()))
  if bracket:
    at_least = -sum_by_line(bracket.upper.log_likelihood)
    error = np.sqrt(sum_by_line(bracket.upper.stderr**2))
    effective = np.full(len(lines), np.inf)
    np.minimum.at(effective, line_of, bracket.effective_orders)
    for i, result in enumerate(results):
      result |= {
        'nats_at_least': float(at_least[i]),
        'stderr_nats_at_least': _number(error[i]),
        'effective_orders': float(effective[i]),
      }
    upper = corpus(bracket.upper, int(num_tokens.sum()), int(num_bytes.sum()))
    total['nats_per_token_at_least'] = upper['nats_per_token']
    total['stderr_nats_per_token_at_least'] = _number(
      upper['stderr_nats_per_token']
    )
  total['stderr_nats_per_token'] = _number(total['stderr_nats_per_token'])
  return results, {
    'lines': len(lines),
    'tokens': int(num_tokens.sum()),
    **total,
  }


def choices(lines, tokenizer, context, score):
  """Picks the choice with the highest log-likelihood, in total and per byte.

  The choices of a line share a seed. Choices with equally many tokens are then
  compared under the same masks. Arguments and errors as for `bound`.

  Returns:
    - one dict per line: the log-likelihood of each choice, the two picked
      choices and the right choice.
    - dict with both accuracies and their standard errors.
  """
  encoded = [
    (i, *_encode(line, choice, tokenizer, context))
    for i, line in enumerate(lines)
    for choice in line.value['choices']
  ]
  line_of, *parts, num_bytes = zip(*encoded, strict=True)
  estimate = score(lay_out(*parts), line_of)
  rows = []
  for i, line in enumerate(lines):
    in_line = np.array(line_of) == i
    nats = estimate.log_likelihood[in_line]
    per_byte = nats / np.array(num_bytes)[in_line]
    rows.append(
      {
        'log_likelihood_nats': nats.tolist(),
        'stderr_nats': [_number(s) for s in estimate.stderr[in_line]],
        'choice': int(nats.argmax()),
        'choice_per_byte': int(per_byte.argmax()),
        'answer': line.value['answer'],
      }
    )
  correct = lambda key: [row[key] == row['answer'] for row in rows]
  return rows, {
    'lines': len(lines),
    **accuracy('accuracy', correct('choice')),
    **accuracy('accuracy_per_byte', correct('choice_per_byte')),
  }


def greedy(lines, tokenizer, context, matches):
  """Checks whether greedy decoding produces the answers, token for token.

  Args:
    lines: as for `bound`.
    tokenizer: as for `bound`.
    context: as for `bound`.
    matches: function from queries.Answers to [B] bool.

  Returns:
    - one dict per line: whether its answer matches.
    - dict with the accuracy and its standard error.
  """
  encoded = [
    _encode(line, line.value['answer'], tokenizer, context) for line in lines
  ]
  *parts, _ = zip(*encoded, strict=True)
  matched = matches(lay_out(*parts)).tolist()
  rows = [{'match': match} for match in matched]
  return rows, {'lines': len(lines), **accuracy('accuracy', matched)}


TASKS = {'bound': bound, 'choices': choices, 'greedy': greedy}


def _encode(line, answer, tokenizer, context):
  """Encodes prompt, answer and suffix of a line.

  Returns:
    Three token lists, and the number of UTF-8 bytes of the answer.

  Raises:
    UserError: the row is longer than the context.
  """
  prompt, answer = split_space(line.value['prompt'], answer)
  suffix = line.value.get('suffix', '')
  parts = [tokenizer.encode(text) for text in (prompt, answer, suffix)]
  length = sum(map(len, parts))
  if length > context:
    fields = 'prompt, answer and suffix' if suffix else 'prompt and answer'
    raise UserError(
      f'{line.where}: {fields} have {length} tokens together, but training '
      f'rows had {context}: shorten the line'
    )
  return *parts, len(answer.encode())


def split_space(prompt, answer):
  """Returns prompt and answer with white space between them in the answer."""
  stripped = prompt.rstrip()
  return stripped, prompt[len(stripped) :] + answer


def accuracy(name, correct):
  """Returns a dict with the accuracy `name` and its standard error.

  Args:
    name: key of the accuracy.
    correct: list of bool, one per line.
  """
  mean, n = float(np.mean(correct)), len(correct)
  stderr = (mean * (1 - mean) / (n - 1)) ** 0.5 if n > 1 else None
  return {name: mean, f'stderr_{name}': stderr}


def _number(x):
  """Returns a float, or None instead of nan, which JSON cannot represent."""
  return None if np.isnan(x) else float(x)
