"""Compares a run with random faults to an undisturbed run, bit for bit.

python benchmarks/soak.py [--steps 1000] [--batch 8] [--seed 0]

Trains configs/tiny.py twice, with NaN losses at the same steps. One run has a
random fault every 20 to 50 steps: SIGKILL, SIGTERM, SIGKILL followed by a
flipped bit in the newest checkpoint, some seconds in which all its writes to
files fail, as on a full disk, or a second process with the same command, which
must be refused while the first continues. Prints the number of faults and the
goodput of both runs. The exit status is 1 unless the parameters are equal bit
for bit.
"""

import argparse
import collections
import contextlib
import json
import pathlib
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import orbax.checkpoint as ocp

from maskdiff.checkpoints import checkpoint
from maskdiff.errors import STATUS_AGAIN
from maskdiff.monitoring import ledger, metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent


def start(workdir, args, nan_steps):
  """Starts a training process."""
  return subprocess.Popen(
    [
      *(sys.executable, str(ROOT / 'tests' / 'faulty_pretrain.py')),
      json.dumps({'nan_steps': nan_steps}),
      *('--config', 'configs/tiny.py', '--workdir', str(workdir)),
      *(
        f'--config.{key}={value}'
        for key, value in {
          'train.steps': args.steps,
          'train.batch': args.batch,
          'train.log_every_steps': 5,
          'checkpoint.every_steps': 10,
          'checkpoint.keep': 3,
          'checkpoint.max_failures': 100,
          'eval.every_steps': 250,
          'eval.batches': 2,
          'sample.prompts': '()',
          'optimizer.warmup_steps': 20,
          'optimizer.decay_steps': 100,
        }.items()
      ),
    ],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=(workdir.parent / f'{workdir.name}.log').open('a'),
  )


def last_step(workdir):
  """Returns the last step that has a row of metrics."""
  rows = metrics.read(workdir / 'metrics.jsonl')
  return max([row['step'] for row in rows], default=0)


def flip_a_bit(workdir):
  """Flips a bit in the newest checkpoint, if there is an older one.

  Returns:
    Whether a bit was flipped.
  """
  steps = [p for p in (workdir / 'checkpoints').glob('*') if p.name.isdecimal()]
  if len(steps) < 2:  # the run needs an older checkpoint to resume from
    return False
  newest = max(steps, key=lambda p: int(p.name))
  files = [p for p in (newest / 'params').rglob('*') if p.is_file()]
  path = max(files, key=lambda p: p.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  return True


def fill_disk(process, dice):
  """Makes all writes of a running process to files fail for some seconds."""
  limit = resource.RLIMIT_FSIZE
  with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
    soft, hard = resource.prlimit(process.pid, limit)
    resource.prlimit(process.pid, limit, (0, hard))
    time.sleep(dice.uniform(1, 4))
    resource.prlimit(process.pid, limit, (soft, hard))


def disturbed(workdir, args, nan_steps, dice):
  """Runs a training with faults to its end; returns the counts of faults."""
  faults = collections.Counter()
  process, target = None, 0
  while True:
    process = process or start(workdir, args, nan_steps)
    target = max(target, last_step(workdir)) + dice.randint(20, 50)
    while process.poll() is None and last_step(workdir) < target:
      time.sleep(0.05)
    time.sleep(dice.uniform(0, 0.5))
    fault = dice.choice(
      ['kill', 'sigterm', 'flipped bit', 'full disk', 'second process']
    )
    if fault == 'full disk' and target > args.steps - 100:
      fault = 'kill'  # the last checkpoint would not be saved
    if process.poll() is None and fault == 'full disk':
      fill_disk(process, dice)
      faults[fault] += 1
      print(f'step {last_step(workdir)}: {fault}', file=sys.stderr, flush=True)
      continue
    if process.poll() is None:
      if fault == 'second process':
        refused = start(workdir, args, nan_steps).wait() == STATUS_AGAIN
        if not refused and process.poll() is None:
          sys.exit('a second process was not refused; see the log')
        faults[fault] += refused
        continue
      process.send_signal(
        signal.SIGTERM if fault == 'sigterm' else signal.SIGKILL
      )
      process.wait()
      if fault == 'flipped bit' and not flip_a_bit(workdir):
        fault = 'kill'
      faults[fault] += 1
      print(f'step {last_step(workdir)}: {fault}', file=sys.stderr, flush=True)
    elif process.returncode:
      sys.exit(f'the run ended with status {process.returncode}; see the log')
    if process.returncode == 0 and last_step(workdir) == args.steps:
      return faults
    process = None


def parameters(workdir, step):
  """Returns the bytes of the parameters in a checkpoint, by name."""
  with ocp.StandardCheckpointer() as checkpointer:
    params = checkpointer.restore(
      workdir / 'checkpoints' / str(step) / 'params'
    )
  return {
    k: np.asarray(x).tobytes() for k, x in checkpoint.flat(params).items()
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--steps', type=int, default=1000)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  dice = random.Random(args.seed)
  nan_steps = sorted(dice.sample(range(1, args.steps), args.steps // 50))
  with tempfile.TemporaryDirectory() as folder:
    calm, rough = pathlib.Path(folder, 'calm'), pathlib.Path(folder, 'rough')
    if start(calm, args, nan_steps).wait():
      sys.exit((pathlib.Path(folder) / 'calm.log').read_text()[-3000:])
    faults = disturbed(rough, args, nan_steps, dice)
    same = parameters(rough, args.steps) == parameters(calm, args.steps)
    print(
      f'{args.steps} steps, {len(nan_steps)} of them poisoned, '
      + ', '.join(f'{n} x {fault}' for fault, n in sorted(faults.items()))
      + f': the parameters are {"the same" if same else "NOT THE SAME"}'
    )
    for name, workdir in (('undisturbed', calm), ('disturbed', rough)):
      total = ledger.goodput(workdir / 'ledger.jsonl')
      print(f'\n{name}\n{ledger.format_goodput(total)}')
    sys.exit(not same)


if __name__ == '__main__':
  main()
