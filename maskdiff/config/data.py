"""Config keys of the training data."""

from maskdiff.config.key import Key, require

KEYS = {
  'path': Key(
    'embedded',
    'Training data: embedded, a directory of launch/prepare.py, or a mixture '
    'DIR=WEIGHT,DIR=WEIGHT.',
  ),
  'tokenizer': Key(
    'tokenizer/stdlib_4k.model',
    'Tokenizer: a .model or tokenizer.json file, or a directory with one.',
  ),
  'cache_dir': Key(
    '~/.cache/maskdiff', 'Directory for the rows of the embedded corpus.'
  ),
  'length': Key(
    256, 'Tokens per row, L. The length of the prepared rows.', minimum=1
  ),
  'verify': Key(
    'sample',
    'Rows compared with their checksums at the start.',
    ('sample', 'all'),
  ),
  'max_damaged_rows': Key(
    0,
    'Damaged rows that are replaced in each dataset before the run stops.',
    minimum=0,
  ),
  'allow_change': Key(
    False, 'Resume on other data, at the same sample number.'
  ),
  'skip_samples': Key(
    (),
    'Sample numbers to skip from the next start on, as (first, end), ...; for '
    'example those of batches whose updates were skipped.',
  ),
}


def check(c):
  """Raises UserError if keys of this section contradict each other."""
  skip = c.data.skip_samples
  pairs = all(isinstance(r, tuple) and len(r) == 2 for r in skip)
  bounds = [n for pair in skip for n in pair] if pairs else []
  require(
    pairs
    and all(isinstance(n, int) and n >= 0 for n in bounds)
    and bounds == sorted(set(bounds)),
    f'config.data.skip_samples={skip}: must be (first, end) pairs of sample '
    'numbers, ascending and apart, as in ((128, 256), (512, 544))',
  )
