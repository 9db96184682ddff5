"""Fine-tuning: the stage of pretraining over rows with answers.

A run starts from a trained model, `config.init_from`, and its rows have the
column `answer`: the loss is computed at answers only. `complete` fills the keys
of a config that the model and the rows determine.
"""

import dataclasses
import json
import math
import os

from maskdiff import config as config_lib
from maskdiff.config import config_file, sample
from maskdiff.data import pipeline, records
from maskdiff.errors import UserError, no_checkpoint
from maskdiff.files.paths import local_path
from maskdiff.interop import config_json, families, hf, hf_config
from maskdiff.monitoring import stage_file
from maskdiff.objectives.table import OBJECTIVES
from maskdiff.posttraining import (
  chat,
  chat_tokens,
  heldout_answers,
  length_tokens,
)
from maskdiff.training import inputs, pretraining

# Keys of a config that the model of config.init_from determines.
_MODEL_KEYS = (
  *(f'model.{field}' for field in families.FIELDS),
  *(f'tokens.{name}' for name in ('mask_id', 'bos_id', 'eos_id')),
  'data.tokenizer',
  'data.length_tokens',
)
# Keys that keep another value of the config.
_OBJECTIVE_KEYS = (
  'objective.name',
  'objective.block_length',
  'objective.clean_attention',
  'objective.predict_mask',
  'objective.window_length',
  'objective.window_attention',
  'sample.eot_id',
)
EXACT_MATCH_PANEL = stage_file.Curve(
  id='exact_match',
  title='Exact match on held-out answers',
  note='Share of held-out prompts whose sampled answer is that of the row.',
  key='eval/exact_match',
)
_EMBEDDED = config_lib.KEYS['data.path'].default


def make_stage(config, setup):
  """Opens tokenizer and data of a config; returns the Stage of fine-tuning.

  Args:
    config: ConfigDict, such as one from `complete`.
    setup: RunSetup.

  Raises:
    UserError: the run has no model to start from, or its rows have no answers.
  """
  require_inputs(config)
  stage = pretraining.make_stage(config, setup, columns=('answer',))
  files = chat_files(config, stage.tokenizer)
  stage = dataclasses.replace(stage, name='fine-tuning', files=files)
  return (
    _with_exact_match(config, setup, stage) if config.eval.answers else stage
  )


def chat_files(config, tokenizer):
  """Returns the chat template of the rows, and the tokens that end an answer.

  They are files of the work directory, for launch/chat.py and for exports.

  Args:
    config: ConfigDict; the first dataset of a mixture is read.
    tokenizer: data.tokenizer.Tokenizer.

  Returns:
    dict of bytes by name; empty if the rows have no template.
  """
  folder = local_path(pipeline.parse_mixture(config.data.path)[0][0])
  template = chat.of_folder(folder)
  if template is None:
    return {}
  settings = records.read_manifest(folder).settings
  arguments = settings.get('chat_arguments', template.arguments)
  return template_files(chat.with_defaults(template, arguments), tokenizer)


def template_files(template, tokenizer):
  """Returns the files of a chat.Template, dict of bytes by name."""
  ids = {
    'bos_token_id': tokenizer.bos_id,
    'eos_token_id': chat_tokens.end_ids(
      chat_tokens.encoder(template, tokenizer)
    ),
    'pad_token_id': tokenizer.pad_id,
  }
  return {
    chat.FILE: template.source.encode(),
    hf.GENERATION: (json.dumps(ids, indent=2) + '\n').encode(),
  }


def _with_exact_match(config, setup, stage):
  """Returns a Stage that also samples answers to held-out prompts."""
  tokenizer = stage.tokenizer
  path = config.eval.path or config.data.path
  datasets = inputs.open_data(config, tokenizer, path, ('answer',))
  questions = heldout_answers.read(config, datasets, config.tokens.eos_id)
  if not questions:
    raise UserError(
      f'{datasets[0].directory} has no held-out prompt with room for an answer '
      'in a row: set --config.eval.answers=0'
    )

  def evaluate(step, params, average):
    result = stage.evaluate(step, params, average)
    setup.between()
    share, texts = heldout_answers.exact_match(
      config, params, tokenizer, setup.mesh, questions
    )
    line = f'{result.line}; exact match {share:.1%} of {len(questions)}'
    return dataclasses.replace(
      result,
      row=result.row | {'eval/exact_match': share},
      texts=[*result.texts, *texts],
      line=line,
    )

  return dataclasses.replace(
    stage, evaluate=evaluate, panels=(EXACT_MATCH_PANEL, *stage.panels)
  )


def require_inputs(config, name='fine-tuning', layout=''):
  """Raises UserError unless the config names a model and data.

  Args:
    config: ConfigDict.
    name: of the training.
    layout: flag of launch/prepare.py for its rows, such as ' --layout=pairs'.
  """
  if not config.init_from:
    raise UserError(
      f'{name} starts from a trained model: set --config.init_from to a '
      'Hugging Face folder or to the work directory of a run'
    )
  if config.data.path == _EMBEDDED:
    raise UserError(
      f'{name} needs rows with answers: prepare conversations with '
      f'launch/prepare.py --chat{layout}, and set --config.data.path to their '
      'directory'
    )


def complete(config, given=()):
  """Returns a config with the model of config.init_from and the data's length.

  The model, the token ids and the tokenizer are those of config.init_from. So
  are the tokens of lengths, unless the rows have their own. Its
  objective is kept unless the config or a flag names another one. An
  autoregressive Hugging Face folder becomes a masked diffusion model, unless
  the objective is autoregressive or sdlm. `data.length` becomes that of the
  rows. With `train.epochs`, the rows determine `train.steps`, warmup is at most
  a tenth of them, and the learning rate decays in the last tenth.

  Args:
    config: ConfigDict of --config with its flags.
    given: dotted keys that flags have set; they keep their values.

  Raises:
    UserError: see `require_inputs`; or the model or the rows cannot be read.
  """
  require_inputs(config)
  config = config.copy_and_resolve_references()
  values = model_values(config, given) | _data_values(config, given)
  config.update_from_flattened_dict(
    {key: value for key, value in values.items() if key not in given}
  )
  sample.fit_rule(config, given)
  config.train.epochs = 0.0  # train.steps counts
  return config


def model_values(config, given):
  """Returns {dotted key: value} that the model of config.init_from sets."""
  kept = lambda key: (
    key in given
    or config_lib.lookup(config, key) != config_lib.KEYS[key].default
  )
  objective = config.objective.name if kept('objective.name') else None
  source = model_config(config.init_from, objective)
  keys = [key for key in _OBJECTIVE_KEYS if not kept(key)]
  values = {
    key: config_lib.lookup(source, key) for key in (*_MODEL_KEYS, *keys)
  }
  # The outputs of the network keep their meaning.
  of_source = OBJECTIVES[source.objective.name]
  of_run = OBJECTIVES[objective or source.objective.name]
  values['model.predict_next'] = not of_run.left_to_right and (
    source.model.predict_next or of_source.left_to_right
  )
  return values


def model_config(path, objective=None):
  """Returns the config of a trained model, with the path of its tokenizer.

  Args:
    path: Hugging Face folder or work directory.
    objective: name of the objective that the run trains; None for that of the
      model.

  Raises:
    UserError: the folder has no model.
  """
  folder = str(local_path(path))
  if config_json.is_published(folder):
    config = config_lib.default()
    published = hf.open_folder(folder)
    unmasked = objective and not OBJECTIVES[objective].has_mask_token
    hf_config.start(config, published, bool(unmasked))
    # Published losses do not exclude the mask token.
    config.objective.predict_mask = published.family.has_mask_token
    return config
  saved = os.path.join(folder, 'config.json')
  if not os.path.isfile(saved):
    raise no_checkpoint(folder)
  config = config_file.load(saved)
  config.data.tokenizer = folder
  return config


def _data_values(config, given):
  """Returns {dotted key: value} that the rows of config.data.path set."""
  names = [name for name, _ in pipeline.parse_mixture(config.data.path)]
  manifests = [records.read_manifest(name) for name in names]
  length = manifests[0].row_length
  if 'data.length' in given:
    length = config.data.length
  values = {'data.length': length}
  # The lengths that the model knows are kept unless the rows have others.
  if named := {length_tokens.of_settings(m.settings) for m in manifests} - {()}:
    if len(named) > 1:
      raise UserError(
        f'the datasets of config.data.path={config.data.path} have different '
        '--length_buckets: prepare them with the same ones'
      )
    (values['data.length_tokens'],) = named
  if not config.train.epochs:
    return values
  tokens = sum(m.splits['train'].rows * m.row_length for m in manifests)
  batches = tokens / length / config.train.batch
  steps = max(1, math.ceil(config.train.epochs * batches))
  if 'train.steps' in given:
    steps = config.train.steps
  return values | {
    'train.steps': steps,
    'optimizer.warmup_steps': min(config.optimizer.warmup_steps, steps // 10),
    'optimizer.decay_steps': steps // 10,
  }
