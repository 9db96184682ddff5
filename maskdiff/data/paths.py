"""Where files are: on this machine, or in a bucket that is mounted on it."""

import os
import pathlib

from maskdiff.errors import UserError

# Where Vertex AI mounts buckets: gs://BUCKET/x is /gcs/BUCKET/x.
BUCKETS = pathlib.Path('/gcs')


def local_path(path: str | pathlib.Path) -> pathlib.Path:
  """The path on this machine; gs://BUCKET/x is looked for in a mount.

  ArrayRecord reads and writes files. Buckets are mounted by gcsfuse.

  Raises:
    UserError: a bucket that is not mounted, or another remote path.
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
