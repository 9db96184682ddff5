"""Config keys of the training data."""

import itertools
import math

from maskdiff.config.key import Key, require

_MAX_SAMPLE = 1 << 62  # sample numbers are int64

KEYS = {
  'path': Key(
    'embedded',
    'Training data: embedded (the source text of the standard library of '
    'Python), an output directory of launch/prepare.py, or a mixture '
    'DIR=WEIGHT,DIR=WEIGHT.',
  ),
  'tokenizer': Key(
    'tokenizer/stdlib_4k.model',
    'Tokenizer: a .model, tokenizer.json or vocab.json file, or a directory '
    'with one.',
  ),
  'cache_dir': Key(
    '~/.cache/maskdiff', 'Directory for the rows of the embedded corpus.'
  ),
  'length': Key(
    256,
    'Tokens per row, L. A divisor or a multiple of the prepared length.',
    minimum=1,
  ),
  'verify': Key(
    'sample',
    'Rows compared with their checksums at the start.',
    ('sample', 'all'),
  ),
  'max_damaged_rows': Key(
    0,
    'Number of damaged rows per dataset that are replaced by the next row. '
    'One more stops the run.',
    minimum=0,
  ),
  'allow_change': Key(
    False, 'Allow a run to resume on other data, at the same sample number.'
  ),
  'skip_samples': Key(
    (),
    'Ranges of sample numbers that the next start leaves out, as (first, end), '
    '...; end is excluded. For example, the batches whose updates were '
    'skipped.',
  ),
  'length_tokens': Key(
    (),
    'Lengths of answers with the ids of the tokens that name them, as '
    '(length, id), ...; launch/finetune.py takes them from rows of '
    'launch/prepare.py --length_buckets.',
  ),
}


def check(c):
  """Raises UserError if keys of this section contradict each other."""
  skip = c.data.skip_samples
  pairs = all(isinstance(r, tuple) and len(r) == 2 for r in skip)
  bounds = [n for pair in skip for n in pair] if pairs else []
  require(
    pairs
    and all(type(n) is int and 0 <= n < _MAX_SAMPLE for n in bounds)
    and bounds == sorted(set(bounds)),
    f'config.data.skip_samples={skip}: must be (first, end) pairs of sample '
    'numbers, ascending and not adjacent, as in ((128, 256), (512, 544))',
  )
  named = c.data.length_tokens
  pairs = all(isinstance(r, tuple) and len(r) == 2 for r in named)
  lengths, ids = zip(*named, strict=True) if pairs and named else ((), ())
  require(
    pairs
    and all(type(n) is int for n in (*lengths, *ids))
    and all(0 < a < b for a, b in itertools.pairwise((*lengths, math.inf)))
    and all(0 <= i < c.model.vocab_size for i in ids)
    and len(set(ids)) == len(ids),
    f'config.data.length_tokens={named}: must be (length, id) pairs with '
    f'ascending lengths and ids below {c.model.vocab_size}, as in ((16, 200), '
    '(32, 201))',
  )
