"""Every command of README.md and docs/ runs and prints the expected output.

The commands of a page are pasted from the top into one shell, in a copy of the
clone. The copy has the run of the README's first command, and the files that
pages assume. tests/shims.py makes the commands small. Commands that need a
cluster or a download are marked in the page (tests/pages.py) and not run, but
the scripts still parse their flags, and those of commands in docstrings.
Commands of several pages run once, before the copies are made.
"""

import ast
import concurrent.futures
import gzip
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from typing import NamedTuple

import forked
import made_answers
import pages
import published_folders
import pytest
import shims
import xla_flags
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

from maskdiff.data import tokenizer

ROOT = pages.ROOT
PUZZLES = ROOT / 'configs' / 'puzzles.py'
TEXTS = {path: path.read_text() for path in pages.PAGES}
# Folders that commands make in a clone.
MADE = ('runs', 'data', 'models', 'site', 'maskdiff.egg-info')
# Flags whose value is a file or a directory to be written.
WRITES = '--out --output --json --plot --workdir --html --local-dir'.split()
# Programs that a page may start, besides those of shims.py. Others are not on
# the path: a command that changes the machine or uses the network is marked.
PROGRAMS = 'bash cat dirname env head ls mkdir sleep tail'.split()
BLOCKS = {
  path: list(filter(pages.runs, pages.blocks(text)))
  for path, text in TEXTS.items()
}
RUN = [path for path in BLOCKS if BLOCKS[path]]

# Regular expressions of commands, and of the output of those that succeed.
SAYS = {
  r'launch/(pretrain|finetune|preferences)\.py (?!.*--profile)': (
    r'(?s)step 2/2 .*held-out'
  ),
  r'launch/pretrain\.py .*--profile': r'(?s)part of the step .*step 5/5 ',
  r'launch/rl\.py': r'(?s)step 2/2 .*held-out reward',
  r'launch/sample\.py (?!.*--help)': r'\d+ tokens, \d+ forward passes',
  r'launch/sample\.py .*--prompt "?class': r'^class ',
  # 64 separators. Atomic groups, because .* would backtrack 2^64 times.
  r'launch/sample\.py .*--show': r'(?s)\A(?>.*?={8}\n){64}',
  r'launch/chat\.py': r'^seed 3$',
  r'launch/serve\.py': r'^serving tiny at http://127\.0\.0\.1:8008/v1$',
  r'launch/evaluate\.py': r'"workdir": ',
  r'launch/evaluate\.py .*--task (choices|cloze|greedy|sudoku)': r'"accuracy',
  r'launch/evaluate\.py .*--task bound': r'"bits_per_byte": ',
  r'launch/tasks\.py .*--reward': r'right answers: reward .*errors: none',
  r'launch/harness\.py': r'\|my_questions\|',
  r'launch/prepare\.py .*--inspect': r'unigram entropy',
  r'launch/convert\.py .*--check': r'largest difference',
  r'launch/goodput\.py': r'goodput',
  r'launch/report\.py': r'report\.html',
  r'launch/plan\.py': r'GiB',
  r'launch/tpu_pod\.sh': r'gcloud compute tpus ',
}


class Ran(NamedTuple):
  """Result of a page: status and output of the shell, and its commands."""

  status: int
  output: str
  commands: list


class Shell:
  """Runs shell scripts in copies of the clone."""

  def __init__(self, home):
    self.home = home
    programs = home / 'bin'
    programs.mkdir()
    source = pathlib.Path(shims.__file__).read_text()
    self.shim = f'#!{sys.executable}\n{source}'
    for name in ('python', 'python3', 'pip'):
      write_program(programs / name, self.shim)
    for name in PROGRAMS:
      (programs / name).symlink_to(shutil.which(name))
    self.environment = {
      'PATH': str(programs),
      'HOME': str(home),
      'LANG': 'C.UTF-8',
      'JAX_PLATFORMS': 'cpu',
      'FAST': xla_flags.FAST,
      'JAX_COMPILATION_CACHE_DIR': str(home / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'HF_HUB_OFFLINE': '1',
      'TESTS': str(ROOT / 'tests'),
    }
    self.environment[forked.SERVER] = forked.address(self.environment)

  def clone(self, name):
    """Returns a new copy of the clone."""
    folder = self.home / name
    folder.mkdir()
    for path in ROOT.iterdir():
      if path.name.startswith('.') or path.name in MADE:
        continue
      if path.is_dir():
        ignored = shutil.ignore_patterns('__pycache__')
        shutil.copytree(path, folder / path.name, ignore=ignored)
      else:
        shutil.copy(path, folder)
    pod = folder / 'launch' / 'tpu_pod.sh'
    pod.rename(pod.with_suffix(''))
    write_program(pod, self.shim)
    return folder

  def run(self, script, folder, **variables):
    """Runs a shell script in a folder until a command fails."""
    log = self.home / f'{folder.name}.jsonl'
    # Background jobs must succeed too.
    script = f'{script}\nfor job in $(jobs -p); do wait "$job"; done\n'
    done = subprocess.run(
      ['bash', '-euo', 'pipefail', '-c', script, folder.name],
      cwd=folder,
      env=self.environment
      | {'PYTHONPATH': str(folder), 'COMMAND_LOG': str(log)}
      | variables,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
    )
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    output = f'{done.stdout[-3000:]}\n{done.stderr[-6000:]}'
    return Ran(done.returncode, output, list(map(json.loads, lines)))


def write_program(path, text):
  path.write_text(text)
  path.chmod(0o755)


def add_assumed_files(folder):
  """Adds the files that pages assume to a clone that has runs/tiny."""
  documents = [
    f'def f{i}(x):\n  return x * {i} + len("{"abc" * (i % 7)}")\n\n' * 40
    for i in range(120)
  ]
  web = folder / 'data' / 'web'
  web.mkdir(parents=True)
  for i in range(2):
    with gzip.open(web / f'{i}.jsonl.gz', 'wt') as f:
      f.writelines(json.dumps({'text': d}) + '\n' for d in documents[i::2])
  answer = {'prompt': 'for i in', 'answer': ' range(3):'}
  question = {'prompt': 'for i in', 'choices': [' x', ' y'], 'answer': 0}
  for name, line in {
    'texts': {'text': 'def read(self):\n  return alpha'},
    'answers': answer,
    'gaps': {'prompt': 'for', 'answer': ' i', 'suffix': ' in range(3):'},
    'questions': question,
  }.items():
    (folder / f'{name}.jsonl').write_text(json.dumps(line) + '\n')
  models = folder / 'models'
  models.mkdir()
  published_folders.make(models / 'LLaDA-8B-Base', 'llada')
  published_folders.make(models / 'Qwen2.5-0.5B', 'qwen2')
  shutil.copytree(folder / 'runs' / 'tiny', folder / 'runs' / 'web')
  made_answers.write_rows(
    folder / 'data' / 'chat',
    tokenizer.load(folder / 'runs' / 'tiny'),
    length=64,
  )
  tasks = folder / 'my_tasks'
  tasks.mkdir()
  (tasks / 'my_questions.yaml').write_text(
    'task: my_questions\noutput_type: generate_until\ndataset_path: json\n'
    'test_split: test\ndataset_kwargs:\n  data_files:\n'
    f'    test: {folder}/answers.jsonl\n'
    'doc_to_text: "{{prompt}}"\ndoc_to_target: "{{answer}}"\n'
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 32}\n'
    'metric_list: [{metric: exact_match}]\n'
  )


ROWS = """
python launch/prepare.py --source "data/web/*.jsonl.gz" \
  --tokenizer models/Qwen2.5-0.5B/tokenizer.json --out data/rows \
  --row_length 1024
"""
# Commands of several pages, as these have them.
SHARED = """
python launch/prepare.py --source maskdiff --out data/own --train_tokenizer
python tokenizer/train.py --input "data/web/*.jsonl.gz" --vocab_size 32000 \
  --out data/web.model
python launch/pretrain.py --config configs/proof.py \
  --workdir runs/autoregressive --config.objective.name=autoregressive
python launch/sample.py --workdir runs/tiny --infill "for{{1}} in range({{3}}):"
python launch/sample.py --workdir runs/tiny --prompt "class " --gen_length 64 \
  --steps 64 --show
python launch/goodput.py --workdir runs/tiny
python launch/report.py runs/tiny
"""


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
  """Returns a dict from page to its Ran; key None: the setup of all pages."""
  shell = Shell(tmp_path_factory.mktemp('pages'))
  readme = ROOT / 'README.md'
  base = shell.clone('base')
  first = BLOCKS[readme][:1]
  begun = shell.run(pages.shell(TEXTS[readme], first), base)
  assert begun.status == 0, begun.output
  add_assumed_files(base)
  # docs/evaluation.md refers to the commands of this docstring.
  puzzles = ast.get_docstring(ast.parse(PUZZLES.read_text())).split('\n\n')[1]
  given = shell.run(f'{puzzles}\n{ROWS}\n{SHARED}', base)
  assert given.status == 0, given.output
  commands = begun.commands + given.commands
  shared = shell.home / 'shared.jsonl'
  shared.write_text(''.join(json.dumps(c) + '\n' for c in commands))
  lines = {' '.join(command['words'][1:]) for command in commands}

  def run_page(number, path):
    folder = shell.home / f'page{number}'
    shutil.copytree(base, folder, symlinks=True)
    chosen = [b for b in BLOCKS[path] if path != readme or b not in first]
    script = pages.shell(TEXTS[path], chosen)
    training = r'(launch/pretrain\.py .*--workdir (\S+).*)'
    for line, made in re.findall(training, script):
      if line not in lines:
        shutil.rmtree(folder / made, ignore_errors=True)  # the page makes it
    return shell.run(script, folder, SHARED=str(shared))

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    done = dict(zip(RUN, pool.map(run_page, range(len(RUN)), RUN), strict=True))
  return {None: Ran(0, '', commands)} | done


def name_of(path):
  return str(path.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize('path', RUN, ids=name_of)
def test_commands_of_a_page_run(ran, path):
  page = ran[path]
  for command in page.commands:
    words = ' '.join(command['words'])
    assert command['status'] == 0, f'{words}\n{command["stderr"][-4000:]}'
    if command['run']:
      assert 'Traceback' not in command['stderr'], words
      printed = command['stdout'] + command['stderr']
      for pattern, says in SAYS.items():
        # Only process 0 prints.
        if command['process'] == '0' and re.search(pattern, words):
          assert re.search(says, printed, re.M), f'{words}\n{printed[-4000:]}'
  assert page.status == 0, page.output
  for command in page.commands:
    print(f'{command["seconds"]:.1f} s', *command['words'])


@pytest.mark.slow
def test_every_rule_and_expectation_is_used(ran):
  commands = [c for page in ran.values() for c in page.commands]
  assert {r for c in commands for r in c['rules']} == set(shims.RULES)
  words = [' '.join(c['words']) for c in commands]
  for pattern in SAYS:
    assert any(re.search(pattern, w) for w in words), pattern
  shared = [c['words'] for c in commands if c.get('shared')]
  for command in pages.simple_commands(SHARED):
    assert shared.count(command) > 1, command


def test_excluded_pages_have_their_own_test():
  for folder, test in pages.FOLLOWED.items():
    if (ROOT / 'docs' / folder).exists():
      assert f"'{folder}'" in test.read_text()


def test_bash_blocks_are_valid_and_run_or_marked():
  marks, number = set(), 0
  for path, text in TEXTS.items():
    for block in pages.blocks(text):
      assert block.language, f'{name_of(path)}:{block.line} has no language'
      if block.language == 'bash':
        number += 1
        assert set(block.marks) <= set(pages.MARKS), (path, block.line)
        marks |= set(block.marks)
        subprocess.run(
          ['bash', '-n'], input='\n'.join(block.lines), text=True, check=True
        )
    indented = re.search(r'(?m)^(?:#.*|)\n {4,}\$? ?(python|pip) .*$', text)
    assert not indented, f'{name_of(path)}: {indented[0]!r} is not in a block'
  assert number > 15 and marks == set(pages.MARKS)


def test_git_ignores_files_that_commands_write():
  """launch/tpu_pod.sh copies files that git does not ignore to every host."""
  if not (ROOT / '.git').exists() or not shutil.which('git'):
    pytest.skip('not a git checkout')
  written = set()
  for where, words in pages.all_commands():
    for flag, value in zip(words, words[1:], strict=False):
      if flag in WRITES and where.startswith(tuple(map(name_of, TEXTS))):
        written.add(value)
  for block in sum(map(pages.blocks, TEXTS.values()), []):
    if block.language == 'bash' and 'cluster' not in block.marks:
      written |= set(re.findall(r'(?m) >+ ?(\S+)$', '\n'.join(block.lines)))
  # Not absolute paths, and not names in capitals that the user replaces.
  written = {w for w in written if not re.match(r'/|gs:|[A-Z]+$', w)}
  assert {'questions.jsonl', 'plan.json', 'data/web.model'} <= written
  ignored = subprocess.run(
    ['git', 'check-ignore', '--stdin'],
    cwd=ROOT,
    input='\n'.join(written),
    stdout=subprocess.PIPE,
    text=True,
  )
  assert written == set(ignored.stdout.splitlines())


@pytest.fixture(scope='module')
def parsed(tmp_path_factory):
  """Returns [(where, script, arguments, error or '')] of all commands."""
  folder = tmp_path_factory.mktemp('parsed')
  for name in ('launch', 'configs', 'benchmarks', 'tokenizer'):
    (folder / name).symlink_to(ROOT / name)
  (folder / 'models').mkdir()
  published_folders.make(folder / 'models' / 'Qwen2.5-0.5B', 'qwen2')
  (folder / 'DIR').symlink_to(folder / 'models' / 'Qwen2.5-0.5B')
  found = {}
  for command in pages.all_commands():
    for script, arguments in pages.scripts(command):
      stand_in = ['configs/tiny.py' if a == 'FILE' else a for a in arguments]
      key = json.dumps([script, stand_in])
      found.setdefault(key, []).append(command.where)
  done = subprocess.run(
    [sys.executable, str(ROOT / 'tests' / 'parse_flags.py')],
    input=f'[{",".join(found)}]',
    cwd=folder,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  problems = json.loads(done.stdout)
  return [
    (where, *json.loads(key), problem)
    for (key, where), problem in zip(found.items(), problems, strict=True)
  ]


def test_flags_and_config_keys_of_commands_exist(parsed):
  problems = [p for p in parsed if p[-1]]
  assert not problems, json.dumps(problems, indent=1)
  assert len(parsed) > 80
  parsed_scripts = {script for _, script, _, _ in parsed}
  known = {
    f'launch/{path.name}'
    for path in (ROOT / 'launch').glob('*.py')
    if 'run_script(' in path.read_text()
  }
  assert not known - parsed_scripts


def requirements(arguments):
  """Returns the requirements of a `pip install`, also those in -r files.

  Raises:
    InvalidRequirement: a word is not a requirement.
  """
  words, found = list(arguments), []
  while words:
    word = words.pop(0)
    if word == '-r':
      lines = (ROOT / words.pop(0)).read_text().splitlines()
      for line in filter(None, (x.partition('#')[0].strip() for x in lines)):
        found += requirements(
          line.split(maxsplit=1) if line[0] == '-' else [line]
        )
    elif word in ('-e', '--editable'):
      folder, _, extras = words.pop(0).partition('[')
      assert (ROOT / folder / 'pyproject.toml').exists()
      found.append(Requirement(f'maskdiff[{extras}' if extras else 'maskdiff'))
    elif word in ('--python', '--target'):
      words.pop(0)
    elif not word.startswith('-'):
      found.append(Requirement(word))
  return found


def test_install_commands_fit_the_installed_versions():
  installed = {canonical(d.name): d for d in importlib.metadata.distributions()}
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  found = []
  for where, words in pages.all_commands():
    if 'install' in words and 'pip' in words[: words.index('install')]:
      for r in requirements(words[words.index('install') + 1 :]):
        found.append(r.name)
        extras = set(map(canonical, r.extras))
        if r.name == 'maskdiff':
          assert extras <= set(project['optional-dependencies']), where
        elif distribution := installed.get(canonical(r.name)):
          assert distribution.version in r.specifier, (where, str(r))
          offered = distribution.metadata.get_all('Provides-Extra') or []
          assert extras <= set(map(canonical, offered)), (where, str(r))
  assert {'jax', 'lm-eval', 'maskdiff', 'pytest', 'pyarrow'} <= set(found)
