"""Rollouts: answers sampled by the policy, on the devices that train it.

`sampling_copy` casts the parameters and shards them for sampling; `sample` runs
the sampler, which refills its rows. An answer depends on its prompt, its seed,
the settings and the parameters, and not on the other answers. Its seed depends
on the seed of the run, the round, the prompt and its number in the group. So
neither the mesh nor the number of rows of the sampler changes an answer, except
by rounding.

Letters in shapes: N answers of a round, G to each prompt; L positions.
"""

import functools
import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import leaves
from maskdiff.model import transformer
from maskdiff.rl.batch import Batch, until_eos
from maskdiff.sampling import layouts
from maskdiff.sampling.serve import RowRequest, serve
from maskdiff.sampling.settings import fit_blocks


class Answers(NamedTuple):
  """Sampled answers and their cost; `recordings[i]` fills `requests[i]`.

  A recording has the token ids of a row, and the step and the confidence of
  each sampled token; its request has the prompt, the seed and the settings.
  """

  requests: list  # N serve.RowRequest
  recordings: list  # N recording.Recording
  forwards: int  # forward passes, sum over rows


def seed(run_seed, round_number, prompt, answer):
  """Returns the seed of an answer, an int in [0, 2^32).

  Args:
    run_seed: int.
    round_number: int, or a name such as 'heldout'.
    prompt: number of the prompt in its round.
    answer: number of the answer in its group.
  """
  text = f'{run_seed} {round_number} {prompt} {answer}'
  digest = hashlib.sha256(text.encode()).digest()
  return int.from_bytes(digest[:4], 'big')


def requests(run_seed, round_number, prompts, group, slots, settings):
  """Returns the requests of a round, `group` for each prompt in turn.

  Args:
    run_seed: see `seed`.
    round_number: see `seed`.
    prompts: list of token lists.
    group: G.
    slots: tokens to sample for each answer.
    settings: sampling.settings.Settings.
  """
  return [
    RowRequest(
      i * group + j,
      layouts.prompt_row(prompt, slots),
      seed(run_seed, round_number, i, j),
      settings,
    )
    for i, prompt in enumerate(prompts)
    for j in range(group)
  ]


def sampling_copy(c, mesh, dtype):
  """Returns a function that copies parameters for sampling.

  Matrices are split over the axis `tensor` only, so that a forward pass gathers
  no parameters; the rows of the sampler are split over the other axes.

  Args:
    c: TransformerConfig.
    mesh: device mesh.
    dtype: dtype of the copy.
  """
  casts = jax.tree.map(
    lambda sharding: cast(sharding, dtype), copy_shardings(c, mesh)
  )
  return lambda params: jax.tree.map(lambda copy, x: copy(x), casts, params)


def cast(sharding, dtype):
  """Returns a jitted function that copies a parameter.

  A gather needs a buffer of the size of its result. In one program for all
  parameters, the TPU compiler has all these buffers at once, which are a second
  copy.

  Args:
    sharding: of the copy.
    dtype: of the copy.
  """
  return jax.jit(
    functools.partial(leaves.cast, dtype=dtype), out_shardings=sharding
  )


def copy_shardings(c, mesh):
  """Returns the shardings of the copy; arguments as for `sampling_copy`."""
  whole = lambda axis: None if axis == mesh_lib.STATE_AXES else axis
  without_fsdp = lambda s: NamedSharding(
    mesh, PartitionSpec(*map(whole, s.spec))
  )
  shardings = mesh_lib.param_shardings(
    mesh, transformer.axes(c), transformer.shapes(c)
  )
  return jax.tree.map(without_fsdp, shardings)


def sample(network, c, requests, rows, length, between=lambda: None):
  """Samples the answers to some requests; call it under `jax.set_mesh`.

  Args:
    network: Network, such as with the parameters of `sampling_copy`.
    c: SamplerConfig.
    requests: list of serve.RowRequest with the ids 0, 1, 2, ...
    rows: answers sampled at a time.
    length: L, positions of a row.
    between: see `RunSetup.between`; called after each answer.

  Returns:
    Answers.

  Raises:
    UserError: a request is not valid, or logits were NaN or infinite.
  """
  c = fit_blocks(network, c, requests[0].row.count(None))
  recordings, forwards = [None] * len(requests), 0
  for answer in serve(network, c, requests, rows, length):
    if answer.error:
      raise UserError(f'answer {answer.id} of a rollout: {answer.error}')
    recordings[answer.id] = answer.recording
    forwards += answer.forwards
    between()
  return Answers(requests, recordings, forwards)


def arrays(recordings, length):
  """Returns answers as NumPy arrays of fixed shapes, for checkpoints.

  Args:
    recordings: list of N recording.Recording; slots follow the prompt.
    length: L.

  Returns:
    dict of int32: `tokens` and `steps`, [N, L], 0 on padding; `slots`, [N, 2],
    the first slot of the answer, and the position after its last.
  """
  tokens, steps = np.zeros((2, len(recordings), length), np.int32)
  slots = np.zeros((len(recordings), 2), np.int32)
  for i, r in enumerate(recordings):
    tokens[i, : len(r.tokens)] = r.tokens
    steps[i, : len(r.tokens)] = r.steps
    where = np.flatnonzero(r.fill)
    slots[i] = where[0], where[-1] + 1
  return {'tokens': tokens, 'steps': steps, 'slots': slots}


def to_batch(rollout, eos_id, num_eos):
  """Returns the Batch of the dict of `arrays`, in jit.

  Args:
    rollout: dict of arrays.
    eos_id: id of the end-of-text token; -1: none.
    num_eos: see `batch.until_eos`.
  """
  tokens = rollout['tokens']
  first, end = rollout['slots'][:, :1], rollout['slots'][:, 1:]
  index = jnp.arange(tokens.shape[1])
  answer = (first <= index) & (index < end)
  return Batch(
    tokens=tokens,
    valid=index < end,
    answer=answer,
    counted=until_eos(tokens, answer, eos_id, num_eos),
    steps=rollout['steps'],
  )


def answer_tokens(recording, end_ids):
  """Returns the tokens of an answer before the first end token, a list.

  Args:
    recording: recording.Recording.
    end_ids: ids that end an answer.
  """
  tokens = recording.tokens[recording.fill].tolist()
  ends = [i for i, token in enumerate(tokens) if token in end_ids]
  return tokens[: ends[0]] if ends else tokens


def num_counted(recording, eos_id):
  """Returns the number of tokens up to the first eos, with it."""
  return min(
    len(answer_tokens(recording, (eos_id,))) + 1, int(recording.fill.sum())
  )


def sampled_nats(recordings, eos_id):
  """Returns the mean of -log(confidence) of the tokens up to the first eos.

  If the confidence is the probability of the token, this is an estimate of the
  entropy of the tokens that the sampler draws.
  """
  found = []
  for r in recordings:
    confidence = r.confidence[r.fill][: num_counted(r, eos_id)]
    found += np.log(np.maximum(confidence, 1e-30)).tolist()
  return -float(np.nanmean(found)) if np.isfinite(found).any() else 0.0
