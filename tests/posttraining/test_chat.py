"""Chat templates render as those of transformers, and cannot do harm."""

import concurrent.futures
import dataclasses
import json
import pathlib

import pytest

from maskdiff.errors import UserError
from maskdiff.posttraining import chat

GOLDEN = json.loads(
  (
    pathlib.Path(__file__).parents[1] / 'golden' / 'chat_templates.json'
  ).read_text()
)
NAMES = {
  'llada_instruct': 'llada',
  'llada_dllm': 'llada_dllm',
  'llada_automodel': 'llada_nemo',
  'llama3': 'llama3',
  'qwen25_fast_dllm_v2': 'qwen25',
  'qwen3_sdar': 'qwen3',
}


def rendered(case):
  template = chat.load(
    NAMES[case['template']], json.dumps(case['kwargs'] or {})
  )
  bos = GOLDEN['templates'][case['template']]['bos_token']
  return chat.render(
    template,
    GOLDEN['conversations'][case['conversation']],
    generation_prompt=case['add_generation_prompt'],
    special={'bos_token': bos},
  )


def test_golden_renderings_are_byte_equal():
  assert len(GOLDEN['renderings']) == 140
  for case in GOLDEN['renderings']:
    result = rendered(case)
    assert result.text == case['text'], case
    if case.get('assistant_spans') is not None:
      spans = [list(span) for span in result.generated]
      assert spans == case['assistant_spans']


@pytest.mark.parametrize('name', ['qwen25', 'qwen3'])
def test_results_of_tools_are_a_turn_of_the_user(name):
  roles = ['system', 'user', 'assistant', 'tool', 'tool', 'assistant']
  messages = [
    {'role': role, 'content': content}
    for role, content in zip(roles, 'suabcd', strict=True)
  ]
  think = '<think>\n\n</think>\n\n' if name == 'qwen3' else ''
  assert text(chat.load(name), messages) == (
    '<|im_start|>system\ns<|im_end|>\n'
    '<|im_start|>user\nu<|im_end|>\n'
    '<|im_start|>assistant\na<|im_end|>\n'
    '<|im_start|>user\n<tool_response>\nb\n</tool_response>'
    '\n<tool_response>\nc\n</tool_response><|im_end|>\n'
    f'<|im_start|>assistant\n{think}d<|im_end|>\n'
  )


def own(source):
  return chat.Template('own', source)


def text(template, messages=(), seconds=10.0, **options):
  options = {'generation_prompt': False, 'special': {}} | options
  return chat.render(template, messages, seconds=seconds, **options).text


USER = {'role': 'user', 'content': 'x'}


def test_template_of_a_folder(tmp_path):
  assert chat.of_folder(tmp_path) is None
  config = tmp_path / 'tokenizer_config.json'
  config.write_text(json.dumps({'chat_template': None}))
  assert chat.of_folder(tmp_path) is None
  config.write_text(json.dumps({'chat_template': 'one'}))
  assert text(chat.load(str(tmp_path))) == 'one'
  named = [
    {'name': 'tool_use', 'template': 'tools'},
    {'name': 'default', 'template': 'two'},
  ]
  config.write_text(json.dumps({'chat_template': named}))
  assert text(chat.load(str(tmp_path))) == 'two'
  (tmp_path / 'chat_template.jinja').write_text('three')
  assert text(chat.of_folder(tmp_path)) == 'three'
  assert text(chat.load(str(tmp_path / 'chat_template.jinja'))) == 'three'


@pytest.mark.parametrize(
  'config, problem',
  [
    ('{}', 'has no chat template'),
    ('{"chat_template": 7}', 'has no chat template'),
    ('{"chat_template": [1, {"name": "default"}]}', 'has no chat template'),
    ('{"chat_template": [{"name": {}}, {"name": []}]}', 'no chat template'),
    ('{"chat_template": "{% if %}"}', 'Expected an expression'),
    ('[', 'is not valid JSON'),
  ],
)
def test_folder_with_a_bad_template_is_refused(tmp_path, config, problem):
  (tmp_path / 'tokenizer_config.json').write_text(config)
  with pytest.raises(UserError, match=problem):
    chat.load(str(tmp_path))


def test_unknown_name_is_refused_with_the_names():
  with pytest.raises(UserError, match="did you mean 'llama3'"):
    chat.load('lama3')


@pytest.mark.parametrize('arguments', ['[1]', '{', '"x"'])
def test_arguments_are_a_json_object(arguments):
  with pytest.raises(UserError, match='template arguments'):
    chat.load('plain', arguments)


def test_options_are_those_of_transformers():
  source = """
  {% for m in messages %}
    {% if loop.index0 == 1 %}{% continue %}{% endif %}
{{ m | tojson }}
  {% endfor %}
"""
  messages = [{'a': '<é>'}, {'b': 1}, {'c': None}]
  assert text(own(source), messages) == '\n{"a": "<é>"}\n{"c": null}\n'
  assert text(own("{{ strftime_now('%Y') }}")).isdigit()


@pytest.mark.parametrize(
  'source, problem',
  [
    ("{{ raise_exception('no system turn') }}", 'no system turn'),
    ('{{ messages[0].content + 1 }}', 'can only concatenate'),
    ('{{ messages.append(1) }}', 'unsafe'),
    ("{{ ''.__class__.__mro__ }}", 'unsafe'),
    ('{% for i in range(10 ** 9) %}x{% endfor %}', 'Range too big'),
    ('{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}', 'recursion'),
    ("{% include '/etc/passwd' %}", 'no loader'),
    ("{{ strftime_now('%Y') }}", 'date_string'),
  ],
)
def test_failing_template_is_one_line(source, problem):
  with pytest.raises(UserError, match=problem) as error:
    text(own(source), [USER], fixed_date=True)
  assert len(str(error.value).splitlines()) == 1


ENDLESS = '{% for i in range(99999) %}' * 3 + '{% endfor %}' * 3


def test_template_that_does_not_end_is_stopped():
  with pytest.raises(UserError, match='does not end'):
    text(own(ENDLESS), seconds=0.1)


def test_template_whose_compilation_does_not_end_is_stopped(
  tmp_path, monkeypatch
):
  """Jinja computes constants when it compiles, for example of a folder."""
  monkeypatch.setattr(chat, 'MAX_SECONDS', 0.1)
  (tmp_path / chat.FILE).write_text('{{ 9 ** (9 ** 9) }}')
  with pytest.raises(UserError, match='does not end'):
    chat.of_folder(tmp_path)


def test_template_keeps_the_arguments_of_its_rows_as_defaults():
  source = '\n  {% macro m() %}{{ x }}{% endmacro %}{{ m() }}{{ y }}{{ z.a }}'
  values = {'x': 'é"%}\n', 'y': None, 'z': {'a': [True, 1.5]}, 'not-a-name': 1}
  arguments = json.dumps(values)
  found = chat.with_defaults(own(source), arguments)
  expected = text(chat.Template('own', source, arguments))
  assert text(found) == expected == '\né"%}\nNone[True, 1.5]'
  other = dataclasses.replace(found, arguments='{"x": 1}')
  assert text(other) == '\n1None[True, 1.5]'
  assert chat.with_defaults(own(source), '{}') == own(source)
  for damaged in (3, '[]', '{'):
    with pytest.raises(UserError, match='template arguments'):
      chat.with_defaults(own(source), damaged)


def test_template_in_another_thread_is_stopped_too():
  """The thread can be used again, as those of a server are."""

  def errors():
    for source in (ENDLESS, 'ends', ENDLESS):
      try:
        yield text(own(source), seconds=0.1)
      except UserError as error:
        yield str(error)

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first, second, third = pool.submit(lambda: list(errors())).result(30)
  assert 'does not end' in first and first == third
  assert second == 'ends'


def test_template_that_writes_without_end_is_stopped(monkeypatch):
  monkeypatch.setattr(chat, 'MAX_CHARS', 1000)
  with pytest.raises(UserError, match='over 1,000 characters'):
    text(own('{% for i in range(2000) %}x{% endfor %}'))
