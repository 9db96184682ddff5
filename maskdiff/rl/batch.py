"""Rows with sampled answers, as the losses of reinforcement learning use them.

Letters in shapes, in all files of this folder: n masked copies per row; B rows;
L positions; G answers to one prompt. Row i belongs to group i // G.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Batch(NamedTuple):
  """Prompts and their sampled answers; `[B, L]` each."""

  tokens: jax.Array  # int32
  valid: jax.Array  # bool, False on padding at the ends of a row
  answer: jax.Array  # bool, slots of the sampler, also those after eos
  counted: jax.Array  # bool, slots that carry a loss; see `until_eos`
  steps: jax.Array | None = None  # int32, denoising step of each slot


def until_eos(tokens, answer, eos_id, num_eos=1):
  """Returns the answer up to its first eos.

  Args:
    tokens: [B, L] int32.
    answer: [B, L] bool.
    eos_id: id of the end-of-text token.
    num_eos: slots from the first eos on that are included: 1 for the eos
      itself, as in d1; 0 for none, as in TraceRL; -1 for all slots.

  Returns:
    [B, L] bool.
  """
  if num_eos < 0:
    return answer
  ended = jnp.cumsum(answer & (tokens == eos_id), axis=1) > 0
  since = jnp.cumsum(ended & answer, axis=1)
  return answer & (since <= num_eos)
