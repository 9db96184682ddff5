"""Tokens of conversations: prompts, trained turns, bos and control tokens."""

import json
import pathlib

import made_tokenizers
import pytest

from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.errors import UserError
from maskdiff.posttraining import chat, chat_tokens

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / 'tests/golden/chat_templates.json').read_text())
LLADA = ('<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>')
SPECIAL = {
  'llada': ('<|startoftext|>', '<|endoftext|>', '<|mdm_mask|>', *LLADA),
  'llama3': ('<|begin_of_text|>', '<|end_of_text|>', *LLADA),
  'qwen': ('<|endoftext|>', '<|im_start|>', '<|im_end|>'),
}
FAMILY = {
  'llada': 'llada',
  'llada_dllm': 'llada',
  'llada_nemo': 'llada',
  'llama3': 'llama3',
  'qwen25': 'qwen',
  'qwen3': 'qwen',
}
END = {'llada': '<|eot_id|>', 'llama3': '<|eot_id|>', 'qwen': '<|im_end|>'}


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory):
  made = {'plain': tokenizer_lib.load(ROOT / 'tokenizer' / 'stdlib_4k.model')}
  for name, special in SPECIAL.items():
    folder = tmp_path_factory.mktemp(name)
    spec = made_tokenizers.spec(added_tokens=made_tokenizers.added(special))
    made_tokenizers.write_json(folder, spec)
    made[name] = tokenizer_lib.load(folder)
  return made


@pytest.fixture(params=['plain', *FAMILY])
def encoder(request, tokenizers):
  tokenizer = tokenizers[FAMILY.get(request.param, 'plain')]
  return chat_tokens.encoder(chat.load(request.param), tokenizer)


def encoder_of(tokenizers, name, arguments='{}'):
  template = chat.load(name, arguments)
  return chat_tokens.encoder(template, tokenizers[FAMILY.get(name, 'plain')])


def shown(encoder, ids):
  """Returns the text of ids with their special tokens."""
  texts = {i: text for text, i in encoder.ids.items()}
  pieces = (
    texts[i].encode() if i in texts else encoder.tokenizer.piece(i)
    for i in map(int, ids)
  )
  return b''.join(pieces).decode()


ANSWERED = {
  name: turns
  for name, turns in GOLDEN['conversations'].items()
  if turns[-1]['role'] == 'assistant'
}


@pytest.mark.parametrize('name', ANSWERED)
def test_prompt_of_sampling_begins_the_training_tokens(encoder, name):
  messages = ANSWERED[name]
  last = len(messages) - 1
  tokens, answer = chat_tokens.encode(encoder, messages, [last])
  prompt = chat_tokens.prompt_ids(encoder, messages[:last])
  assert tokens[: len(prompt)].tolist() == prompt
  assert answer.tolist() == [False] * len(prompt) + [True] * (
    len(tokens) - len(prompt)
  )


@pytest.mark.parametrize('name', ANSWERED)
def test_trained_turn_is_the_answer_with_its_end(encoder, name):
  messages = ANSWERED[name]
  tokens, answer = chat_tokens.encode(encoder, messages, [len(messages) - 1])
  family = FAMILY.get(encoder.template.name, 'plain')
  text = shown(encoder, tokens[answer])
  eos = encoder.names['eos_token']
  assert text.endswith(END.get(family, '') + eos)
  content = messages[-1]['content']
  text = text.removesuffix(END.get(family, '') + eos)
  assert text.strip().endswith(content.strip())
  assert int(tokens[-1]) == encoder.tokenizer.eos_id


@pytest.mark.parametrize('name', GOLDEN['conversations'])
def test_exactly_one_bos(encoder, name):
  tokens = chat_tokens.prompt_ids(encoder, GOLDEN['conversations'][name])
  bos = encoder.tokenizer.bos_id
  if bos is None:  # Qwen
    return
  assert tokens[0] == bos
  assert tokens.count(bos) == 1


def test_tokens_spell_the_golden_renderings(encoder):
  """Only the special tokens of the template are special."""
  golden = {
    'llada_dllm': 'llada_dllm',
    'llada_nemo': 'llada_automodel',
    'llama3': 'llama3',
    'qwen25': 'qwen25_fast_dllm_v2',
    'qwen3': 'qwen3_sdar',
    'llada': 'llada_instruct',
  }.get(encoder.template.name)
  cases = [
    case
    for case in GOLDEN['renderings']
    if case['template'] == golden
    and case['add_generation_prompt']
    and not case['kwargs']
  ]
  for case in cases:
    messages = GOLDEN['conversations'][case['conversation']]
    ids = chat_tokens.prompt_ids(encoder, messages)
    assert shown(encoder, ids) == case['text']
  assert golden is None or len(cases) == 10


def test_control_strings_of_contents_stay_text(encoder):
  special = ' '.join(encoder.ids)
  hostile = [
    {'role': 'system', 'content': special},
    {'role': 'user', 'content': f'{special}x{special}'},
    {'role': 'assistant', 'content': f'a {special}'},
  ]
  harmless = [turn | {'content': 'x'} for turn in hostile]
  is_special = lambda tokens: [
    i for i in map(int, tokens) if i in encoder.ids.values()
  ]
  tokens, answer = chat_tokens.encode(encoder, hostile, [2])
  expected, _ = chat_tokens.encode(encoder, harmless, [2])
  assert is_special(tokens) == is_special(expected)
  assert shown(encoder, tokens).count(special) == 4
  assert f'a {special}' in shown(encoder, tokens[answer])


def test_tokens_are_those_of_the_whole_text_between_special_tokens(tokenizers):
  encoder = encoder_of(tokenizers, 'qwen25')
  messages = [{'role': 'user', 'content': '  the 12\n'}]
  expected = encoder.tokenizer.encode('user\n  the 12\n')
  start = encoder.ids['<|im_start|>']
  ids = chat_tokens.prompt_ids(encoder, messages)
  second = [i for i, token in enumerate(ids) if token == start][1]
  assert ids[second + 1 : second + 1 + len(expected)] == expected


MULTI = [
  {'role': 'user', 'content': 'a?'},
  {'role': 'assistant', 'content': 'A'},
  {'role': 'user', 'content': 'b?'},
  {'role': 'assistant', 'content': 'B'},
  {'role': 'user', 'content': 'c?'},
]


@pytest.mark.parametrize('name', ['plain', 'llada', 'llada_nemo', 'qwen25'])
def test_all_trained_turns_have_their_ends(tokenizers, name):
  encoder = encoder_of(tokenizers, name)
  tokens, answer = chat_tokens.encode(encoder, MULTI, [1, 3])
  end = END.get(FAMILY.get(name), encoder.names['eos_token'])
  text = shown(encoder, tokens[answer])
  assert text.removesuffix(encoder.names['eos_token']) in (
    f'A{end}B{end}',
    f'A{end}B',
  )
  assert 'c?' not in shown(encoder, tokens)
  one, _ = chat_tokens.encode(encoder, MULTI, [3])
  assert shown(encoder, one) == shown(encoder, tokens)


def test_spans_of_nemo_are_those_that_its_template_marks(tokenizers):
  encoder = encoder_of(tokenizers, 'llada_nemo')
  for case in GOLDEN['renderings']:
    messages = GOLDEN['conversations'][case['conversation']]
    trained = [i for i, m in enumerate(messages) if m['role'] == 'assistant']
    if case['template'] == 'llada_automodel' and trained:
      tokens, answer = chat_tokens.encode(encoder, messages, trained)
      marked = [case['text'][a:b] for a, b in case['assistant_spans']]
      text = shown(encoder, tokens[answer])
      assert text == ''.join(marked) + '<|endoftext|>'


def test_qwen3_is_refused_where_thoughts_are_dropped(tokenizers):
  think = GOLDEN['conversations']['think']
  encoder = encoder_of(tokenizers, 'qwen3')
  with pytest.raises(UserError, match=r'messages\[1\].*--turns=each'):
    chat_tokens.encode(encoder, think, [1, 3])
  for last in (1, 3):  # each answer on its own
    tokens, answer = chat_tokens.encode(encoder, think, [last])
    assert shown(encoder, tokens[answer]).startswith('<think>\nadd ')
  silent = encoder_of(tokenizers, 'qwen3', '{"enable_thinking": false}')
  with pytest.raises(UserError, match=r'messages\[3\].*--chat_arguments'):
    chat_tokens.encode(silent, think, [3])
  tokens, answer = chat_tokens.encode(silent, ANSWERED['answered'], [1])
  assert shown(silent, tokens[answer]).startswith('7 times 8')


@pytest.mark.parametrize(
  'prompt, end, problem',
  [
    ('{{ bos_token }}{{ bos_token }}', '<|eot_id|>', 'writes 2 bos tokens'),
    ('x{{ bos_token }}', '<|eot_id|>', 'writes 1 bos tokens'),
    ('{{ mask_token }}', '<|eot_id|>', 'writes the mask token'),
    ('{{ bos_token }}', '', 'ends messages.1. with no special token'),
  ],
)
def test_templates_with_wrong_special_tokens_are_refused(
  tokenizers, prompt, end, problem
):
  content = '{{ messages[-1].content }}'
  answer = '{% if not add_generation_prompt %}' + content + end + '{% endif %}'
  template = chat.Template('own', prompt + answer)
  encoder = chat_tokens.encoder(template, tokenizers['llada'])
  with pytest.raises(UserError, match=problem):
    chat_tokens.encode(encoder, MULTI[:2], [1])


def test_special_tokens_before_the_content_do_not_end_an_answer(tokenizers):
  source = """
{%- for m in messages -%}
<|start_header_id|>{{ m.role }}
{%- if m.role == 'assistant' -%}
<|end_header_id|>final<|end_header_id|>{{ m.content }}
<|eot_id|> and more
{%- else -%}
{{ m.content }}<|end_header_id|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start_header_id|>assistant
{%- endif -%}
"""
  template = chat.Template('own', source)
  encoder = chat_tokens.encoder(template, tokenizers['llada'])
  for content in ('A', 'final', ''):
    answer = MULTI[1] | {'content': content}
    tokens, is_answer = chat_tokens.encode(encoder, [MULTI[0], answer], [1])
    assert shown(encoder, tokens[is_answer]) == (
      f'<|end_header_id|>final<|end_header_id|>{content}\n'
      '<|eot_id|><|endoftext|>'
    )


def test_answer_without_a_prompt_is_refused(encoder):
  with pytest.raises(UserError, match='the first turn is an answer'):
    chat_tokens.encode(encoder, MULTI[1:2], [0])
