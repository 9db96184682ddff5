"""The Python blocks of docs/library.md, in order and in one process.

A block of text after a block of Python shows its output. The run of the page is
one that was saved before its first step.
"""

import contextlib
import io
import json
import os

import forked
import numpy as np
import pages
import pytest
import untrained_run

PAGE = pages.ROOT / 'docs' / 'library.md'
BLOCKS = [
  block
  for block in pages.blocks(PAGE.read_text())
  if block.language in ('python', 'text')
]


@pytest.fixture(scope='module')
def folder(tokenizer, tmp_path_factory):
  """Returns a folder with runs/tiny and the golden models of the tests."""
  folder = tmp_path_factory.mktemp('clone')
  run = folder / 'runs' / 'tiny'
  run.mkdir(parents=True)
  untrained_run.save(run, tokenizer)
  (folder / 'tests').symlink_to(pages.ROOT / 'tests')
  return folder


@pytest.mark.slow
def test_blocks_print_the_outputs_that_follow_them(folder, monkeypatch):
  monkeypatch.chdir(folder)
  scope, checked = {}, 0
  for block, after in zip(BLOCKS, [*BLOCKS[1:], None], strict=True):
    if block.language == 'text':
      continue
    printed = io.StringIO()
    code = compile('\n'.join(block.lines), f'{PAGE}:{block.line}', 'exec')
    with contextlib.redirect_stdout(printed):
      exec(code, scope)
    if after and after.language == 'text':
      checked += 1
      assert printed.getvalue().splitlines() == after.lines, after.line
  assert checked == sum(block.language == 'text' for block in BLOCKS) > 6


@pytest.mark.slow  # starts two scripts
def test_first_block_does_what_the_scripts_do(folder, monkeypatch):
  monkeypatch.chdir(folder)
  scope = {}
  exec('\n'.join(BLOCKS[0].lines), scope)
  (answer,) = script(
    *('launch/sample.py', '--prompt=def read_file(', '--gen_length=16'),
    *('--temperature=0.7', '--trajectory'),
    f'--out={folder / "answers.jsonl"}',
    output=folder / 'answers.jsonl',
  )
  np.testing.assert_allclose(
    answer.pop('confidence'), scope['answer'].pop('confidence'), rtol=1e-4
  )
  assert answer == scope['answer']
  line = {'prompt': 'for i in', 'choices': scope['choices'], 'answer': 0}
  data = folder / 'questions.jsonl'
  data.write_text(json.dumps(line))
  row, _ = script('launch/evaluate.py', '--task=choices', f'--data={data}')
  np.testing.assert_allclose(row['log_likelihood_nats'], scope['nats'])
  np.testing.assert_allclose(row['stderr_nats'], scope['stderr'], rtol=1e-4)


def script(name, *flags, output=None):
  """Runs a script on runs/tiny; returns the JSON lines of its output."""
  done = forked.run(
    [name, f'--workdir={os.getcwd()}/runs/tiny', *flags],
    cwd=pages.ROOT,
    env={**os.environ, 'PYTHONPATH': str(pages.ROOT)},
  )
  assert done.returncode == 0, done.stderr
  lines = output.read_text() if output else done.stdout
  return [json.loads(line) for line in lines.splitlines()]
