"""Questions of a task as prompts, and the rewards of their answers."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from maskdiff.distributed import consensus
from maskdiff.errors import UserError, inline
from maskdiff.files.paths import local_path
from maskdiff.posttraining import chat, chat_tokens
from maskdiff.rl import rewards, tasks
from maskdiff.rl.reward_pool import RewardPool, Rewards


@dataclasses.dataclass(frozen=True)
class Questions:
  """A task, with its prompts for one model.

  Attributes:
    task: tasks.Task.
    reward: rewards.Source.
    encode: function from the text of a prompt to a list of tokens.
    decode: function from a list of tokens to a text.
    end_ids: ids that end an answer.
    template: chat.Template of the prompts, or None.
    score: (questions, texts) -> Rewards, the same in all processes.
    room: largest number of tokens of a prompt.
  """

  task: tasks.Task
  reward: rewards.Source
  encode: Callable
  decode: Callable
  end_ids: tuple
  template: chat.Template | None
  score: Callable
  room: int

  def draw(self, seed, n, heldout=False):
    """Returns n questions, and their prompts as lists of tokens.

    Raises:
      UserError: a prompt is too long; or see tasks.get.
    """
    questions = self.task.draw(seed, n, heldout)
    prompts = [self.encode(question['prompt']) for question in questions]
    for question, prompt in zip(questions, prompts, strict=True):
      if len(prompt) > self.room:
        raise UserError(
          f'the prompt {inline(question["prompt"], 40)!r} has {len(prompt)} '
          f'tokens, and rows have room for {self.room} before the answer: set '
          f'--config.data.length to {len(prompt) - self.room} more, or lower '
          '--config.sample.gen_length'
        )
    return questions, prompts


def open_questions(config, tokenizer):
  """Opens task, chat template and reward of a config; returns Questions.

  Process 0 starts the workers of the reward, and checks the reward of a
  question. All processes must call this function.

  Args:
    config: ConfigDict.
    tokenizer: data.tokenizer.Tokenizer of the policy.

  Raises:
    UserError: the task, the template or the reward does not exist or fails; or
      rows have no room for a prompt.
  """
  p = config.policy
  task = tasks.get(p.task)
  source = rewards.find(p.reward or task.reward)
  template, end_ids = _template(config), (config.tokens.eos_id,)
  encode = tokenizer.encode
  if template is not None:
    encoder = chat_tokens.encoder(template, tokenizer)
    end_ids = (*end_ids, *chat_tokens.end_ids(encoder))
    encode = lambda text: chat_tokens.prompt_ids(
      encoder, [{'role': 'user', 'content': text}]
    )
  room = config.data.length - config.sample.gen_length
  if room < 1:
    raise UserError(
      f'config.sample.gen_length={config.sample.gen_length} leaves no room '
      f'for a prompt in rows of config.data.length={config.data.length}; '
      'raise --config.data.length'
    )
  pool = _open_pool(config, source, task.draw('check', 1, False)[0])
  return Questions(
    task=task,
    reward=source,
    encode=encode,
    decode=tokenizer.decode,
    end_ids=end_ids,
    template=template,
    score=functools.partial(_score, pool),
    room=room,
  )


def _template(config):
  """Returns the chat.Template of the prompts, or None."""
  name = config.policy.chat_template
  if name == 'none':
    return None
  if name:
    return chat.load(str(local_path(name)))
  return chat.of_folder(local_path(config.init_from))


def _open_pool(config, source, question):
  """Returns the RewardPool, checked with a question; None but in process 0."""
  pool, error = None, None
  if jax.process_index() == 0:
    workers, timeout_s = (
      config.policy.reward_workers,
      config.policy.reward_timeout_s,
    )
    try:
      pool = RewardPool(source, workers, timeout_s)
      pool.check(question)
    except UserError as found:
      error = found
  consensus.raise_in_all(error)
  return pool


def _score(pool, questions, texts):
  def work():
    found = pool.score(questions, texts)
    return {
      'total': found.total.tolist(),
      'failed': found.failed.tolist(),
      'parts': {name: part.tolist() for name, part in found.parts.items()},
      'errors': found.errors,
      'messages': found.messages,
    }

  found = consensus.from_first(work)
  return Rewards(
    total=np.array(found['total']),
    failed=np.array(found['failed'], bool),
    parts={name: np.array(x) for name, x in found['parts'].items()},
    errors=found['errors'],
    messages=found['messages'],
  )


def require_rewards(name, found):
  """Raises UserError if the reward failed on every answer.

  Args:
    name: name of the reward.
    found: Rewards.
  """
  if found.failed.all():
    kind, message = next(iter(found.messages.items()))
    raise UserError(
      f'reward {name!r} failed on all {len(found.failed)} answers of a round: '
      f'{kind} ({message}); change the function, or set '
      '--config.policy.reward'
    )
