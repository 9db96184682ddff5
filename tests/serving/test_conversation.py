"""Chat in a terminal: commands, history, and how an answer is shown."""

import dataclasses
import json
import os
import shutil

import local_server
import pytest

from maskdiff.errors import UserError
from maskdiff.files import streams
from maskdiff.sampling import lengths
from maskdiff.sampling.settings import sampler_config
from maskdiff.serving import asked, screen
from maskdiff.serving.conversation import Conversation

CONTEXT = 128


@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
  """Returns an asked.Model, its Network, and a list of the prompts so far."""
  folder = tmp_path_factory.mktemp('model') / 'bytes'
  tokenizer = local_server.byte_tokenizer(folder)
  config, network = local_server.make_network(tokenizer)
  config.data.length = CONTEXT
  c, _ = sampler_config(config)
  prompts = []

  def encode(messages):
    prompts.append(json.loads(json.dumps(messages)))
    text = ''.join(f'{m["role"][0]}{m["content"]}\n' for m in messages)
    return tokenizer.encode(text)

  values = {'gen_length': 16, 'steps': 32, 'stop_at_eos': True}
  chat = asked.Chat(encode)
  model = asked.Model('tiny', config, c, values, tokenizer, CONTEXT, chat)
  return model, network, prompts


def say(loaded, conversation, text):
  """Returns the parts of an answer."""
  return list(conversation.answer(*loaded[:2], text))


@pytest.mark.slow
def test_history_grows_and_commands_change_it(loaded):
  prompts = loaded[-1]
  c = Conversation('be brief', seed=5)
  first = say(loaded, c, 'hi')
  assert c.seed == 6
  text = ''.join(new for new, _ in first)
  begun = [
    {'role': 'system', 'content': 'be brief'},
    {'role': 'user', 'content': 'hi'},
  ]
  assert c.messages == [*begun, {'role': 'assistant', 'content': text}]
  say(loaded, c, 'more')
  assert prompts[-1] == [
    *begun,
    {'role': 'assistant', 'content': text},
    {'role': 'user', 'content': 'more'},
  ]
  assert c.command('/reset') == 'new conversation'
  assert c.messages == begun[:1]
  assert c.command('/seed 5') == 'seed 5'
  assert say(loaded, c, 'hi') == first
  c.command('/system')
  assert c.messages == []
  assert '/seed N' in c.command('/help')
  assert not c.ended
  c.command('/quit')
  assert c.ended


def test_parts_are_the_committed_text_and_the_masks(loaded):
  parts = say(loaded, Conversation(seed=3), 'x')
  answer, masked = '', []
  for new, shown in parts:
    answer += new
    masked.append(shown.count('░'))
    assert shown.partition('░')[0].startswith(answer)
  assert shown == answer
  assert len(parts) > 2 and masked[0] > masked[-1] == 0


@pytest.mark.parametrize(
  'line, problem',
  [
    ('/rest', "no command /rest; did you mean '/reset'?"),
    ('/seed x', 'must be a whole number'),
    ('/seed 4294967296', 'below 2'),
  ],
)
def test_bad_command_is_an_error(line, problem):
  with pytest.raises(UserError, match=problem.replace('?', r'\?')):
    Conversation().command(line)


def test_long_conversation_is_an_error_that_names_reset(loaded):
  c = Conversation()
  with pytest.raises(UserError, match='begin again with /reset'):
    say(loaded, c, 'x' * CONTEXT)
  assert c.messages == [] and c.seed == 0


def test_last_answer_gets_the_room_that_is_left(loaded):
  """Steps shrink with the slots: two per slot."""
  c = Conversation()
  say(loaded, c, 'x' * (CONTEXT - 5))
  assert len(c.messages) == 2


def test_answer_has_the_predicted_length(loaded, monkeypatch):
  model, network, _ = loaded
  config = model.config.copy_and_resolve_references()
  config.data.length_tokens = ((3, 17), (6, 18))
  model = dataclasses.replace(model, config=config, predict_length=True)
  asked_for = []

  def predict(network, c, length_tokens, prompts, seeds, settings, batch):
    asked_for.extend([prompts, seeds])
    return [lengths.Length(*length_tokens[1], forwards=1, positions=4)]

  def serve(network, c, requests, *_, **__):
    asked_for.extend(requests)
    raise UserError('enough')

  monkeypatch.setattr(lengths, 'predict', predict)
  monkeypatch.setattr('maskdiff.serving.conversation.serve', serve)
  with pytest.raises(UserError, match='enough'):
    say((model, network), Conversation(seed=4), 'hi')
  (prompt,), seeds, request = asked_for
  assert seeds == [4]
  assert request.row == [*prompt, 18, *[None] * 6]
  # As many steps per slot as the settings of the model: 32 for 16.
  assert (request.settings.gen_length, request.settings.steps) == (6, 12)
  with pytest.raises(UserError, match='begin again with /reset'):
    say((model, network), Conversation(), 'x' * (CONTEXT - 5))


def test_lines_fit_the_terminal():
  assert screen.wrap('abcdef\n\ngh', 4) == ['abcd', 'ef', '', 'gh']
  assert screen.wrap('漢字ab', 4) == ['漢字', 'ab']
  assert screen.wrap('a\tb', 8) == ['a       ', 'b']
  assert screen.wrap('\x1b[2J', 80) == ['\\x1b[2J']
  assert screen.wrap('e\u0301' * 4, 4) == ['e\u0301' * 4]


def test_answer_with_masks_is_drawn_over_itself(monkeypatch, capsysbinary):
  size = os.terminal_size((5, 4))
  monkeypatch.setattr(shutil, 'get_terminal_size', lambda: size)
  screen.print_with_masks([('', '░░░░░'), ('', 'a░░░b'), ('', 'acdeb\nf\ng')])
  erase = b'\x1b[2A\x1b[J'
  expected = ['░░░░\n░\n', 'a░░░\nb\n', 'f\ng\n', 'acdeb\nf\ng\n']
  found = capsysbinary.readouterr().out
  assert found == erase.join(text.encode() for text in expected)


def test_committed_text_is_printed_as_it_grows(capsys):
  screen.print_committed([('a', ''), ('', ''), ('bc', '')])
  assert capsys.readouterr().out == 'abc\n'
  assert streams.erase_lines(0) is None
