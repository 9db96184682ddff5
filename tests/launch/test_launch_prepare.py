"""launch/prepare.py: its output, kills and interrupts, and its errors."""

import contextlib
import gzip
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time

import numpy as np
import pytest

from maskdiff.data import prepare, records, row_reader, row_writer
from maskdiff.data.rows import Rows

ROOT = pathlib.Path(__file__).parents[2]
LIBRARY = pathlib.Path(sysconfig.get_paths()['stdlib'])
SETTINGS = [
  '--tokenizer=tokenizer/stdlib_4k.model',
  '--row_length=256',
  '--heldout_fraction=0.1',
  '--workers=2',
]


started = []


@pytest.fixture(autouse=True)
def no_process_left():
  """Kills the processes of a test that failed."""
  yield
  while started:
    process = started.pop()
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      process.communicate()


def start(*args, file_limit=None):
  """Starts launch/prepare.py in its own process group.

  `file_limit` is the largest size in bytes of the files that it can write.
  """

  def prepare():
    # Processes that a shell runs in the background ignore SIGINT.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if file_limit is not None:
      resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit,) * 2)

  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  environment.pop('PYTHONUNBUFFERED', None)  # the script itself must flush
  process = subprocess.Popen(
    [sys.executable, 'launch/prepare.py', *map(str, args)],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
    preexec_fn=prepare,
  )
  started.append(process)
  return process


def run(*args, status=0):
  """Runs launch/prepare.py; returns its output, or its error message."""
  process = start(*args)
  output, errors = process.communicate(timeout=60)
  assert process.returncode == status, errors
  if status == 0:
    assert not errors
    return output
  assert errors.startswith('error: ') and errors.count('\n') == 1
  return errors


def contents(directory):
  return {
    str(path.relative_to(directory)): None
    if path.is_dir()
    else path.read_bytes()
    for path in sorted(directory.rglob('*'))
  }


def read_lines(process, count):
  """Returns the first lines of a process's output as soon as they appear."""
  too_late = threading.Timer(20, process.kill)
  too_late.start()
  lines = [process.stdout.readline() for _ in range(count)]
  too_late.cancel()
  return lines


def wait_for(condition, process):
  """Waits for the condition; returns False if the process ends first."""
  while not condition():
    if process.poll() is not None:
      return False
    time.sleep(0.002)
  return True


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """Three megabytes in twelve parts, which alternate between two formats."""
  folder = tmp_path_factory.mktemp('corpus')
  modules = sorted(LIBRARY.glob('*.py'))[:120]
  for n in range(6):
    *many, a, b, c = modules[20 * n : 20 * n + 20]
    with gzip.open(folder / f'{n}a.jsonl.gz', 'wt', compresslevel=1) as f:
      for path in many:
        text = path.read_text(encoding='utf-8')
        f.write(json.dumps({'text': text}) + '\n')
    for path in (a, b, c):
      (folder / f'{n}b_{path.name}').write_bytes(path.read_bytes())
  return folder


@pytest.fixture(scope='module')
def undisturbed(corpus, tmp_path_factory):
  """Rows of a preparation without interruption, its seconds and output."""
  directory = tmp_path_factory.mktemp('undisturbed') / 'rows'
  process = start('--source', corpus, '--out', directory, *SETTINGS)
  assert wait_for(directory.exists, process)
  began = time.monotonic()
  output, errors = process.communicate(timeout=60)
  assert process.returncode == 0, errors
  return directory, time.monotonic() - began, output


def test_the_source_and_a_summary_are_printed(corpus, undisturbed):
  directory, _, output = undisturbed
  manifest = records.read_manifest(directory)
  first, summary, line, command = output.splitlines()
  assert first.startswith(f'{corpus}: 1.') and first.endswith('MB, 12 parts')
  assert summary == f'{directory}: {prepare.summary(manifest)}'
  assert line == 'to train on these rows:'
  assert f'--config.data.path={directory} ' in command
  assert len(manifest.splits['train'].shards) == 13
  row_reader.verify(directory, manifest, rows='all')


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  """Rows of a corpus with three skipped documents, and the output."""
  folder = tmp_path_factory.mktemp('small')
  texts = [f'def f{n}(x):\n  return x + {n}\n' for n in range(300)]
  lines = [json.dumps({'content': text}).encode() for text in texts]
  lines[5:5] = [b'{"content": "latin \xe9"}', b'{"content": ""}']
  (folder / 'a.jsonl').write_bytes(b'\n'.join(lines))
  (folder / 'b.txt').write_bytes(b'latin \xe9')
  output = run(
    f'--source={folder / "a.jsonl"}',
    f'--source={folder}/*.txt',
    '--text_key=content',
    '--out',
    folder / 'rows',
    '--row_length=32',
    '--heldout_fraction=0.3',
    '--tokenizer=tokenizer/stdlib_4k.model',
    '--workers=1',
  )
  return folder / 'rows', output


# Kills, interrupts, a full disk, two processes.


def kill_9(kill, corpus, directory, parts, seconds):
  """Kills a preparation some seconds after `parts` parts are done.

  Returns False if it ended before.
  """
  process = start('--source', corpus, '--out', directory, *SETTINGS)
  done = lambda: len(list(directory.glob('.prepare/0*.npz')))
  if wait_for(lambda: directory.exists() and done() >= parts, process):
    time.sleep(seconds)
  alive = process.poll() is None
  if alive:
    kill(process.pid, signal.SIGKILL)
  killed = time.monotonic()
  # The workers share the output, which ends when the last worker ends.
  process.communicate(timeout=20)
  assert time.monotonic() - killed < 5
  return alive


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(5))
def test_rows_do_not_depend_on_kills(corpus, undisturbed, tmp_path, seed):
  """Two kills at random moments: the parent only, or all processes."""
  wanted, duration, _ = undisturbed
  directory = tmp_path / 'rows'
  rng = random.Random(seed)
  first, second = [os.kill, os.killpg][:: (-1) ** seed]
  # The seeds spread the first kill over the whole duration, ...
  seconds = (seed + rng.random()) / 5 * duration
  while not kill_9(first, corpus, directory, 0, seconds):
    shutil.rmtree(directory)
    seconds *= 0.8  # the machine has become faster
  # ... and the second over the parts, which take less time than the start.
  parts = 2 * seed + rng.randint(1, 3)
  kill_9(second, corpus, directory, parts, rng.random() / 20)
  run('--source', corpus, '--out', directory, *SETTINGS)
  assert contents(directory) == contents(wanted)


@pytest.mark.slow
def test_an_interrupt_keeps_finished_parts(corpus, undisturbed, tmp_path):
  wanted, _, _ = undisturbed
  for attempt in range(5):  # on a busy machine an interrupt can be too late
    directory = tmp_path / f'rows-{attempt}'
    process = start('--source', corpus, '--out', directory, *SETTINGS)
    done = lambda d=directory: list((d / '.prepare').glob('0*.npz'))
    wait_for(done, process)
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
    interrupted = time.monotonic()
    process.communicate(timeout=20)
    assert time.monotonic() - interrupted < 5
    if process.returncode:
      break
  assert process.returncode
  assert done() and not (directory / records.MANIFEST).exists()
  output = run('--source', corpus, '--out', directory, *SETTINGS)
  assert 'resuming: ' in output
  assert contents(directory) == contents(wanted)


@pytest.mark.slow
@pytest.mark.parametrize('end', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_end_the_script_while_it_reads(small, tmp_path, end):
  (tmp_path / 'a.jsonl').write_bytes((small[0].parent / 'a.jsonl').read_bytes())
  # Reading these 30 MB takes longer than the test.
  line = json.dumps({'content': 'def f(x): return x + 1\n' * 20}) + '\n'
  (tmp_path / 'b.jsonl').write_text(line * 60_000)
  rows = tmp_path / 'rows'
  args = ['--source', tmp_path, '--text_key=content', '--out', rows]
  process = start(*args, *SETTINGS)
  assert wait_for((rows / '.prepare' / '00000.npz').exists, process)
  process.send_signal(end)
  process.communicate(timeout=5)
  assert process.returncode


@pytest.mark.slow
def test_a_full_disk_keeps_finished_parts(corpus, undisturbed, tmp_path):
  wanted, _, _ = undisturbed
  directory = tmp_path / 'rows'
  sizes = sorted(p.stat().st_size for p in wanted.glob('train-*'))
  assert sizes[0] < sizes[-1]
  args = ['--source', corpus, '--out', directory, *SETTINGS]
  process = start(*args, file_limit=sizes[0])
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 2
  assert errors.startswith(f'error: cannot write prepared data to {directory}')
  assert 'File too large' in errors and errors.count('\n') == 1
  run(*args)
  assert contents(directory) == contents(wanted)


def test_two_processes_write_the_rows_of_one(corpus, undisturbed, tmp_path):
  wanted, _, _ = undisturbed
  directory = tmp_path / 'rows'
  args = ['--source', corpus, '--out', directory, *SETTINGS]
  first = start(*args)
  assert wait_for((directory / '.prepare').exists, first)
  first.send_signal(signal.SIGSTOP)
  second = start(*args)
  _, line = read_lines(second, 2)
  assert line.startswith(f'another process is preparing {directory}')
  first.send_signal(signal.SIGCONT)
  summaries = [
    p.communicate(timeout=60)[0].splitlines()[-1:] for p in (first, second)
  ]
  assert first.returncode == second.returncode == 0
  assert summaries[0] == summaries[1] != []
  assert contents(directory) == contents(wanted)


def test_a_waiting_process_takes_over_from_a_killed_one(
  corpus, undisturbed, tmp_path
):
  wanted, _, _ = undisturbed
  directory = tmp_path / 'rows'
  args = ['--source', corpus, '--out', directory, *SETTINGS]
  first = start(*args)
  assert wait_for((directory / '.prepare').exists, first)
  first.send_signal(signal.SIGSTOP)
  second = start(*args)
  assert 'waiting' in read_lines(second, 2)[1]
  first.kill()
  second.communicate(timeout=60)
  assert second.returncode == 0
  first.communicate(timeout=5)
  assert contents(directory) == contents(wanted)


# Input that is not text, and the other modes.


def test_skipped_documents_are_counted(small):
  directory, output = small
  assert '(skipped: 2 not UTF-8, 1 empty)\n' in output
  manifest = records.read_manifest(directory)
  assert manifest.skipped == {'not UTF-8': 2, 'empty': 1}
  assert sum(s.documents for s in manifest.splits.values()) == 300


def test_a_split_without_rows_is_reported(small, tmp_path):
  source = small[0].parent / 'a.jsonl'
  args = ['--source', source, '--text_key=content', '--out', tmp_path / 'rows']
  output = run(*args, *SETTINGS, '--heldout_fraction=0')
  *_, note, advice = output.splitlines()
  assert "no row in the split 'heldout'" in note
  assert '--row_length=' in advice and '--heldout_fraction=0.' in advice


def test_inspect_prints_statistics_and_rows(small):
  directory, _ = small
  manifest = records.read_manifest(directory)
  output = run('--inspect', directory, '--rows=2')
  assert prepare.summary(manifest) in output
  assert manifest.tokenizer_fingerprint in output and 'uint16' in output
  for name, split in manifest.splits.items():
    entropy = f'{split.unigram_entropy_nats:.3f} nats per token'
    assert f'{name}: 1 shards, ' in output and entropy in output
    assert output.count(f'--- {name} row ') == 2
  assert output.count('return x + ') > 2
  assert '---' not in run('--inspect', directory, '--rows=0')


def test_inspect_shows_columns_and_no_padding(tokenizer, tmp_path):
  text = [tokenizer.encode('first'), tokenizer.encode('second')]
  doc = [[n] * len(ids) for n, ids in enumerate(text)]
  padding = [tokenizer.encode(' hidden')[0]]
  rows = Rows(np.array([sum(text, padding)]), np.array([sum(doc, [-1])]))
  directory = tmp_path / 'rows'
  row_writer.write_rows(directory, {'train': [rows]}, tokenizer, source='two')
  output = run('--inspect', directory)
  assert f'{directory}: two\n' in output
  assert 'on disk: tokens uint16, doc int16\n' in output
  assert '--- train row 0 ---\nfirst<end of document>second\n' in output


def test_verify_finds_one_changed_byte(small, tmp_path):
  directory, _ = small
  output = run('--verify', directory)
  manifest = records.read_manifest(directory)
  rows = sum(split.rows for split in manifest.splits.values())
  assert output == f'{directory}: all {rows} rows match their checksums\n'

  damaged = tmp_path / 'damaged'
  damaged.mkdir()
  for name, data in contents(directory).items():
    if name == 'train-00000.array_record':
      # In the middle of the rows; a small file ends with padding.
      middle = data.index(b'\0' * 1000) // 2
      data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    (damaged / name).write_bytes(data)
  error = run('--verify', damaged, status=2)
  assert 'train-00000.array_record' in error


def test_conversations_are_prepared_and_inspected(tmp_path):
  """The folder has a tokenizer and a template, so no other flag is needed."""
  folder = tmp_path / 'model'
  folder.mkdir()
  shutil.copy(ROOT / 'tokenizer' / 'stdlib_4k.model', folder)
  (folder / 'chat_template.jinja').write_text(
    '{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}'
  )
  source = tmp_path / 'chats.jsonl'
  source.write_text('{"prompt": "2+2?", "completion": "4"}\n' * 3)
  flags = ['--row_length=32', '--heldout_fraction=0', '--workers=1']
  flags += [f'--source={source}', f'--out={tmp_path / "rows"}', '--align=8']
  output = run(f'--chat={folder}', *flags)
  assert '3 + 0 documents' in output
  assert 'a larger --heldout_fraction' in output.splitlines()[-1]
  assert '6 tokens with a loss, of which 50.0% are eos (0.0% fill' in output
  assert run(f'--inspect={tmp_path / "rows"}').count('2+2?4') == 3
  stored = (tmp_path / 'rows' / 'chat_template.jinja').read_text()
  assert stored == (folder / 'chat_template.jinja').read_text()
  error = run('--chat=plain', f'--tokenizer={folder}', *flags, status=2)
  assert 'was prepared with chat=' in error


@pytest.mark.parametrize(
  'args, message',
  [
    (['--out=x', '--source=docs', '--chat=lama3'], '--out needs either'),
    (
      ['--out=x', '--source=docs', '--tokenizer=tokenizer', '--chat=plain'],
      'no text files in docs (not read:',
    ),
    (
      ['--out=x', '--source=docs', '--tokenizer=tokenizer', '--turns=all'],
      '--turns needs --chat',
    ),
    (
      ['--out=x', '--source=docs', '--train_tokenizer', '--chat=plain'],
      '--train_tokenizer has no effect with --chat',
    ),
    (
      ['--out=x', '--source=docs', '--tokenizer=tokenizer', '--align=3'],
      '--align=3 does not divide --row_length=4096',
    ),
    (
      ['--out=x', '--source=docs', '--tokenizer=tokenizer', '--chat=plain']
      + ['--layout=pairs', '--turns=all'],
      '--turns has no effect with --layout=pairs',
    ),
    ([], 'give one of --out DIR, the directory to write, --inspect DIR and'),
    (['--out=x', '--verify=x'], 'give one of --out DIR'),
    (['--out=x'], '--out needs --source'),
    (['--out=x', '--source=embedded'], '--out needs either --train_tokenizer'),
    (['--out=x', '--source=launch', '--vocab_size=9'], '--out needs either'),
    (
      [
        '--out=x',
        '--source=launch',
        '--tokenizer=tokenizer',
        '--heldout_fraction=nan',
      ],
      '--heldout_fraction=nan',
    ),
    (['--out=x', '--rowlength=3'], "rowlength; did you mean 'row_length'?"),
    (['--out=x', '--row_length=0'], 'row_length'),
    (['--out=x', '--heldout_fraction=2'], 'heldout_fraction'),
    (['--out=x', '--workers=0'], 'workers'),
    (['--out=x', '--source=a.txt', 'b.txt'], "unexpected argument 'b.txt'"),
    (['--inspect=absent'], "cannot read 'absent/manifest.json'"),
    (['--out=a\udcff', '--source=launch'], 'is not UTF-8: rename the folder'),
    (['--inspect=a\udcff'], 'is not UTF-8: rename the folder'),
    (['--verify=absent'], "cannot read 'absent/manifest.json'"),
    (
      ['--out=x', '--source=absent', '--tokenizer=tokenizer'],
      'no file or directory absent',
    ),
    (['--out=x', '--source=launch', '--tokenizer=absent'], "read 'absent'"),
  ],
  ids=lambda value: ' '.join(value) if isinstance(value, list) else '',
)
def test_a_wrong_command_line_is_one_line(args, message):
  assert message in run(*args, status=2)
  assert not (ROOT / 'x').exists()


def test_help_lists_the_flags():
  output = run('--help')
  for shown in ('python launch/prepare.py', '--source', '--row_length'):
    assert shown in output
