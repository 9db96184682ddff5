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
import jax.numpy as jnp
import numpy as np

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import load
from maskdiff.model import lora, transformer
from maskdiff.posttraining import finetuning
from maskdiff.rl import advantages as advantages_lib
from maskdiff.rl import (
  policy_step,
  rollouts,
  round_metrics,
  scoring,
  stage_config,
  table,
  trace,
)
from maskdiff.sampling.settings import sampler_config
from maskdiff.training import inputs
from maskdiff.training import step as step_lib
from maskdiff.training.stage import Evaluation, Stage, compile_step


def make_stage(config, setup):
  """Opens task, reward, reference and tokenizer; returns the Stage.

  Args:
    config: ConfigDict, such as one from `stage_config.complete`.
    setup: RunSetup.

  Raises:
    UserError: the config has no model to start from; task, reward, method,
      sampler, tokenizer or reference do not fit it.
  """
  tokenizer = inputs.open_tokenizer(config)
  stage_config.check(config, tokenizer)
  c = stage_config.policy_config(config)
  questions = scoring.open_questions(config, tokenizer)
  questions.draw(f'{config.seed}-0', config.policy.prompts)  # checks lengths
  parts = _Parts(config, setup, c, questions)
  measured = {}  # round -> metrics of its rollouts, until they are written

  def next_batch(position, params):
    number, inner = position['round'], position['inner']
    if 'rollout' not in position:
      with setup.ledger.span('rollout'):
        rollout, measured[number] = _round(parts, number, params)
      position = position | {'rollout': rollout}
    batch = parts.choose(position['rollout'], np.array([number, inner]))
    following = position | {'inner': inner + 1}
    if inner + 1 == c.inner_steps:
      following = {'round': number + 1, 'inner': 0}
    return batch, following, {'round': number, 'inner': inner}

  def compile(state, batch, key):
    jitted = step_lib.compile_train_step(
      step_lib.step_config(config),
      setup.optimizer,
      setup.mesh,
      functools.partial(policy_step.gradients, c),
      policy_step.shardings(c, setup.mesh)[0],
    )
    return compile_step(jitted, state, batch, key)

  def row(metrics, facts, step_s):
    numbers = sorted({f['round'] for f in facts})
    of_rounds = [measured.pop(n) for n in numbers if n in measured]
    return round_metrics.row(metrics, of_rounds, parts.forwards_per_step)

  files = {}
  if questions.template is not None:
    files = finetuning.template_files(questions.template, tokenizer)
  return Stage(
    name='policy optimization',
    identity=stage_config.identity(config, questions, tokenizer),
    header=stage_config.header(config, questions, parts.copies),
    tokenizer=tokenizer,
    start={'round': 0, 'inner': 0},
    next_batch=next_batch,
    compile=compile,
    evaluate=functools.partial(_evaluate, parts),
    row=row,
    line=round_metrics.line,
    loss_name='loss_policy',
    first_row=lambda batch: tokenizer.decode(
      inputs.first_row(batch, setup.mesh)
    ),
    panels=round_metrics.PANELS,
    files=files,
  )


class _Parts:
  """Compiled functions and constants of the stage."""

  def __init__(self, config, setup, c, questions):
    """Opens the reference, and makes the jitted functions.

    Args:
      config: ConfigDict.
      setup: RunSetup.
      c: PolicyConfig.
      questions: scoring.Questions.
    """
    mesh = setup.mesh
    self.config, self.setup, self.c, self.questions = (
      config,
      setup,
      c,
      questions,
    )
    self.sampler, self.settings = sampler_config(config)
    self.reference = open_reference(config, mesh) if c.reference else None
    self.copy = rollouts.sampling_copy(
      setup.model, mesh, config.policy.sampling_dtype
    )
    sharded, fixed = policy_step.shardings(c, mesh)
    self._rows, self._advantages = sharded.tokens, sharded.advantages
    to_rows = functools.partial(
      rollouts.to_batch,
      eos_id=config.tokens.eos_id,
      num_eos=table.find(c.method).num_eos,
    )
    self.to_rows = jax.jit(to_rows)
    self.copies = jax.eval_shape(
      lambda rollout: policy_step.draw(c, to_rows(rollout), jnp.zeros(2, int)),
      self._shapes(),
    ).masked.shape[0]
    self.forwards_per_step = self.copies * config.train.batch
    if c.microbatches > 1:
      self.forwards_per_step *= 2
    self._choose = jax.jit(
      lambda rollout, step: policy_step.choose(
        c,
        to_rows(rollout),
        rollout['advantages'],
        rollout.get('log_probs'),
        step,
      ),
      out_shardings=sharded,
    )
    self._fixed = jax.jit(
      lambda params, rollout, number: policy_step.fixed_log_probs(
        c, params, to_rows(rollout), number
      ),
      out_shardings=fixed,
    )

  def _shapes(self):
    rows = self.config.train.batch
    shape = lambda n: jax.ShapeDtypeStruct((rows, n), np.int32)
    length = self.config.data.length
    return {'tokens': shape(length), 'steps': shape(length), 'slots': shape(2)}

  def choose(self, rollout, step):
    """Returns the PolicyRows of an inner step."""
    return self._choose(rollout, step.astype(np.int32))

  def answer(self, params, round_number, prompts, group, **changes):
    """Samples answers; `changes` are settings that differ from the config's.

    Returns:
      rollouts.Answers, and a list of texts.
    """
    config = self.config
    requests = rollouts.requests(
      config.seed,
      round_number,
      prompts,
      group,
      config.sample.gen_length,
      self.settings._replace(**changes),
    )
    found = rollouts.sample(
      load.network(config, self.copy(params)),
      self.sampler,
      requests,
      config.policy.sampling_rows or config.train.batch,
      config.data.length,
      self.setup.between,
    )
    ends = self.questions.end_ids
    tokens = [rollouts.answer_tokens(r, ends) for r in found.recordings]
    return found, [self.questions.decode(ids) for ids in tokens]

  def fixed(self, params, rollout, number):
    """Returns `policy_step.fixed_log_probs`; None if none are needed."""
    c = self.c
    if not (c.fixed_steps and c.fixed_networks):
      return None
    reference = self.reference
    if reference is None:
      reference = lora.base(params)
    of = {'old': params, 'reference': reference}
    params = [of[name] for name in c.fixed_networks]
    return self._fixed(params, rollout, np.int32(number))


def _round(parts, number, params):
  """Samples the answers of a round and computes their rewards.

  Args:
    parts: _Parts.
    number: of the round.
    params: parameter tree of the policy.

  Returns:
    The arrays of the round, a dict; and its metrics, a dict of floats.

  Raises:
    UserError: the reward failed on all answers, or logits were not finite.
  """
  config, p = parts.config, parts.config.policy
  questions, prompts = parts.questions.draw(
    f'{config.seed}-{number}', p.prompts
  )
  answers, texts = parts.answer(params, number, prompts, p.group)
  asked = [question for question in questions for _ in range(p.group)]
  rewards = parts.questions.score(asked, texts)
  scoring.require_rewards(parts.questions.reward.name, rewards)
  method = table.find(p.method)
  advantages = advantages_lib.advantages(
    rewards.total.astype(np.float32),
    p.group,
    method.baseline if p.baseline == 'published' else p.baseline,
    method.deviation if p.deviation == 'published' else p.deviation,
  )
  found = rollouts.arrays(answers.recordings, config.data.length)
  rollout = _placed(parts, found | {'advantages': np.asarray(advantages)})
  if parts.c.settings.copies:
    _check_copies(parts, rollout)
  parts.setup.between()
  fixed = parts.fixed(params, rollout, number)
  if fixed is not None:
    rollout['log_probs'] = jax.block_until_ready(fixed)
  num_fixed = len(parts.c.fixed_steps) * len(parts.c.fixed_networks)
  measured = round_metrics.of_round(config, answers, rewards, p.group)
  measured['fixed_forwards'] = num_fixed * parts.copies * config.train.batch
  return rollout, measured


def _placed(parts, arrays):
  """Returns NumPy arrays, the same in all processes, on the mesh."""
  mesh = parts.setup.mesh
  rows, rest = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
  sharding = lambda name: rows if name in ('tokens', 'steps') else rest
  return {
    name: jax.make_array_from_callback(x.shape, sharding(name), x.__getitem__)
    for name, x in arrays.items()
  }


def _check_copies(parts, rollout):
  """Raises UserError if `copies` leaves tokens without a copy."""
  c, rows = parts.c, parts.to_rows(rollout)
  method = table.find(c.method)
  if method.draw is trace.left_to_right:
    trace.check_copies(c.network, c.settings, trace.in_order(rows))
  elif method.needs_steps:
    trace.check_copies(c.network, c.settings, rows)


def open_reference(config, mesh):
  """Loads the parameters of the reference; None if they are the base.

  The base of adapters does not change, so it is no second copy.

  Args:
    config: ConfigDict.
    mesh: device mesh.

  Raises:
    UserError: the reference has another architecture, or cannot be loaded.
  """
  path = config.policy.reference
  if config.lora.rank and not path:
    return None
  changed = config.copy_and_resolve_references()
  changed.lora.rank = 0
  if path:
    changed.init_from, changed.init_from_ema = path, False
  try:
    params = load.warm_start(changed, mesh)
  except UserError as error:
    raise UserError(f'the reference of policy optimization: {error}') from error
  dtype = config.policy.reference_dtype
  c = transformer.from_config(changed)
  shardings = mesh_lib.param_shardings(
    mesh, transformer.axes(c), transformer.shapes(c)
  )
  cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
  return jax.jit(cast, out_shardings=shardings, donate_argnums=0)(params)


def _evaluate(parts, step, params, average):
  """Answers held-out questions; returns an Evaluation."""
  config, number = parts.config, parts.config.eval.answers
  if not number:
    text = 'no held-out questions: config.eval.answers=0'
    return Evaluation({}, [], text, text)
  questions, prompts = parts.questions.draw(
    f'{config.seed}-heldout', number, heldout=True
  )
  temperature = config.policy.eval_temperature
  changes = {'temperature': temperature}
  if not temperature:  # they filter what temperature 0 does not draw
    changes |= {'top_k': 0, 'top_p': 1.0}
  row, texts = {}, []
  for name, tree in (('', params), ('ema_', average)):
    if tree is None:
      continue
    _, answers = parts.answer(tree, 'heldout', prompts, 1, **changes)
    rewards = parts.questions.score(questions, answers)
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
