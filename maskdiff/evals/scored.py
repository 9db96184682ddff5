"""Tasks on lines of text that are scored by likelihood.

A line of a JSON lines file is an object:
  bound    {"prompt": ..., "answer": ...}, or {"text": ...} without a prompt
  greedy   {"prompt": ..., "answer": ...}
  choices  {"prompt": ..., "choices": [...], "answer": number of the right one}

A line with a prompt may have "suffix": ..., text that follows the answer. The
row is then prompt, answer and suffix, and the answer alone is scored, given
both. The three are encoded each for itself, as evals/decode.py does, so that
the answer's tokens are those of its text whatever stands beside it.

Each task takes the lines and a function that scores rows of tokens, and
returns a dict for each line and one for all of them. As in LLaDA's evaluation
(eval_llada.py, _encode_pair), white space at the end of a prompt is moved to
the answer, where tokenizers expect it.
"""

import json
from typing import NamedTuple

import numpy as np

from maskdiff.errors import UserError
from maskdiff.likelihood.bounds import corpus, lay_out


class Line(NamedTuple):
  where: str  # FILE:NUMBER
  value: dict


def read(path, task):
  """Reads and checks the lines of a task.

  Args:
    path: of a JSON lines file; empty lines are passed over.
    task: a key of TASKS.

  Returns:
    list of Line, not empty.

  Raises:
    UserError: names the file, the line and what is wrong with it.
  """
  lines = []
  try:
    with open(path, encoding='utf-8') as f:
      for number, text in enumerate(f, start=1):
        if text.strip():
          lines.append(_parse(f'{path}:{number}', text, task))
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'--data: cannot read {path!r} ({error})') from error
  if not lines:
    raise UserError(f'--data: {path!r} has no lines')
  return lines


def _parse(where, text, task):
  try:
    value = json.loads(text)
  except ValueError as error:
    raise UserError(f'{where}: this is not JSON ({error})') from error
  if not isinstance(value, dict):
    raise UserError(f'{where}: must be a JSON object')
  fields, scored = {'prompt': str, 'answer': str}, 'answer'
  if task == 'choices':
    fields, scored = {'prompt': str, 'choices': list, 'answer': int}, 'choices'
  elif task == 'bound' and 'text' in value:
    fields, scored = {'text': str}, 'text'
  if 'suffix' in value:
    if 'text' in fields:
      raise UserError(
        f'{where}: a text is scored whole and has no suffix: write prompt, '
        'answer and suffix'
      )
    fields['suffix'] = str
  if {k: type(v) for k, v in value.items() if k in fields} != fields:
    named = ', '.join(f'{k} ({t.__name__})' for k, t in fields.items())
    raise UserError(f'{where}: {task} needs {named}')
  texts = value[scored] if task == 'choices' else [value[scored]]
  if not all(isinstance(t, str) and t for t in texts):
    raise UserError(f'{where}: {scored} must be text that is not empty')
  if task == 'choices' and not 0 <= value['answer'] < len(texts):
    raise UserError(
      f'{where}: answer {value["answer"]} is none of its {len(texts)} choices, '
      'which count from 0'
    )
  try:
    given = value.get('prompt', ''), value.get('suffix', '')
    ''.join([*given, *texts]).encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{where}: this is not Unicode text ({error})') from error
  return Line(where, value)


def check_ends(lines):
  """Checks that nothing follows an answer, as for an autoregressive model.

  Raises:
    UserError: a line has a suffix that is not empty.
  """
  for line in lines:
    if line.value.get('suffix'):
      raise UserError(
        f'{line.where}: text follows the answer, and an autoregressive model '
        'knows only what stands before it: take out the suffix, or score the '
        'line with a model of masked diffusion'
      )


def bound(lines, tokenizer, context, score):
  """Scores the answers, or whole texts, cut where they exceed the context.

  The pieces of a text are scored as if nothing stood before them.

  Args:
    lines: list of Line.
    tokenizer: data.tokenizer.Tokenizer.
    context: tokens of the longest row.
    score: function from queries.Answers and seeds (from 0 on) to a
      bounds.Estimate.

  Returns:
    list of dicts with the nats of each line (an upper bound, with its standard
    error, None if unknown), its tokens and bits per byte; and the same for all.

  Raises:
    UserError: a line that is not to be cut is longer than the context.
  """
  parts, line_of, num_bytes = [], [], np.zeros(len(lines), int)
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
    parts += pieces
    line_of += [i] * len(pieces)
  estimate = score(lay_out(*zip(*parts, strict=True)), range(len(parts)))
  by_line = lambda x: np.bincount(line_of, x, minlength=len(lines))
  nats = -by_line(estimate.log_likelihood)
  stderr = np.sqrt(by_line(estimate.stderr**2))
  num_tokens = by_line([len(answer) for _, answer, _ in parts]).astype(int)
  rows = [
    {
      'nats': float(nats[i]),
      'stderr_nats': _number(stderr[i]),
      'tokens': int(num_tokens[i]),
      'bits_per_byte': float(nats[i] / num_bytes[i] / np.log(2)),
    }
    for i in range(len(lines))
  ]
  whole = corpus(estimate, int(num_tokens.sum()), int(num_bytes.sum()))
  whole['stderr_nats_per_token'] = _number(whole['stderr_nats_per_token'])
  return rows, {'lines': len(lines), 'tokens': int(num_tokens.sum()), **whole}


def choices(lines, tokenizer, context, score):
  """Takes the likeliest choice of each line, in all and per byte of its text.

  The choices of a line have one seed, so that those of equally many tokens are
  compared under the same masks. Arguments and errors as for `bound`.

  Returns:
    list of dicts with the log-likelihoods of the choices and the ones taken;
    and a dict of the accuracies with their standard errors over lines.
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
    mine = np.array(line_of) == i
    nats = estimate.log_likelihood[mine]
    per_byte = nats / np.array(num_bytes)[mine]
    rows.append(
      {
        'log_likelihood_nats': nats.tolist(),
        'stderr_nats': [_number(s) for s in estimate.stderr[mine]],
        'choice': int(nats.argmax()),
        'choice_per_byte': int(per_byte.argmax()),
        'answer': line.value['answer'],
      }
    )
  right = lambda key: [row[key] == row['answer'] for row in rows]
  return rows, {
    'lines': len(lines),
    **accuracy('accuracy', right('choice')),
    **accuracy('accuracy_per_byte', right('choice_per_byte')),
  }


def greedy(lines, tokenizer, context, matches):
  """Whether greedy decoding gives the answers, token for token.

  Args:
    lines: as for `bound`.
    tokenizer: as for `bound`.
    context: as for `bound`.
    matches: function from queries.Answers to [B] bool.

  Returns:
    list of dicts, and a dict of the accuracy.
  """
  encoded = [
    _encode(line, line.value['answer'], tokenizer, context) for line in lines
  ]
  *parts, _ = zip(*encoded, strict=True)
  right = matches(lay_out(*parts)).tolist()
  rows = [{'match': match} for match in right]
  return rows, {'lines': len(lines), **accuracy('accuracy', right)}


TASKS = {'bound': bound, 'choices': choices, 'greedy': greedy}


def _encode(line, answer, tokenizer, context):
  """Tokens of prompt, answer and suffix, and the bytes of what is scored."""
  prompt = line.value['prompt'].rstrip()
  answer = line.value['prompt'][len(prompt) :] + answer
  suffix = line.value.get('suffix', '')
  parts = [tokenizer.encode(text) for text in (prompt, answer, suffix)]
  length = sum(map(len, parts))
  if length > context:
    named = 'prompt, answer and suffix' if suffix else 'prompt and answer'
    raise UserError(
      f'{line.where}: {named} have {length} tokens, more than the '
      f'{context} that the network was trained on'
    )
  return *parts, len(answer.encode())


def accuracy(name, right):
  """The share of what is right, and its standard error over lines."""
  share, n = float(np.mean(right)), len(right)
  return {
    name: share,
    f'stderr_{name}': (share * (1 - share) / (n - 1)) ** 0.5 if n > 1 else None,
  }


def _number(x):
  """A float for JSON, which has no nan."""
  return None if np.isnan(x) else float(x)
