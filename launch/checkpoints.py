"""Lists the checkpoints of a run; verifies them; or goes back to one.

python launch/checkpoints.py --workdir runs/tiny
python launch/checkpoints.py --workdir runs/tiny --verify
python launch/checkpoints.py --workdir runs/tiny --rollback 4000

--verify reads all arrays onto the devices and compares their bits with what was
saved. --rollback moves all later steps to checkpoints.aside/, so that the run,
which must have been stopped, goes on from this one.
"""

import contextlib
import os
import sys
import time

from absl import flags, logging

from maskdiff import config
from maskdiff.errors import UserError

flags.DEFINE_string('workdir', None, 'The run to look at.')
flags.DEFINE_bool('verify', False, 'Read everything; status 1 after damage.')
flags.DEFINE_integer('rollback', None, 'Step to go back to.', lower_bound=0)
flags.mark_flag_as_required('workdir')


def main(args):
  if args.verify and args.rollback is not None:
    raise UserError('give either --verify or --rollback, not both')
  import jax

  if not args.verify:  # the devices may be those of a run that goes on
    jax.config.update('jax_platforms', 'cpu')
  # Orbax warns that checkpoints are opened to be read only: it is meant so.
  logging.set_verbosity(logging.ERROR)
  if args.rollback is not None:
    roll_back(args.workdir, args.rollback)
  else:
    show(args.workdir, args.verify)


def show(workdir, verify):
  from maskdiff.checkpoints import checkpoint

  damaged = 0
  with contextlib.closing(checkpoint.open_run(workdir)) as checkpointer:
    for step in checkpointer.steps():
      path = os.path.join(checkpointer.directory, str(step))
      date = time.strftime('%Y-%m-%d %H:%M', time.localtime(_written(path)))
      state = _state(checkpointer, step, verify)
      damaged += state.startswith('damaged')
      print(f'{step:>9,}  {date}  {_size(path) / 1e9:9.3f} GB  {state}')
    aside = checkpointer.aside()
    if os.path.isdir(aside):
      print(f'set aside: {", ".join(sorted(os.listdir(aside)))} in {aside}')
  if damaged:
    sys.exit(1)


def _state(checkpointer, step, verify):
  """What can be said of a step, in a few words."""
  from maskdiff.checkpoints import checkpoint

  try:
    meta = checkpointer.read_meta(step)
    if verify:
      checkpoint.verify(checkpointer, step, meta)
  except checkpoint.Damaged as error:
    return f'damaged: {error}'
  except UserError as error:
    return f'not read: {error}'
  if verify:
    return f'all {len(meta["leaves"])} arrays are as they were saved'
  return 'meta intact'


def roll_back(workdir, step):
  from maskdiff.checkpoints import checkpoint

  checkpoint.open_run(workdir).close()  # a clear error if there is none
  directory = os.path.join(workdir, 'checkpoints')
  checkpointer = checkpoint.Checkpointer(directory, keep=None)
  with contextlib.closing(checkpointer):
    if step in checkpointer.steps():
      try:
        checkpointer.read_meta(step)
      except checkpoint.Damaged as error:
        raise UserError(f'step {step} is damaged: {error}') from error
    moved = checkpoint.roll_back(checkpointer, step)
    where = f'; {", ".join(map(str, moved))} are now in {checkpointer.aside()}'
  print(f'{directory} ends with step {step}' + (where if moved else ''))


def _written(path):
  """Seconds since the epoch: of its meta, or else of what there is."""
  meta = os.path.join(path, 'meta', 'metadata')
  return os.path.getmtime(meta if os.path.exists(meta) else path)


def _size(path):
  """Bytes of all files below."""
  return sum(
    os.path.getsize(os.path.join(folder, name))
    for folder, _, names in os.walk(path)
    for name in names
  )


if __name__ == '__main__':
  config.run_script(main)
