"""Permissions of converted files: at most those of the files they come from."""

import os

from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.files import folder as folder_lib
from maskdiff.interop import safetensors


def copy_tokenizer(tokenizer, target):
  """Copies the files of a tokenizer, with at most their permissions.

  Args:
    tokenizer: data.tokenizer.Tokenizer.
    target: an existing folder.

  Raises:
    UserError: a file cannot be read or written.
  """
  inodes = lambda: {
    (name, os.stat(os.path.join(target, name)).st_ino)
    for name in folder_lib.file_names(target)
  }
  with safetensors.writing(target):
    before = inodes()
    tokenizer_lib.copy(tokenizer, target)
    for name, _ in inodes() - before:
      source = os.path.join(os.path.dirname(tokenizer.path), name)
      if not os.path.exists(source):  # the copy has another name
        source = tokenizer.path
      path = os.path.join(target, name)
      os.chmod(path, os.stat(path).st_mode & os.stat(source).st_mode & 0o666)


def narrow(folder, sources):
  """Takes permissions that the sources lack from the weights of a folder.

  Args:
    folder: folder with safetensors files.
    sources: paths of the files from which the weights come.

  Raises:
    UserError: the permissions of a file cannot be read or changed.
  """
  with safetensors.writing(folder):
    allowed = 0o666
    for source in sources:
      allowed &= os.stat(source).st_mode
    for name in folder_lib.file_names(folder):
      if name.endswith('.safetensors'):
        path = os.path.join(folder, name)
        os.chmod(path, os.stat(path).st_mode & allowed)
