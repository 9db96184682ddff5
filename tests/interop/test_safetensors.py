"""Safetensors files: compared with the safetensors package; damaged files."""

import json
import os
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


W = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}


def file_of(header, num_bytes=8):
  """Returns a file with a header, bytes or a JSON value, and zeros."""
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  return struct.pack('<Q', len(header)) + header + bytes(num_bytes)


def file_with(**entry):
  """Returns a file with one tensor w, its header entry and 8 bytes of data."""
  return file_of({'w': {**W, **entry}})


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

NOT_VALID = {
  'a list': [],
  'a tensor that is null': {'w': None},
  'metadata that is a list': {'__metadata__': [1], 'w': W},
  'metadata that is a number': {'__metadata__': {'format': 1}, 'w': W},
  'not UTF-8': b'{"\xff": 1}',
  'deep': b'[' * 100_000,
  'deep object': b'{"w":' * 50_000,
  'a name twice': json.dumps({'w': W})[:-1].encode() + b', "w": {}}',
  'a long number': b'{"w": ' + b'9' * 5000 + b'}',
} | {
  f'{key} {value}': {'w': {**W, key: value}}
  for key, values in {
    'shape': (
      *('2', 2, None, [2.0], [True, 2], ['2'], [None], [[2]], [-1, -2]),
      *([float('nan')], [float('inf')], [2**64], [10**400], {'0': 2}),
      *([2**62, 2**62, 0], [1] * 100, [-2]),
    ),
    'data_offsets': (
      *(None, 8, [8], [], [0, 8, 8], ['0', '8'], [0.0, 8.0], [False, 8]),
      *([-8, 0], [0, float('nan')], [0, 2**64], {'0': 8}),
    ),
    'dtype': (None, 1, ['F32'], {}, True),
  }.items()
  for value in values
}
DAMAGE |= {
  name: (file_of(header), 'header is not valid')
  for name, header in NOT_VALID.items()
}
DAMAGE |= {
  'header beyond the file': (struct.pack('<Q', 2**64 - 1), 'header alone'),
  'overlap': (
    file_of({'v': W, 'w': {**W, 'data_offsets': [4, 12]}}, 12),
    'w in .* begins at byte 4 of the data, not at 8',
  ),
  'the same bytes twice': (
    file_of({'v': W, 'w': W}),
    'w in .* begins at byte 0 of the data, not at 8',
  ),
  'reversed range': (file_with(data_offsets=[8, 0]), 'w in .* has -8 bytes'),
  'size that overflows': (
    file_with(shape=[2**31, 2**27]),
    'w in .* has 8 bytes, but F32.* takes 1152921504606846976',
  ),
  'petabytes': (
    file_with(shape=[2**48], data_offsets=[0, 2**50]),
    'cut off within w',
  ),
  'empty dtype': (file_with(dtype=''), 'w in .* has dtype'),
}


@pytest.mark.parametrize('content, message', DAMAGE.values(), ids=DAMAGE)
def test_damaged_file_is_named(tmp_path, content, message):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(content)
  with pytest.raises(UserError, match=message) as raised:
    ours.read_folder(str(tmp_path))
  assert str(path) in str(raised.value)
  assert len(str(raised.value).splitlines()) == 1
  if message != DAMAGE['dtype'][1]:  # the package knows more dtypes
    with pytest.raises(safetensors.SafetensorError):
      safetensors.numpy.load_file(path)


VALID = {
  'no tensors': file_of({}, 0),
  'metadata': file_of({'__metadata__': {'a': 'b'}, 'w': W}),
  'padded': file_of(json.dumps({'w': W}).encode() + b' ' * 40),
  'another key': file_of({'w': {**W, 'note': [1]}}),
  'an axis of length 0': file_of(
    {'w': W, 'z': {**W, 'shape': [0, 3], 'data_offsets': [8, 8]}}
  ),
  'a scalar': file_of({'w': {**W, 'shape': [], 'data_offsets': [0, 4]}}, 4),
  'a long axis beside one of length 0': file_of(
    {'w': {**W, 'shape': [2**40, 0], 'data_offsets': [0, 0]}}, 0
  ),
}


@pytest.mark.parametrize('content', VALID.values(), ids=VALID)
def test_package_reads_the_same_from_odd_valid_files(tmp_path, content):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(content)
  ours_, theirs = ours.read_folder(tmp_path), safetensors.numpy.load_file(path)
  assert ours_.keys() == theirs.keys()
  for name, array in theirs.items():
    np.testing.assert_array_equal(ours_[name].view(), array)


def test_names_cannot_control_the_terminal(tmp_path):
  name = '\x1b]0;title\x07w\nx'
  path = tmp_path / 'model.safetensors'
  path.write_bytes(file_of({name: {**W, 'dtype': 'F8'}}))
  with pytest.raises(UserError, match=r'\\x1b\]0;title\\x07w') as raised:
    ours.read_folder(tmp_path)
  assert '\x1b' not in str(raised.value)
  path.write_bytes(file_of({name: W}))
  assert '\x1b' not in str(ours.read_header(path)[name])


def test_header_is_bounded(tmp_path):
  """A large header costs neither its claimed size nor its size on disk."""
  path = tmp_path / 'model.safetensors'
  with open(path, 'wb') as file:
    file.write(struct.pack('<Q', 1 << 40))
    file.truncate((1 << 40) + 8)  # sparse: takes no space
  with pytest.raises(UserError, match='header of 1,099,511,627,776 bytes; the'):
    ours.read_folder(tmp_path)


def test_file_that_changes_after_its_header_is_refused(tmp_path):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(file_with())
  tensor = ours.read_header(path)['w']
  path.write_bytes(file_with()[:-4])
  with pytest.raises(UserError, match='has changed since its header was read'):
    tensor.view()
  (tmp_path / 'private').write_bytes(file_with())
  path.unlink()
  (tmp_path / 'in').mkdir()
  path.symlink_to('../private')
  with pytest.raises(UserError, match='is a link to'):
    tensor.view()


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
  'an absolute path': (
    lambda index: index.update(t2='/etc/passwd'),
    'names /etc/passwd, which is not in',
  ),
  'the folder': (lambda index: index.update(t2='..'), 'which is not in'),
  'no name': (lambda index: index.update(t2=''), 'which is not in'),
  'a null character': (lambda index: index.update(t2='a\0'), 'is not in'),
  'a number': (lambda index: index.update(t2=1), 'cannot be read as an index'),
  'escape': (lambda index: index.update(t2='\x1b[2J'), r'names \\x1b\[2J'),
}


@pytest.mark.parametrize(
  'change, message', WRONG_INDEX.values(), ids=WRONG_INDEX
)
def test_wrong_index_error_names_tensor_and_file(sharded, change, message):
  change_index(sharded, change)
  with pytest.raises(UserError, match=message):
    ours.read_folder(str(sharded))


@pytest.mark.parametrize('name', [ours.INDEX, SECOND])
def test_fifos_and_links_among_the_weights_are_refused(sharded, name):
  (sharded / name).rename(sharded.parent / 'private')
  os.mkfifo(sharded / name)
  with pytest.raises(UserError, match='not a regular file'):
    ours.read_folder(sharded)
  (sharded / name).unlink()
  (sharded / name).symlink_to('../private')
  with pytest.raises(UserError, match='is a link to'):
    ours.read_folder(sharded)


def test_invalid_index_and_missing_weights_are_refused(sharded, tmp_path):
  for text in ('{"weights": 1}', '[]', '1', '{"weight_map": ["t0"]}'):
    (sharded / ours.INDEX).write_text(text)
    with pytest.raises(UserError, match='json cannot be read as an index'):
      ours.read_folder(str(sharded))
  (sharded / ours.INDEX).write_text('[' * 100_000)
  with pytest.raises(UserError, match='nested more than'):
    ours.read_folder(str(sharded))
  (sharded / ours.INDEX).unlink()
  with pytest.raises(UserError, match='no model.safetensors .* only model-0'):
    ours.read_folder(str(sharded))
