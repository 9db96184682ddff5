r"""Fine-tunes a trained model on rows with answers, or resumes a fine-tuning.

python launch/finetune.py --config configs/sft.py --workdir runs/sft \
  --config.init_from=models/LLaDA-8B-Base --config.data.path=data/chat

The model, the tokenizer and the row length are those of config.init_from and
config.data.path. See docs/fine_tuning.md, and launch/pretrain.py for resuming,
pods and exit statuses.
"""

from maskdiff import config

config.define_training_flags()


def main(args):
  # Imported after flags are parsed, so that a bad flag is reported at once.
  from maskdiff.planner import training_run
  from maskdiff.posttraining import finetuning

  training_run.run(args, finetuning.make_stage, finetuning.complete)


if __name__ == '__main__':
  config.run_script(main)
