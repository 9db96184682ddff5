"""Lists or verifies the checkpoints of a run, or rolls the run back.

python launch/checkpoints.py --workdir runs/tiny
python launch/checkpoints.py --workdir runs/tiny --verify
python launch/checkpoints.py --workdir runs/tiny --rollback 4000

--verify restores all arrays onto the devices and compares their bits with the
saved fingerprints. --rollback moves all later checkpoints to
checkpoints.aside/, so that the run resumes from the given step. Stop the run
before a rollback, which is refused while the run writes.
"""

import contextlib
import os
import sys
import time

from absl import flags, logging

from maskdiff import config
from maskdiff.errors import UserError, printable

flags.DEFINE_string('workdir', None, 'Work directory of the run.')
flags.DEFINE_bool(
  'verify',
  False,
  'Restore every checkpoint. Exit status 1 if one is damaged.',
)
flags.DEFINE_integer('rollback', None, 'Step to roll back to.', lower_bound=0)
flags.mark_flag_as_required('workdir')


def main(args):
  if args.verify and args.rollback is not None:
    raise UserError(
      '--verify and --rollback exclude each other: give one of them'
    )
  config.require_workdir(args.workdir)
  import jax

  from maskdiff.distributed import runtime

  if not args.verify:  # the run may be training and hold the devices
    jax.config.update('jax_platforms', 'cpu')
  runtime.quiet_without_tpu(os.environ, jax.config.jax_platforms)
  # Orbax warns that checkpoints are opened read-only, which is intended.
  logging.set_verbosity(logging.ERROR)
  if args.rollback is not None:
    roll_back(args.workdir, args.rollback)
  else:
    show(args.workdir, args.verify)


def show(workdir, verify):
  from maskdiff.checkpoints import restore

  damaged = 0
  with contextlib.closing(restore.open_run(workdir)) as checkpointer:
    for step in checkpointer.steps():
      path = os.path.join(checkpointer.directory, str(step))
      date = time.strftime('%Y-%m-%d %H:%M', time.localtime(_written(path)))
      state = _state(checkpointer, step, verify)
      damaged += state.startswith('damaged')
      print(f'{step:>9,}  {date}  {_size(path) / 1e9:9.3f} GB  {state}')
    aside = checkpointer.aside()
    if os.path.isdir(aside):
      names = printable(', '.join(sorted(os.listdir(aside))))
      print(f'set aside: {names} in {aside}')
  if damaged:
    sys.exit(1)


def _state(checkpointer, step, verify):
  """Returns a phrase on the state of a checkpoint."""
  from maskdiff.checkpoints import restore
  from maskdiff.checkpoints.manifest import Damaged

  try:
    meta = checkpointer.read_meta(step)
    if verify:
      restore.verify(checkpointer, step, meta)
  except Damaged as error:
    return f'damaged: {error}'
  except UserError as error:
    return f'not read: {error}'
  if verify:
    return f'all {len(meta.leaves)} arrays match their fingerprints'
  return 'meta intact'


def roll_back(workdir, step):
  from maskdiff.checkpoints import restore
  from maskdiff.checkpoints.checkpoint import Checkpointer
  from maskdiff.checkpoints.manifest import Damaged
  from maskdiff.files import lock

  restore.open_run(workdir).close()  # raises UserError if there is none
  directory = os.path.join(workdir, 'checkpoints')
  with contextlib.ExitStack() as stack:
    stack.enter_context(lock.locked(workdir))
    checkpointer = Checkpointer(directory, keep=None)
    stack.callback(checkpointer.close)
    if step in checkpointer.steps():
      try:
        checkpointer.read_meta(step)
      except Damaged as error:
        raise UserError(f'step {step} is damaged: {error}') from error
    moved = restore.roll_back(checkpointer, step)
    moves = f'; {", ".join(map(str, moved))} are now in {checkpointer.aside()}'
  print(f'{directory} ends with step {step}' + (moves if moved else ''))


def _written(path):
  """Returns the time of a save in seconds since the epoch."""
  meta = os.path.join(path, 'meta', 'metadata')
  return os.lstat(meta if os.path.exists(meta) else path).st_mtime


def _size(path):
  """Returns the bytes of all files in a folder and its subfolders."""
  return sum(
    os.lstat(os.path.join(folder, name)).st_size
    for folder, _, names in os.walk(path)
    for name in names
  )


if __name__ == '__main__':
  config.run_script(main)
