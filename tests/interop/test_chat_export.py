"""Exports of chat models in transformers: template and end tokens.

The tests are skipped without transformers (requirements-interop-test.txt).
"""

import pathlib
import types

import made_answers
import made_tokenizers
import pytest
import untrained_run

from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.interop import convert
from maskdiff.posttraining import chat, chat_tokens, finetuning

transformers = pytest.importorskip('transformers')

ROOT = pathlib.Path(__file__).parents[2]
IM = ('<|im_start|>', '<|im_end|>')
TURNS = [
  {'role': 'user', 'content': 'Add 2 and 3.'},
  {'role': 'assistant', 'content': '5'},
  {'role': 'user', 'content': 'Und 4?'},
]


def fine_tuned(folder, case):
  """Writes a run with the files of its rows; returns its chat_tokens.Encoder.

  qwen25 has two tokens that end an answer, plain has one.
  """
  if case == 'plain':
    path = ROOT / 'tokenizer' / 'stdlib_4k.model'
  else:
    path = folder / 'tokenizer'
    special = made_tokenizers.added(('<|endoftext|>', *IM))
    made_tokenizers.write_json(path, made_tokenizers.spec(added_tokens=special))
  tokenizer = tokenizer_lib.load(path)
  ids = {
    'tokens_eos_id': tokenizer.eos_id,
    'tokens_bos_id': tokenizer.bos_id or tokenizer.eos_id,
    'tokens_mask_id': tokenizer.mask_id or tokenizer.vocab_size,
  }
  untrained_run.save(folder / 'run', tokenizer, **ids)
  rows = made_answers.write_rows(folder / 'rows', tokenizer)
  template = chat.load(case)
  chat.save(template, rows)
  config = types.SimpleNamespace(data=types.SimpleNamespace(path=str(rows)))
  for name, content in finetuning.chat_files(config, tokenizer).items():
    (folder / 'run' / name).write_bytes(content)
  return chat_tokens.encoder(template, tokenizer)


@pytest.mark.parametrize('case', ['plain', 'qwen25'])
def test_transformers_renders_and_ends_as_the_run(case, tmp_path):
  encoder, out = fine_tuned(tmp_path, case), tmp_path / 'out'
  convert.to_hf(str(tmp_path / 'run'), str(out))
  loaded = transformers.AutoTokenizer.from_pretrained(out)
  options = dict(add_generation_prompt=True)
  found = loaded.apply_chat_template(TURNS, return_dict=False, **options)
  assert found == chat_tokens.prompt_ids(encoder, TURNS)
  generation = transformers.GenerationConfig.from_pretrained(out)
  ends = chat_tokens.end_ids(encoder)
  assert tuple(generation.eos_token_id) == ends
  assert len(ends) == {'plain': 1, 'qwen25': 2}[case]
  assert generation.pad_token_id == encoder.tokenizer.pad_id
