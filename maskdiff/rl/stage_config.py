"""Configs of policy optimization: completed, checked, and as an identity."""

import dataclasses
import hashlib
import json

from maskdiff import config as config_lib
from maskdiff.config import policy, sample
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.errors import UserError, suggestion
from maskdiff.interop import load
from maskdiff.model import transformer
from maskdiff.objectives.table import OBJECTIVES
from maskdiff.posttraining import finetuning
from maskdiff.rl import table
from maskdiff.rl.policy_step import PolicyConfig
from maskdiff.rl.settings import Settings

# Keys of config.policy that do not change the training.
_NOT_IDENTITY = (
  'reward',  # that of the task has a name, and a program a digest
  'reward_workers',
  'reward_timeout_s',
  'sampling_rows',
  'chat_template',  # its text has a digest
  'eval_temperature',
  'reference',  # its parameters have a digest
  'reference_dtype',
)
# Remasking rules that draw at random at temperature 0 too.
_RANDOM_RULES = ('random', 'ancestral', 'first_hitting')


def require_model(config, name='policy optimization'):
  """Raises UserError unless the config names a model to start from."""
  if not config.init_from:
    raise UserError(
      f'{name} starts from a trained model: set '
      '--config.init_from to the work directory of a run or to a Hugging Face '
      'folder'
    )


def complete(config, given=()):
  """Returns a config with the model of config.init_from.

  The model, the token ids, the tokenizer and the objective are those of
  config.init_from, as in fine-tuning. `train.batch` becomes the number of
  answers of a round.

  Args:
    config: ConfigDict of --config with its flags.
    given: dotted keys that flags have set; they keep their values.

  Raises:
    UserError: config.init_from is missing or cannot be read.
  """
  require_model(config)
  config = config.copy_and_resolve_references()
  values = finetuning.model_values(config, given)
  values['train.batch'] = config.policy.prompts * config.policy.group
  config.update_from_flattened_dict(
    {key: value for key, value in values.items() if key not in given}
  )
  sample.fit_rule(config, given)
  return config


def check_model(config, tokenizer):
  """Raises UserError unless the method can train the model.

  Args:
    config: ConfigDict with config.init_from.
    tokenizer: data.tokenizer.Tokenizer of the run.
  """
  p, objective = config.policy, OBJECTIVES[config.objective.name]
  source = finetuning.model_config(config.init_from).data.tokenizer
  of_policy = tokenizer_lib.load(source).fingerprint
  if of_policy != tokenizer.fingerprint:
    raise UserError(
      f'--config.data.tokenizer={config.data.tokenizer} differs from the '
      f'tokenizer of --config.init_from={config.init_from}, which the policy '
      f'was trained with; set --config.data.tokenizer={source}'
    )
  if table.find(p.method).masks and objective.left_to_right:
    methods = table.METHODS.items()
    rest = [n for n, m in methods if not m.masks and not m.pairs]
    raise UserError(
      f'--config.policy.method={p.method} masks tokens, and a network trained '
      f'with objective {config.objective.name} has no mask token; set '
      f'--config.policy.method to {", ".join(rest[:-1])} or {rest[-1]}'
    )
  if objective.drafts:
    raise UserError(
      'launch/rl.py and launch/preferences.py train no drafter: set '
      '--config.objective.name=autoregressive --config.drafter.kind=none'
    )
  if config.train.epochs:
    raise UserError(
      f'config.train.epochs={config.train.epochs} is for launch/finetune.py; '
      'set --config.train.epochs=0 and --config.train.steps'
    )


def check(config, tokenizer):
  """Checks what a config cannot check without the rooms above it.

  Args:
    config: ConfigDict.
    tokenizer: data.tokenizer.Tokenizer of the run.

  Raises:
    UserError: the model to start from is missing, or has another tokenizer, or
      is of a kind that the method or the stage cannot train; or batch, sampler
      and masks do not fit each other.
  """
  require_model(config)
  p = config.policy
  if table.find(p.method).pairs:
    raise UserError(
      f'--config.policy.method={p.method} learns from pairs of answers, not '
      'from rewards: use launch/preferences.py'
    )
  check_model(config, tokenizer)
  if config.data.length_tokens:
    raise UserError(
      'the model predicts lengths of answers, and rollouts have answers of '
      'config.sample.gen_length slots: set --config.data.length_tokens="()"'
    )
  answers = p.prompts * p.group
  if config.train.batch != answers:
    raise UserError(
      f'--config.train.batch={config.train.batch} must be the number of '
      f'answers of a round, config.policy.prompts x group = {p.prompts} x '
      f'{p.group}: set --config.train.batch={answers}'
    )
  if not config.sample.temperature and (
    config.sample.remasking not in _RANDOM_RULES
  ):
    raise UserError(
      'config.sample.temperature=0 gives equal answers to a prompt, from which '
      'nothing is learned: set --config.sample.temperature=1'
    )


def policy_config(config):
  """Returns the PolicyConfig of a run.

  Raises:
    UserError: the settings of the method have an unknown name or a value out of
      range.
  """
  p = config.policy
  s = _settings(p)
  network = dataclasses.replace(
    load.network(config, None), config=transformer.from_config(config)
  )
  needs = table.find(p.method).needs_reference
  return PolicyConfig(
    method=p.method,
    settings=s,
    network=network,
    seed=config.seed % 2**32,
    inner_steps=p.inner_steps,
    reference=needs
    or (s.kl_to == 'reference' and bool(s.kl_weight or p.measure_kl)),
    chunk=config.objective.loss_chunk_tokens,
    microbatches=config.train.microbatches,
  )


def _settings(p):
  """Returns the Settings of a section config.policy."""
  known = {f.name: f.default for f in dataclasses.fields(Settings)}
  changes = dict(p.settings)
  for name, value in changes.items():
    if name not in known:
      raise UserError(
        f'config.policy.settings has {name!r}: choose from {", ".join(known)}'
        + suggestion(name, known)
      )
    kind = type(known[name])
    if type(value) is not kind and not (kind is float and type(value) is int):
      raise UserError(
        f'config.policy.settings: {name}={value!r} must be {kind.__name__}'
      )
  if not table.find(p.method).pairs:
    changes.setdefault('group', p.group)
  return table.settings(p.method, **changes)


def identity(config, questions, tokenizer, drawn, reference):
  """Returns the identity of the stage, see `stage.Stage`.

  Args:
    config: ConfigDict.
    questions: scoring.Questions.
    tokenizer: data.tokenizer.Tokenizer.
    drawn: the questions of the first round.
    reference: digest of the reference, or '' if there is none.
  """
  digest = lambda text: hashlib.sha256(text.encode()).hexdigest()[:16]
  reward, template = questions.reward, questions.template
  keys = [
    *(f'policy.{name}' for name in policy.KEYS if name not in _NOT_IDENTITY),
    *(f'sample.{name}' for name in sample.SETTINGS),
  ]
  return {
    'tokenizer': [tokenizer.fingerprint],
    'seed': config.seed,
    'length': config.data.length,
    'questions': digest(json.dumps(drawn)),
    'reference': reference,
    'reward': f'{reward.name} {digest(reward.program)}'
    if reward.path
    else reward.name,
    'template': '' if template is None else digest(template.source),
    **{key: config_lib.lookup(config, key) for key in keys},
  }


def header(config, questions, copies):
  """Returns the last lines of header.txt.

  Args:
    config: ConfigDict.
    questions: scoring.Questions.
    copies: masked copies per answer.
  """
  p = config.policy
  return (
    f'policy optimization: {described(config, copies)}\ntask {p.task}, reward '
    f'{questions.reward.name}: {p.prompts} prompts of {p.group} answers per '
    f'round, {p.inner_steps} steps per round'
  )


def described(config, copies):
  """Returns the method of a config, its settings and its cost, for header.txt.

  Args:
    config: ConfigDict.
    copies: masked copies per answer.
  """
  s = _settings(config.policy)
  changed = ', '.join(
    f'{f.name}={getattr(s, f.name)}'
    for f in dataclasses.fields(s)
    if getattr(s, f.name) != f.default
  )
  method = config.policy.method
  return f'{method} ({changed}), {copies} masked copies per answer'
