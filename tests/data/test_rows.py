"""Columns of rows: their bytes on disk, joined rows, missing columns."""

import itertools

import numpy as np
import pytest

from maskdiff.data import rows as rows_lib
from maskdiff.data.rows import Rows
from maskdiff.model import masks

EOS = 3


def random_rows(rows, length, columns=rows_lib.COLUMNS, seed=0):
  rng = np.random.default_rng(seed)
  doc = rng.integers(-1, length, (rows, length)).astype(np.int32)
  answer = rng.random((rows, length)) < 0.5
  return Rows(
    rng.integers(0, 9, (rows, length)).astype(np.uint16),
    doc if 'doc' in columns else None,
    answer if 'answer' in columns else None,
  )


def assert_equal(rows, expected):
  assert rows.columns == expected.columns
  for column, other in zip(rows, expected, strict=True):
    if other is not None:
      assert column.dtype == other.dtype
      np.testing.assert_array_equal(column, other)


def test_bytes_on_disk():
  """Little-endian tokens, then doc, then bits, the highest bit first."""
  rows = Rows(
    np.array([[1, 258, 3]]),
    np.array([[-1, 0, 2]]),
    np.array([[True, False, True]]),
  )
  columns = rows_lib.disk_dtypes(rows.columns, 3)
  assert columns == {'doc': 'int16', 'answer': 'bits'}
  packed = rows_lib.pack(rows, 'uint16', columns)
  tokens, doc, answer = '0100 0201 0300', 'ffff 0000 0200', 'a0'
  assert packed.tobytes() == bytes.fromhex(tokens + doc + answer)
  wide = rows_lib.pack(rows, 'uint32', {'doc': 'int32'})
  tokens, doc = '01000000 02010000 03000000', 'ffffffff 00000000 02000000'
  assert wide.tobytes() == bytes.fromhex(tokens + doc)


@pytest.mark.parametrize('length', [1, 7, 8, 33])
@pytest.mark.parametrize('dtype', ['uint16', 'uint32'])
def test_unpacked_rows_are_those_packed(length, dtype):
  for n in range(3):
    for columns in itertools.combinations(rows_lib.COLUMNS, n):
      rows = random_rows(5, length, columns)
      rows = rows._replace(tokens=rows.tokens.astype(dtype))
      dtypes = rows_lib.disk_dtypes(columns, length)
      packed = rows_lib.pack(rows, dtype, dtypes)
      size = sum(
        rows_lib.column_bytes(d, length) for d in (dtype, *dtypes.values())
      )
      assert packed.shape == (5, size)
      found = rows_lib.unpack(packed.tobytes(), dtype, dtypes, length)
      assert_equal(found, rows)
      none = rows_lib.unpack(b'', dtype, dtypes, length)
      assert none.tokens.shape == (0, length) and none.columns == rows.columns


@pytest.mark.parametrize(
  'length, dtype', [(1 << 15, 'int16'), (32769, 'int32')]
)
def test_dtype_of_doc_holds_every_number_below_the_row_length(length, dtype):
  assert rows_lib.disk_dtypes(('doc',), length) == {'doc': dtype}
  assert np.iinfo(dtype).max >= length - 1


def test_documents_of_joined_rows_are_distinct():
  rows = random_rows(12, 8)
  joined = rows_lib.join(rows, 3)
  assert joined.tokens.shape == (4, 24)
  np.testing.assert_array_equal(joined.tokens, rows.tokens.reshape(4, 24))
  np.testing.assert_array_equal(joined.answer, rows.answer.reshape(4, 24))
  row = np.arange(12).repeat(8).reshape(4, 24)
  doc = rows.doc.reshape(4, 24)
  same = lambda x: x[:, :, None] == x[:, None, :]
  text = (doc >= 0)[:, :, None] & (doc >= 0)[:, None, :]
  np.testing.assert_array_equal(joined.doc >= 0, doc >= 0)
  np.testing.assert_array_equal(
    same(joined.doc) & text, same(doc) & same(row) & text
  )
  assert joined.doc.min() == -1 and joined.doc.max() < 24
  assert_equal(rows_lib.join(rows, 1), rows)


def test_missing_columns_are_filled_as_the_objectives_do():
  rows = random_rows(6, 20, ())
  filled = rows_lib.fill(rows, ('doc', 'answer'), EOS)
  np.testing.assert_array_equal(filled.doc, masks.documents(rows.tokens, EOS))
  assert filled.doc.max() > 0 and filled.answer.all()
  assert filled.doc.dtype == np.int32 and filled.answer.dtype == bool
  stored = random_rows(6, 20)
  assert_equal(rows_lib.fill(stored, ('doc', 'answer'), EOS), stored)
  assert rows_lib.fill(rows, (), EOS) is rows


def test_documents_of_a_row_are_split_without_padding():
  tokens = np.array([5, EOS, 6, 7, EOS, 8])
  split = lambda rows: [d.tolist() for d in rows_lib.split_documents(rows, EOS)]
  assert split(Rows(tokens)) == [[5, EOS], [6, 7, EOS], [8]]
  doc = np.array([1, 1, -1, 0, 0, 2])
  assert split(Rows(tokens, doc)) == [[5, EOS], [7, EOS], [8]]
