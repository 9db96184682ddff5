"""Which part of the model an instruction of the compiled step belongs to.

Told from what the compiler keeps of the Python code: the einsum strings of
model.py and cross_entropy.py, and the functions that an instruction is from.
Einsums are told apart by their letters, not by the order of these: see the
letters in WORKSPACE.md. What cannot be told keeps its op_name.
"""

import re

EINSUM = re.compile(r'([a-z.]+),([a-z.]+)->([a-z.]+)')
# From Python functions, and from the files that others are in, to parts: the
# innermost one that is known decides.
FUNCTIONS = {
  'rms_norm': 'normalisation',
  'rope': 'rotary positions',
  'rotate': 'rotary positions',
  'lookup': 'embedding',
  '_lookup_forward': 'embedding',
  '_lookup_backward': 'embedding',
  'block': 'layer: elementwise',
  'Transformer._layers': 'layer: stacked arrays',
  'Transformer._layers.<locals>.<lambda>': 'weights: cast and copy',
  'Transformer.logits': 'logits',
  'Transformer.vocabulary': 'logits',
  'batch_gradients.<locals>.accumulate': 'gradient sum over microbatches',
  'summarize': 'metrics',
  'scale_by_adam': 'optimizer',
  'apply_updates': 'optimizer',
  'add_decayed_weights': 'optimizer',
  'clip_by_global_norm': 'optimizer',
  'chain': 'optimizer',
  'tree_norm': 'optimizer',
}
FILES = {
  'attention': 'attention besides kernel',
  'splash_attention_kernel': 'attention besides kernel',
  'cross_entropy': 'loss',
  'guard': 'guard',
  'canvas': 'noise',
  'masked_diffusion': 'noise',
  'autoregressive': 'noise',
  'table': 'noise',
  'schedule': 'noise',
  'candidates': 'sampling: choice of tokens',
  'remasking': 'sampling: choice of tokens',
  'sampler': 'sampling: bookkeeping',
  'passes': 'sampling: bookkeeping',
  'commit': 'sampling: choice of tokens',
  'cached_attention': 'attention besides kernel',
  'optimizer': 'optimizer',
}
# Parts that are computed in the forward pass and again in the backward pass.
IN_LAYER = ('attention', 'mlp', 'normalisation', 'rotary', 'layer', 'embed')


def model_part(op_name, functions):
  """The part of the model that an instruction belongs to, in words.

  Args:
    op_name: of its metadata, or a name of the compiler's.
    functions: of Python that it is from, `file.name`, innermost first.

  Returns:
    E.g. 'mlp gate/up forward'; the op_name if it cannot be told.
  """
  part = (
    _weights(op_name)
    or _kernel(op_name)
    or _einsum(op_name)
    or _scan(op_name, functions)
    or _function(op_name, functions)
  )
  if part is None:
    # The compiler's own names end in a number.
    return re.sub(r'^jit\(\w+\)/|\.\d+$', '', op_name)
  if part.startswith(IN_LAYER):
    return f'{part} {direction(op_name)}'
  return part


def direction(op_name):
  """forward, recomputed (rematerialisation) or backward."""
  if re.search(r'splash_mha_(dkv|dq)', op_name):
    return 'backward'
  if 'rematted_computation' in op_name:
    return 'recomputed'
  return 'backward' if 'transpose(' in op_name else 'forward'


def _weights(op_name):
  """What the compiler does to arguments, which it names after themselves."""
  argument = re.match(r'(state\.)?params\[', op_name)
  return 'weights: cast and copy' if argument else None


def _kernel(op_name):
  return 'attention kernel' if 'splash_mha' in op_name else None


def _einsum(op_name):
  found = EINSUM.findall(op_name)
  if not found:
    return None
  first, second, out = found[-1]
  letters = set(first + second + out)
  if 'v' in letters:
    if 't' not in letters:
      return 'logits'
    kinds = {'tv': 'logits', 'td': 'gradient of hidden states'}
    return 'loss: ' + kinds.get(out, 'gradient of the head')
  if 'f' in letters:
    return 'mlp gate/up' if 'f' in out else 'mlp down'
  if 's' in letters:
    return 'attention'
  if {'d', 'k'} <= letters:
    if 'd' in out:
      return 'attention output'
    return 'attention query' if 'h' in out else 'attention key/value'
  return None


def _scan(op_name, functions):
  """Slices of arrays that are stacked over the layers, in and out."""
  sliced = re.search(r'dynamic_(update_)?(index_in_dim|slice)', op_name)
  outer = functions and functions[0] in (
    'transformer.Transformer._layers',
    'step.batch_gradients',
  )
  return 'layer: stacked arrays' if sliced and outer else None


def _function(op_name, functions):
  if 'silu' in op_name or 'logistic' in op_name:
    return 'mlp activation'
  for function in functions:
    file, _, qualified = function.partition('.')
    for name in (qualified, qualified.split('.')[0]):
      if name in FUNCTIONS:
        return FUNCTIONS[name]
    if file in FILES:
      return FILES[file]
  return None
