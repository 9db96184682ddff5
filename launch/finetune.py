r"""Fine-tunes a trained model on rows with answers, or resumes a fine-tuning.

python launch/finetune.py --config configs/sft.py --workdir runs/sft \
  --config.init_from=models/LLaDA-8B-Base --config.data.path=data/chat

The model, the tokenizer and the row length are those of config.init_from and
config.data.path. See docs/fine_tuning.md, and launch/pretrain.py for resuming,
pods and exit statuses.
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
  from maskdiff.posttraining import finetuning
  from maskdiff.training import loop

  given = args['config'].override_values
  settings = finetuning.complete(args.config, given)
  with runtime.started(heartbeat_s=settings.train.heartbeat_s):
    loop.run(settings, args.workdir, finetuning.make_stage)


if __name__ == '__main__':
  config.run_script(main)
