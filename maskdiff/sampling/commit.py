"""The parts of a denoising step after its forward pass; see sampler.denoise.

state.py explains the letters in shapes; V is the vocabulary size.
"""

import jax
import jax.numpy as jnp

from maskdiff.objectives.schedule import Schedule
from maskdiff.sampling import candidates, remasking
from maskdiff.sampling.state import current, has_leading_slot


def step_keys(seeds, block, step):
  """Returns the PRNG keys of a denoising step.

  A key depends only on the seed, block and step of its row, so the noise of a
  row is the same in any batch.

  Args:
    seeds: [B] uint32.
    block: [B] int32.
    step: [B] int32.

  Returns:
    Two arrays of [B] keys: for drawing tokens, and for the remasking rule.
  """
  fold = jax.vmap(jax.random.fold_in)
  keys = fold(fold(jax.vmap(jax.random.key)(seeds), block), step)
  return jax.vmap(jax.random.split, out_axes=1)(keys)


def noise_of_step(layout, carry):
  """Returns the noise of a denoising step: PRNG keys, or the noise itself.

  Args:
    layout: Layout.
    carry: Carry before the step.

  Returns:
    For drawing tokens: [B] PRNG keys, or Gumbel noise [B, S, V] if the Layout
    has it. For the remasking rule: [B] keys, or uniform numbers [B, S].
  """
  keys = step_keys(layout.seeds, carry.block, carry.step)

  def of_step(noise):
    steps, blocks = noise.shape[1:3]
    return noise[
      jnp.arange(len(noise)),
      jnp.minimum(carry.total_steps, steps - 1),
      jnp.minimum(carry.block, blocks - 1),
    ]

  return tuple(
    of_keys if given is None else of_step(given)
    for of_keys, given in zip(
      keys, (layout.gumbel, layout.uniform), strict=True
    )
  )


def predict(network, c, settings, logits, keys):
  """Draws a token for every slot of a block.

  Args:
    network: Network.
    c: SamplerConfig.
    settings: Settings, each field [B].
    logits: [B, S, V] float32.
    keys: [B] PRNG keys, or Gumbel noise [B, S, V].

  Returns:
    token [B, S] int32; and [B, S] float32, its confidence, NaN where logits
    are NaN or infinite.
  """
  s, logits = settings, allowed(network, settings, logits)
  token = candidates.draw(logits, s.temperature, s.top_k, s.top_p, keys)
  confidence = candidates.CONFIDENCES[c.confidence](logits, token)
  return token, defer(network, c, settings, logits, token, confidence)


def allowed(network, settings, logits):
  """Returns logits [B, S, V] with -inf at tokens that are never predicted.

  Args:
    network: Network.
    settings: Settings, each field [B].
    logits: [B, S, V] float32.
  """
  # For each token, the rows that never predict it. One call of `suppress`
  # copies the logits only once.
  never = {}
  if not network.predict_mask:
    never[network.mask_id] = jnp.ones_like(settings.logits_eos_inf)
  if network.eos_id >= 0:
    never[network.eos_id] = settings.logits_eos_inf
  for i in network.length_ids:
    never[i] = jnp.ones_like(settings.logits_eos_inf)
  if not never:
    return logits
  rows = jnp.stack(list(never.values()), axis=1)
  return candidates.suppress(logits, tuple(never), rows)


def defer(network, c, settings, logits, token, confidence):
  """Returns confidences with which eos and the end of turn are committed last.

  Only rows with `confidence_eos_eot_inf` change. The two tokens get confidence
  0. The confidence of other tokens is computed without the two.

  Args:
    network: Network.
    c: SamplerConfig.
    settings: Settings, each field [B].
    logits: [B, S, V] float32.
    token: [B, S] int32.
    confidence: [B, S] float32, of `token` given `logits`.

  Returns:
    [B, S] float32.
  """
  if network.eos_id < 0:  # request.begin refuses the setting
    return confidence
  rows = settings.confidence_eos_eot_inf
  eos_ids = jnp.full_like(settings.eot_id, network.eos_id)
  ids = jnp.where(rows, jnp.stack([eos_ids, settings.eot_id]), -1).T  # [B, 2]

  def deferred():
    others = candidates.suppress_each(logits, ids)
    found = candidates.CONFIDENCES[c.confidence](others, token)
    is_deferred = (token[..., None] == ids[:, None]).any(axis=-1)
    return jnp.where(
      rows[:, None], jnp.where(is_deferred, 0.0, found), confidence
    )

  return jax.lax.cond(rows.any(), deferred, lambda: confidence)


def select(network, c, layout, carry, confidence, masked, keys):
  """Returns the slots whose predictions are committed.

  They are selected by the remasking rule, except that a leading slot is
  committed alone, in a step that does not count for the schedule.

  Args:
    network: Network.
    c: SamplerConfig.
    layout: Layout.
    carry: Carry before the step.
    confidence: [B, S] float32.
    masked: [B, S] bool, slots of the current block that may be committed.
    keys: of the remasking rule, from `noise_of_step`.

  Returns:
    [B, S] bool; and [B] bool, True in rows that commit a leading slot.
  """
  has_leading = has_leading_slot(network, layout, carry.block)
  num_slots = current(layout.num_slots, carry.block) - has_leading
  num_masked = masked.sum(axis=1)
  committed = remasking.RULES[c.remasking](
    confidence,
    masked,
    budget(c, layout.settings, num_slots, num_masked, carry.step, layout.steps),
    keys,
  )
  leads = has_leading & masked[:, 0]
  is_first = jnp.arange(masked.shape[1]) == 0
  return jnp.where(leads[:, None], masked & is_first, committed), leads


def budget(c, settings, num_slots, num_masked, step, steps):
  """Returns the budget of the remasking rule for a step of a block.

  Args:
    c: SamplerConfig.
    settings: Settings, each field [B].
    num_slots: [B] int32, slots of the block, without a leading slot.
    num_masked: [B] int32, slots of the block that are masked now.
    step: [B] int32, 0-based step within the block.
    steps: [B] int32, steps per block.

  Returns:
    [B] int32, number of tokens. For remasking=ancestral [B] float32, the
    probability of each slot; for factor [B] float32, that setting; for
    threshold and the prefixes [B] float32, the threshold; for
    quota_and_threshold the number and the threshold.
  """
  if c.remasking == 'factor':
    return settings.factor
  if c.remasking in ('threshold', 'longest_prefix', 'cumulative_prefix'):
    return settings.threshold
  ratio = Schedule(c.schedule).mask_ratio
  before, after = 1 - step / steps, 1 - (step + 1) / steps  # times t
  if c.remasking == 'ancestral':
    return 1 - ratio(after) / ratio(before)
  if c.schedule == 'linear':
    number = remasking.quota(num_slots, step, steps)
  else:
    number = remasking.quota_to(ratio(after), num_slots, num_masked)
  if c.remasking == 'quota_and_threshold':
    return number, settings.threshold
  return number


def at_positions(x, index):
  """Returns the values of the slots of a step, at their positions.

  A gather: XLA runs a scatter to the positions slot by slot on a CPU.

  Args:
    x: [B, S].
    index: [B, L] int32, from state.index_in_step.

  Returns:
    [B, L]; zero, or False, on all other positions.
  """
  found = jnp.take_along_axis(x, jnp.maximum(index, 0), axis=1, mode='clip')
  return jnp.where(index >= 0, found, jnp.zeros_like(found))


def up_to_eos(network, settings, token, committed):
  """Returns the committed slots of a window, up to the first eos among them.

  Tokens after an eos are no part of an answer. Only rows with `stop_at_eos`
  change. `end_at_eos` fills their slots with eos.

  Args:
    network: Network.
    settings: Settings, each field [B].
    token: [B, D] int32.
    committed: [B, D] bool.
  """
  is_eos = committed & (token == network.eos_id)
  after_eos = jnp.cumsum(is_eos, axis=1) > is_eos
  return committed & ~(settings.stop_at_eos[:, None] & after_eos)


def end_at_eos(eos_id, layout, step, canvas, masked, filled_at):
  """Ends rows with `stop_at_eos` whose text is complete up to its first eos.

  The answer of the row is final: tokens before the eos are never revised, and
  tokens after the eos are cut off (layouts.cut). Masked slots after the eos
  become eos.

  Args:
    eos_id: int.
    layout: Layout.
    step: [B] int32, denoising steps of the row, with the current one.
    canvas: see state.Carry, as the next two.
    masked: [B, blocks, S] bool.
    filled_at: [B, L] int32.

  Returns:
    canvas, masked and filled_at, without masked slots in rows that ended.
  """
  batch, length = canvas.shape
  slots = layout.slots.reshape(batch, -1)
  is_masked = masked.reshape(batch, -1)
  rows = jnp.arange(batch)[:, None]
  is_eos = canvas[rows, jnp.minimum(slots, length - 1)] == eos_id
  after_eos = jnp.cumsum(is_eos & (slots < length) & ~is_masked, axis=1) > 0
  ended = after_eos.any(axis=1) & ~jnp.any(is_masked & ~after_eos, axis=1)
  # An abandoned row has no masked slots, but slots without a token.
  ended &= layout.settings.stop_at_eos & is_masked.any(axis=1)
  filled = ended[:, None] & layout.fill & (filled_at == 0)
  return (
    jnp.where(filled, eos_id, canvas),
    masked & ~ended[:, None, None],
    jnp.where(filled, step[:, None], filled_at),
  )
