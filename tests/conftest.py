"""Tests run on the CPU with 8 fake devices, chosen before JAX is imported."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
# XLA's pool has a thread for each device, and a device that has two collectives
# under way takes two. When all threads wait, each for one that has none, the
# process hangs: so there are some to spare.
os.environ.setdefault('PJRT_NPROC', '64')
# Most of the time is compilation, and the programs are tiny.
# On a busy machine 8 devices may wait for each other for more than the 40 s
# after which XLA aborts the process.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_force_host_platform_device_count=8'
  + ' --xla_backend_optimization_level=0'
  + ' --xla_cpu_collective_call_terminate_timeout_seconds=600'
)

import gc  # noqa: E402
import json  # noqa: E402
import pathlib  # noqa: E402
import random  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(scope='module', autouse=True)
def compiled_programs_are_given_back():
  """Each takes regions of memory, of which a process may have only so many:
  with some thousands of programs the compiler ends in a segmentation fault."""
  yield
  import jax

  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope='session')
def tokenizer():
  """The tokenizer that comes with the code."""
  from maskdiff.data import tokenizer

  root = pathlib.Path(__file__).parents[1]
  return tokenizer.load(root / 'tokenizer' / 'stdlib_4k.model')


@pytest.fixture(scope='session')
def corpus(tokenizer, tmp_path_factory):
  """A directory with rows of 16 tokens, prepared from made-up functions."""
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
