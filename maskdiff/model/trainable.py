"""The parameters that a training changes: all, the adapters or the drafter."""

from maskdiff.model import lora


def trainable(c, tree):
  """Returns the part of a parameter tree that training changes.

  Args:
    c: TransformerConfig.
    tree: parameter tree, of arrays or anything else.

  Returns:
    The adapters, {'blocks': ...}, if there are any; {'drafter': ...} if the
    network is frozen; else the whole tree.
  """
  if c.drafter.frozen:
    return {'drafter': tree['drafter']}
  return lora.trained(tree)


def join(tree, part):
  """Returns a parameter tree with other values for a part of it."""
  merged = dict(tree)
  for name, x in part.items():
    deeper = isinstance(x, dict) and name in tree
    merged[name] = join(tree[name], x) if deeper else x
  return merged
