r"""Trains a model on chosen and rejected answers, or resumes such a training.

python launch/preferences.py --config configs/preferences.py \
  --workdir runs/preferences --config.init_from=models/LLaDA-8B-Instruct \
  --config.data.path=data/pairs

The model, the tokenizer and the row length are those of config.init_from and
config.data.path, pairs of launch/prepare.py --layout=pairs. See
docs/preferences.md, and launch/pretrain.py for resuming, pods and exit
statuses.
"""

from maskdiff import config

config.define_training_flags()


def main(args):
  # Imported after flags are parsed, so that a bad flag is reported at once.
  from maskdiff.planner import training_run
  from maskdiff.rl import preferences

  training_run.run(args, preferences.make_stage, preferences.complete)


if __name__ == '__main__':
  config.run_script(main)
