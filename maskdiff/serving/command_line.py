"""Flags of launch/serve.py and launch/chat.py; see setup.open_model."""

from absl import flags

from maskdiff import config as config_lib


def define_flags():
  """Defines the flags that `setup.open_model` reads."""
  flags.DEFINE_string('workdir', None, 'Work directory or Hugging Face folder.')
  flags.DEFINE_string(
    'chat_template',
    None,
    'Name of a chat template, such as plain; or a folder or *.jinja file with '
    'one. Default: that of the model.',
  )
  flags.DEFINE_string(
    'chat_arguments',
    None,
    'Variables of the chat template, as JSON: {"enable_thinking": false}.',
  )
  flags.DEFINE_bool('suppress_mask', False, 'Never predict the mask token.')
  flags.DEFINE_bool(
    'open_length',
    False,
    'Append blocks until the model predicts eos; at most --gen_length tokens.',
  )
  flags.mark_flag_as_required('workdir')
  config_lib.define_sample_flags()
  config_lib.define_load_flags()
