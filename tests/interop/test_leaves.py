"""Parameters on disk: slices that each device reads, fingerprints, dtypes."""

import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maskdiff.checkpoints import manifest
from maskdiff.checkpoints.fingerprint import fingerprint
from maskdiff.checkpoints.manifest import Meta
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import leaves as leaves_lib
from maskdiff.interop.leaves import Leaf

META = Meta(config={})


def counting(array):
  """Returns a Leaf of an array, and the list to which reads add indices."""
  seen = []

  def read(index):
    seen.append(index)
    return array[index]

  return Leaf(array.shape, array.dtype, read), seen


def draw(shape, dtype=np.float32):
  return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.fixture
def small_parts(monkeypatch):
  monkeypatch.setattr(leaves_lib, 'PART_BYTES', 100)


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_round_trip_reads_parts_of_bounded_size(tmp_path, small_parts, dtype):
  arrays = {'blocks/q': draw((7, 3, 4), dtype), 'norm': draw((5,), dtype)}
  counted = {name: counting(array) for name, array in arrays.items()}
  leaves = {name: leaf for name, (leaf, _) in counted.items()}
  leaves_lib.write(str(tmp_path), leaves, META)
  rows = 100 // (12 * np.dtype(dtype).itemsize)
  assert len(counted['blocks/q'][1]) == -(-7 // rows) > 1
  found, meta = leaves_lib.open_folder(str(tmp_path))
  for name, array in arrays.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name].read((slice(None),)), array)
    assert meta.leaves[name]['fingerprint'] == int(fingerprint(array))


def test_place_reads_each_devices_slice_only():
  mesh = mesh_lib.make_mesh(replica=2, fsdp=2, tensor=2)
  array = draw((3, 8, 6))
  leaf, seen = counting(array)
  sharding = NamedSharding(mesh, PartitionSpec(None, 'fsdp', 'tensor'))
  placed = leaves_lib.place({'w': leaf}, {'w': sharding})['w']
  np.testing.assert_array_equal(placed, array)
  assert placed.sharding == sharding
  assert {array[index].shape for index in seen} == {(3, 4, 3)}
  addressable = sharding.addressable_devices_indices_map(array.shape)
  assert {str(i) for i in seen} == {str(i) for i in addressable.values()}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_place_casts_to_dtype(tmp_path, dtype):
  array = draw((4, 8), ml_dtypes.bfloat16)
  leaves_lib.write(str(tmp_path), {'w': counting(array)[0]}, META)
  leaves, meta = leaves_lib.open_folder(str(tmp_path))
  where = {'w': mesh_lib.replicated(mesh_lib.make_mesh())}
  placed = leaves_lib.place(leaves, where, dtype, meta.leaves)['w']
  assert placed.dtype == dtype
  np.testing.assert_array_equal(placed, array.astype(dtype))


def test_flipped_bit_is_refused(tmp_path):
  leaves_lib.write(str(tmp_path), {'w': counting(draw((4, 8)))[0]}, META)
  path = tmp_path / 'w.safetensors'
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  leaves, meta = leaves_lib.open_folder(str(tmp_path))
  where = {'w': mesh_lib.replicated(mesh_lib.make_mesh())}
  with pytest.raises(UserError, match='HERE: bits of w have changed'):
    leaves_lib.place(leaves, where, None, meta.leaves, 'HERE')


def test_folder_that_disagrees_with_its_manifest_is_refused(tmp_path):
  leaves_lib.write(str(tmp_path), {'w': counting(draw((4, 8)))[0]}, META)
  (tmp_path / 'other').mkdir()
  leaves_lib.write(
    str(tmp_path / 'other'), {'w': counting(draw((8, 4)))[0]}, META
  )
  (tmp_path / 'other' / 'w.safetensors').replace(tmp_path / 'w.safetensors')
  with pytest.raises(UserError, match='w.safetensors has .*8, 4.* for w'):
    leaves_lib.open_folder(str(tmp_path))
  meta = json.loads((tmp_path / 'meta.json').read_text())
  meta['leaves']['w']['fingerprint'] += 1
  (tmp_path / 'meta.json').write_text(json.dumps(meta))
  with pytest.raises(UserError, match='its meta differs from what was written'):
    leaves_lib.open_folder(str(tmp_path))


def damaged(folder, kind):
  """Damages meta.json in a way that its digest does not show."""
  path = folder / 'meta.json'
  values = json.loads(path.read_text())
  values.pop('digest')
  leaf = values['leaves']['w']
  match kind:
    case 'FIFO':
      path.unlink()
      os.mkfifo(path)
      return
    case 'link':
      path.rename(folder.parent / 'private')
      path.symlink_to('../private')
      return
    case 'deep':
      path.write_text('[' * 10**5)
      return
    case 'large':
      os.truncate(path, 1 << 40)  # sparse: takes no space
      return
    case 'no leaves':
      values['leaves'] = None
    case 'a leaf':
      values['leaves']['w'] = 1
    case 'a shape':
      leaf['shape'] = 8
    case 'a config':
      values['config'] = []
    case 'no config':
      del values['config']
    case 'another folder':
      values['leaves'] = {'../../private': leaf}
    case 'a null character':
      values['leaves'] = {'a\0b': leaf}
  digest = manifest.json_digest(values)
  path.write_text(json.dumps({**values, 'digest': digest}))


DAMAGE = {
  'FIFO': 'not a regular file',
  'link': 'is a link to',
  'deep': 'nested more than',
  'large': 'more than 67,108,864 bytes',
  'no leaves': 'leaves is not a dict',
  'a leaf': "of 'w' is not one",
  'a shape': "of 'w' is not one",
  'a config': 'config is not a dict',
  'no config': 'meta.json has no config',
  'another folder': 'is not the name of an array',
  'a null character': 'is not a file of this folder',
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_damaged_meta_is_refused(tmp_path, kind):
  folder = tmp_path / 'params'
  folder.mkdir()
  leaves_lib.write(str(folder), {'w': counting(draw((4, 8)))[0]}, META)
  damaged(folder, kind)
  with pytest.raises(UserError, match=DAMAGE[kind]):
    leaves_lib.open_folder(folder)


def test_fingerprint_is_the_sum_over_parts():
  array = draw((11, 3))
  compiled = jax.jit(fingerprint)
  parts = [(0, 4), (4, 9), (9, 11)]
  total = sum(int(compiled(array[a:b], a)) for a, b in parts)
  assert total % 2**32 == int(compiled(array))
