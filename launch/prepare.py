r"""Turns text into rows of tokens for training, or inspects such rows.

python launch/prepare.py --source data/books --out data/rows --train_tokenizer
python launch/prepare.py --source 'data/web/*.jsonl.zst' --source data/books \
  --tokenizer tokenizer/stdlib_4k.model --out data/rows --row_length 4096 \
  --workers 16
python launch/prepare.py --source my/chats.jsonl --chat plain \
  --tokenizer tokenizer/stdlib_4k.model --out data/chats --row_length 1024
python launch/prepare.py --inspect data/rows
python launch/prepare.py --verify data/rows

After an interruption, the same command resumes the work. The last line is a
command that trains a small model on the rows, or fine-tunes a model on
conversations.
"""

import dataclasses
import functools
import os
import pathlib
import sys
import tempfile

from absl import flags

from maskdiff import config
from maskdiff.errors import UserError, printable, require_utf8

ROW_LENGTH = 4096
HELDOUT_FRACTION = 0.005

flags.DEFINE_multi_string(
  'source',
  [],
  'embedded; a file, directory or quoted glob of .txt .md .py .jsonl .json '
  '(also with .gz or .zst) or .parquet; or tfds:DIR:SPLIT. May be repeated.',
)
flags.DEFINE_string('tokenizer', None, 'A .model or tokenizer.json file.')
flags.DEFINE_bool(
  'train_tokenizer',
  False,
  'Train a tokenizer on the text, in place of --tokenizer. Row length and '
  'held-out share are chosen by the amount of text.',
)
flags.DEFINE_integer(
  'vocab_size',
  None,
  'Token ids of --train_tokenizer. Default: by the amount of text.',
  lower_bound=1,
  upper_bound=1 << 20,
)
flags.DEFINE_string(
  'out',
  None,
  'Output directory for the rows. It may be inside a source.',
)
flags.DEFINE_integer(
  'row_length',
  None,
  f'Tokens per row. Default: {ROW_LENGTH}.',
  lower_bound=1,
  upper_bound=1 << 20,
)
flags.DEFINE_float(
  'heldout_fraction',
  None,
  'Share of held-out documents, selected by a hash of their text. Default: '
  f'{HELDOUT_FRACTION}.',
  lower_bound=0,
  upper_bound=1,
)
flags.DEFINE_integer(
  'piece_chars',
  None,
  'Cut longer documents into pieces of at most so many characters, each of '
  'which counts as a document. Default: documents stay whole.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'workers', os.cpu_count() or 1, 'Number of processes.', lower_bound=1
)
flags.DEFINE_string(
  'beam',
  None,
  'Flags of Apache Beam, such as "--runner=FlinkRunner", whose workers do the '
  'work on many machines.',
)
flags.DEFINE_string(
  'text_key', 'text', 'Field or column with the text in JSON, Parquet and tfds.'
)
flags.DEFINE_bool(
  'by_line', False, 'Read each line of a .txt file as a document.'
)
flags.DEFINE_integer(
  'align',
  1,
  'Start every document at a multiple of so many tokens, the block length of '
  'block diffusion; the gap before it is padding.',
  lower_bound=1,
)
flags.DEFINE_string(
  'chat',
  None,
  'Read conversations, JSON lines or Parquet with messages or with prompt and '
  'completion. The value is their template: plain, llada, llada_dllm, '
  "llada_nemo, llama3, qwen25, qwen3, a .jinja file, or a model's folder, "
  'which is then also the default of --tokenizer.',
)
flags.DEFINE_string(
  'chat_arguments',
  '{}',
  'Variables of the template as JSON, such as \'{"enable_thinking": false}\'.',
)
flags.DEFINE_enum(
  'turns',
  'last',
  ['last', 'all', 'each'],
  'Answers of a conversation that are learned: the last one; all; or each in a '
  'document of its own that ends with it. "train": true or false in a message '
  'overrides this.',
)
flags.DEFINE_enum(
  'truncate',
  'drop',
  ['drop', 'right', 'turns'],
  'Conversations longer than a row: drop them; cut them at the right; or drop '
  'turns from their start.',
)
flags.DEFINE_enum(
  'layout',
  'packed',
  ['packed', 'padded', 'pairs'],
  'Rows of --chat: several conversations each; one each, padded with learned '
  'eos to the length of its --group, as in LLaDA; or, for lines with prompt, '
  'chosen and rejected, both answers, each in half a row.',
)
flags.DEFINE_integer(
  'group',
  8,
  'Conversations of similar length that --layout=padded pads to one length: '
  'the batch of the training.',
  lower_bound=1,
)
flags.DEFINE_bool(
  'fill_eos',
  False,
  'With --chat, fill the gap of --align with learned eos, as in SDAR.',
)
flags.DEFINE_list(
  'length_buckets',
  [],
  'With --chat, teach the model to predict the length of an answer, one of '
  'these numbers of tokens, such as 16,32,64; see docs/chat_data.md.',
)
flags.DEFINE_string('inspect', None, 'Directory of rows to describe.')
flags.DEFINE_integer('rows', 3, 'Rows that --inspect prints.', lower_bound=0)
flags.DEFINE_string('verify', None, 'Directory of rows to check completely.')


def main(args):
  modes = [m for m in ('out', 'inspect', 'verify') if args[m].value]
  if len(modes) != 1:
    raise UserError(
      'give one of --out DIR, the directory to write, --inspect DIR and '
      '--verify DIR'
    )
  {'out': prepare, 'inspect': inspect, 'verify': verify}[modes[0]](args)


def prepare(args):
  from maskdiff.data import beam, first_run, packing, prepare

  sys.stdout.reconfigure(line_buffering=True)  # for progress in a log file
  check(args)
  plan = open_plan(args)
  with tempfile.TemporaryDirectory() as folder:
    tok, choices = open_tokenizer(args, plan, pathlib.Path(folder))
    settings = dataclasses.asdict(choices) | columns(args, choices, tok)
    if args.beam:
      settings['elsewhere'] = functools.partial(beam.make_shards, args.beam)
    manifest = prepare.prepare(
      plan, tok, args.out, workers=args.workers, **settings
    )
  print(printable(f'{args.out}: {prepare.summary(manifest)}'))
  if manifest.statistics:
    print(packing.summary(manifest))
  for name, split in manifest.splits.items():
    if not split.rows:
      print(f'note: no row in the split {name!r}; see --heldout_fraction')
  if args.chat:
    settings['encode'].save_template(args.out)
    models = [path for path in (args.chat, args.tokenizer) if path]
    print(first_run.fine_tuning(args.out, manifest, models))
    return
  if command := first_run.command(args.out, manifest, tok):
    print(f'to train on these rows:\n{command}')
  else:
    choices = dataclasses.asdict(first_run.choose(plan))
    words = ' '.join(f'--{name}={x}' for name, x in choices.items() if x)
    print(
      'note: a run needs two held-out rows and a training row: prepare more '
      f'text, or another --out with {words}'
    )


def check(args):
  """Raises UserError if flags are missing or contradict each other."""
  if not args.source:
    raise UserError(
      "--out needs --source: the text, such as --source 'my/text'"
    )
  require_utf8(args.out)
  if args.chat and os.path.isdir(args.chat) and not args.tokenizer:
    args.tokenizer = args.chat
  if bool(args.tokenizer) == args.train_tokenizer:
    raise UserError(
      '--out needs either --train_tokenizer, which trains a tokenizer on the '
      'text, or --tokenizer FILE, such as tokenizer/stdlib_4k.model'
    )
  if args.vocab_size and not args.train_tokenizer:
    raise UserError('--vocab_size needs --train_tokenizer')
  if args.chat:
    given = ('train_tokenizer', 'piece_chars', 'by_line')
    refused = [f'--{name}' for name in given if args[name].value]
  else:
    names = 'chat_arguments turns truncate layout group fill_eos length_buckets'
    refused = [
      f'--{n}' for n in names.split() if not args[n].using_default_value
    ]
  if args.layout == 'pairs':
    names = 'turns truncate align fill_eos length_buckets'.split()
    for name in (n for n in names if not args[n].using_default_value):
      raise UserError(f'--{name} has no effect with --layout=pairs: remove it')
  if args.chat and args.fill_eos and args.align == 1:
    raise UserError('--fill_eos needs --align, whose gaps it fills')
  if args.length_buckets:
    check_length_buckets(args)
  if not args['group'].using_default_value and args.layout != 'padded':
    raise UserError('--group needs --layout=padded')
  if refused:
    reason = 'has no effect with' if args.chat else 'needs'
    raise UserError(f'{refused[0]} {reason} --chat')


def check_length_buckets(args):
  """Raises UserError if flags do not go with --length_buckets."""
  if not all(x.isdecimal() for x in args.length_buckets):
    raise UserError(
      f'--length_buckets={",".join(args.length_buckets)}: must be numbers of '
      'tokens, such as 16,32,64'
    )
  for flag, refused in (
    ('--turns=all', args.turns == 'all'),
    ('--truncate=right', args.truncate == 'right'),
    ('--layout=padded', args.layout == 'padded'),
    ('--fill_eos', args.fill_eos),
  ):
    if refused:
      raise UserError(
        f'{flag} does not go with --length_buckets, whose answers end their '
        'documents and fill their lengths with eos: remove one of the two'
      )


def open_plan(args):
  """Returns the plan of the input; prints its size and what it ignores."""
  from maskdiff.data import sources

  plan = sources.plan(
    args.source,
    text_key=args.text_key,
    by_line=args.by_line,
    records=args.chat is not None,
    output=args.out,
  )
  size = sum(part.size for part in plan.parts)
  print(f'{plan.description}: {size / 1e6:,.1f} MB, {len(plan.parts)} parts')
  for suffix, number in plan.ignored.items():
    print(printable(f'note: not read: {number:,} {suffix}'))
  large = [p for p in plan.parts if p.size > sources.MAX_PART_BYTES]
  if large:
    print(
      f'note: {len(large)} parts are over 1 GiB, such as '
      f'{printable(large[0].paths[0])}: a single process reads each of them; '
      'split the files to share the work'
    )
  return plan


def columns(args, choices, tok):
  """Returns the arguments of prepare.prepare for rows with more columns."""
  from maskdiff.data import packing

  if args.chat:
    from maskdiff.posttraining import chat, chat_rows, length_tokens

    template = chat.load(args.chat, args.chat_arguments)
    lengths, pairs = map(int, args.length_buckets), args.layout == 'pairs'
    encode = chat_rows.ChatDocuments(
      template,
      choices.row_length,
      args.turns,
      args.truncate,
      length_tokens.choose(tok, lengths) if args.length_buckets else (),
      pairs,
    )
    group = args.group if args.layout == 'padded' else 1
    align = choices.row_length // 2 if pairs else args.align
    layout = packing.Layout(args.layout, align, args.fill_eos, group)
    return dict(layout=layout, encode=encode, encode_settings=encode.settings)
  if args.align > 1:
    return dict(layout=packing.Layout('cut', args.align))
  return {}


def open_tokenizer(args, plan, folder):
  """Returns the tokenizer and first_run.Choices of the flags.

  A tokenizer that is trained is written to the folder.
  """
  from maskdiff.data import first_run, tokenizer

  names = ('row_length', 'heldout_fraction', 'piece_chars')
  given = {name: x for name in names if (x := args[name].value) is not None}
  if not args.train_tokenizer:
    defaults = first_run.Choices(ROW_LENGTH, HELDOUT_FRACTION)
    choices = dataclasses.replace(defaults, **given)
    return tokenizer.load(args.tokenizer), choices
  if found := first_run.stored(args.out):
    tok, choices = found
    if args.vocab_size not in (None, tok.vocab_size):
      raise UserError(
        f'{args.out} was prepared with --vocab_size={tok.vocab_size}: delete '
        'it or choose another directory'
      )
    return tok, dataclasses.replace(choices, **given)
  choices = first_run.choose(plan, **given)
  if choices.piece_chars and not args.piece_chars:
    print(
      'note: few documents hold most of the text, so it is cut into pieces of '
      f'at most {choices.piece_chars:,} characters, and some of them are held '
      'out'
    )
  tok = first_run.train_tokenizer(
    plan, choices, args.vocab_size, folder / 'tokenizer.model'
  )
  print(f'trained a tokenizer of {tok.vocab_size:,} token ids')
  return tok, choices


def inspect(args):
  import numpy as np

  from maskdiff.data import packing, prepare, records, row_reader, tokenizer
  from maskdiff.data import rows as rows_lib
  from maskdiff.posttraining import length_tokens

  directory = args.inspect
  manifest = records.read_manifest(directory)
  named = length_tokens.of_settings(manifest.settings)
  shown = {i: f'<{length} tokens>'.encode() for length, i in named}
  tok = tokenizer.with_pieces(tokenizer.load(directory), shown)
  print(printable(f'{directory}: {manifest.source}'))
  print(printable(prepare.summary(manifest)))
  if manifest.statistics:
    print(packing.summary(manifest))
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
      text = printable('<end of document>'.join(documents))
      print(f'--- {name} row {i} ---\n{text}')


def verify(args):
  from maskdiff.data import records, row_reader

  manifest = records.read_manifest(args.verify)
  row_reader.verify(args.verify, manifest, rows='all')
  rows = sum(split.rows for split in manifest.splits.values())
  print(f'{args.verify}: all {rows:,} rows match their checksums')


if __name__ == '__main__':
  config.run_script(main)
