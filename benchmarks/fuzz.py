"""Reads thousands of damaged files of others, and counts what goes wrong.

python benchmarks/fuzz.py
python benchmarks/fuzz.py --files 10000 --seed 1

Writes a Hugging Face folder, a folder of prepared rows and a work directory,
damages one file at a time at random (tests/mutations.py), and reads it as the
scripts do. Each read must either succeed or raise a UserError of one line,
open no file outside of the folder, and take bounded memory and time. Prints a
row for each kind of file; the exit status is 1 if a read did anything else.
"""

import argparse
import json
import pathlib
import random
import resource
import sys
import tempfile
import time
import traceback

import numpy as np

from maskdiff.data import records, row_reader
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.data.row_writer import write_rows
from maskdiff.data.rows import Rows
from maskdiff.errors import UserError
from maskdiff.interop import hf, hf_config, hf_tokenizer
from maskdiff.monitoring import history, report
from maskdiff.monitoring import ledger as ledger_lib

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'tests'))
import made_runs  # noqa: E402, shared with the tests
import mutations  # noqa: E402
import published_folders  # noqa: E402

MAX_SECONDS, MAX_BYTES = 10.0, 512 << 20


def read_weights(folder):
  opened = hf.open_folder(str(folder))
  hf_config.weights_config(opened)
  for leaf in opened.leaves.values():
    leaf.read((slice(None),) * len(leaf.shape))


def read_tokenizer(folder):
  tokenizer = hf_tokenizer.open_tokenizer(hf.open_folder(str(folder)))
  if tokenizer is not None:
    text = 'Der Fuß\t 12  é\n'
    assert tokenizer.decode(tokenizer.encode(text)) == text


def read_rows(folder):
  manifest = records.read_manifest(folder)
  row_reader.verify(folder, manifest, rows='all')
  source = row_reader.RowSource(folder, manifest, 'train')
  for i in range(len(source)):
    source[i]


def read_run(folder):
  report.page([history.read_run(str(folder))])
  ledger_lib.goodput(str(folder / 'ledger.jsonl'))


def make_rows(folder, tokenizer):
  block = Rows(np.arange(64, dtype=np.int32).reshape(4, 16) % 200)
  write_rows(
    folder,
    {'train': [block], 'heldout': [block]},
    tokenizer,
    source='numbers',
    settings={},
  )


def make_run(folder):
  rows = [made_runs.eval_row(0, 6.0)]
  for step in range(10, 60, 10):
    rows += [made_runs.train_row(step, 5.0), made_runs.eval_row(step, 5.5)]
  ledger = [
    {'time': 1.0 + i, 'step': i, 'seconds': {'step': 0.9}} for i in range(9)
  ]
  made_runs.write(folder, rows, ledger)
  panels = ['heldout', {'id': 'a', 'title': 't', 'note': 'n', 'key': 'k'}]
  (folder / 'stage.json').write_text(
    json.dumps({'name': 'pretraining', 'panels': panels})
  )


def mutated_header(rng, content):
  """Damages the JSON header of a safetensors file, or any byte of it."""
  if rng.random() < 0.3:
    return mutations.mutated_bytes(rng, content)
  size = int.from_bytes(content[:8], 'little')
  header = json.loads(content[8 : 8 + size])
  text = json.dumps(mutations.mutated_json(rng, header)).encode()
  return len(text).to_bytes(8, 'little') + text + content[8 + size :]


def mutated_text(rng, content):
  """Damages JSON as a value, or as bytes."""
  if rng.random() < 0.5:
    return mutations.mutated_bytes(rng, content)
  try:
    value = json.loads(content)
  except ValueError:  # JSON lines
    lines = content.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    value = mutations.mutated_json(rng, json.loads(lines[i]))
    lines[i] = json.dumps(value).encode() + b'\n'
    return b''.join(lines)
  return json.dumps(mutations.mutated_json(rng, value)).encode()


class Opened:
  """Records the paths that Python opens, by an audit hook."""

  def __init__(self):
    self.paths = set()
    sys.addaudithook(self._hook)

  def _hook(self, event, args):
    if event == 'open' and isinstance(args[0], (str, bytes)):
      self.paths.add(
        args[0]
        if isinstance(args[0], str)
        else args[0].decode('utf-8', 'replace')
      )


def outside(paths, folder):
  """Returns the opened paths that a damaged file may have named."""
  known = (str(folder), sys.prefix, sys.base_prefix, str(ROOT))
  return {
    p
    for p in paths
    if not str(pathlib.Path(p).resolve()).startswith(
      tuple(str(pathlib.Path(k).resolve()) for k in known)
    )
  }


def fuzz(folder, name, mutate, read, number, rng, opened):
  """Damages one file `number` times; returns a row of text, and failures."""
  path, kind = folder / name, f'{folder.name}/{name}'
  content = path.read_bytes()
  read(folder)  # the undamaged file is read, and imports are done
  opened.paths.clear()
  read(folder)
  usual = outside(opened.paths, folder)
  refused, failures, slowest = 0, [], 0.0
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for i in range(number):
    damaged = mutate(rng, content)
    path.write_bytes(damaged)
    opened.paths.clear()
    began, problem, paths = time.monotonic(), None, None
    try:
      read(folder)
    except UserError as error:
      refused += 1
      if '\n' in str(error) or not str(error):
        problem = f'an error that is not one line: {error!r}'
    except BaseException as error:  # also a panic of native code
      if isinstance(error, KeyboardInterrupt):
        raise
      paths = set(opened.paths)  # formatting opens the source code
      problem = ''.join(traceback.format_exception(error)[-3:])[-400:]
    seconds = time.monotonic() - began
    slowest = max(slowest, seconds)
    if others := outside(paths or opened.paths, folder) - usual:
      problem = f'opened {sorted(others)[:3]}'
    if seconds > MAX_SECONDS:
      problem = f'took {seconds:.1f} s'
    if problem:
      failures.append((kind, i, problem))
  path.write_bytes(content)
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
  if grown * 1024 > MAX_BYTES:
    failures.append((kind, -1, f'memory grew by {grown >> 10} MiB'))
  return (
    f'{kind:<24}{number:>8}{refused:>9}{len(failures):>10}'
    f'{slowest:>12.2f}{grown / 1024:>12.0f}'
  ), failures


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--files', type=int, default=2000)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  rng, opened = random.Random(args.seed), Opened()
  with tempfile.TemporaryDirectory() as root:
    root = pathlib.Path(root)
    folder = published_folders.make(root / 'model')
    tokenizer = tokenizer_lib.load(str(folder))
    make_rows(root / 'rows', tokenizer)
    make_run(root / 'run')
    rows, run = root / 'rows', root / 'run'
    cases = [
      (folder, 'model.safetensors', mutated_header, read_weights),
      (folder, 'config.json', mutated_text, read_weights),
      (folder, 'tokenizer.json', mutated_text, read_tokenizer),
      (folder, 'tokenizer_config.json', mutated_text, read_tokenizer),
      (rows, records.MANIFEST, mutated_text, read_rows),
      (run, 'metrics.jsonl', mutated_text, read_run),
      (run, 'ledger.jsonl', mutated_text, read_run),
      (run, 'stage.json', mutated_text, read_run),
      (run, 'config.json', mutated_text, read_run),
    ]
    number = -(-args.files // len(cases))
    print(
      f'{"file":<24}{"damaged":>8}{"refused":>9}{"failures":>10}'
      f'{"slowest, s":>12}{"memory, MiB":>12}'
    )
    failures = []
    for case in cases:
      line, failed = fuzz(*case, number, rng, opened)
      print(line, flush=True)
      failures += failed
  for kind, i, problem in failures[:20]:
    print(f'{kind}, file {i}: {problem}', file=sys.stderr)
  sys.exit(1 if failures else 0)


if __name__ == '__main__':
  main()
