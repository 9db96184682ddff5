"""Policy optimization, a stage of the training loop.

A round draws prompts of a task, samples a group of answers to each with the
live parameters, computes their rewards and advantages, and trains on all of
them for `config.policy.inner_steps` steps. The position of the stage is

    {'round': r, 'inner': i, 'rollout': {...}}

with the answers of the round, their advantages, and the log-probabilities that
do not change during the round. They are stored because they cannot be computed
again: after the first inner step, the parameters that sampled the answers are
gone. At the start of a round the position has no rollout.
"""

import functools

import jax
import numpy as np

from maskdiff.posttraining import finetuning
from maskdiff.rl import (
  programs,
  reference,
  round_metrics,
  rounds,
  scoring,
  stage_config,
)
from maskdiff.training import inputs
from maskdiff.training.stage import Evaluation, Stage


def make_stage(config, setup):
  """Opens task, reward, reference and tokenizer; returns the Stage.

  Args:
    config: ConfigDict, such as one from `stage_config.complete`.
    setup: RunSetup.

  Raises:
    UserError: the config has no model to start from; or task, reward, method,
      sampler, tokenizer or reference do not fit it.
  """
  tokenizer = inputs.open_tokenizer(config)
  stage_config.check(config, tokenizer)
  c = stage_config.policy_config(config)
  questions = scoring.open_questions(config, tokenizer)
  # Errors of the first round come before the reference is loaded.
  drawn, _ = questions.draw(f'{config.seed}-0', config.policy.prompts)
  o = rounds.Opened(
    config=config,
    setup=setup,
    c=c,
    questions=questions,
    programs=programs.make(config, setup, c),
    reference=reference.load_reference(config, setup.mesh)
    if c.reference
    else None,
  )
  measured = {}  # round -> metrics of its rollouts, until they are written

  def next_batch(position, params):
    number, inner = position['round'], position['inner']
    rollout = position.get('rollout')
    if rollout is not None and not rounds.fits(o, inner, rollout):
      number, inner, rollout = number + 1, 0, None
    if rollout is None:
      with setup.ledger.span('step'):  # the last one may still be running
        jax.block_until_ready(params)
      with setup.ledger.span('rollout'):
        rollout, measured[number] = rounds.sample_round(o, number, params)
    batch = o.programs.choose(rollout, np.array([number, inner], np.int32))
    following = {'round': number, 'inner': inner + 1, 'rollout': rollout}
    if inner + 1 == c.inner_steps:
      following = {'round': number + 1, 'inner': 0}
    return batch, following, {'round': number, 'inner': inner}

  # Several microbatches take a pass without gradients first.
  passes = o.programs.copies * (1 + (c.microbatches > 1))

  def row(metrics, facts, step_s):
    numbers = sorted({f['round'] for f in facts})
    of_rounds = [measured.pop(n) for n in numbers if n in measured]
    return round_metrics.row(metrics, of_rounds, passes * config.train.batch)

  digest = '' if o.reference is None else reference.digest(o.reference)
  files = {}
  if questions.template is not None:
    files = finetuning.template_files(questions.template, tokenizer)
  return Stage(
    name='policy optimization',
    identity=stage_config.identity(config, questions, tokenizer, drawn, digest),
    header=stage_config.header(config, questions, o.programs.copies),
    tokenizer=tokenizer,
    start={'round': 0, 'inner': 0},
    next_batch=next_batch,
    compile=functools.partial(programs.compile_train_step, config, setup, c),
    evaluate=functools.partial(_evaluate, o),
    row=row,
    line=round_metrics.line,
    loss_name='loss_policy',
    first_row=lambda batch: tokenizer.decode(
      inputs.first_row(batch, setup.mesh)
    ),
    panels=round_metrics.PANELS,
    files=files,
  )


def _evaluate(o, step, params, average):
  """Answers held-out questions; returns an Evaluation."""
  config, number = o.config, o.config.eval.answers
  if not number:
    text = 'no held-out questions: config.eval.answers=0'
    return Evaluation({}, [], text, text)
  questions, prompts = o.questions.draw(
    f'{config.seed}-heldout', number, heldout=True
  )
  temperature = config.policy.eval_temperature
  changes = {'temperature': temperature}
  if not temperature:  # nothing is drawn
    changes |= {'top_k': 0, 'top_p': 1.0}
  row, texts = {}, []
  for name, tree in (('', params), ('ema_', average)):
    if tree is None:
      continue
    _, answers = rounds.answer(o, tree, 'heldout', prompts, 1, **changes)
    rewards = o.questions.score(questions, answers)
    row |= round_metrics.of_rewards(rewards, f'eval/{name}')
    texts = texts or [
      f'{question["prompt"]}{answer}'
      for question, answer in zip(questions, answers, strict=True)
    ]
  line = f'held-out reward {row["eval/reward"]:.3f}'
  if 'eval/correct' in row:
    line += f', correct {row["eval/correct"]:.1%}'
  line += f' of {number}'
  return Evaluation(row, texts[: round_metrics.SHOWN], line, line)
