"""Programs that replace python and pip while test_commands.py runs a page.

Each shim runs the real program with less work if one of RULES matches the
command, and unchanged otherwise. Each command is logged as a line of JSON in
the file $COMMAND_LOG. A command that is in the log $SHARED is not run: its
files are in the clone, and the shim prints what it printed.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import NamedTuple

TIMEOUT_S = 600


class Rule(NamedTuple):
  """How to change some commands.

  pattern: regular expression of the command, words joined by spaces.
  add: words to append; they override those of the page.
  needs: module without which the command is not run.
  run: False if the command is never run.
  """

  pattern: str
  add: str = ''
  needs: str = ''
  run: bool = True


# All rules that match apply, in this order.
RULES = {
  'two steps': Rule(
    r'launch/(pretrain|finetune|preferences)\.py',
    '--config.train.steps=2 --config.train.batch=8 '
    '--config.optimizer.warmup_steps=1 --config.optimizer.decay_steps=1 '
    '--config.eval.batch=8 --config.eval.batches=1 '
    '--config.sample.gen_length=8 --config.sample.steps=8',
  ),
  'five steps': Rule(
    r'launch/pretrain\.py .*--profile', '--config.train.steps=5'
  ),
  # Runs with other objectives sample, and those whose samples a page shows.
  'no samples': Rule(
    r'launch/pretrain\.py (?!.*(objective\.name|proof\.py|runs/tiny))',
    '--config.sample.prompts=()',
  ),
  # A program is compiled for every length of the cache.
  'short answers': Rule(r'launch/sample\.py .*--cache', '--gen_length=16'),
  'one round': Rule(
    r'launch/rl\.py',
    '--config.train.steps=2 --config.train.batch=8 '
    '--config.optimizer.warmup_steps=1 --config.optimizer.decay_steps=1 '
    '--config.policy.prompts=2 '
    '--config.policy.group=4 --config.policy.inner_steps=2 '
    '--config.eval.answers=2 --config.policy.reward_workers=1',
  ),
  'narrow': Rule(
    r'launch/pretrain\.py (?!.*published\.py)',
    '--config.model.embed=16 --config.model.layers=1 --config.model.heads=2 '
    '--config.model.kv_heads=2 --config.model.head_dim=8 '
    '--config.model.mlp=16',
  ),
  'one small recipe': Rule(
    r'benchmarks/recipes\.py',
    '--recipes uniform --seeds 0 --set train.steps=2 --set train.batch=8 '
    '--set optimizer.warmup_steps=1 --set optimizer.decay_steps=1 '
    '--set eval.batch=8 --set eval.batches=2 --set sample.gen_length=8 '
    '--set sample.steps=8 --set model.embed=16 --set model.layers=1 '
    '--set model.heads=2 --set model.kv_heads=2 --set model.head_dim=8 '
    '--set model.mlp=16',
  ),
  # Rows of these configs are long, and fill one device.
  'few rows': Rule(
    r'launch/pretrain\.py .*configs/(150m|1b|published)\.py',
    '--config.train.batch=2 --config.train.microbatches=1 '
    '--config.eval.batch=2',
  ),
  'short rows': Rule(
    r'launch/pretrain\.py .*configs/150m\.py', '--config.data.length=128'
  ),
  # With a quarter held out, little text suffices.
  'two workers': Rule(
    r'launch/prepare\.py .*--out', '--workers=2 --heldout_fraction=0.25'
  ),
  'few pieces': Rule(
    r'tokenizer/train\.py .*--vocab_size \d{4,}', '--vocab_size=320'
  ),
  'few puzzles': Rule(
    r'launch/(puzzles|instructions)\.py .*--num \d{4,}', '--num=400'
  ),
  'few lines': Rule(r'launch/evaluate\.py', '--num=2 --samples=4 --strata=2'),
  # The page sends three requests.
  'three requests': Rule(r'launch/serve\.py', '--max_requests=3'),
  'few questions': Rule(r'launch/harness\.py', '--limit=1', needs='lm_eval'),
  # A tiny model, compiled for the TPU. The time to compile grows with the
  # tokens of a chip, so one chip gets fewer rows than a pod needs.
  'small plan': Rule(
    r'launch/plan\.py',
    '--config.model.vocab_size=256 --config.model.embed=128 '
    '--config.model.layers=1 --config.model.heads=1 '
    '--config.model.kv_heads=1 --config.model.head_dim=128 '
    '--config.model.mlp=128 --config.tokens.mask_id=4 '
    '--config.tokens.bos_id=1 --config.tokens.eos_id=2 '
    '--config.data.length=128 --config.train.batch=128 '
    '--config.train.microbatches=1 --config.eval.batch=128 '
    '--config.objective.loss_chunk_tokens=128',
    needs='libtpu',
  ),
  'small round': Rule(
    r'launch/plan\.py .*configs/rl',
    '--config.policy.prompts=4 --config.policy.group=4 '
    '--config.sample.gen_length=32 --config.sample.steps=32',
  ),
  'plan of one chip': Rule(
    r'launch/plan\.py .*:1x1', '--config.train.batch=2 --config.eval.batch=2'
  ),
  'small sweep': Rule(
    r'launch/plan\.py .*--sweep',
    '--sweep_rows=2 --sweep_remat=full --sweep_mesh=fsdp=-1',
  ),
  # The environment of the tests replaces a fresh one; another test compares it
  # with the packages that the pages install.
  'no environment': Rule(r'python3? -m venv', run=False),
  'no installation': Rule(r'pip install', run=False),
  'one file of tests': Rule(
    r'python -m pytest', '--collect-only tests/objectives/test_schedule.py'
  ),
  'dry run': Rule(r'launch/tpu_pod\.sh'),
}


def start(program):
  """Starts a program with both outputs captured.

  Scripts are forked from the server of the test (forked.py), except for
  launch/plan.py: libtpu reads its settings when JAX is imported.
  """
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  # A page may set XLA_FLAGS. The last value of a flag counts.
  flags = os.environ['FAST'], os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = ' '.join(flags)
  script = program[1] if program[0] == sys.executable else ''
  if script.endswith('.py') and script != 'launch/plan.py':
    sys.path.append(os.environ['TESTS'])
    import forked

    return forked.start(program[1:], stdin=0, **pipes)
  return subprocess.Popen(program, text=True, **pipes)


def shared(words):
  """Returns the line of a command in $SHARED, or None."""
  path = os.environ.get('SHARED')
  if not path or 'XLA_FLAGS' in os.environ:
    return None
  lines = map(json.loads, pathlib.Path(path).read_text().splitlines())
  return next((line for line in lines if line['words'] == words), None)


def main():
  name = os.path.basename(sys.argv[0])
  here = pathlib.Path(sys.argv[0]).resolve().parent
  if name == 'tpu_pod.sh':
    words = ['launch/tpu_pod.sh', *sys.argv[1:]]
    program = ['bash', str(here / 'tpu_pod'), sys.argv[1], '--dry_run']
    program += sys.argv[2:]
  else:
    words = [name, *sys.argv[1:]]
    program = [sys.executable, *sys.argv[1:]]
    if name == 'pip':
      program[1:1] = ['-m', 'pip']
  rules = [r for r in RULES if re.search(RULES[r].pattern, ' '.join(words))]
  run = True
  for rule in (RULES[r] for r in rules):
    program += rule.add.split()
    installed = not rule.needs or importlib.util.find_spec(rule.needs)
    run = run and rule.run and bool(installed)
  if words[1:3] == ['-m', 'venv']:
    activate = pathlib.Path(words[3], 'bin', 'activate')
    activate.parent.mkdir(parents=True)
    activate.write_text('')
  begin = time.time()
  log = {'words': words, 'rules': rules, 'run': run, 'status': 0}
  log['process'] = os.environ.get('JAX_PROCESS_ID', '0')
  if earlier := shared(words):
    log = earlier | {'shared': True}
  elif run:
    process = start(program)
    try:
      outputs = process.communicate(TIMEOUT_S)
    except subprocess.TimeoutExpired:
      process.kill()
      outputs = process.communicate()
    log['status'] = process.returncode
    log['stdout'], log['stderr'] = outputs
  sys.stdout.write(log.get('stdout', ''))
  sys.stderr.write(log.get('stderr', ''))
  log['seconds'] = time.time() - begin
  with open(os.environ['COMMAND_LOG'], 'a') as f:
    f.write(json.dumps(log) + '\n')
  sys.exit(log['status'])


if __name__ == '__main__':
  main()
