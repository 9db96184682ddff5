"""The table of objectives, with every trait in which objectives differ.

No other file compares the name of an objective with a string. To add an
objective, write a module with `make_canvas` and `show`, and add an entry to
OBJECTIVES.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from maskdiff.model import transformer
from maskdiff.objectives import (
  autoregressive,
  block_diffusion,
  drafting,
  masked_diffusion,
  sdlm,
)
from maskdiff.objectives.canvas import canvas_loss


@dataclasses.dataclass(frozen=True)
class Objective:
  """Traits of a training objective.

  Attributes:
    make_canvas: (ObjectiveConfig, Rows of [b, L], row numbers [b] int32, key,
      batch, progress) -> Canvas; see masked_diffusion.make_canvas.
    show: (ObjectiveConfig or Network, tokens [B, L] int32, valid [B, L] bool,
      doc) -> inputs [B, L] int32 and their masks.Labels.
    order: the order in which tokens can be predicted: 'any';
      'left_to_right' if the network sees only the tokens to the left; or
      'blocks' if it sees its own block and the blocks to the left.
    likelihood: 'bound' if the loss is an upper bound on the negative
      log-likelihood, 'exact' if the loss equals it, or for windows that of a
      model that emits whole windows.
    can_guide: whether the network was trained with masked prompts, which
      classifier-free guidance needs.
    exact_cache: whether the tokens that a position sees are final once they
      are filled, so that a KV cache of them stays exact.
    visible_pairs: (ObjectiveConfig, L) -> pairs of a query and a key that it
      sees in a training row, divided by L^2.
    copies: (ObjectiveConfig, L) -> positions of a training row, divided by L.
    targets: (ObjectiveConfig, L) -> targets of a training row, divided by L.
    windows: whether the network predicts the next `window_length` tokens at
      once, from mask tokens.
    drafts: whether a drafter guesses the tokens after the next one.
    loss: (ObjectiveConfig, Transformer, Canvas) -> summed loss, and nll of each
      position; see canvas.canvas_loss.
    next_weight: (ObjectiveConfig, L) -> weight of a token in an autoregressive
      part of the loss.
    flops_per_token: as the function below, for an objective to whose cost the
      other numbers do not apply; else None.
    with_masks: (ObjectiveConfig, Rows of [B, L], times [B, K], masked [B, L]
      bool, lengths [B]) -> Canvas for given masks; None if the objective draws
      none.
    show_masked: as `show`, with masked [B, L] bool after the tokens, which are
      clean; the first L of the hidden states predict the masked tokens. None:
      the inputs of `show` with masked tokens.
  """

  make_canvas: Callable
  show: Callable
  order: str
  likelihood: str
  can_guide: bool
  exact_cache: bool
  visible_pairs: Callable
  copies: Callable = lambda c, length: 1
  targets: Callable = lambda c, length: 1
  windows: bool = False
  drafts: bool = False
  loss: Callable = canvas_loss
  next_weight: Callable = lambda c, length: c.autoregressive_weight
  flops_per_token: Callable | None = None
  with_masks: Callable | None = None
  show_masked: Callable | None = None

  @property
  def left_to_right(self):
    return self.order == 'left_to_right'

  @property
  def by_blocks(self):
    return self.order == 'blocks'

  @property
  def has_mask_token(self):
    """Whether mask tokens are inputs of the network."""
    return self.windows or not self.left_to_right


OBJECTIVES = {
  'masked_diffusion': Objective(
    make_canvas=masked_diffusion.make_canvas,
    show=masked_diffusion.show,
    order='any',
    likelihood='bound',
    can_guide=True,
    exact_cache=False,
    visible_pairs=lambda c, length: 1.0,
    with_masks=masked_diffusion.with_masks,
  ),
  'autoregressive': Objective(
    make_canvas=autoregressive.make_canvas,
    show=autoregressive.show,
    order='left_to_right',
    likelihood='exact',
    can_guide=False,
    exact_cache=True,
    visible_pairs=lambda c, length: 0.5,
  ),
  'block_diffusion': Objective(
    make_canvas=block_diffusion.make_canvas,
    show=block_diffusion.show,
    order='blocks',
    likelihood='bound',
    can_guide=False,  # the blocks before a noisy block are clean
    exact_cache=True,
    visible_pairs=block_diffusion.visible_pairs,
    copies=block_diffusion.copies,
    with_masks=block_diffusion.with_masks,
    show_masked=block_diffusion.show_masked,
  ),
  'sdlm': Objective(
    make_canvas=sdlm.make_canvas,
    show=sdlm.show,
    order='left_to_right',
    likelihood='exact',
    can_guide=False,
    exact_cache=True,
    visible_pairs=sdlm.visible_pairs,
    copies=sdlm.copies,
    targets=sdlm.targets,
    windows=True,
    show_masked=sdlm.show_masked,
  ),
  'drafting': Objective(
    make_canvas=drafting.make_canvas,
    show=autoregressive.show,
    order='left_to_right',
    likelihood='exact',
    can_guide=False,
    exact_cache=True,
    visible_pairs=lambda c, length: 0.5,
    targets=drafting.targets,
    drafts=True,
    loss=drafting.loss,
    next_weight=drafting.next_weight,
    flops_per_token=drafting.flops_per_token,
  ),
}


@jax.named_scope('part(noise)')
def make_canvas(c, rows, numbers, key, batch, progress=0.0):
  """Returns the Canvas of the objective `c.name`.

  Arguments as for masked_diffusion.make_canvas.
  """
  return OBJECTIVES[c.name].make_canvas(c, rows, numbers, key, batch, progress)


def loss(c, model, canvas):
  """Returns summed loss and nll of a Canvas; see canvas.canvas_loss."""
  return OBJECTIVES[c.name].loss(c, model, canvas)


def show(network, tokens, valid, doc=0):
  """Returns inputs in the form that a network was trained on.

  Args:
    network: model.network.Network.
    tokens: [B, L] int32.
    valid: [B, L] bool, False on padding.
    doc: [B, L] int32, documents; by default each row is one document.

  Returns:
    inputs [B, L] int32, and their masks.Labels.
  """
  return OBJECTIVES[network.objective].show(network, tokens, valid, doc)


def show_masked(network, tokens, masked, valid, doc=0):
  """Returns inputs from which a network predicts masked tokens of rows.

  Args:
    network: model.network.Network.
    tokens: [B, L] int32, clean.
    masked: [B, L] bool; prompts may be masked too, for guidance.
    valid: [B, L] bool, False on padding.
    doc: see `show`.

  Returns:
    inputs [B, M] int32, M >= L, and their masks.Labels. The first L hidden
    states predict the tokens of the row.
  """
  objective = OBJECTIVES[network.objective]
  if objective.show_masked:
    return objective.show_masked(network, tokens, masked, valid, doc)
  noisy = jnp.where(masked, network.mask_id, tokens)
  return objective.show(network, noisy, valid, doc)


@functools.lru_cache(maxsize=64)  # asked for every step of a run
def flops_per_token(c, model_config, length):
  """Returns matrix-product FLOPs of a training step per token.

  The sum of three terms: 6 per weight of the layers and copy of the token; 6
  per weight of the head; and 12 N L H K times `visible_pairs` for attention.
  Recomputation is not counted. The head is counted for every token, although
  the loss skips unmasked tokens. Complementary masks double the sum. With
  adapters, a weight of the base takes 4 instead of 6, because no gradient by it
  is computed.

  Args:
    c: ObjectiveConfig.
    model_config: transformer.TransformerConfig.
    length: L.
  """
  m, objective = model_config, OBJECTIVES[c.name]
  if objective.flops_per_token:
    return objective.flops_per_token(c, m, length)
  adapters = transformer.num_adapter_params(m)
  _, inner = transformer.num_params(m)
  base, copies = inner - adapters, objective.copies(c, length)
  heads = objective.targets(c, length)
  if c.autoregressive_weight:  # both copies have a loss
    heads += 1
  weights = base * copies + heads * m.vocab_size * m.embed
  attention = m.layers * length * m.heads * m.head_dim
  pairs = objective.visible_pairs(c, length)
  rows = 2 if c.complementary_masks else 1
  per_weight = 4 if adapters else 6
  products = per_weight * weights + 6 * adapters * copies
  return rows * (products + 12 * pairs * attention)
