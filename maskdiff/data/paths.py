"""Local paths of files, also of files in a mounted bucket."""

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
