"""Makes the shards of parts on other machines, with Apache Beam.

Every part is an element of a pipeline. Its worker calls `shards.make_shard`, so
that the files are those of a preparation on one machine. A part that Beam
repeats, or computes twice, gives the same files again.

A worker writes to the output directory if it sees the directory. Otherwise the
directory must be in a bucket: the worker copies the files of its part, makes
the shard in a temporary directory, and copies the shard to the bucket. The
machine that starts the pipeline needs the bucket mounted, as for all commands.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shlex
import shutil
import socket
import tempfile
from collections.abc import Sequence

from maskdiff.data import leftovers, shards, sources
from maskdiff.data.job import Job
from maskdiff.data.tokenizer import Tokenizer
from maskdiff.errors import UserError, one_line
from maskdiff.files import paths


def make_shards(
  options: str,
  job: Job,
  tokenizer: Tokenizer,
  todo: Sequence[tuple[int, sources.Part]],
) -> None:
  """Runs a pipeline that makes the shards of parts.

  Args:
    options: flags of Beam and its runner, as on a command line.
    job: Job.
    tokenizer: Tokenizer.
    todo: numbers of the parts in the plan, and the parts.

  Raises:
    UserError: Beam is not installed, the pipeline failed, or see
      `shards.make_shard`. Finished parts are kept.
  """
  try:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as e:
    raise UserError(
      f'--beam needs Apache Beam ({one_line(e)}): '
      'pip install -r requirements-beam.txt'
    ) from e
  if not todo:
    return
  for number, _ in todo:
    _problem(job, number).unlink(missing_ok=True)
  make = functools.partial(make_part, job, tokenizer)
  try:
    with apache_beam.Pipeline(
      options=PipelineOptions(shlex.split(options))
    ) as pipeline:
      _ = (
        pipeline
        | 'parts' >> apache_beam.Create(todo)
        | 'shards' >> apache_beam.MapTuple(make)
      )
  except Exception as e:  # of many types, by runner
    raise UserError(
      f'Apache Beam failed ({one_line(e, 300)}): run again to resume'
    ) from e
  check(job, tokenizer, todo)


def check(
  job: Job, tokenizer: Tokenizer, todo: Sequence[tuple[int, sources.Part]]
) -> None:
  """Checks that workers have made the shards of parts.

  Raises:
    UserError: the first error of a worker; or files are missing.
  """
  for number, _ in todo:
    if (path := _problem(job, number)).exists():
      message = json.loads(path.read_text())
      path.unlink()
      raise UserError(message)
  missing = [
    number
    for number, _ in todo
    if not leftovers.is_done(job, number, tokenizer.vocab_size)
  ]
  if missing:
    raise UserError(
      f'{len(missing)} of {len(todo)} parts are not in {job.directory} after '
      'the pipeline, such as the one with number '
      f'{missing[0]}: check that all workers write there, and run again'
    )


def make_part(
  job: Job, tokenizer: Tokenizer, number: int, part: sources.Part
) -> None:
  """Makes the shard of a part, in a worker.

  An error that no repetition can repair is written to a file, for `check`;
  Beam would repeat the part and print its stack.

  Args:
    job: Job.
    tokenizer: Tokenizer.
    number: index of the part in the plan.
    part: the part.

  Raises:
    OSError: a file cannot be read or written; Beam repeats the part.
  """
  shared = job.state.is_dir()
  try:
    if shared:
      shards.make_shard(job, tokenizer, number, part)
    else:
      _make_copied(job, tokenizer, number, part)
  except UserError as e:
    path, content = _problem(job, number), json.dumps(str(e)).encode()
    if shared:
      path.write_bytes(content)
    else:
      with _create(path) as file:
        file.write(content)


def _problem(job: Job, number: int) -> pathlib.Path:
  """File of the error of a part."""
  return job.state / f'{number:05d}.error'


def _make_copied(
  job: Job, tokenizer: Tokenizer, number: int, part: sources.Part
) -> None:
  """Makes the shard of a part in a temporary directory; copies files."""
  if part.format == 'tfds':
    raise UserError(
      f'{part.paths[0]}: a source tfds:DIR:SPLIT and --out must be directories '
      'that all workers see'
    )
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    local = dataclasses.replace(job, directory=folder / 'out')
    local.state.mkdir(parents=True)
    copies = []
    for i, path in enumerate(part.paths):
      copy = folder / str(i) / os.path.basename(path)
      copy.parent.mkdir()
      with _open(path) as source, open(copy, 'wb') as target:
        shutil.copyfileobj(source, target, 1 << 20)
      copies.append(str(copy))
    copied = dataclasses.replace(part, paths=tuple(copies))
    shards.make_shard(local, tokenizer, number, copied)
    # The leftovers last, because a part with leftovers is done.
    for of in (
      lambda job: job.shard('train', number),
      lambda job: job.leftovers(number),
    ):
      if of(local).exists():
        with open(of(local), 'rb') as source, _create(of(job)) as target:
          shutil.copyfileobj(source, target, 1 << 20)


def _open(path):
  from apache_beam.io import filesystems

  return filesystems.FileSystems.open(
    bucket_path(path),
    compression_type=filesystems.CompressionTypes.UNCOMPRESSED,
  )


def _create(path):
  from apache_beam.io import filesystems

  return filesystems.FileSystems.create(
    bucket_path(path),
    compression_type=filesystems.CompressionTypes.UNCOMPRESSED,
  )


def bucket_path(path: str | os.PathLike) -> str:
  """Returns gs://BUCKET/x of a path in a mounted bucket.

  Raises:
    UserError: the path is not in a bucket.
  """
  try:
    return f'gs://{pathlib.Path(path).relative_to(paths.BUCKETS)}'
  except ValueError:
    raise UserError(
      f'the worker on {socket.gethostname()} does not see {path}: give '
      '--source and --out in a bucket, gs://BUCKET/..., or in a directory that '
      'all workers see'
    ) from None
