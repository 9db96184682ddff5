r"""Trains a model on chosen and rejected answers, or resumes such a training.

python launch/preferences.py --config configs/preferences.py \
  --workdir runs/preferences --config.init_from=models/LLaDA-8B-Instruct \
  --config.data.path=data/pairs

The model, the tokenizer and the row length are those of config.init_from and
config.data.path, pairs of launch/prepare.py --layout=pairs. See
docs/preferences.md, and launch/pretrain.py for resuming, pods and exit
statuses.
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
  from maskdiff.rl import preferences
  from maskdiff.training import loop

  given = args['config'].override_values
  settings = preferences.complete(args.config, given)
  with runtime.started(heartbeat_s=settings.train.heartbeat_s):
    loop.run(settings, args.workdir, preferences.make_stage)


if __name__ == '__main__':
  config.run_script(main)
