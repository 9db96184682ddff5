"""Safetensors files: compared with the safetensors package; damaged files."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from maskdiff.errors import UserError
from maskdiff.interop import safetensors as ours


def arrays():
  random = np.random.default_rng(0)
  return {
    'matrix': random.normal(size=(7, 5)).astype(np.float32),
    'half': random.normal(size=(3, 4)).astype(ml_dtypes.bfloat16),
    'half too': random.normal(size=(6,)).astype(np.float16),
    'ids': np.arange(9, dtype=np.int64).reshape(3, 3),
    'scalar': np.array(2.5, np.float32),
    'empty': np.zeros((0, 4), np.float32),
  }


def new_tensors(tensors):
  return [
    ours.New(name, x.dtype, x.shape, lambda x=x: [x])
    for name, x in tensors.items()
  ]


def test_package_and_our_files_are_interchangeable(tmp_path):
  path, back = str(tmp_path / 'a.safetensors'), str(tmp_path / 'b.safetensors')
  safetensors.numpy.save_file(arrays(), path)
  ours.write(back, new_tensors(arrays()))
  loaded = safetensors.numpy.load_file(back)
  for name, array in arrays().items():
    tensor = ours.read_header(path)[name]
    assert (tensor.dtype, tensor.shape) == (array.dtype, array.shape)
    assert tensor.view().tobytes() == array.tobytes()
    assert loaded[name].dtype == array.dtype
    assert loaded[name].tobytes() == array.tobytes()


def test_tensor_written_in_parts_is_complete(tmp_path):
  matrix = arrays()['matrix']
  parts = lambda: (matrix[i : i + 3] for i in (0, 3, 6))
  path = str(tmp_path / 'a.safetensors')
  ours.write(path, [ours.New('m', matrix.dtype, matrix.shape, parts)])
  np.testing.assert_array_equal(ours.read_header(path)['m'].view(), matrix)


@pytest.mark.parametrize('parts', [1, 3])
def test_missing_or_extra_part_is_refused(tmp_path, parts):
  row = np.zeros((1, 4), np.float32)
  new = ours.New('m', row.dtype, (2, 4), lambda: [row] * parts)
  with pytest.raises(ValueError, match='m: '):
    ours.write(str(tmp_path / 'a.safetensors'), [new])


def test_files_respect_max_bytes_except_single_tensors(tmp_path):
  tensors = {f't{i}': np.full((4,), i, np.float32) for i in range(5)}
  tensors['large'] = np.zeros((100,), np.float32)
  ours.write_folder(str(tmp_path), new_tensors(tensors), max_bytes=40)
  index = json.loads((tmp_path / ours.INDEX).read_text())
  assert index['metadata'] == {'total_size': 480}
  assert len(set(index['weight_map'].values())) == 4
  found = ours.read_folder(str(tmp_path))
  assert found.keys() == tensors.keys()
  for name, tensor in found.items():
    np.testing.assert_array_equal(tensor.view(), tensors[name])


def file_with(**entry):
  """Returns a file with one tensor w, its header entry and 8 bytes of data."""
  whole = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8], **entry}
  header = json.dumps({'w': whole}).encode()
  return struct.pack('<Q', len(header)) + header + bytes(8)


DAMAGE = {
  'empty': (b'', 'cut off or not a safetensors file'),
  'no header': (struct.pack('<Q', 500) + b'{}', 'its header alone'),
  'not JSON': (struct.pack('<Q', 4) + b'abcd', 'header is not valid'),
  'cut off': (file_with()[:-3], 'cut off within w'),
  'too long': (file_with() + b'1', 'bytes, but its header says'),
  'dtype': (file_with(dtype='F8_E4M3'), 'w in .* has dtype F8_E4M3'),
  'size': (file_with(shape=[3]), r'w in .* has 8 bytes, but F32\[3\]'),
  'a hole': (file_with(data_offsets=[4, 12]), 'begins at byte 4'),
}


@pytest.mark.parametrize('content, message', DAMAGE.values(), ids=DAMAGE)
def test_damaged_file_is_named(tmp_path, content, message):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(content)
  with pytest.raises(UserError, match=message) as raised:
    ours.read_folder(str(tmp_path))
  assert str(path) in str(raised.value)


@pytest.fixture
def sharded(tmp_path):
  tensors = {f't{i}': np.full((4,), i, np.float32) for i in range(3)}
  ours.write_folder(str(tmp_path), new_tensors(tensors), max_bytes=32)
  return tmp_path


def change_index(folder, change):
  index = json.loads((folder / ours.INDEX).read_text())
  change(index['weight_map'])
  (folder / ours.INDEX).write_text(json.dumps(index))


SECOND = 'model-00002-of-00002.safetensors'
WRONG_INDEX = {
  'tensor in another file': (
    lambda index: index.update(t0=SECOND),
    't0 in .*00001-of-00002.* places it in model-00002',
  ),
  'extra tensor': (
    lambda index: index.update(t9=SECOND),
    f'places t9 in {SECOND}, which lacks it',
  ),
  'missing tensor': (lambda index: index.pop('t1'), 't1 in .* is not in'),
  'extra file': (
    lambda index: index.update(t9='model-00003.safetensors'),
    'names model-00003.safetensors, which is not in',
  ),
  'a path': (
    lambda index: index.update(t2='../x.safetensors'),
    'names ../x.safetensors, which is not in',
  ),
}


@pytest.mark.parametrize(
  'change, message', WRONG_INDEX.values(), ids=WRONG_INDEX
)
def test_wrong_index_error_names_tensor_and_file(sharded, change, message):
  change_index(sharded, change)
  with pytest.raises(UserError, match=message):
    ours.read_folder(str(sharded))


def test_invalid_index_and_missing_weights_are_refused(sharded, tmp_path):
  (sharded / ours.INDEX).write_text('{"weights": 1}')
  with pytest.raises(UserError, match='index.json cannot be read as an index'):
    ours.read_folder(str(sharded))
  (sharded / ours.INDEX).unlink()
  with pytest.raises(UserError, match='no model.safetensors .* only model-0'):
    ours.read_folder(str(sharded))
