r"""Turns text into rows of tokens for training, or inspects such rows.

python launch/prepare.py --source 'data/web/*.jsonl.zst' --source data/books \
  --tokenizer tokenizer/stdlib_4k.model --out data/rows --row_length 4096 \
  --workers 16
python launch/prepare.py --inspect data/rows
python launch/prepare.py --verify data/rows

After an interruption, the same command resumes the work.
"""

import os
import sys

from absl import flags

from maskdiff import config
from maskdiff.errors import UserError

flags.DEFINE_multi_string(
  'source',
  [],
  'embedded; a file, directory or quoted glob of .txt .md .py .jsonl .json '
  '(also with .gz or .zst) or .parquet; or tfds:DIR:SPLIT. May be repeated.',
)
flags.DEFINE_string('tokenizer', None, 'A .model or tokenizer.json file.')
flags.DEFINE_string('out', None, 'Output directory for the rows.')
flags.DEFINE_integer('row_length', 4096, 'Tokens per row.', lower_bound=1)
flags.DEFINE_float(
  'heldout_fraction',
  0.005,
  'Share of held-out documents, selected by a hash of their text.',
  lower_bound=0,
  upper_bound=1,
)
flags.DEFINE_integer(
  'workers', os.cpu_count() or 1, 'Number of processes.', lower_bound=1
)
flags.DEFINE_string(
  'text_key', 'text', 'Field or column with the text in JSON, Parquet and tfds.'
)
flags.DEFINE_bool(
  'by_line', False, 'Read each line of a .txt file as a document.'
)
flags.DEFINE_string(
  'inspect', None, 'Print statistics and rows of this directory.'
)
flags.DEFINE_integer('rows', 3, 'Rows that --inspect prints.', lower_bound=0)
flags.DEFINE_string(
  'verify', None, 'Compare all rows of this directory with their checksums.'
)


def main(args):
  modes = [m for m in ('out', 'inspect', 'verify') if args[m].value]
  if len(modes) != 1:
    raise UserError('give one of --out DIR, --inspect DIR and --verify DIR')
  {'out': prepare, 'inspect': inspect, 'verify': verify}[modes[0]](args)


def prepare(args):
  from maskdiff.data import prepare, sources, tokenizer

  sys.stdout.reconfigure(line_buffering=True)  # for progress in a log file
  for name in ('source', 'tokenizer'):
    if not args[name].value:
      raise UserError(f'--out needs --{name}')
  tok = tokenizer.load(args.tokenizer)
  plan = sources.plan(args.source, text_key=args.text_key, by_line=args.by_line)
  size = sum(part.size for part in plan.parts)
  print(f'{plan.description}: {size / 1e6:,.1f} MB, {len(plan.parts)} parts')
  for suffix, number in plan.ignored.items():
    print(f'note: not read: {number:,} {suffix}')
  large = [p for p in plan.parts if p.size > sources.MAX_PART_BYTES]
  if large:
    print(
      f'note: {len(large)} parts are over 1 GiB, such as {large[0].paths[0]}: '
      'a single process reads each of them; split the files to share the work'
    )
  manifest = prepare.prepare(
    plan,
    tok,
    args.out,
    row_length=args.row_length,
    heldout_fraction=args.heldout_fraction,
    workers=args.workers,
  )
  print(f'{args.out}: {prepare.summary(manifest)}')
  for name, split in manifest.splits.items():
    if not split.rows:
      print(f'note: no row in the split {name!r}; see --heldout_fraction')


def inspect(args):
  import numpy as np

  from maskdiff.data import prepare, records, row_reader, tokenizer
  from maskdiff.data import rows as rows_lib

  directory = args.inspect
  manifest = records.read_manifest(directory)
  tok = tokenizer.load(directory)
  print(f'{directory}: {manifest.source}')
  print(prepare.summary(manifest))
  dtypes = {'tokens': manifest.dtype, **manifest.columns}
  columns = ', '.join(f'{name} {dtype}' for name, dtype in dtypes.items())
  print(f'tokenizer {manifest.tokenizer_fingerprint}, on disk: {columns}')
  for name, split in manifest.splits.items():
    size = sum(shard.bytes for shard in split.shards)
    print(
      f'{name}: {len(split.shards)} shards, {size / 1e6:,.1f} MB, '
      f'{split.tokens:,} tokens, unigram entropy '
      f'{split.unigram_entropy_nats:.3f} nats per token'
    )
    source = row_reader.RowSource(directory, manifest, name)
    rows = min(args.rows, len(source))
    rng = np.random.default_rng(0)
    numbers = rng.choice(len(source), rows, replace=False) if rows else []
    for i in sorted(map(int, numbers)):
      row = rows_lib.map_columns(lambda x: x[0], source.read([i]))
      pieces = rows_lib.split_documents(row, manifest.eos_id)
      documents = map(tok.decode, pieces)
      print(f'--- {name} row {i} ---\n{"<end of document>".join(documents)}')


def verify(args):
  from maskdiff.data import records, row_reader

  manifest = records.read_manifest(args.verify)
  row_reader.verify(args.verify, manifest, rows='all')
  rows = sum(split.rows for split in manifest.splits.values())
  print(f'{args.verify}: all {rows:,} rows match their checksums')


if __name__ == '__main__':
  config.run_script(main)
