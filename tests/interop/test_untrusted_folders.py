"""Damaged Hugging Face folders: an error of one line, or a usable folder."""

import json
import os
import random
import struct
import tracemalloc

import mutations
import published_folders
import pytest

from maskdiff.errors import UserError
from maskdiff.interop import hf, hf_config, safetensors

ROUNDS = (150, pytest.param(1000, marks=pytest.mark.slow))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Returns a folder with two files of weights and an index."""
  made = tmp_path_factory.mktemp('untrusted') / 'in'
  return published_folders.make(made, 'llama', max_bytes=35_000)


def mutated_header(rng, content):
  """Returns a safetensors file with a damaged header and unharmed data."""
  length = struct.unpack('<Q', content[:8])[0]
  header, data = content[8 : 8 + length], content[8 + length :]
  kind = rng.randrange(3)
  if kind == 0:
    return mutations.mutated_bytes(rng, content)
  if kind == 1:
    header = mutations.mutated_bytes(rng, header)
  else:
    header = json.dumps(mutations.mutated_json(rng, json.loads(header)))
    header = header.encode()
  return struct.pack('<Q', len(header)) + header + data


def mutated_text(rng, content):
  if rng.randrange(3) == 0:
    return mutations.mutated_bytes(rng, content)
  return json.dumps(mutations.mutated_json(rng, json.loads(content))).encode()


def open_all(folder):
  """Opens a folder and reads a byte of every tensor."""
  published = hf.open_folder(folder)
  for leaf in published.leaves.values():
    leaf.read(tuple(slice(0, 1) for _ in leaf.shape))
  hf_config.run_config(published, None, mask_id=3)


FILES = {
  'model-00001-of-00002.safetensors': mutated_header,
  safetensors.INDEX: mutated_text,
  'config.json': mutated_text,
}


@pytest.mark.parametrize('rounds', ROUNDS)
@pytest.mark.parametrize('name', FILES)
def test_damaged_file_is_one_line_or_harmless(
  folder, name, rounds, monkeypatch
):
  """No file outside the folder is opened, and memory is bounded."""
  path = folder / name
  original, real = path.read_bytes(), os.open
  opened = []

  def recorded(target, *args, dir_fd=None, **kwargs):
    handle = real(target, *args, dir_fd=dir_fd, **kwargs)
    opened.append(os.readlink(f'/proc/self/fd/{handle}'))
    return handle

  monkeypatch.setattr(os, 'open', recorded)
  refused = 0
  try:
    for seed in range(rounds):
      path.write_bytes(FILES[name](random.Random(seed), original))
      if name != 'config.json':  # it is slow where JAX computes shapes
        tracemalloc.start()
      try:
        open_all(folder)
      except UserError as error:
        refused += 1
        message = str(error)
        assert message.isprintable() and len(message) < 2000, seed
      except BaseException as error:
        raise AssertionError(f'seed {seed}') from error
      finally:
        peak = tracemalloc.get_traced_memory()[1]  # 0 if not started
        tracemalloc.stop()
      assert peak < 50e6, seed
  finally:
    path.write_bytes(original)
  assert rounds / 2 < refused < rounds
  root = os.path.realpath(folder)
  assert opened and all(os.path.commonpath([root, p]) == root for p in opened)
  open_all(folder)
