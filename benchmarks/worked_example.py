"""Prints the tables of the worked example in docs/idea.md.

python benchmarks/worked_example.py

The language has three sentences, and the two denoisers are known exactly. All
masks and all orders are enumerated, with probabilities as fractions.
tests/docs/test_idea.py compares the page with these tables, and the tables with
maskdiff's own functions.
"""

import itertools
import math
from fractions import Fraction

MASK = '_'
LANGUAGE = {
  ('the', 'cat', 'sat', 'down'): Fraction(1, 2),
  ('the', 'dog', 'sat', 'down'): Fraction(1, 4),
  ('the', 'dog', 'ran', 'away'): Fraction(1, 4),
}
SENTENCE = ('the', 'dog', 'sat', 'down')
L = len(SENTENCE)

# Positions that a denoiser sees when it predicts position i.
SEES = {
  'exact': lambda i: [j for j in range(L) if j != i],
  'neighbours': lambda i: [j for j in (i - 1, i + 1) if 0 <= j < L],
}


def chance(name, canvas, i, word):
  """Returns p(word at position i | visible words of a canvas), a Fraction."""

  def share(seen):
    fits = [
      (sentence, p)
      for sentence, p in LANGUAGE.items()
      if all(canvas[j] in (MASK, sentence[j]) for j in seen)
    ]
    total = sum(p for _, p in fits)
    right = sum((p for sentence, p in fits if sentence[i] == word), Fraction(0))
    return right / total if total else None

  seen = SEES[name](i)
  p = share(seen)
  # If no sentence has these neighbours together, only the left one counts.
  return share([j for j in seen if j < i]) if p is None else p


def masks():
  """Returns all 2^L sets of masked positions, small sets first."""
  for l in range(L + 1):
    yield from itertools.combinations(range(L), l)


def hide(sentence, hidden):
  return tuple(MASK if i in hidden else w for i, w in enumerate(sentence))


def weight(l):
  """Returns the integral of t^l (1 - t)^(L - l) / t over t in [0, 1]."""
  return Fraction(
    math.factorial(l - 1) * math.factorial(L - l), math.factorial(L)
  )


def nats(name, sentence, hidden):
  """Returns the sum of -log p of the masked words given the visible words."""
  canvas = hide(sentence, hidden)
  return sum(-math.log(chance(name, canvas, i, sentence[i])) for i in hidden)


def bound(name, sentence):
  """Returns the expected loss of a sentence, in nats."""
  return sum(weight(len(m)) * nats(name, sentence, m) for m in masks() if m)


def in_order(name, sentence, order):
  """Returns the probability of drawing the words one by one in an order."""
  p = Fraction(1)
  for k, i in enumerate(order):
    canvas = hide(sentence, order[k:])
    p *= chance(name, canvas, i, sentence[i])
  return p


def generated(name, sentence):
  """Returns the probability of a sentence drawn in a random order."""
  orders = list(itertools.permutations(range(L)))
  return sum(in_order(name, sentence, order) for order in orders) / len(orders)


def at_once(name, sentence):
  """Returns the probability of a sentence drawn in a single step."""
  nothing = (MASK,) * L
  p = Fraction(1)
  for i, word in enumerate(sentence):
    p *= chance(name, nothing, i, word)
  return p


def table(head, rows):
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def table_of_masks():
  """Returns a table with a row for each mask of SENTENCE."""
  rows = []
  for hidden in masks():
    canvas = ' '.join(hide(SENTENCE, hidden))
    l = len(hidden)
    rows.append(
      [
        f'`{canvas}`',
        weight(l) if l else 0,
        *(f'{nats(name, SENTENCE, hidden):.4f}' for name in SEES),
      ]
    )
  sums = [f'**{bound(name, SENTENCE):.4f}**' for name in SEES]
  rows.append(['weighted sum: the bound', '', *sums])
  return table(['shown', 'weight', *SEES], rows)


def table_of_orders():
  """Returns a table with a row for each order of the uncertain words."""
  name = 'neighbours'
  rows = []
  for order in itertools.permutations((1, 2, 3)):
    words = ', '.join(SENTENCE[i] for i in order)
    factors = []
    for k, i in enumerate(order):
      canvas = hide(SENTENCE, order[k:])
      factors.append(chance(name, canvas, i, SENTENCE[i]))
    p = math.prod(factors)
    product = ' x '.join(map(str, factors))
    rows.append([words, product, p, f'{-math.log(p):.4f}'])
  p = generated(name, SENTENCE)
  mean = bound(name, SENTENCE)
  rows.append(['mean of the six', '', f'**{p}**', f'**{mean:.4f}**'])
  return table(['order', 'probabilities', 'product', '-ln'], rows)


def table_of_sentences():
  """Returns a table with a row for each sentence, and their mean."""
  rows, means = [], [0.0] * 5
  for sentence, p in LANGUAGE.items():
    figures = [
      -math.log(p),
      bound('exact', sentence),
      -math.log(generated('neighbours', sentence)),
      bound('neighbours', sentence),
    ]
    figures.append(figures[3] - figures[2])
    rows.append([' '.join(sentence), p, *(f'{x:.4f}' for x in figures)])
    means = [m + float(p) * x for m, x in zip(means, figures, strict=True)]
  rows.append(['mean over the language', '', *(f'**{x:.4f}**' for x in means)])
  head = ['sentence', 'p', '-ln p', 'bound, exact']
  head += ['own -ln p, neighbours', 'bound, neighbours', 'gap']
  return table(head, rows)


def table_of_steps():
  """Returns a table of probabilities of samples: one word per step, or all."""
  rows = []
  for sentence in LANGUAGE:
    row = [generated(name, sentence) for name in SEES]
    rows.append([' '.join(sentence), *row, at_once('exact', sentence)])
  rest = [1 - sum(row[c] for row in rows) for c in (1, 2, 3)]
  rows.append(['anything else', *rest])
  head = ['sentence', 'one per step, exact', 'one per step, neighbours']
  return table([*head, 'all at once, either'], rows)


TABLES = {
  'masks': table_of_masks,
  'orders': table_of_orders,
  'sentences': table_of_sentences,
  'steps': table_of_steps,
}


if __name__ == '__main__':
  for make in TABLES.values():
    print(make(), end='\n\n')
