"""Trains a model, or goes on training it.

python launch/pretrain.py --config configs/tiny.py --workdir runs/tiny \
  [--config.train.steps=2000 ...]
"""

from absl import flags

from maskdiff import config

config.define_config_flag()
flags.DEFINE_string('workdir', None, 'Where the run is written and resumed.')
flags.mark_flags_as_required(['config', 'workdir'])


def main(args):
  from maskdiff import train  # after the flags: a bad one is told at once

  train.run(args.config, args.workdir)


if __name__ == '__main__':
  config.run_script(main)
