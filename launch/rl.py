r"""Trains a model on rewards of its own answers, or resumes such a training.

python launch/rl.py --config configs/rl_countdown.py --workdir runs/rl \
  --config.init_from=runs/countdown

The model and the tokenizer are those of config.init_from. See docs/rl.md, and
launch/pretrain.py for resuming, pods and exit statuses.
"""

from maskdiff import config

config.define_training_flags()


def main(args):
  # Imported after flags are parsed, so that a bad flag is reported at once.
  from maskdiff.planner import training_run
  from maskdiff.rl import stage, stage_config

  training_run.run(args, stage.make_stage, stage_config.complete)


if __name__ == '__main__':
  config.run_script(main)
