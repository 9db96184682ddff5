"""Opens the tokenizer and data of a config; yields batches on the mesh."""

import functools

import jax
import numpy as np

from maskdiff import config as config_lib
from maskdiff.data import first_run, pipeline, prepare, records, row_reader
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.distributed import runtime
from maskdiff.errors import UserError

READ_THREADS = 2


def open_tokenizer(config):
  """Loads the tokenizer of config.data and checks it against the config.

  Returns:
    data.tokenizer.Tokenizer.

  Raises:
    UserError: a token id differs from config.tokens, or the tokenizer has more
      pieces than config.model.vocab_size.
  """
  tokenizer = tokenizer_lib.load(config.data.tokenizer)
  changes = first_run.fit_vocabulary(
    tokenizer, config.tokens, config.model.vocab_size
  )
  if changes:
    name, value = next(iter(changes.items()))
    flags = ' '.join(f'--config.{k}={v}' for k, v in changes.items())
    raise UserError(
      f'config.{name}={config_lib.lookup(config, name)}, but '
      f'{config.data.tokenizer} needs {value}; set {flags}, or choose another '
      '--config.data.tokenizer'
    )
  return tokenizer_lib.with_missing_ids(tokenizer, config.tokens)


def open_data(config, tokenizer, path=None, columns=(), pairs=False):
  """Opens the datasets of a data path and verifies their shards.

  The embedded corpus is prepared on first use. Process 0 prepares it for all
  hosts that share config.data.cache_dir.

  Args:
    config: ConfigDict.
    tokenizer: data.tokenizer.Tokenizer.
    path: in the form of config.data.path. Default: config.data.path.
    columns: names of the columns that every dataset must store, from
      data.rows.COLUMNS.
    pairs: whether the rows are pairs of answers, of --layout=pairs.

  Returns:
    List of data.pipeline.Dataset.

  Raises:
    UserError: a directory or shard is missing or damaged, was prepared with
      another tokenizer or as another kind of rows, or lacks a column.
  """
  datasets = []
  for name, weight in pipeline.parse_mixture(path or config.data.path):
    directory = name
    if name == 'embedded':
      directory = runtime.main_process_first(
        functools.partial(
          prepare.embedded,
          tokenizer,
          config.data.cache_dir,
          config.data.length,
          runtime.print_once,
        )
      )
    manifest = records.read_manifest(directory)
    if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
      raise UserError(
        f'{directory} was prepared with tokenizer '
        f'{manifest.tokenizer_fingerprint}, but {config.data.tokenizer} is '
        f'{tokenizer.fingerprint}; set --config.data.tokenizer={directory}, '
        'which holds the right tokenizer'
      )
    if manifest.eos_id != tokenizer.eos_id:
      raise UserError(
        f'the documents of {directory} end with the eos id {manifest.eos_id}, '
        f'but config.tokens.eos_id={tokenizer.eos_id}; set '
        f'--config.data.tokenizer={directory}, which holds the right tokenizer'
      )
    if pairs != (manifest.settings.get('layout') == 'pairs'):
      raise UserError(
        f'{directory} has no pairs of a chosen and a rejected answer: prepare '
        'them with launch/prepare.py --chat TEMPLATE --layout=pairs'
        if pairs
        else f'{directory} has pairs of a chosen and a rejected answer: train '
        'on them with launch/preferences.py'
      )
    missing = [name for name in columns if name not in manifest.columns]
    if missing:
      stored = ', '.join(('tokens', *manifest.columns))
      raise UserError(
        f'the rows of {directory} have the columns {stored}; this run also '
        f'needs {", ".join(missing)}: prepare conversations with '
        'launch/prepare.py --chat, write the columns with '
        'maskdiff.data.row_writer, or set --config.data.path to data that has '
        'them'
      )
    rows = config.data.verify
    if rows == 'sample' and config.data.max_damaged_rows:
      rows = 'none'  # the run replaces damaged rows when it reads them
    row_reader.verify(
      directory,
      manifest,
      rows=rows,
      share=(jax.process_index(), jax.process_count()),
    )
    datasets.append(pipeline.Dataset(name, str(directory), weight, manifest))
  return datasets


def train_batches(config, datasets, mesh, start_sample):
  """Returns an endless iterator of training batches on the mesh.

  Args:
    config: ConfigDict.
    datasets: from `open_data`.
    mesh: device mesh.
    start_sample: number of samples consumed so far.

  Returns:
    Iterator of data.rows.Rows of [B, L].

  Raises:
    UserError: config.data.length does not fit the prepared rows.
  """
  sharding = mesh_lib.batch_sharding(mesh)
  shape = (config.train.batch, config.data.length)
  batches = pipeline.train_batches(
    datasets,
    global_batch=config.train.batch,
    length=config.data.length,
    seed=config.seed,
    start_sample=start_sample,
    rows=pipeline.host_rows(sharding, shape),
    num_threads=READ_THREADS,
    max_damaged_rows=config.data.max_damaged_rows,
    skip=config.data.skip_samples,
  )
  return pipeline.to_device(batches, sharding, shape)


def first_row(rows, mesh):
  """Copies the tokens of row 0 of a batch to every host, [L] int32.

  All processes must call this function.
  """
  replicated = mesh_lib.replicated(mesh)
  row_0 = jax.jit(lambda tokens: tokens[0], out_shardings=replicated)
  return np.asarray(row_0(rows.tokens))


def read_samples(config, datasets, first, end):
  """Reads the tokens of training samples first, ..., end - 1 onto the host.

  Args:
    config: ConfigDict.
    datasets: from `open_data`.
    first: number of the first sample.
    end: number of the last sample, plus 1.

  Returns:
    [end - first, L] int32.
  """
  batches = pipeline.train_batches(
    datasets,
    global_batch=end - first,
    length=config.data.length,
    seed=config.seed,
    start_sample=first,
    rows=range(end - first),
    num_threads=0,
    max_damaged_rows=config.data.max_damaged_rows,
  )
  return next(batches).tokens


def heldout_batches(config, dataset, mesh):
  """Returns an iterator of held-out batches on the mesh, Rows of [B, L].

  The batches are the same at every evaluation.

  Args:
    config: ConfigDict.
    dataset: data.pipeline.Dataset.
    mesh: device mesh.

  Raises:
    UserError: the dataset has less held-out text than config.eval needs.
  """
  sharding = mesh_lib.batch_sharding(mesh)
  shape = (config.eval.batch, config.data.length)
  batches = pipeline.heldout_batches(
    dataset,
    batch=config.eval.batch,
    length=config.data.length,
    num_batches=config.eval.batches,
    rows=pipeline.host_rows(sharding, shape),
    num_threads=READ_THREADS,
  )
  return pipeline.to_device(batches, sharding, shape)
