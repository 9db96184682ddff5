"""The table of objectives, with every trait in which objectives differ.

No other file compares the name of an objective with a string. To add an
objective, write a module with `make_canvas` and `show`, and add an entry to
OBJECTIVES.
"""

import dataclasses
from collections.abc import Callable

import jax

from maskdiff.model import transformer
from maskdiff.objectives import autoregressive, masked_diffusion


@dataclasses.dataclass(frozen=True)
class Objective:
  """Traits of a training objective.

  Attributes:
    make_canvas: (ObjectiveConfig, Rows of [b, L], row numbers [b] int32, key,
      batch, progress) -> Canvas; see masked_diffusion.make_canvas.
    show: (tokens [B, L] int32, valid [B, L] bool, bos_id, doc) -> inputs
      [B, L] int32 and their masks.Labels.
    order: the order in which tokens can be predicted: 'any', or
      'left_to_right' if the network sees only the tokens to the left.
    likelihood: 'bound' if the loss is an upper bound on the negative
      log-likelihood, 'exact' if the loss equals it.
    can_guide: whether the network was trained with masked prompts, which
      classifier-free guidance needs.
    exact_cache: whether positions see only positions to their left, so that
      a KV cache of committed tokens stays exact.
    attention_flops: attention FLOPs of a training step per token, in units of
      N L H K (layers, length, heads, head dimension).
    with_masks: (ObjectiveConfig, Rows of [B, L], times [B], masked [B, L] bool,
      lengths [B]) -> Canvas for given masks; None if the objective draws none.
  """

  make_canvas: Callable
  show: Callable
  order: str
  likelihood: str
  can_guide: bool
  exact_cache: bool
  attention_flops: int
  with_masks: Callable | None = None

  @property
  def left_to_right(self):
    return self.order == 'left_to_right'


OBJECTIVES = {
  'masked_diffusion': Objective(
    make_canvas=masked_diffusion.make_canvas,
    show=masked_diffusion.show,
    order='any',
    likelihood='bound',
    can_guide=True,
    exact_cache=False,
    attention_flops=12,
    with_masks=masked_diffusion.with_masks,
  ),
  'autoregressive': Objective(
    make_canvas=autoregressive.make_canvas,
    show=autoregressive.show,
    order='left_to_right',
    likelihood='exact',
    can_guide=False,
    exact_cache=True,
    attention_flops=6,  # a query sees half of the keys
  ),
}


@jax.named_scope('part(noise)')
def make_canvas(c, rows, numbers, key, batch, progress=0.0):
  """Returns the Canvas of the objective `c.name`.

  Arguments as for masked_diffusion.make_canvas.
  """
  return OBJECTIVES[c.name].make_canvas(c, rows, numbers, key, batch, progress)


def show(name, tokens, valid, bos_id, doc=0):
  """Returns inputs in the form that a network was trained on.

  Args:
    name: a key of OBJECTIVES, the objective of the training.
    tokens: [B, L] int32.
    valid: [B, L] bool, False on padding.
    bos_id: id of the token before the first token of a causal row.
    doc: [B, L] int32, documents; by default each row is one document.

  Returns:
    inputs [B, L] int32, and their masks.Labels.
  """
  return OBJECTIVES[name].show(tokens, valid, bos_id, doc)


def flops_per_token(name, model_config, length):
  """Returns matrix-product FLOPs of a training step per token.

  The sum of two terms: 6 per weight that multiplies an activation, including
  the head; and `attention_flops` x N L H K for attention. Recomputation is not
  counted. The head is counted for every token, although the loss skips unmasked
  tokens.

  Args:
    name: a key of OBJECTIVES.
    model_config: transformer.TransformerConfig.
    length: L.
  """
  c = model_config
  _, inner = transformer.num_params(c)
  weights = inner + c.vocab_size * c.embed
  attention = c.layers * length * c.heads * c.head_dim
  return 6 * weights + OBJECTIVES[name].attention_flops * attention
