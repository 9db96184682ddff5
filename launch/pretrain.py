r"""Trains a model, or resumes its training.

python launch/pretrain.py --config configs/tiny.py --workdir runs/tiny \
  [--config.train.steps=2000 ...]

The same command resumes an interrupted run. On a pod, start the command on
every host; see docs/pods.md. Exit status 75: start the same command again. Exit
status 2: fix the command first. See docs/reliability.md.
"""

from absl import flags

from maskdiff import config

config.define_config_flag()
flags.DEFINE_string(
  'workdir', None, 'Work directory, for checkpoints and metrics.'
)
flags.mark_flags_as_required(['config', 'workdir'])


def main(args, make_stage=None):
  # Imported after flags are parsed, so that a bad flag is reported at once.
  from maskdiff.distributed import runtime
  from maskdiff.training import loop, pretraining

  heartbeat_s = args.config.train.heartbeat_s
  make_stage = make_stage or pretraining.make_stage
  with runtime.started(heartbeat_s=heartbeat_s):
    loop.run(args.config, args.workdir, make_stage)


if __name__ == '__main__':
  config.run_script(main)
