r"""Writes an English corpus of 35 MB from two Debian packages, as JSON lines.

apt-get download anarchism=15.3-3 linux-doc-6.1=6.1.192-3
python benchmarks/english_corpus.py anarchism_*.deb linux-doc-6.1_*.deb \
  --out english.jsonl
python launch/prepare.py --source english.jsonl --train_tokenizer \
  --vocab_size 4096 --row_length 128 --out rows/english

The texts are An Anarchist FAQ, connected prose, and the documentation of the
Linux kernel. Both are licensed under the GPL, and no part of them is in this
repository. snapshot.debian.org keeps versions that the mirrors have replaced.
The script needs dpkg-deb.
"""

import argparse
import hashlib
import html.parser
import io
import json
import pathlib
import subprocess
import sys
import tarfile

# The suffix of a package's pages, by the SHA-256 of its .deb file.
PACKAGES = {
  'cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948': 'html',
  'f18dfe28dcab7bdbf9185be16b9521f5841277a6a96c374a6683a648d5d5fa4f': 'rst.txt',
}


class Text(html.parser.HTMLParser):
  """Collects the text of an HTML page in `parts`, without scripts."""

  def __init__(self):
    super().__init__()
    self.parts, self.hidden = [], False

  def handle_starttag(self, tag, attrs):
    self.hidden = tag in ('script', 'style')

  def handle_endtag(self, tag):
    self.hidden = False

  def handle_data(self, data):
    if not self.hidden:
      self.parts.append(data)


def documents(package):
  """Yields the text of each page of a .deb file, in order of their names."""
  content = pathlib.Path(package).read_bytes()
  suffix = PACKAGES.get(hashlib.sha256(content).hexdigest())
  if suffix is None:
    sys.exit(f'{package}: not the version that this script names')
  archive = subprocess.run(
    ['dpkg-deb', '--fsys-tarfile', package], check=True, stdout=subprocess.PIPE
  ).stdout
  with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
    for member in sorted(tar, key=lambda m: m.name):
      if member.isfile() and member.name.endswith(f'.{suffix}'):
        page = tar.extractfile(member).read().decode(errors='replace')
        yield plain(page) if suffix == 'html' else page


def plain(page):
  """Returns the text of an HTML page, without empty lines."""
  parser = Text()
  parser.feed(page)
  lines = (line.strip() for line in ''.join(parser.parts).splitlines())
  return '\n'.join(filter(None, lines))


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('packages', nargs='+', help='.deb files')
  parser.add_argument('--out', required=True)
  args = parser.parse_args()
  with open(args.out, 'w') as f:
    for package in args.packages:
      for text in documents(package):
        f.write(json.dumps({'text': text}) + '\n')


if __name__ == '__main__':
  main()
