r"""Trains a model on rewards of its own answers, or resumes such a training.

python launch/rl.py --config configs/rl_countdown.py --workdir runs/rl \
  --config.init_from=runs/countdown

The model and the tokenizer are those of config.init_from. See docs/rl.md, and
launch/pretrain.py for resuming, pods and exit statuses.
"""

from absl import flags

from maskdiff import config

config.define_config_flag()
flags.DEFINE_string(
  'workdir', None, 'Work directory, for checkpoints and metrics.'
)
flags.mark_flags_as_required(['config', 'workdir'])


def main(args):
  # Imported after flags are parsed, so that a bad flag is reported at once.
  from maskdiff.distributed import runtime
  from maskdiff.rl import stage, stage_config
  from maskdiff.training import loop

  settings = stage_config.complete(args.config, args['config'].override_values)
  with runtime.started(heartbeat_s=settings.train.heartbeat_s):
    loop.run(settings, args.workdir, stage.make_stage)


if __name__ == '__main__':
  config.run_script(main)
