"""Compares the peak memory of converting a checkpoint with its size.

python benchmarks/convert.py [--layers 32] [--directory D]

Writes a Hugging Face folder with LLaDA 8B's shapes in bfloat16, in files of
5 GB with an index. The files are sparse: only the first and last elements of
each tensor are written. All of them differ, so that a tensor in the wrong place
is detected. launch/convert.py converts the folder to a work directory and back,
in two processes. Prints for each process the peak resident memory, with mapped
files, and the time compared with a copy of the same files. The result must
equal the original byte by byte. Needs disk space for three times the size,
48 GB.
"""

import argparse
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

from maskdiff.interop import (
  config_export,
  config_json,
  families,
  hf,
  safetensors,
  tensor_layout,
)

ROOT = pathlib.Path(__file__).parents[1]
MODEL = {
  'vocab_size': 126464,
  'embed': 4096,
  'heads': 32,
  'kv_heads': 32,
  'head_dim': 128,
  'mlp': 12288,
  'tie_embeddings': False,
  'rope_theta': 500000.0,
  'rope_scaling': (),
  'norm_eps': 1e-5,
  'qkv_bias': False,
  'qk_norm': False,
}
TOKENS = {'mask_id': 126336, 'bos_id': 126080, 'eos_id': 126081}
FILE_BYTES = 5 << 30
GIB = 2**30


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--layers', type=int, default=32)
  parser.add_argument('--directory', help='directory on the disk to measure')
  args = parser.parse_args()
  model = {**MODEL, 'layers': args.layers}
  with tempfile.TemporaryDirectory(dir=args.directory) as folder:
    folder = pathlib.Path(folder)
    size = make(folder / 'in', model)
    free = shutil.disk_usage(folder).free
    if free < 3 * size:
      parser.error(
        f'{folder} has {free / 1e9:.0f} GB free, but the benchmark needs '
        f'{3 * size / 1e9:.0f} GB'
      )
    print(f'{args.layers} layers, {size / GIB:.2f} GiB as bfloat16')
    seconds = copy(folder)
    for flag, source, target in (('from', 'in', 'run'), ('to', 'run', 'out')):
      began = time.perf_counter()
      peak = convert(flag, folder / source, folder / target)
      elapsed = time.perf_counter() - began
      print(
        f'--{flag} hf: peak {peak / GIB:.2f} GiB, {peak / size:.2f} of the '
        f'size; {elapsed:.0f} s, {elapsed / seconds:.2f} of a copy',
        flush=True,
      )
    compare(folder / 'in', folder / 'out')


def make(folder, model):
  """Writes the sparse folder; returns the bytes of its tensors."""
  folder.mkdir()
  family = families.BY_NAME['llada']
  config = config_export.published_config(
    family, model, TOKENS, 4096, 'bfloat16'
  )
  (folder / config_json.CONFIG).write_text(json.dumps(config))
  shapes = {}
  for name, shape in hf.shapes(model).items():
    layer = shape[1:] if name.startswith('blocks/') else shape
    for published in tensor_layout.names(family, name, model['layers']):
      shapes[published] = tensor_layout.published_shape(name, layer)
  files, total = [{}], 0
  for name, shape in shapes.items():
    size = 2 * int(np.prod(shape, dtype=np.int64))
    if total // FILE_BYTES < (total + size) // FILE_BYTES and files[-1]:
      files.append({})
    files[-1][name] = shape
    total += size
  weight_map = {}
  for i, tensors in enumerate(files):
    path = f'model-{i + 1:05}-of-{len(files):05}.safetensors'
    write_sparse(folder / path, tensors, first=len(weight_map))
    weight_map |= dict.fromkeys(tensors, path)
  (folder / safetensors.INDEX).write_text(
    json.dumps({'metadata': {'total_size': total}, 'weight_map': weight_map})
  )
  return total


def write_sparse(path, shapes, first):
  """Writes a safetensors file that is zero except the ends of each tensor."""
  entries, end = {}, 0
  for name, shape in shapes.items():
    size = 2 * int(np.prod(shape, dtype=np.int64))
    offsets = [end, end + size]
    entries[name] = {
      'dtype': 'BF16',
      'shape': list(shape),
      'data_offsets': offsets,
    }
    end += size
  header = json.dumps(entries).encode()
  with open(path, 'wb') as f:
    f.write(struct.pack('<Q', len(header)) + header)
    start = f.tell()
    f.truncate(start + end)
    for number, entry in enumerate(entries.values(), first + 1):
      for offset, bits in zip(
        (entry['data_offsets'][0], entry['data_offsets'][1] - 2),
        (number, 0x4000 + number),
        strict=True,
      ):
        f.seek(start + offset)
        f.write(np.uint16(bits).tobytes())


def copy(folder):
  """Returns the seconds to copy the files, with all zeros written to disk."""
  (folder / 'copy').mkdir()
  began = time.perf_counter()
  for path in (folder / 'in').glob('*.safetensors'):
    with (
      open(path, 'rb') as source,
      open(folder / 'copy' / path.name, 'wb') as f,
    ):
      shutil.copyfileobj(source, f, 64 << 20)
      f.flush()
      os.fsync(f.fileno())
  seconds = time.perf_counter() - began
  shutil.rmtree(folder / 'copy')
  return seconds


def convert(flag, source, target):
  """Runs launch/convert.py; returns its peak resident memory in bytes."""
  process = subprocess.Popen(
    [sys.executable, 'launch/convert.py', f'--{flag}=hf', f'--in={source}']
    + [f'--out={target}'],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    sys.exit(f'launch/convert.py --{flag} hf failed')
  return usage.ru_maxrss * 1024


def compare(before, after):
  """Asserts that both folders hold the same tensors."""
  original = safetensors.read_folder(str(before))
  converted = safetensors.read_folder(str(after))
  assert original.keys() == converted.keys()
  for name, tensor in original.items():
    assert tensor.dtype == ml_dtypes.bfloat16
    a, b = (t.view().view(np.uint16) for t in (tensor, converted[name]))
    assert a.shape == b.shape and np.array_equal(a, b), name
  print(f'{len(original)} tensors are unchanged')


if __name__ == '__main__':
  main()
