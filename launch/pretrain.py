r"""Trains a model, or resumes its training.

python launch/pretrain.py --config configs/tiny.py --workdir runs/tiny \
  [--config.train.steps=2000 ...]

The same command resumes an interrupted run. On a pod, start the command on
every host; see docs/pods.md. Exit status 75: start the same command again. Exit
status 2: fix the command first. See docs/reliability.md.
"""

from maskdiff import config

config.define_training_flags()


def main(args, make_stage=None):
  # Imported after flags are parsed, so that a bad flag is reported at once.
  from maskdiff.planner import training_run
  from maskdiff.training import pretraining

  training_run.run(args, make_stage or pretraining.make_stage)


if __name__ == '__main__':
  config.run_script(main)
