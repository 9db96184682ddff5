"""Layouts of documents in rows."""

import dataclasses

import numpy as np
import pytest
from objective_cases import CONFIG

from maskdiff.data import packing
from maskdiff.data.documents import Document
from maskdiff.data.packing import Layout
from maskdiff.data.rows import Rows
from maskdiff.errors import UserError
from maskdiff.objectives import block_diffusion

EOS, PAD = 99, 98


def document(number, length):
  """Returns a document of distinct tokens, whose second half is an answer."""
  tokens = 1000 * number + np.arange(length)
  return Document(str(number), tokens, np.arange(length) >= length // 2)


def documents(sizes):
  return [document(n, size) for n, size in enumerate(sizes, 1)]


def rows_of(layout, given, row_length):
  """Returns one Rows of all blocks."""
  blocks = packing.rows(layout, given, row_length, eos_id=EOS, pad_id=PAD)
  columns = zip(*blocks, strict=True)
  join = lambda c: None if c[0] is None else np.concatenate(c)
  return Rows(*map(join, columns))


def found(rows):
  """Returns (row, start, tokens, answer) of each document of Rows."""
  result = []
  for r in range(len(rows.tokens)):
    for n in np.unique(rows.doc[r][rows.doc[r] >= 0]):
      (at,) = np.nonzero(rows.doc[r] == n)
      assert (np.diff(at) == 1).all()
      answer = rows.answer[r, at] if rows.answer is not None else None
      result.append((r, int(at[0]), rows.tokens[r, at], answer))
  return result


def random_sizes(seed, count=300, longest=32):
  return np.random.default_rng(seed).integers(1, longest + 1, count)


@pytest.mark.parametrize('align', [1, 4, 8])
@pytest.mark.parametrize('open_rows', [3, 256])
def test_packed_rows_hold_each_document_once_and_whole(
  align, open_rows, monkeypatch
):
  monkeypatch.setattr(packing, 'OPEN_ROWS', open_rows)
  monkeypatch.setattr(packing, '_ROWS_AT_ONCE', 7)
  given = documents(random_sizes(0))
  rows = rows_of(Layout('packed', align), given, 32)
  placed = {int(tokens[0]): x for x in found(rows) for tokens in [x[2]]}
  assert len(placed) == len(given)
  for d in given:
    _, start, tokens, answer = placed[int(d.tokens[0])]
    assert start % align == 0
    np.testing.assert_array_equal(tokens, d.tokens)
    np.testing.assert_array_equal(answer, d.answer)
  assert not rows.answer[rows.doc < 0].any()
  assert (rows.tokens[rows.doc < 0] == PAD).all()


def test_first_fit_takes_the_first_row_with_room():
  given = documents([6, 5, 3, 4, 2, 1])
  rows = rows_of(Layout('packed'), given, 10)
  contents = [[], [], []]
  for r, _, tokens, _ in found(rows):
    contents[r].append(int(tokens[0]) // 1000)
  assert contents == [[1, 3, 6], [2, 4], [5]]


def test_padding_is_small_for_many_documents():
  rows = rows_of(Layout('packed'), documents(random_sizes(1, 2000)), 64)
  assert np.mean(rows.doc < 0) < 0.02


def test_eos_fills_the_gap_and_is_learned():
  rows = rows_of(Layout('packed', 4, fill_eos=True), documents([5, 3]), 16)
  first, second = found(rows)
  assert first[2].tolist() == [1000, 1001, 1002, 1003, 1004, EOS, EOS, EOS]
  assert first[3].tolist() == [False] * 2 + [True] * 6
  assert second[1] == 8
  assert second[2].tolist() == [2000, 2001, 2002, EOS]


@pytest.mark.parametrize('align', [1, 4])
def test_padded_rows_end_with_learned_eos_at_the_length_of_their_group(align):
  sizes = random_sizes(2, 50, 20)
  rows = rows_of(Layout('padded', align, group=8), documents(sizes), 20)
  placed = found(rows)
  assert [(r, s) for r, s, _, _ in placed] == [(r, 0) for r in range(50)]
  lengths = [len(tokens) for _, _, tokens, _ in placed]
  clean = [int((tokens != EOS).sum()) for _, _, tokens, _ in placed]
  assert clean == sorted(sizes)
  for start in range(0, 50, 8):
    longest = -(-max(clean[start : start + 8]) // align) * align
    assert set(lengths[start : start + 8]) == {longest}
  for _, _, tokens, answer in placed:
    assert answer[tokens == EOS].all()


@pytest.mark.parametrize('align', [1, 4, 8])
def test_cut_rows_keep_the_order_of_the_text(align):
  given = documents(random_sizes(3, 200, 50))
  rows = rows_of(Layout('cut', align), given, 16)
  assert rows.answer is None
  text = rows.tokens[rows.doc >= 0]
  np.testing.assert_array_equal(text, np.concatenate([d.tokens for d in given]))
  for _, start, _, _ in found(rows):
    assert start % align == 0
  starts = {int(d.tokens[0]) for d in given}
  at = np.isin(rows.tokens, list(starts)) & (rows.doc >= 0)
  assert (np.nonzero(at)[1] % align == 0).all()


@pytest.mark.parametrize('name', ['cut', 'packed', 'padded'])
def test_no_documents_make_no_rows(name):
  layout = Layout(name)
  assert not list(packing.rows(layout, [], 8, eos_id=EOS, pad_id=PAD))


@pytest.mark.parametrize('align', [0, -4, 3, 32])
def test_align_divides_the_row_length(align):
  with pytest.raises(UserError, match='does not divide --row_length=16'):
    packing.check(Layout('packed', align), 16)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['cut', 'packed'])
def test_no_block_of_block_diffusion_has_two_documents(name):
  """The labels of the objective are those of the published block mask."""

  def mixed_blocks(align):
    rows = rows_of(Layout(name, align), documents(random_sizes(4)), 32)
    rows = rows._replace(tokens=(rows.tokens % 3).astype(np.int32))
    c = dataclasses.replace(
      CONFIG,
      name='block_diffusion',
      block_length=8,
      attend_within='document',
    )
    size = len(rows.tokens)
    canvas = block_diffusion.corrupt(
      c,
      rows,
      np.full((size, 4), 0.5, np.float32),
      np.zeros((size, 32), np.float32),
      np.full(size, 32),
    )
    doc = np.asarray(canvas.labels.doc)[:, :32].reshape(-1, 8)
    block = np.asarray(canvas.labels.block)[..., :32]
    block = np.broadcast_to(block, (size, 32)).reshape(-1, 8)
    assert (block == block[:, :1]).all()
    highest = doc.max(axis=1)
    lowest = np.where(doc < 0, 99, doc).min(axis=1)
    return np.count_nonzero((highest >= 0) & (lowest != highest))

  assert mixed_blocks(1) > 50
  assert mixed_blocks(8) == 0
