"""Writes the adapters of a run in the layout of the package peft.

    adapter_config.json          rank, alpha, targets and the name of the base
    adapter_model.safetensors    A and B of each target and layer

`peft.PeftModel.from_pretrained(base, folder)` loads the folder onto the base, a
model of transformers with the weights of config.init_from.
"""

import contextlib
import functools
import os
import re

import numpy as np

from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.errors import UserError, inline
from maskdiff.files import atomic, new_folder
from maskdiff.interop import (
  config_json,
  convert,
  hf,
  hf_tokenizer,
  mask_token,
  run_leaves,
  safetensors,
  tensor_layout,
)
from maskdiff.model import transformer


def to_peft(workdir, folder, family=None):
  """Writes the adapters of a work directory as a folder of peft.

  Args:
    workdir: work directory of a run with config.lora.rank.
    folder: directory to create.
    family: name of the family of the base; see convert.to_hf.

  Returns:
    list of lines to print.

  Raises:
    UserError: the run has no adapters, or see convert.to_hf.
  """
  with contextlib.ExitStack() as stack:
    config, leaves, source = run_leaves.open_workdir(
      workdir, stack, merge=False
    )
    if not config.lora.rank:
      raise UserError(
        f'{inline(workdir)} has no adapters (config.lora.rank=0): write the '
        'whole model with --to hf'
      )
    if len(scaling := config.model.rope_scaling) == 2:
      raise UserError(
        f'{inline(workdir)} has config.model.rope_scaling={tuple(scaling)}, '
        'which the base of adapters lacks: write the whole model with --to hf'
      )
    c = transformer.from_config(config).lora
    published = os.path.join(workdir, hf.PUBLISHED)
    original = None
    if os.path.lexists(os.path.join(published, config_json.CONFIG)):
      original = config_json.read_config(workdir, hf.PUBLISHED)
    chosen = convert.choose_family(config, original, family)
    content = convert.as_text(adapter_config(c, chosen, config.init_from))
    with new_folder.new_folder(folder) as new:
      path = os.path.join(new, 'adapter_config.json')
      with safetensors.writing(path):
        atomic.write(path, content)
      safetensors.write(
        os.path.join(new, 'adapter_model.safetensors'),
        tensors(c, chosen, leaves),
      )
  lines = [
    f'{inline(folder)}: adapters of {", ".join(c.matrices)} with rank {c.rank} '
    f'from {inline(source)}',
    f'base: {inline(config.init_from)}, as {chosen.architectures[0]}',
  ]
  if hf_tokenizer.has_tokenizer(workdir) and mask_token.is_added(
    config, tokenizer_lib.load(workdir)
  ):
    lines.append(
      'note: the base has no mask token, and its embedding is not part of the '
      'adapters: write the whole model with --to hf'
    )
  return lines


def adapter_config(c, family, base):
  """Returns the contents of adapter_config.json, a dict.

  The targets are a regular expression, because a list of names may match other
  modules: the head of LLaDA is called ff_out, as are the matrices of its
  layers.

  Args:
    c: LoraConfig.
    family: families.Family of the base.
    base: path or name of the base.
  """
  names = [family.names[f'blocks/{matrix}'] for matrix in c.matrices]
  stack = names[0].partition('.{n}.')[0].rpartition('.')[2]
  modules = [
    re.escape(name.partition('.{n}.')[2].removesuffix('.weight'))
    for name in names
  ]
  whole = float(c.alpha).is_integer()
  return {
    'peft_type': 'LORA',
    'task_type': None,
    'base_model_name_or_path': base,
    'r': c.rank,
    'lora_alpha': int(c.alpha) if whole else c.alpha,
    'lora_dropout': 0.0,
    'target_modules': rf'(?:.*\.)?{stack}\.\d+\.(?:{"|".join(modules)})',
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
    'init_lora_weights': True,
    'modules_to_save': None,
    'use_rslora': False,
  }


def tensors(c, family, leaves):
  """Returns the tensors of adapter_model.safetensors, a list of New.

  Args:
    c: LoraConfig.
    family: families.Family of the base.
    leaves: dict of Leaf by name, with adapters.
  """
  found = []
  for matrix in c.matrices:
    a, b = (leaves[f'blocks/{matrix}_{side}'] for side in 'ab')
    published = tensor_layout.names(family, f'blocks/{matrix}', a.shape[0])
    inputs = int(np.prod(a.shape[1:-1]))
    outputs = int(np.prod(b.shape[2:]))
    for n, name in enumerate(published):
      module = f'base_model.model.{name.removesuffix(".weight")}'
      for side, leaf, size, shape in (
        ('A', a, (inputs, c.rank), (c.rank, inputs)),
        ('B', b, (c.rank, outputs), (outputs, c.rank)),
      ):
        parts = functools.partial(_transposed, leaf, n, size)
        name = f'{module}.lora_{side}.weight'
        found.append(safetensors.New(name, np.dtype('float32'), shape, parts))
  return found


def _transposed(leaf, n, size):
  """Yields layer n of an adapter, as a transposed matrix."""
  rest = (slice(None),) * (len(leaf.shape) - 1)
  layer = np.asarray(leaf.read((slice(n, n + 1), *rest)), np.float32)
  yield np.ascontiguousarray(layer.reshape(size).T)
