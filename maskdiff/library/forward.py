"""Logits and losses of rows of tokens: `maskdiff.logits`, `maskdiff.loss`.

Both can be differentiated by the parameters, and called inside jit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.data.rows import PADDING, Rows
from maskdiff.distributed.mesh import batch_sharding
from maskdiff.errors import UserError
from maskdiff.library import arguments, batches
from maskdiff.likelihood.queries import padded_length
from maskdiff.model import masks
from maskdiff.model.transformer import bind
from maskdiff.objectives import masked_diffusion
from maskdiff.objectives.canvas import divisor
from maskdiff.objectives.table import OBJECTIVES, make_canvas, show
from maskdiff.objectives.table import loss as loss_of
from maskdiff.training.step import step_config


def logits(model, rows, *, lengths=None, doc=None):
  """Returns the logits of every position, given the tokens of its row.

  The logits at a position predict the token of that position. A network trained
  with masked diffusion sees the whole row: put `model.network.mask_id` where
  tokens are unknown. A left-to-right network sees the tokens before the
  position only, and a network trained on blocks also its block. The softmax of
  the logits is the distribution that losses and samplers use: if the network
  was trained without config.objective. predict_mask, the logit of the mask
  token is -inf.

  Args:
    model: Model.
    rows: list of texts or token lists of any lengths; or int [B, L].
    lengths: [B] int, tokens of each row of an array; the rest is padding.
    doc: [B, L] int, documents; positions of different documents do not see each
      other, and -1 is padding. Default: each row is one document.

  Returns:
    [B, L, V] float32; 0 on padding, which no position sees. L is the length of
    the longest row.

  Raises:
    UserError: ids are not in the vocabulary, rows are longer than the training
      rows, or an argument has another shape or dtype.
  """
  batch = batches.batch_of(model, rows, lengths, doc, padded_length)
  found = _logits(
    model.network, model.mesh, batch.tokens, batch.valid, batch.doc
  )
  return found[: batch.size, : batch.length]


@functools.partial(jax.jit, static_argnums=1)
def _logits(network, mesh, tokens, valid, doc):
  with _on_mesh(mesh):
    tokens = jax.lax.with_sharding_constraint(tokens, batch_sharding(mesh))
    documents = 0 if doc is None else doc
    inputs, labels = show(network, tokens, valid, documents)
    if doc is not None and OBJECTIVES[network.objective].left_to_right:
      # The first token of every document is predicted from bos.
      continues = masks.continues_document(labels)
      inputs = jnp.where(continues, inputs, network.bos_id)
    transformer = bind(network.config, network.params)
    found = transformer.logits(transformer(inputs, labels))
    if not network.predict_mask:
      found = found.at[..., network.mask_id].set(-jnp.inf)
    return jnp.where(valid[..., None], found, 0)


def _on_mesh(mesh):
  """Returns the context of a mesh inside jit, where jax.set_mesh is refused.

  Inputs need shardings of the mesh, since the caller may compile for another
  set of devices.
  """
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def loss(
  model,
  rows,
  *,
  lengths=None,
  doc=None,
  answer=None,
  times=None,
  mask_ratio=None,
  masked=None,
  noise=None,
  key=None,
):
  """Returns the training loss of rows for given random draws.

  For masked diffusion, give `times` or `mask_ratio`, and `masked` or `noise`;
  or give `key`, and all are drawn as in a training step. The loss of an
  autoregressive model has no draws. That of a model with windows (sdlm) or with
  a drafter needs `key`, which draws where windows begin. To differentiate the
  loss:

    jax.grad(lambda params: maskdiff.loss(
      dataclasses.replace(model, params=params), rows, key=key))(model.params)

  Args:
    model: Model.
    rows: list of texts or token lists of any lengths; or int [B, L].
    lengths: [B] int, tokens of each row of an array; the rest is padding.
    doc: [B, L] int, as the column `doc` of data.rows.Rows; -1 is padding.
    answer: [B, L] bool, the tokens that may be masked and carry a loss; the
      others are a prompt. Default: all.
    times: [B] float in (0, 1], which determine the loss weights; or [B, K], one
      for each of the K blocks of the longest row, under block diffusion.
    mask_ratio: as `times`, in place of the times: expected share of
      masked tokens. Equal to the times for the linear schedule.
    masked: [B, L] bool, the masked tokens; prompts and padding never are.
    noise: [B, L] float in [0, 1), in place of the masks: tokens are masked
      where the noise is below the mask ratio.
    key: PRNG key, as that of a training step; or an integer, its seed.

  Returns:
    float32, nats per token: sum(weights x nll) / tokens that may carry a loss,
    with the term of `config.objective.confidence_weight`; for another
    `config.objective.denominator` see objectives.canvas.divisor.

  Raises:
    UserError: see `logits`; a draw is missing or not used; a row contains the
      mask token; or no token carries a loss. Inside jit the loss is then NaN.
  """
  batch = batches.batch_of(model, rows, lengths, doc)
  c = step_config(model.config).objective
  columns = _columns(c, batch, answer)
  key = None if key is None else arguments.key_of(key)
  draws = _draws(c, batch, times, mask_ratio, masked, noise, key)
  found, count = _loss(model.network, c, model.mesh, batch.size, columns, draws)
  if not arguments.traced(count) and not count:
    raise UserError(
      'no window of this draw has a token that carries a loss: give longer '
      'rows, more answers or another key'
      if _draws_windows(c)
      else 'no token carries a loss: set `answer` to True at some tokens'
    )
  return found


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _loss(network, c, mesh, size, rows, draws):
  with _on_mesh(mesh):
    rows = jax.lax.with_sharding_constraint(rows, batch_sharding(mesh))
    if isinstance(draws, tuple):
      t, masked = draws
      lengths = jnp.full(len(t), rows.tokens.shape[1])
      canvas = OBJECTIVES[c.name].with_masks(c, rows, t, masked, lengths)
    else:
      numbers = jnp.arange(len(rows.tokens), dtype=jnp.int32)
      canvas = make_canvas(c, rows, numbers, draws, size)
    total, _ = loss_of(c, bind(network.config, network.params), canvas)
    return total / divisor(c, canvas).sum(), canvas.num_tokens.sum()


def _columns(c, batch, answer):
  """Returns data.rows.Rows with the columns that these rows need.

  Rows without padding have no columns, so that they are treated as rows of a
  training batch. Padding of a left-to-right network needs no documents, since
  it comes after all tokens.
  """
  tokens, valid, doc, size, length = batch
  if not arguments.traced(tokens) and not arguments.traced(valid):
    if (tokens[valid] == c.mask_id).any():
      raise UserError(
        f'rows contain the mask token, id {c.mask_id}: give clean tokens, and '
        'the masks as `masked`'
      )
  is_text = valid
  if answer is not None:
    answer = batches.per_position('answer', answer, (size, length), 'b')
    valid = valid & batches.padded(answer, len(tokens) - size)
  if doc is not None:
    return Rows(tokens, doc, valid)
  padding = arguments.traced(is_text) or not is_text[:size].all()
  if padding and not OBJECTIVES[c.name].left_to_right:
    eos = (tokens == c.eos_id).astype(np.int32)
    doc = jnp.where(is_text, eos.cumsum(axis=1) - eos, PADDING)
  if answer is None and not padding and size == len(tokens):
    return Rows(tokens)
  return Rows(tokens, doc, valid)


def _draws_windows(c):
  objective = OBJECTIVES[c.name]
  return objective.drafts or (objective.windows and c.window_length > 1)


def _check_windows(c, length, key):
  if key is None:
    raise UserError(
      f'the loss of objective {c.name} draws the places of its windows: give a '
      'key'
    )
  windows = OBJECTIVES[c.name].windows
  if windows and c.anchors == 'stride' and length < c.window_length:
    raise UserError(
      f'rows of {length} tokens are shorter than config.objective.'
      f'window_length={c.window_length}: give a longer row'
    )


def _draws(c, batch, times, mask_ratio, masked, noise, key):
  """Returns a key, or the pair (times [B] or [B, K], masked [B, L])."""
  given = {
    'times': times,
    'mask_ratio': mask_ratio,
    'masked': masked,
    'noise': noise,
  }
  names = [name for name, value in given.items() if value is not None]
  objective = OBJECTIVES[c.name]
  if objective.likelihood == 'exact':
    windows = _draws_windows(c)
    if names:
      raise UserError(
        f'{names[0]}: the loss of objective {c.name} has no random '
        f'{"masks" if windows else "draws"}; leave it out'
      )
    if windows:
      _check_windows(c, batch.length, key)
    return jax.random.key(0) if key is None else key
  if key is not None:
    if names:
      raise UserError(f'key draws all noise: leave out {" and ".join(names)}')
    if c.time_sampling == 'antithetic' and batch.size % 2:
      raise UserError(
        f'{batch.size} rows: config.objective.time_sampling=antithetic draws '
        'times for pairs of rows; give an even number'
      )
    return key
  if objective.with_masks is None:
    raise UserError(f'objective {c.name} takes no given masks: give a key')
  if (times is None) == (mask_ratio is None) or (masked is None) == (
    noise is None
  ):
    raise UserError(
      'give times or mask_ratio, and masked or noise; or a key that draws both'
    )
  name = 'times' if mask_ratio is None else 'mask_ratio'
  t = times if mask_ratio is None else mask_ratio
  shape = batch.size, batch.length
  blocks = -(-batch.length // c.block_length)
  per_block = objective.by_blocks and np.ndim(t) == 2
  t = arguments.checked(name, t, (shape[0], blocks)[: 1 + per_block], 'fiu')
  if not arguments.traced(t) and not np.all((t > 0) & (t <= 1)):
    raise UserError(f'{name}={np.asarray(t).tolist()} must lie in (0, 1]')
  t = jnp.asarray(t, jnp.float32)
  t = t if mask_ratio is None else c.schedule.time(t)
  if masked is None:
    noise = batches.per_position('noise', noise, shape, 'fiu')
    used = batch.valid[: batch.size, : batch.length]
    arguments.check_in_unit('noise', noise, used)
    of_row = t.reshape(len(t), -1)
    ratio = masked_diffusion.by_position(c, lambda s: s.mask_ratio(of_row))
    masked = noise < masked_diffusion.by_token(c, ratio, batch.length)
  masked = batches.per_position('masked', masked, shape, 'b')
  added = len(batch.tokens) - batch.size
  t = jnp.pad(t, [(0, added)] + [(0, 0)] * per_block, constant_values=1)
  return t, batches.padded(masked, added)
