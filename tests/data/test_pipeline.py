"""The data order is a pure function of the seed and the sample index."""

import dataclasses
import fractions
import itertools
import json
import math
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maskdiff.data import order, pipeline, records, row_reader
from maskdiff.data import rows as rows_lib
from maskdiff.data.rows import Rows
from maskdiff.data.samples import num_samples
from maskdiff.errors import UserError
from maskdiff.training import pretraining

ROWS, ROW_LENGTH, BATCH = 50, 32, 8


def make_dataset(directory, train, heldout=None, weight=1.0, cuts=(), **other):
  """Writes a prepared directory with these rows; shards start at the cuts.

  Args:
    directory: new directory.
    train: [R, L] tokens, or Rows.
    heldout: as train; default: none.
    weight: weight in a mixture.
    cuts: rows at which shards start.
    **other: fields of the manifest.
  """
  directory.mkdir()
  train = train if isinstance(train, Rows) else Rows(train)
  heldout = (
    train._replace(tokens=train.tokens[:0]) if heldout is None else heldout
  )
  row_length, dtype = train.tokens.shape[1], train.tokens.dtype.name
  columns = rows_lib.disk_dtypes(train.columns, row_length)
  splits = {}
  for name, rows in ('train', train), ('heldout', heldout):
    tokens = getattr(rows, 'tokens', rows)
    blocks = (
      rows_lib.pack(rows, dtype, columns) if columns and len(tokens) else tokens
    )
    shards = [
      records.write_shard(directory / f'{name}-{n}', [part])
      for n, part in enumerate(np.split(blocks, cuts))
    ]
    splits[name] = records.Split(
      tuple(s for s in shards if s), len(tokens), tokens.size, 1, 1, 1.0
    )
  fields = dict(
    format_version=2 + bool(columns),
    source=f'counting in {directory.name}',
    settings={},
    tokenizer_fingerprint='none',
    vocab_size=1 << 16,
    eos_id=0,
    row_length=row_length,
    dtype=dtype,
    skipped={},
    splits=splits,
    columns=columns,
  )
  manifest = records.Manifest(**(fields | other))
  records.write_manifest(directory, manifest)
  return pipeline.Dataset(directory.name, str(directory), weight, manifest)


def counting_rows(rows=ROWS, row_length=ROW_LENGTH):
  """Returns rows whose tokens name their place: token = 100 * row + column."""
  tokens = 100 * np.arange(rows)[:, None] + np.arange(row_length)
  return tokens.astype(np.uint16)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
  directory = tmp_path_factory.mktemp('pipeline') / 'counting'
  return make_dataset(directory, counting_rows(), counting_rows(), cuts=[20])


def take(n, datasets, **changes):
  """Returns the tokens of the first n batches, [n, b, L]."""
  return take_rows(n, datasets, **changes).tokens


def take_rows(n, datasets, **changes):
  """Returns the first n batches, Rows of [n, b, L]."""
  settings = dict(
    global_batch=BATCH,
    length=ROW_LENGTH,
    seed=3,
    start_sample=0,
    rows=range(BATCH),
    num_threads=0,
  )
  if isinstance(datasets, pipeline.Dataset):
    datasets = [datasets]
  batches = pipeline.train_batches(datasets, **(settings | changes))
  return stack(itertools.islice(batches, n))


def stack(batches, axis=0, function=np.stack):
  """Stacks Rows column by column."""
  return jax.tree.map(lambda *x: function(x, axis=axis), *batches)


def samples(batches):
  """Returns [n, b, L] batches as a list of samples in global order."""
  return [tuple(row) for batch in batches for row in batch.tolist()]


def row_samples(batches):
  """Returns Rows of [n, b, L] as a list of samples: a tuple for each column."""
  columns = [samples(x) for x in batches if x is not None]
  return list(zip(*columns, strict=True))


def check_one_line(error):
  assert '\n' not in str(error.value)


# Random mixtures, compared with plain Python lists

CASES = 25
NUMBERING = 10_000  # of the tokens of a dataset: no two samples start the same
CASE_EOS = 60_000


@dataclasses.dataclass
class Case:
  """A random mixture and a run over it.

  Attributes:
    tokens: concatenated tokens of each dataset.
    stored: Rows of each dataset, as written.
    columns: names of the columns of the batches.
    sizes: samples of each dataset.
    shares: weights as integers without a common divisor.
    batches: number of batches in the run.
  """

  datasets: list[pipeline.Dataset]
  tokens: list[list[int]]
  stored: list[Rows]
  columns: list[str]
  sizes: list[int]
  shares: list[int]
  length: int
  seed: int
  global_batch: int
  batches: int

  def take(self, n=None, **changes):
    settings = dict(
      length=self.length,
      seed=self.seed,
      global_batch=self.global_batch,
      rows=range(self.global_batch),
    )
    n = self.batches if n is None else n
    return take_rows(n, self.datasets, **(settings | changes))

  def source_and_index(self, sample):
    """Returns the source of a sample and its index, from its tokens."""
    tokens, *_ = sample
    source, at = divmod(tokens[0], NUMBERING)
    assert at % self.length == 0
    assert tokens == tuple(self.tokens[source][at : at + self.length])
    return source, at // self.length

  def sample(self, source, index):
    """Returns sample `index` of a source: a tuple for each column.

    Documents of stored rows do not continue in the next row; other documents
    end with eos.
    """
    at = index * self.length
    of_sample = slice(at, at + self.length)
    tokens = self.tokens[source][of_sample]
    stored, sample = self.stored[source], [tuple(tokens)]
    row_length = stored.tokens.shape[1]
    if 'doc' in self.columns and stored.doc is None:
      sample.append(
        tuple(tokens[:i].count(CASE_EOS) for i in range(self.length))
      )
    elif 'doc' in self.columns:
      doc = stored.doc.ravel()[of_sample].tolist()
      later = [i // row_length * row_length for i in range(self.length)]
      sample.append(
        tuple(d if d < 0 else d + n for d, n in zip(doc, later, strict=True))
      )
    if 'answer' in self.columns:
      answer = np.ones(stored.tokens.shape, bool)
      answer = answer if stored.answer is None else stored.answer
      sample.append(tuple(answer.ravel()[of_sample].tolist()))
    return tuple(sample)


def make_columns(tokens, seed):
  """Returns Rows with random columns, and eos within some samples."""
  rng = np.random.default_rng([seed, 1])
  tokens[:, 1::2][rng.random(tokens[:, 1::2].shape) < 0.3] = CASE_EOS
  has_doc, has_answer = rng.random(2) < 0.4
  doc = rng.integers(-1, tokens.shape[1], tokens.shape)
  answer = rng.random(tokens.shape) < 0.5
  return Rows(tokens, doc if has_doc else None, answer if has_answer else None)


def make_case(directory, seed):
  rng = np.random.default_rng(seed)
  length = int(rng.choice([2, 4, 8, 16, 32]))
  digits = int(rng.integers(1, 4))
  parts = rng.integers(1, 10**digits, rng.integers(1, 5)).tolist()
  datasets, stored, sizes = [], [], []
  for k, part in enumerate(parts):
    row_length = int(rng.choice([4, 8, 16]))
    fewest = max(1, length // row_length)
    rows = int(rng.integers(fewest, rng.choice([5, 40, 300]) + fewest))
    flat = k * NUMBERING + np.arange(rows * row_length)
    tokens = flat.reshape(rows, row_length)
    tokens = tokens.astype(rng.choice(['uint16', 'uint32']))
    stored.append(make_columns(tokens, 10 * seed + k))
    dataset = make_dataset(
      directory / str(k),
      stored[-1],
      weight=part / 10**digits,
      cuts=np.sort(rng.integers(0, rows + 1, rng.integers(3))),
      eos_id=CASE_EOS,
    )
    datasets.append(dataset)
    sizes.append(rows * row_length // length)
  global_batch = int(rng.choice([rng.integers(1, 25), 8 * rng.integers(1, 4)]))
  return Case(
    datasets=datasets,
    tokens=[rows.tokens.ravel().tolist() for rows in stored],
    stored=stored,
    columns=[
      c for c in rows_lib.COLUMNS if any(c in r.columns for r in stored)
    ],
    sizes=sizes,
    shares=[part // math.gcd(*parts) for part in parts],
    length=length,
    seed=int(rng.integers(1000)),
    global_batch=global_batch,
    batches=240 // global_batch + 1,
  )


def plain_samples(case):
  """Returns the samples of a run one by one, as a reference.

  Of the sources whose turn it may be, the one whose turn must come first;
  from it, the next sample of its permutation.
  """
  weights = tuple(d.weight for d in case.datasets)
  keys = order.make_order(tuple(case.sizes), weights, case.seed).keys
  period = sum(case.shares)
  taken = [0] * len(keys)
  for now in range(case.batches * case.global_batch):
    turns = [
      (math.ceil(fractions.Fraction((j + 1) * period, share)), k)
      for k, (j, share) in enumerate(zip(taken, case.shares, strict=True))
      if j * period // share <= now
    ]
    _, k = min(turns)
    epoch, position = divmod(taken[k], case.sizes[k])
    (i,) = order.permute(
      np.array([position]), case.sizes[k], keys[k], np.array([epoch])
    ).tolist()
    yield case.sample(k, i)
    taken[k] += 1


@pytest.fixture(scope='module', params=range(CASES))
def case(request, tmp_path_factory):
  return make_case(tmp_path_factory.mktemp('case'), request.param)


@pytest.fixture(scope='module')
def expected(case):
  return list(plain_samples(case))


def test_samples_are_those_of_plain_lists(case, expected):
  assert row_samples(case.take()) == expected


def test_any_number_of_hosts_reads_the_same_global_batches(case, expected):
  for hosts in (1, 2, 4, 8):
    per_host, left = divmod(case.global_batch, hosts)
    if left:
      continue
    parts = [
      case.take(rows=range(h * per_host, (h + 1) * per_host))
      for h in range(hosts)
    ]
    together = stack(parts, axis=1, function=np.concatenate)
    assert row_samples(together) == expected


def test_a_run_resumes_at_any_sample(case, expected):
  """The sample may be inside a batch, and the batch size may change."""
  rng = np.random.default_rng(0)
  for start in [1, *rng.integers(0, len(expected) - 24, 3).tolist()]:
    batch = int(rng.integers(1, 25))
    n = (len(expected) - start) // batch
    resumed = case.take(
      n, start_sample=start, global_batch=batch, rows=range(batch)
    )
    assert row_samples(resumed) == expected[start : start + n * batch]


def test_hosts_resume_together(case, expected):
  """Each host resumes at the same step with its own rows."""
  step = case.batches // 3
  stop = (step + 3) * case.global_batch
  rest = expected[step * case.global_batch : stop]
  for row in range(0, case.global_batch, 3):
    resumed = case.take(3, start_sample=step * case.global_batch, rows=(row,))
    assert row_samples(resumed) == rest[row :: case.global_batch]


@pytest.mark.parametrize('num_threads', [1, 3])
def test_batches_do_not_depend_on_threads(case, expected, num_threads):
  assert row_samples(case.take(num_threads=num_threads)) == expected


@pytest.mark.parametrize('window', [3, 50])
def test_batches_do_not_depend_on_the_window(
  case, expected, window, monkeypatch
):
  monkeypatch.setattr(pipeline, '_WINDOW', window)
  assert row_samples(case.take()) == expected


def test_each_epoch_of_each_dataset_is_a_permutation(case):
  order_of = [[] for _ in case.datasets]
  for sample in row_samples(case.take()):
    source, index = case.source_and_index(sample)
    order_of[source].append(index)
  for indices, size in zip(order_of, case.sizes, strict=True):
    for start in range(0, len(indices), size):
      epoch = indices[start : start + size]
      assert len(set(epoch)) == len(epoch)
      if len(epoch) == size:
        assert sorted(epoch) == [*range(size)]


def test_mixture_is_exact_to_one_sample_at_every_time(case):
  period = sum(case.shares)
  counts = [0] * len(case.shares)
  for n, sample in enumerate(row_samples(case.take()), 1):
    counts[case.source_and_index(sample)[0]] += 1
    for count, share in zip(counts, case.shares, strict=True):
      assert abs(count * period - n * share) < period


def test_cases_are_of_every_kind(tmp_path):
  """Otherwise the tests above would prove little."""
  kinds = set()
  for seed in range(CASES):
    (tmp_path / str(seed)).mkdir()
    case = make_case(tmp_path / str(seed), seed)
    kinds.add(f'{len(case.datasets)} datasets')
    kinds |= {f'{h} hosts' for h in (2, 4, 8) if case.global_batch % h == 0}
    drawn = case.batches * case.global_batch
    for dataset, size, share in zip(
      case.datasets, case.sizes, case.shares, strict=True
    ):
      row_length = dataset.manifest.row_length
      kinds.add('parts' if case.length < row_length else 'whole or joined')
      kinds.add(f'{len(dataset.manifest.splits["train"].shards)} shards')
      kinds.add(dataset.manifest.dtype)
      if case.length > row_length:
        left = dataset.manifest.splits['train'].tokens % case.length
        kinds.add('remainder' if left else 'no remainder')
      epochs = drawn * share // sum(case.shares) // size
      kinds.add(f'{min(epochs, 3)} epochs')
    stored = [set(rows.columns) for rows in case.stored]
    kinds.add('some columns' if any(stored) else 'tokens only')
    for column in rows_lib.COLUMNS:
      have = sum(column in columns for columns in stored)
      kinds.add(f'{column} in ' + ('all' if have == len(stored) else 'some'))
      joined = any(
        column in rows.columns and case.length > rows.tokens.shape[1]
        for rows in case.stored
      )
      kinds |= {f'joined {column}'} if joined else set()
    kinds.add('odd batch' if case.global_batch % 2 else 'even batch')
  assert kinds == {
    *(f'{n} datasets' for n in (1, 2, 3, 4)),
    *(f'{n} hosts' for n in (2, 4, 8)),
    *(f'{n} shards' for n in (1, 2, 3)),
    *(f'{n} epochs' for n in (0, 1, 2, 3)),
    *('parts', 'whole or joined', 'remainder', 'no remainder'),
    *('uint16', 'uint32', 'odd batch', 'even batch'),
    *('some columns', 'tokens only', 'joined doc', 'joined answer'),
    *(f'{c} in {n}' for c in rows_lib.COLUMNS for n in ('all', 'some')),
  }


# One dataset of 50 rows.


@pytest.mark.parametrize('length', [ROW_LENGTH, ROW_LENGTH // 4])
def test_each_epoch_is_a_permutation(dataset, length):
  size = ROWS * ROW_LENGTH // length
  flat = samples(take(3 * size // BATCH, dataset, length=length))
  every = {tuple(part) for part in counting_rows().reshape(-1, length).tolist()}
  epochs = [flat[e * size : (e + 1) * size] for e in range(2)]
  for epoch in epochs:
    assert len(epoch) == size and set(epoch) == every
  assert epochs[0] != epochs[1]


def test_batches_are_int32_and_writable(dataset):
  batches = take(2, dataset)
  assert batches.shape == (2, BATCH, ROW_LENGTH) and batches.dtype == np.int32
  stream = pipeline.train_batches(
    [dataset],
    global_batch=BATCH,
    length=ROW_LENGTH,
    seed=3,
    start_sample=0,
    rows=range(BATCH),
    num_threads=0,
  )
  next(stream).tokens[:] = -1
  np.testing.assert_array_equal(next(stream).tokens, batches[1])


def test_a_long_run_is_the_order(dataset):
  """The run spans several lookups of the order and many epochs."""
  got = take(400, dataset)[:, :, 0].ravel() // 100
  expected = order.make_order((ROWS,), (1.0,), 3)
  _, rows = order.locate(expected, np.arange(400 * BATCH))
  np.testing.assert_array_equal(got, rows)


@pytest.mark.parametrize('hosts', [2, 4, 8])
def test_global_batches_are_the_same_for_any_number_of_hosts(dataset, hosts):
  whole = take(30, dataset)  # over four epochs
  per_host = BATCH // hosts
  parts = [
    take(30, dataset, rows=range(h * per_host, (h + 1) * per_host))
    for h in range(hosts)
  ]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_a_host_may_supply_any_rows(dataset):
  whole = take(30, dataset)
  rows = (1, 2, 6)
  np.testing.assert_array_equal(take(30, dataset, rows=rows), whole[:, rows])


@pytest.mark.parametrize('step', [1, 6, 7, 100])
def test_resume_equals_skipping(dataset, step):
  whole = take(step + 5, dataset)
  resumed = take(5, dataset, start_sample=step * BATCH)
  np.testing.assert_array_equal(resumed, whole[step:])


def test_another_batch_size_continues_at_the_same_sample(dataset):
  whole = samples(take(12, dataset))
  resumed = take(4, dataset, global_batch=6, rows=range(6), start_sample=24)
  assert samples(resumed) == whole[24:48]
  resumed = take(4, dataset, global_batch=6, rows=range(6), start_sample=7)
  assert samples(resumed) == whole[7:31]


@pytest.fixture
def read(monkeypatch):
  """Records the numbers of the rows that are read, in order."""
  numbers = []

  class Counting(row_reader.RowSource):
    def read(self, rows):
      numbers.extend(rows)
      return super().read(rows)

  monkeypatch.setattr(row_reader, 'RowSource', Counting)
  return numbers


@pytest.mark.parametrize('step', [0, 10**6, 2**45])
def test_resuming_reads_only_requested_rows(dataset, step, read):
  """The cost of resuming does not depend on the position in the run."""
  batch = take(1, dataset, start_sample=step * BATCH)[0]
  _, rows = order.locate(
    order.make_order((ROWS,), (1.0,), 3), step * BATCH + np.arange(BATCH)
  )
  assert read == rows.tolist()
  np.testing.assert_array_equal(batch[:, 0] // 100, rows)


def test_a_host_reads_only_its_rows(dataset, read):
  batches = take(5, dataset, rows=(2, 3))
  assert read == (batches[:, :, 0] // 100).ravel().tolist()


def test_threads_read_a_few_batches_ahead(dataset, read):
  take(1, dataset, num_threads=2)
  assert len(read) <= (1 + 3 * 2) * BATCH


def test_seeds_differ_also_from_each_others_later_epochs(dataset):
  """With the key seed + epoch, (s, 1) and (s + 1, 0) would be equal."""
  per_epoch = ROWS // 2
  orders = [
    tuple(samples(batches)[e * ROWS : (e + 1) * ROWS])
    for seed in range(4)
    for batches in [
      take(4 * per_epoch, dataset, seed=seed, global_batch=2, rows=(0, 1))
    ]
    for e in range(4)
  ]
  assert len(set(orders)) == 16


def test_order_is_pinned(dataset):
  """If this fails, existing runs cannot resume with the same data."""
  pinned = [16, 17, 23, 38, 14, 19, 2, 46]
  first = take(1, dataset)[0, :, 0] // 100
  assert first.tolist() == pinned


def test_a_multiple_of_the_row_length_joins_rows(tmp_path):
  dataset = make_dataset(tmp_path / 'a', counting_rows(11, 8), cuts=[4, 5])
  flat = samples(take(3, dataset, length=24, global_batch=3, rows=range(3)))
  joined = [
    tuple(rows.ravel().tolist()) for rows in np.split(counting_rows(9, 8), 3)
  ]
  for epoch in range(3):  # rows 9 and 10 make no sample
    assert sorted(flat[3 * epoch : 3 * epoch + 3]) == joined


def test_a_divisor_of_the_row_length_cuts_rows(tmp_path):
  dataset = make_dataset(tmp_path / 'a', counting_rows(5, 12))
  flat = samples(take(1, dataset, length=3, global_batch=20, rows=range(20)))
  parts = counting_rows(5, 12).reshape(-1, 3).tolist()
  assert sorted(flat) == [tuple(part) for part in parts]


def test_datasets_may_differ_in_row_length(tmp_path):
  long = make_dataset(tmp_path / 'long', counting_rows(4, 24))
  short = make_dataset(tmp_path / 'short', 5000 + counting_rows(16, 6))
  flat = samples(take(2, [long, short], length=12))
  rows = counting_rows(4, 24).reshape(-1, 12).tolist()
  rows += (5000 + counting_rows(16, 6)).reshape(-1, 12).tolist()
  assert sorted(flat) == [tuple(row) for row in rows]


@pytest.mark.parametrize('length', [24, 48, 33, 5, 3, 0, -32])
def test_length_must_fit_the_row(dataset, length):
  message = f'length of {length} .*rows of 32 tokens.*config.data.length'
  with pytest.raises(UserError, match=message) as e:
    take(1, dataset, length=length)
  check_one_line(e)
  with pytest.raises(UserError, match=message):
    pipeline.fingerprint([dataset], seed=0, length=length)
  with pytest.raises(UserError, match=message):
    heldout(dataset, length=length)


@pytest.mark.parametrize(
  'rows, row_length, length, number',
  [
    (10, 32, 32, 10),
    (10, 32, 8, 40),
    (10, 32, 64, 5),
    (11, 32, 64, 5),
    (10, 32, 96, 3),
    (1, 32, 64, 0),
    (0, 32, 32, 0),
    (10**11, 2048, 4096, 5 * 10**10),
  ],
)
def test_number_of_samples(rows, row_length, length, number):
  assert num_samples(rows, row_length, length) == number


def test_too_few_rows_for_a_sample_are_refused(dataset, tmp_path):
  small = make_dataset(tmp_path / 'small', counting_rows(1))
  assert take(1, small).shape == (1, BATCH, ROW_LENGTH)
  for datasets in ([small], [dataset, small]):
    with pytest.raises(UserError, match='small has no training rows') as e:
      take(1, datasets, length=64)
    check_one_line(e)
  with pytest.raises(UserError, match='small has no training rows'):
    pipeline.fingerprint([small], seed=0, length=64)


def test_a_weight_that_is_too_small_is_refused(dataset):
  tiny = dataclasses.replace(dataset, weight=1e-9)
  with pytest.raises(UserError, match='config.data.path: .*1/65536') as e:
    take(1, [dataset, tiny])
  check_one_line(e)


def test_wrong_rows_are_refused(dataset):
  for rows in ((), (BATCH,), (-1,), (0, BATCH)):
    with pytest.raises(ValueError, match='not rows of a batch'):
      take(1, dataset, rows=rows)


def test_negative_start_is_refused(dataset):
  with pytest.raises(ValueError, match='must not be negative: -8'):
    take(1, dataset, start_sample=-BATCH)


# Damaged rows.


def flip_bit_of_row(path, rows, row):
  """Flips a bit of one row; a file with another row there shows its place."""
  other = rows.copy()
  other[row] += 1
  files = []
  for version in (rows, other):
    records.write_shard(path.with_name('x'), [version])
    files.append(path.with_name('x').read_bytes())
  path.with_name('x').unlink()
  pairs = enumerate(zip(*files, strict=False))
  content = bytearray(path.read_bytes())
  content[next(at for at, (a, b) in pairs if a != b)] ^= 1
  path.write_bytes(content)


def damaged(dataset, directory, *damaged_rows, split='train'):
  """Returns a copy of the dataset of 50 rows with unreadable rows."""
  shutil.copytree(dataset.directory, directory)
  for row in damaged_rows:
    shard, first, last = (0, 0, 20) if row < 20 else (1, 20, ROWS)
    rows = counting_rows()[first:last]
    flip_bit_of_row(directory / f'{split}-{shard}', rows, row - first)
  return dataclasses.replace(dataset, directory=str(directory))


def with_rows_replaced(batches, replaced):
  """Returns batches with rows replaced; a row number is token // 100."""
  out = batches.copy()
  for row, other in replaced.items():
    out[batches // 100 == row] += 100 * (other - row)
  return out


@pytest.mark.parametrize('num_threads', [0, 2])
def test_damaged_row_stops_the_run_and_names_the_file(
  dataset, tmp_path, num_threads
):
  bad = damaged(dataset, tmp_path / 'bad', 27)
  with pytest.raises(UserError, match='row 7 of shard .*bad/train-1 is') as e:
    take(ROWS // BATCH + 1, bad, num_threads=num_threads)
  check_one_line(e)


@pytest.mark.parametrize(
  'replaced',
  [
    {7: 8, 31: 32},
    {7: 9, 8: 9},
    {19: 20},
    {49: 0},
    {48: 0, 49: 0},
    {49: 1, 0: 1},
  ],
)
@pytest.mark.parametrize('length', [8, 32, 64])
def test_next_row_replaces_a_damaged_row(dataset, tmp_path, replaced, length):
  bad = damaged(dataset, tmp_path / 'bad', *replaced)
  whole = take(30, dataset, length=length)
  got = take(30, bad, length=length, max_damaged_rows=2)
  np.testing.assert_array_equal(got, with_rows_replaced(whole, replaced))


def test_damage_is_the_same_on_any_hosts_and_after_resuming(dataset, tmp_path):
  bad = damaged(dataset, tmp_path / 'bad', 7, 31)
  whole = take(30, bad, max_damaged_rows=2)
  assert not np.array_equal(whole, take(30, dataset))
  for hosts in (2, 4, 8):
    parts = [
      take(30, bad, rows=rows, max_damaged_rows=2)
      for rows in np.arange(BATCH).reshape(hosts, -1).tolist()
    ]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
  for step in (1, 9, 25):
    rest = take(5, bad, start_sample=step * BATCH, max_damaged_rows=2)
    np.testing.assert_array_equal(rest, whole[step : step + 5])
  threads = take(30, bad, num_threads=3, max_damaged_rows=2)
  np.testing.assert_array_equal(threads, whole)


@pytest.mark.parametrize('num_threads', [0, 3])
@pytest.mark.parametrize('length', [8, 32, 64])
def test_a_damaged_row_is_reported_once(
  dataset, tmp_path, capsys, num_threads, length
):
  bad = damaged(dataset, tmp_path / 'bad', 7, 31)
  n = 3 * ROWS * ROW_LENGTH // length // BATCH  # three epochs
  take(n, bad, length=length, num_threads=num_threads, max_damaged_rows=2)
  out, err = capsys.readouterr()
  lines = [line for line in err.splitlines() if bad.directory in line]
  lines.sort(key=lambda line: 'train-1' in line)
  assert not out and len(lines) == 2
  assert {line.partition(',')[0] for line in lines} == {
    f'damaged row {n} of at most 2' for n in (1, 2)
  }
  assert 'row 7 of shard' in lines[0] and 'bad/train-0 is' in lines[0]
  assert 'row 11 of shard' in lines[1] and 'bad/train-1 is' in lines[1]


@pytest.mark.parametrize('num_threads', [0, 3])
def test_one_damaged_row_too_many_stops_the_run(dataset, tmp_path, num_threads):
  rows = take(6, dataset)[:, :, 0] // 100
  bad_rows = [int(rows[at]) for at in ((0, 0), (2, 3), (5, 6))]
  bad = damaged(dataset, tmp_path / 'bad', *bad_rows)
  names = [
    f'row {row} of shard {bad.directory}/train-0 is'
    if row < 20
    else f'row {row - 20} of shard {bad.directory}/train-1 is'
    for row in bad_rows
  ]
  settings = dict(num_threads=num_threads, max_damaged_rows=2)
  if not num_threads:  # threads may meet them in another order
    names = names[2:]
    take(5, bad, **settings)
  with pytest.raises(UserError, match='|'.join(names)):
    take(6, bad, **settings)
  take(20, bad, num_threads=num_threads, max_damaged_rows=3)


def test_a_missing_shard_is_not_a_damaged_row(dataset, tmp_path):
  bad = damaged(dataset, tmp_path / 'bad')
  (tmp_path / 'bad' / 'train-1').unlink()
  with pytest.raises(UserError, match='bad/train-1 is missing'):
    take(ROWS // BATCH + 1, bad, max_damaged_rows=100)


def test_a_dataset_without_an_intact_row_stops_the_run(tmp_path):
  rows = counting_rows(3)
  dataset = make_dataset(tmp_path / 'a', rows, cuts=[1, 2])
  for n in range(3):
    flip_bit_of_row(tmp_path / 'a' / f'train-{n}', rows[n : n + 1], 0)
  with pytest.raises(UserError, match='row 0 of shard .* is damaged'):
    take(1, dataset, max_damaged_rows=10)


def test_a_damaged_row_is_replaced_from_its_own_dataset(dataset, tmp_path):
  other = make_dataset(
    tmp_path / 'other', (10_000 + counting_rows(30)).astype(np.uint16)
  )
  bad = damaged(dataset, tmp_path / 'bad', 7)
  whole = take(30, [other, dataset])
  got = take(30, [other, bad], max_damaged_rows=1)
  assert 7 in whole // 100
  np.testing.assert_array_equal(got, with_rows_replaced(whole, {7: 8}))


def test_damaged_heldout_rows_are_never_replaced(dataset, tmp_path):
  bad = damaged(dataset, tmp_path / 'bad', 27, split='heldout')
  with pytest.raises(UserError, match='row 7 of shard .*bad/heldout-1 is'):
    heldout(bad, num_batches=12)


# Held-out batches.


def heldout(dataset, **changes):
  settings = dict(
    batch=4,
    length=ROW_LENGTH,
    num_batches=3,
    rows=range(4),
    num_threads=0,
  )
  batches = pipeline.heldout_batches(dataset, **(settings | changes))
  return [batch.tokens for batch in batches]


def test_heldout_is_a_fixed_sample_without_repeats(dataset):
  batches = heldout(dataset)
  assert len(batches) == 3
  flat = samples(batches)
  assert len(set(flat)) == 12
  assert samples(heldout(dataset)) == flat
  assert (
    samples(heldout(dataset, batch=6, num_batches=2, rows=range(6))) == flat
  )
  assert samples(heldout(dataset, num_batches=12))[:12] == flat
  assert samples(heldout(dataset, num_threads=3)) == flat


def test_heldout_order_is_pinned(dataset):
  """If this fails, evaluations of older runs are not comparable."""
  pinned = [28, 9, 30, 20]
  assert (heldout(dataset)[0][:, 0] // 100).tolist() == pinned


def test_heldout_depends_on_neither_weight_nor_name(dataset):
  other = dataclasses.replace(dataset, weight=0.3, name='other')
  assert samples(heldout(other)) == samples(heldout(dataset))


def test_heldout_by_hosts(dataset):
  whole = np.stack(heldout(dataset))
  parts = [np.stack(heldout(dataset, rows=rows)) for rows in ((0, 1), (2, 3))]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize('length', [8, 64])
def test_heldout_rows_are_cut_and_joined_like_those_of_training(
  dataset, length
):
  number = ROWS * ROW_LENGTH // length
  flat = samples(
    heldout(
      dataset, length=length, batch=number, num_batches=1, rows=range(number)
    )
  )
  every = counting_rows().reshape(-1, length).tolist()
  assert sorted(flat) == [tuple(sample) for sample in every]
  assert samples(heldout(dataset, length=length)) == flat[:12]


def test_too_many_heldout_batches_are_refused(dataset):
  assert len(heldout(dataset, num_batches=12)) == 12
  with pytest.raises(UserError, match='config.eval.batches=12') as e:
    heldout(dataset, num_batches=13)
  assert dataset.directory in str(e.value)
  check_one_line(e)


def test_data_without_a_heldout_part_are_refused(tmp_path):
  dataset = make_dataset(tmp_path / 'a', counting_rows(3))
  with pytest.raises(
    UserError, match='/a has no held-out text.*eval.path'
  ) as e:
    heldout(dataset)
  check_one_line(e)


def test_no_heldout_batches_are_none(dataset):
  assert heldout(dataset, num_batches=0) == []


# Fingerprints.


def fingerprint(datasets, **changes):
  return pipeline.fingerprint(datasets, **(dict(seed=1, length=16) | changes))


def changed(a, b):
  assert a.keys() == b.keys()
  return {key for key in a if a[key] != b[key]}


@pytest.fixture
def mixture(dataset, tmp_path):
  other = make_dataset(tmp_path / 'other', counting_rows(30), cuts=[10, 20])
  return [
    dataclasses.replace(dataset, weight=0.7),
    dataclasses.replace(other, weight=0.3),
  ]


def with_manifest(dataset, **changes):
  manifest = dataclasses.replace(dataset.manifest, **changes)
  return dataclasses.replace(dataset, manifest=manifest)


def rebuilt(dataset, directory, rows, cuts):
  """Returns a dataset of the same source with other rows or shards."""
  new = make_dataset(directory, rows, weight=dataset.weight, cuts=cuts)
  return with_manifest(new, source=dataset.manifest.source)


def test_fingerprint_has_everything_that_determines_the_order(mixture):
  base = fingerprint(mixture)
  assert json.loads(json.dumps(base)) == base
  assert fingerprint(mixture) == base
  assert changed(base, fingerprint(mixture, seed=2)) == {'seed', 'order'}
  differ = changed(base, fingerprint(mixture, length=32))
  assert differ == {'length', 'samples', 'order'}


def test_fingerprint_tells_rows_apart(mixture, tmp_path):
  base = fingerprint(mixture)
  rows = counting_rows(30)
  rows[17, 5] += 1
  other = rebuilt(mixture[1], tmp_path / 'rows', rows, [10, 20])
  assert changed(base, fingerprint([mixture[0], other])) == {'rows'}


def test_fingerprint_tells_numbers_of_rows_apart(mixture, tmp_path):
  more = rebuilt(mixture[1], tmp_path / 'more', counting_rows(31), [10, 20])
  differ = changed(fingerprint(mixture), fingerprint([mixture[0], more]))
  assert differ == {'rows', 'samples', 'order'}


def test_fingerprint_tells_shards_apart(mixture, tmp_path):
  one = rebuilt(mixture[1], tmp_path / 'one', counting_rows(30), [])
  differ = changed(fingerprint(mixture), fingerprint([mixture[0], one]))
  assert differ == {'rows', 'shards'}


def test_fingerprint_tells_weights_apart_by_their_ratio(mixture):
  base = fingerprint(mixture)
  web, code = mixture
  same = [
    dataclasses.replace(web, weight=7),
    dataclasses.replace(code, weight=3),
  ]
  assert fingerprint(same) == base
  other = [web, dataclasses.replace(code, weight=0.7)]
  assert changed(base, fingerprint(other)) == {'shares', 'order'}


def test_fingerprint_tells_tokenizers_apart(mixture):
  base = fingerprint(mixture)
  other = [with_manifest(d, tokenizer_fingerprint='other') for d in mixture]
  assert changed(base, fingerprint(other)) == {'tokenizer'}


def test_fingerprint_does_not_depend_on_names(mixture):
  other = [mixture[0], with_manifest(mixture[1], source='other')]
  assert fingerprint(mixture) == fingerprint(other)


def test_fingerprint_tells_the_order_of_datasets(mixture):
  a, b = mixture
  b = dataclasses.replace(b, weight=0.7)
  differ = changed(fingerprint([a, b]), fingerprint([b, a]))
  assert differ == {'shards', 'rows', 'samples', 'order'}


def test_fingerprint_tells_a_part_from_the_mixture(mixture):
  differ = changed(fingerprint(mixture), fingerprint(mixture[:1]))
  assert {'rows', 'shares', 'samples', 'order'} <= differ


def test_fingerprint_tells_code_with_another_order(mixture, monkeypatch):
  base = fingerprint(mixture)
  permute = order.permute
  monkeypatch.setattr(
    order,
    'permute',
    lambda position, size, key, epoch: permute(position, size, key + 1, epoch),
  )
  assert changed(base, fingerprint(mixture)) == {'order'}


def test_fingerprint_is_the_same_in_another_place(mixture, tmp_path):
  moved = [
    dataclasses.replace(d, name='x', directory=str(tmp_path / 'elsewhere'))
    for d in mixture
  ]
  assert fingerprint(moved) == fingerprint(mixture)


def test_fingerprint_does_not_depend_on_the_heldout_split(mixture):
  train = mixture[1].manifest.splits['train']
  other = with_manifest(mixture[1], splits={'train': train, 'heldout': train})
  assert fingerprint([mixture[0], other]) == fingerprint(mixture)


def test_equal_fingerprints_mean_equal_samples(dataset, tmp_path):
  """The second dataset has the same rows in another directory."""
  (tmp_path / 'copy').mkdir()
  copy = make_dataset(
    tmp_path / 'copy' / 'counting', counting_rows(), cuts=[20]
  )
  assert fingerprint([copy]) == fingerprint([dataset])
  np.testing.assert_array_equal(take(10, copy), take(10, dataset))


# Parsing of mixtures


@pytest.mark.parametrize(
  'path, mixture',
  [
    ('embedded', [('embedded', 1.0)]),
    ('data/web', [('data/web', 1.0)]),
    ('gs://bucket/web', [('gs://bucket/web', 1.0)]),
    ('data/web=2', [('data/web', 2.0)]),
    ('a=0.7,b=0.3', [('a', 0.7), ('b', 0.3)]),
    ('a = 0.7, b =0.3 ', [('a', 0.7), ('b', 0.3)]),
    ('b=1e-3,a=2,c=7', [('b', 0.001), ('a', 2.0), ('c', 7.0)]),
    ('gs://x/y=1,~/z=2', [('gs://x/y', 1.0), ('~/z', 2.0)]),
    ('lr=3/rows=1,b=1', [('lr=3/rows', 1.0), ('b', 1.0)]),
  ],
)
def test_mixtures_are_directories_with_weights(path, mixture):
  assert pipeline.parse_mixture(path) == mixture


@pytest.mark.parametrize(
  'path, part',
  [
    ('a,b', 'a'),
    ('a=1,b', 'b'),
    ('a=', 'a='),
    ('a=1,', ''),
    ('=1,b=2', '=1'),
    ('a=x,b=1', 'a=x'),
    ('a=1,b=0', 'b=0'),
    ('a=1,b=-0.5', 'b=-0.5'),
    ('a=nan,b=1', 'a=nan'),
    ('a=1,b=inf', 'b=inf'),
    ('a=1,b=1e-400', 'b=1e-400'),
  ],
)
def test_bad_parts_of_a_mixture_are_named(path, part):
  with pytest.raises(UserError) as e:
    pipeline.parse_mixture(path)
  assert f'data path {path!r}: {part!r} must be DIRECTORY=WEIGHT' in str(
    e.value
  )
  assert '--config.data.path=' in str(e.value)
  check_one_line(e)


def test_a_directory_comes_once_in_a_mixture():
  with pytest.raises(UserError, match='names data/web twice'):
    pipeline.parse_mixture('data/web=1,b=1,data/web=2')


# Transfer to devices

MESHES = {
  'batch': ((8, 1), PartitionSpec('batch')),
  'batch and length': ((4, 2), PartitionSpec('batch', 'length')),
  'length': ((1, 8), PartitionSpec(None, 'length')),
  'length first': ((2, 4), PartitionSpec('length', 'batch')),
  'both on rows': ((4, 2), PartitionSpec(('length', 'batch'))),
  'replicated': ((4, 2), PartitionSpec()),
}


@pytest.mark.parametrize('name', MESHES)
def test_every_mesh_gives_the_same_global_arrays(dataset, name):
  shape, spec = MESHES[name]
  mesh = jax.make_mesh(
    shape, ('batch', 'length'), axis_types=(AxisType.Auto,) * 2
  )
  sharding = NamedSharding(mesh, spec)
  global_shape = (BATCH, ROW_LENGTH)
  rows = pipeline.host_rows(sharding, global_shape)
  assert rows == tuple(range(BATCH))

  tokens = take(5, dataset, rows=rows)
  expected = [
    Rows(batch, batch % 7 - 1 if n else None, batch % 3 > 0 if n == 2 else None)
    for n, batch in enumerate(tokens)
  ]
  found = list(pipeline.to_device(iter(expected), sharding, global_shape))
  assert [rows.columns for rows in found] == [rows.columns for rows in expected]
  for arrays, batches in zip(found, expected, strict=True):
    for array, batch in zip(
      jax.tree.leaves(arrays), jax.tree.leaves(batches), strict=True
    ):
      assert array.sharding == sharding and array.dtype == batch.dtype
      np.testing.assert_array_equal(array, batch)
      for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, batch[shard.index])


def test_host_rows_are_those_of_its_devices():
  """Two hosts have 4 devices each; the rows of one are not adjacent."""
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))

  class OneHost:
    def __init__(self, devices):
      self.devices = devices

    def addressable_devices_indices_map(self, shape):
      everything = NamedSharding(
        mesh, PartitionSpec('batch')
      ).addressable_devices_indices_map(shape)
      return {d: everything[d] for d in self.devices}

  devices = list(mesh.devices)
  assert pipeline.host_rows(OneHost(devices[4:]), (16, 4)) == (*range(8, 16),)
  ends = OneHost(devices[:1] + devices[-1:])
  assert pipeline.host_rows(ends, (16, 4)) == (0, 1, 14, 15)


def test_one_batch_is_in_flight(dataset):
  asked = []

  def batches():
    for k in itertools.count():
      asked.append(k)
      yield Rows(np.full((BATCH, 4), k, np.int32))

  mesh = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec('batch'))
  arrays = pipeline.to_device(batches(), sharding, (BATCH, 4))
  for k in range(3):
    assert int(next(arrays).tokens[0, 0]) == k
    assert asked == [*range(k + 2)]


def test_directory_name_may_contain_comma_and_equals_sign(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  for name in ('date=2024-01', 'v=1', 'a,b'):
    (tmp_path / name).mkdir()
    assert pipeline.parse_mixture(name) == [(name, 1.0)]


def test_a_directory_named_in_two_ways_is_named_twice():
  with pytest.raises(UserError, match='names ./data/a twice'):
    pipeline.parse_mixture('data/a=1,./data/a=2')


# Skipped samples

SKIPS = [
  ((0, 3),),
  ((5, 6), (7, 9), (9, 30)),
  ((0, 1), (40, 1000)),
  ((4, 12), (13, 14)),
]


@pytest.mark.parametrize('skip', SKIPS)
@pytest.mark.parametrize('start', [0, 1, 5, 8, 13, 50])
def test_sample_numbers_omit_skipped_ranges(skip, start):
  left = [
    n
    for n in range(start, 3000)
    if not any(first <= n < end for first, end in skip)
  ]
  counts = np.arange(500)
  np.testing.assert_array_equal(
    pipeline.sample_number(start, counts, skip), left[:500]
  )
  assert pipeline.sample_number(start, 7, skip) == left[7]
  np.testing.assert_array_equal(
    pipeline.sample_number(start, counts), start + counts
  )


@pytest.mark.parametrize('skip', SKIPS)
def test_skipping_samples_does_not_change_the_others(dataset, skip):
  def samples(number, **options):
    batches = pipeline.train_batches(
      [dataset],
      global_batch=4,
      length=dataset.manifest.row_length,
      seed=0,
      start_sample=2,
      rows=range(4),
      num_threads=0,
      **options,
    )
    return np.concatenate([b.tokens for b in itertools.islice(batches, number)])

  numbers = pipeline.sample_number(2, np.arange(24), skip)
  everything = samples(400 // 4)
  np.testing.assert_array_equal(
    samples(len(numbers) // 4, skip=skip), everything[numbers - 2]
  )


def test_closing_the_device_batches_ends_reading_ahead():
  closed = []

  class Batches:
    """An iterator with a `close`, as those of grain have."""

    def __init__(self, batches):
      self._batches = batches

    def __iter__(self):
      return self

    def __next__(self):
      return next(self._batches)

    def close(self):
      closed.append(True)

  opened = []

  def open_batches(position):
    assert len(closed) == len(opened)  # one iterator is open at a time
    opened.append(position)
    source = Batches(itertools.repeat(Rows(np.zeros((8, 8), np.int32))))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return pipeline.to_device(source, sharding, (8, 8))

  next_batch = pretraining.in_order(open_batches, 8, ())
  for position in (0, 8, 16, 0, 8, 64):
    next_batch(position, None)
  assert opened == [0, 0, 64] and len(closed) == 2
