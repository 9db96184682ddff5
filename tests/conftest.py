"""Settings of all tests: the CPU with 8 fake devices, one compile cache.

The settings are environment variables, set before JAX is imported. Workers of
pytest-xdist, and programs that tests start, inherit them.
"""

import os
import shutil
import tempfile

import xla_flags

os.environ['JAX_PLATFORMS'] = 'cpu'
# XLA's pool has one thread per device, but a device with two collectives in
# flight occupies two threads. If all threads wait for a device that has none,
# the process hangs. Spare threads prevent this.
os.environ.setdefault('PJRT_NPROC', '64')
# On a busy machine 8 devices may wait for each other for more than 40 s, after
# which XLA would abort the process.
os.environ['XLA_FLAGS'] = ' '.join(
  (
    xla_flags.FAST,
    '--xla_force_host_platform_device_count=8',
    '--xla_cpu_collective_call_terminate_timeout_seconds=600',
    os.environ.get('XLA_FLAGS', ''),
  )
)
# All processes of a session share one compile cache.
COMPILED = None
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  COMPILED = tempfile.mkdtemp(prefix='compiled')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = COMPILED
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

import gc  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402
import random  # noqa: E402

import pytest  # noqa: E402

# Fewer than the default limit of Linux.
MOST_MAPPED_REGIONS = 30_000
# The files that take longest, so that one worker does not start them last.
LONGEST = (
  'training/test_faults.py',
  'docs/test_commands.py',
  'launch/test_pods.py',
  'sampling/test_sampler_cache.py',
  'launch/test_launch_plan.py',
  'distributed/test_processes.py',
  'distributed/test_processes_of_rl.py',
  'docs/test_how_to.py',
  'sampling/test_exact_cache.py',
  'objectives/test_exact_bounds.py',
  'objectives/test_markov.py',
  'training/test_loop.py',
  'launch/test_colab.py',
  'sampling/test_sampler_options.py',
  'evals/test_harness.py',
  'launch/test_launch_prepare.py',
  'launch/test_launch_evaluate.py',
  'interop/test_warm_start.py',
)


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(items):
  """Puts the longest files first; tests with a browser are slow."""
  for item in items:
    if 'browser' in item.fixturenames:
      item.add_marker(pytest.mark.slow)
  folder = pathlib.Path(__file__).parent
  order = {str(folder / name): rank for rank, name in enumerate(LONGEST)}
  items.sort(key=lambda item: order.get(str(item.path), len(order)))


def pytest_collection_finish():
  """Makes garbage collection rarer.

  Tracing makes many objects, and by default Python would look through all
  objects, also those of imported modules, hundreds of times.
  """
  gc.freeze()
  gc.set_threshold(50_000, 20, 50)


def pytest_unconfigure():
  if COMPILED:
    shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(scope='module', autouse=True)
def free_compiled_programs():
  """Drops compiled programs after a module if there are many.

  Each program maps regions of memory, and a process may map 65,530 of them:
  after some thousands of programs the compiler would crash.
  """
  yield
  if mapped_regions() > MOST_MAPPED_REGIONS:
    import jax

    jax.clear_caches()
    gc.collect()


def mapped_regions():
  """Returns the number of regions of memory that this process maps."""
  try:
    with open('/proc/self/maps') as maps:
      return sum(1 for _ in maps)
  except OSError:  # not Linux
    return MOST_MAPPED_REGIONS + 1


@pytest.fixture
def disk(monkeypatch):
  """Returns a disks.Disk, on which appending files try again at once."""
  import disks

  from maskdiff.files import appending

  disk = disks.Disk()
  monkeypatch.setattr(os, 'write', disk.write)
  monkeypatch.setattr(appending, 'RETRY_S', 0)
  return disk


@pytest.fixture(scope='session')
def tokenizer():
  """Returns the tokenizer that is shipped with the code."""
  from maskdiff.data import tokenizer

  root = pathlib.Path(__file__).parents[1]
  return tokenizer.load(root / 'tokenizer' / 'stdlib_4k.model')


@pytest.fixture(scope='session')
def corpus(tokenizer, tmp_path_factory):
  """Returns a directory of rows of 16 tokens, made from random functions."""
  from maskdiff.data import prepare, sources

  words = random.Random(0)
  names = ['alpha', 'beta', 'gamma', 'delta', 'read', 'write', 'size', 'café']

  def function():
    name, *args = words.sample(names, 4)
    body = ' + '.join(words.choices(args, k=words.randint(2, 6)))
    return f'def {name}({", ".join(args)}):\n  return {body}\n\n'

  folder = tmp_path_factory.mktemp('corpus')
  with open(folder / 'functions.jsonl', 'w') as f:
    for _ in range(80):
      text = ''.join(function() for _ in range(words.randint(4, 12)))
      f.write(json.dumps({'text': text}) + '\n')
  prepare.prepare(
    sources.plan([str(folder / 'functions.jsonl')]),
    tokenizer,
    folder / 'rows',
    row_length=16,
    heldout_fraction=0.25,
    workers=0,
  )
  return folder / 'rows'
