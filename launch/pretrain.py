r"""Trains a model, or goes on training it.

python launch/pretrain.py --config configs/tiny.py --workdir runs/tiny \
  [--config.train.steps=2000 ...]

On a pod the same command runs on every host; see docs/pods.md. The same command
goes on with a run that has ended; status 75 asks for that, status 2 for a
change by the user. See docs/reliability.md.
"""

from absl import flags

from maskdiff import config

config.define_config_flag()
flags.DEFINE_string('workdir', None, 'Where the run is written and resumed.')
flags.mark_flags_as_required(['config', 'workdir'])


def main(args):
  # After the flags: a bad one is told at once.
  from maskdiff.distributed import runtime
  from maskdiff.training import loop

  heartbeat_s = args.config.train.heartbeat_s
  with runtime.started(args.workdir, heartbeat_s=heartbeat_s):
    loop.run(args.config, args.workdir)


if __name__ == '__main__':
  config.run_script(main)
