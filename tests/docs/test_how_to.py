"""The changes of docs/how_to/ work when a reader follows the pages.

Each page is followed from top to bottom in a copy of the code: git applies the
diffs, files are written, and commands run, trainings on a narrower model. Tests
then check the claims.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import forked
import numpy as np
import pages
import pytest
import xla_flags

# Each page trains or tests in a copy of the code.
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ROOT / 'docs' / 'how_to'
COPIED = ('maskdiff', 'launch', 'configs', 'tokenizer', 'tests')
MOST_LINES = {'add_a_stage': 45}  # of a change; 20 on the other pages
MASK = '░'
# Added to trainings: a step takes a small part of the time, and learns.
NARROW = (
  '--config.model.embed=64 --config.model.layers=1 --config.model.heads=1 '
  '--config.model.kv_heads=1 --config.model.mlp=64 --config.eval.batch=16'
)
# Replaces python: scripts are forked from the server of the test (forked.py).
PYTHON = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
if words[0] == '-m':
  os.execv({sys.executable!r}, [{sys.executable!r}, *words])
if words[0] == 'launch/pretrain.py':
  words += {NARROW.split()}
sys.path.append({str(ROOT / 'tests')!r})
import forked
sys.exit(forked.start(words).wait())
"""


class Copy:
  """A copy of the code with the changes of a page.

  Attributes:
    path: root of the copy.
    printed: outputs of the blocks of commands, in order.
  """

  def __init__(self, path, page):
    self.path, self.printed = path, []
    programs = path.parent / f'{path.name}_bin'
    programs.mkdir()
    (programs / 'python').write_text(PYTHON)
    (programs / 'python').chmod(0o755)
    self.environment = {
      **os.environ,
      'PATH': f'{programs}:{os.environ["PATH"]}',
      'PYTHONPATH': str(path),
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': xla_flags.FAST,  # a single device, as a laptop has
      'PYTEST_ADDOPTS': '-n0',  # workers would only import JAX again
      # Otherwise git finds a repository above the copy.
      'GIT_CEILING_DIRECTORIES': str(path.parent),
    }
    self.environment[forked.SERVER] = forked.address(self.environment)
    for name in COPIED:
      shutil.copytree(
        ROOT / name, path / name, ignore=shutil.ignore_patterns('__pycache__')
      )
    shutil.copy(ROOT / 'pyproject.toml', path)
    for language, title, text in blocks(page):
      if language == 'diff':
        self.run(['git', 'apply', '-'], text)
      elif title:
        (path / title).write_text(text)
      elif language == 'bash':
        self.printed.append(self.run(['bash', '-euc', text]))

  def run(self, command, text=None):
    """Runs a command as a user would, and returns what it printed."""
    result = subprocess.run(
      command,
      input=text,
      cwd=self.path,
      env=self.environment,
      capture_output=True,
      text=True,
    )
    assert not result.returncode, f'{result.stdout}\n{result.stderr}'
    return result.stdout

  def python(self, code):
    """Runs code with the package of the copy; returns the JSON it printed."""
    return json.loads(self.run(['python', '-c', code]).splitlines()[-1])


def blocks(page):
  """Returns the fenced blocks of a page: (language, title, text)."""
  found = pages.blocks((PAGES / f'{page}.md').read_text())
  return [(b.language, b.title, '\n'.join(b.lines) + '\n') for b in found]


def passed(printed):
  """Returns the number of passed tests in the output of pytest."""
  return int(re.search(r'(\d+) passed', printed)[1])


def follow(page, tmp_path_factory):
  return Copy(tmp_path_factory.mktemp(page), page)


@pytest.mark.parametrize(
  'page', sorted(PAGES.glob('*.md')), ids=lambda p: p.stem
)
def test_a_change_is_short(page):
  written = []
  for language, title, text in blocks(page.stem):
    lines = text.splitlines()
    if language == 'diff':
      added = [x[1:] for x in lines if re.match(r'\+(?!\+\+ )', x)]
      written += [x for x in added if x.strip()]
    elif title:
      written += [x for x in lines if x.strip()]
  assert 5 < len(written) < MOST_LINES.get(page.stem, 20)


# A dataset


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
  return follow('add_a_dataset', tmp_path_factory)


def test_rows_hold_the_text_of_the_new_format(dataset):
  assert '2 + 0 documents' in dataset.printed[-1]
  rows = dataset.python(
    """
import json
from maskdiff.data import records, row_reader, tokenizer
manifest = records.read_manifest('data/snippets')
source = row_reader.RowSource('data/snippets', manifest, 'train')
tok = tokenizer.load('data/snippets')
print(json.dumps([tok.decode(source[i]) for i in range(len(source))]))
"""
  )
  text = ''.join(rows)
  assert text.startswith('def add(a, b):\n  return a + b\n')


def test_new_format_is_read_completely_and_bad_bytes_are_skipped(dataset):
  """A file large enough to be split, with quoted lines and one bad document."""
  count, parts, first, skipped, error = dataset.python(
    r"""
import gzip, json
from maskdiff.data import sources
from maskdiff.errors import UserError
row = b'1,"' + b'a,""b""\n' * 20000 + b'"\n'
with open('large.csv', 'wb') as f:
  f.write(b'\xef\xbb\xbfid,text\n' + row * 60 + b'2,\xff\n3,last\n')
with gzip.open('small.csv.gz', 'wb') as f:
  f.write(b'id,text\n1,packed\n')
plan = sources.plan(['large.csv', 'small.csv.gz'])
texts = [text for part in plan.parts for text in sources.read(part)]
skipped = [t.reason for t in texts if not isinstance(t, str)]
texts = [t for t in texts if isinstance(t, str)]
try:
  list(sources.read(sources.plan(['large.csv'], text_key='body').parts[0]))
except UserError as e:
  error = str(e)
print(json.dumps([len(texts), len(plan.parts), texts[0], skipped, error]))
"""
  )
  assert (count, parts) == (62, 2)
  assert first == 'a,"b"\n' * 20000
  assert skipped == ['not Unicode']
  assert "no field 'body' among 'id', 'text'" in error


# An objective


@pytest.fixture(scope='module')
def objective(tmp_path_factory):
  return follow('add_an_objective', tmp_path_factory)


def metrics(copy, run):
  lines = (copy.path / run / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_new_objective_learns_and_fills_a_gap(objective):
  rows = metrics(objective, 'runs/spans')
  bounds = {
    r['step']: r['eval/loss_nats_per_token']
    for r in rows
    if 'eval/loss_nats_per_token' in r
  }
  assert bounds[40] < 7.5 < np.log(4096) < bounds[0]
  config = json.loads((objective.path / 'runs/spans/config.json').read_text())
  assert config['objective']['name'] == 'masked_spans'
  assert 'def ' in objective.printed[0] and '(x):' in objective.printed[0]


def test_new_objective_masks_runs_with_the_weights_of_a_bound(objective):
  """Weights average to 1 per token; the last run may be shorter."""
  masked, weights, ratio = map(
    np.array,
    objective.python(
      """
import dataclasses, json, jax, jax.numpy as jnp
from maskdiff import config
from maskdiff.data.rows import Rows
from maskdiff.objectives import table
from maskdiff.training import step
c = config.default()
c.objective.name = 'masked_spans'
c = step.step_config(c).objective
tokens = jax.random.randint(jax.random.key(1), (512, 30), 5, 4096)
canvas = table.make_canvas(
  c, Rows(tokens), jnp.arange(512), jax.random.key(0), 512)
assert (jnp.where(canvas.weights > 0, c.mask_id, tokens) == canvas.inputs).all()
print(json.dumps([x.tolist() for x in (
  canvas.inputs == c.mask_id, canvas.weights, canvas.mask_ratio[:, 0])]))
"""
    ),
  )
  runs = [masked[:, i : i + 4] for i in range(0, 30, 4)]
  assert all((run == run[:, :1]).all() for run in runs)
  first = np.stack([run[:, 0] for run in runs], axis=1)
  assert ((first[:, :-1] != first[:, 1:]).mean() > 0.25).all()
  error = np.sqrt(ratio * (1 - ratio) / len(runs))
  assert np.abs(first.mean(axis=1) - ratio).max() < 5 * error.max()
  np.testing.assert_allclose(weights, masked / ratio[:, None], rtol=1e-5)


def test_tests_of_objectives_include_the_new_one(objective):
  assert passed(objective.printed[-1]) >= 3


# A stage


@pytest.fixture(scope='module')
def stage(tmp_path_factory):
  return follow('add_a_stage', tmp_path_factory)


def test_new_stage_reads_both_datasets_and_saves_its_position(stage):
  shares = {
    row['step']: row['train/fine_share']
    for row in metrics(stage, 'runs/anneal')
    if 'train/fine_share' in row
  }
  assert shares == {4: 0, 8: 0.5, 12: 1}
  run = stage.path / 'runs' / 'anneal'
  meta = json.loads((run / 'checkpoints/12/meta/metadata').read_text())
  assert meta['position'] == {'coarse': 6 * 8, 'fine': 6 * 8}
  assert meta['stage'] == 'annealing' and 'fine' in meta['identity']
  assert 'Share of fine data' in (run / 'report.html').read_text()


# A rule


@pytest.fixture(scope='module')
def rule(tmp_path_factory):
  return follow('add_a_remasking_rule', tmp_path_factory)


def test_new_rule_commits_the_most_confident_in_its_window(rule):
  """Compared with a loop over rows and slots."""
  random = np.random.default_rng(0)
  confidence = random.random((200, 24)).astype(np.float32)
  masked = random.random((200, 24)) < 0.7
  budget = random.integers(1, 14, 200)
  np.savez(rule.path / 'case.npz', c=confidence, m=masked, b=budget)
  keep = rule.python(
    """
import json, numpy as np
from maskdiff.sampling import remasking
case = np.load('case.npz')
keep = remasking.RULES['leftmost'](case['c'], case['m'], case['b'], None)
print(json.dumps(keep.tolist()))
"""
  )
  for row in range(200):
    window = np.flatnonzero(masked[row])[: max(8, budget[row])]
    best = sorted(window, key=lambda slot: -confidence[row, slot])
    expected = set(best[: budget[row]])
    assert set(np.flatnonzero(keep[row])) == expected


def test_new_rule_fills_text_from_the_left(rule):
  """2 of 32 slots per step; step n reaches 8 masked slots, 2n + 6 in total."""
  *texts, _ = rule.printed[0].split('\n========\n')
  assert len(texts) == 17
  for n, text in enumerate(texts):
    assert text.count(MASK) == 32 - 2 * n
    assert text.endswith(MASK * (26 - 2 * n))


def test_tests_of_rules_include_the_new_one(rule):
  assert passed(rule.printed[-1]) >= 2


# A sampler setting


@pytest.fixture(scope='module')
def setting(tmp_path_factory):
  return follow('add_a_sampler_setting', tmp_path_factory)


def test_new_setting_touches_at_most_three_files():
  page = blocks('add_a_sampler_setting')
  diffs = [text for language, _, text in page if language == 'diff']
  files = re.findall(r'^\+\+\+ b/(.*)$', '\n'.join(diffs), re.M)
  assert 0 < len(set(files)) <= 3
  assert not [title for _, title, _ in page if title]


def test_new_setting_is_a_flag_and_a_key(setting):
  """The highest value leaves one token, so the text is the greedy one."""
  sample = ['python', 'launch/sample.py', '--workdir=runs/itself']
  sample += ['--prompt=def read(', '--gen_length=16', '--temperature=0']
  assert setting.printed[0].endswith(setting.run(sample))
  page = (setting.path / 'min_p.html').read_text()
  assert 'min_p' in page
  (error,) = setting.python(
    """
import json
from maskdiff import config
c = config.default()
c.sample.min_p = 0.5
try:
  config.validate(c)
except ValueError as e:
  print(json.dumps([str(e)]))
"""
  )
  assert 'config.sample.min_p=0.5' in error and 'temperature' in error


def test_new_setting_draws_among_the_probable_tokens(setting):
  """Relative to the highest probability, after the temperature; per row."""
  p, temperature, min_p = np.array([0.4, 0.3, 0.2, 0.1]), 0.5, 0.3
  counts, all_tokens = setting.python(
    f"""
import json, jax, jax.numpy as jnp
from maskdiff.sampling import candidates
logits = jnp.broadcast_to(jnp.log(jnp.array({p.tolist()})), (2, 20000, 4))
keys = jax.random.split(jax.random.key(0), 2)
off = jnp.array([0, 0]), jnp.array([1.0, 1.0])
token = candidates.draw(
  logits, jnp.full(2, {temperature}), *off, keys, jnp.array([{min_p}, 0.0]))
print(json.dumps([jnp.bincount(x, length=4).tolist() for x in token]))
"""
  )
  law = p ** (1 / temperature)
  law[law < min_p * law.max()] = 0
  law /= law.sum()
  assert (
    np.flatnonzero(counts).tolist() == np.flatnonzero(law).tolist() == [0, 1]
  )
  np.testing.assert_allclose(np.array(counts) / 20000, law, atol=0.02)
  assert not np.array(counts)[law == 0].any()
  assert min(all_tokens) > 0  # the second row has min_p=0


def test_tests_of_settings_include_the_new_one(setting):
  assert passed(setting.printed[-1]) == 1


# A size


@pytest.fixture(scope='module')
def size(tmp_path_factory):
  return follow('add_a_model_size', tmp_path_factory)


def test_new_size_has_the_parameter_count_of_the_page(size):
  page = (PAGES / 'add_a_model_size.md').read_text()
  layers, embed, mlp, vocab = 12, 640, 1664, 4096
  inner = layers * (4 * embed**2 + 3 * embed * mlp + 2 * embed) + embed
  expected = f'({inner + vocab * embed}, {inner})'
  assert size.printed[0].strip() == expected
  assert f'prints `{expected}`' in page
  assert passed(size.printed[-1]) >= 2
