"""Freed memory stays with the process on a CPU."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, resource, sys
import jax
import jax.numpy as jnp
from maskdiff.distributed.host_memory import keep_freed_memory

if sys.argv[1] == 'keep':
  keep_freed_memory(os.environ, 'cpu')

@jax.jit
def program(x):  # with 64 MB of temporaries
  y = jax.lax.optimization_barrier(jnp.broadcast_to(x, (16, 1024, 1024)))
  return y.sum(axis=0)

x = jnp.ones((1024, 1024))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
  program(x).block_until_ready()
before = faults()
for _ in range(4):
  program(x).block_until_ready()
print((faults() - before) // 4)
"""


def faults_per_run(argument):
  found = subprocess.run(
    [sys.executable, '-c', PROGRAM, argument],
    capture_output=True,
    text=True,
    check=True,
  )
  return int(found.stdout)


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc')
def test_runs_of_a_program_touch_no_new_pages():
  pages = 64 * 2**20 // 4096
  assert faults_per_run('default') >= pages  # the reason for the module
  assert faults_per_run('keep') < pages / 100


@pytest.mark.parametrize(
  'environ, platforms', [({}, 'tpu'), ({}, 'cuda'), ({}, 'tpu,cpu'), ({}, '')]
)
def test_nothing_changes_with_an_accelerator(monkeypatch, environ, platforms):
  from maskdiff.distributed import host_memory

  monkeypatch.setattr(host_memory.ctypes, 'CDLL', pytest.fail)
  host_memory.keep_freed_memory(environ, platforms)
