"""Local paths: of files in a mounted bucket, and of files within a folder."""

import os
import pathlib

from maskdiff.errors import UserError

# Vertex AI mounts buckets in this folder: gs://BUCKET/x is /gcs/BUCKET/x.
BUCKETS = pathlib.Path('/gcs')


def local_path(path: str | pathlib.Path) -> pathlib.Path:
  """Returns a local path; gs://BUCKET/x becomes a path in the mounted bucket.

  ArrayRecord reads and writes local files only, so a bucket must be mounted by
  gcsfuse.

  Raises:
    UserError: the bucket is not mounted, or the path is another remote path.
  """
  text = str(path)
  if '://' not in text:
    return pathlib.Path(os.path.expanduser(text))
  scheme, _, rest = text.partition('://')
  bucket = rest.partition('/')[0]
  if scheme == 'gs' and bucket and (BUCKETS / bucket).is_dir():
    return BUCKETS / rest
  mount = (
    f'mount it, `mkdir -p {BUCKETS}/{bucket} && gcsfuse --implicit-dirs '
    f'{bucket} {BUCKETS}/{bucket}`, and use the same path again'
    if scheme == 'gs'
    else 'mount it and give the mount point'
  )
  raise UserError(f'{text} is not a local path: {mount}')


def inside(folder, name):
  """Returns the path of a file that a manifest or an index names.

  Args:
    folder: the only folder whose files may be opened.
    name: path relative to the folder, from a file that is not trusted.

  Raises:
    UserError: the name is not a text, is absolute or leaves the folder, also
      through symbolic links.
  """
  path = None
  if isinstance(name, str) and name and '\0' not in name:
    path = os.path.join(folder, name)
    root = os.path.realpath(folder)
    if (
      os.path.isabs(name)
      or os.path.commonpath([root, os.path.realpath(path)]) != root
    ):
      path = None
  if path is None:
    raise UserError(
      f'{os.fspath(folder)!r} names the file {name!r}, which is not a file of '
      'this folder'
    )
  return path
