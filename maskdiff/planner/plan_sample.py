"""Plans sampling on TPUs without a TPU; plan.py plans training."""

import jax
import jax.numpy as jnp

from maskdiff import config as config_lib
from maskdiff.config.sample import block_length
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import load
from maskdiff.objectives.table import OBJECTIVES, show
from maskdiff.planner import pricing
from maskdiff.planner.parts import part
from maskdiff.planner.target import compile_denoise, open_target, params_on
from maskdiff.sampling.settings import sampler_config

MAX_TOKENS = 2**28  # of a batch; a plan holds arrays of this size on the host


def plan_sample(
  config,
  topology,
  prompts,
  prompt_tokens,
  num_slices=1,
  tensor=1,
  dtype='float32',
):
  """Plans sampling: each prompt gets config.sample.gen_length tokens.

  Memory and `step_s` are those of a denoising step over the canvas, including
  the cache if the config has one. If the sampler compiles several lengths, as
  with a prefix cache or a lookahead, the longest is priced: an upper bound.

  The window of a network trained on blocks is a block, and two blocks in the
  first step of a block; `window_step_s` is the mean over the steps.

  Args:
    config: ConfigDict with the keys of config.default().
    topology: topology of one slice, e.g. 'v5e:2x4'.
    prompts: number of prompts in the batch.
    prompt_tokens: tokens of each prompt.
    num_slices: number of slices.
    tensor: chips that share every layer. All other chips split the rows.
    dtype: dtype of the weights.

  Returns:
    Dict with the keys of fields.FIELDS; its values can be written as JSON.

  Raises:
    UserError: config, topology and mesh do not fit each other, or prompts or
      prompt_tokens is out of range.
  """
  if prompts < 1 or prompt_tokens < 0:
    raise UserError(
      f'--prompts={prompts} --prompt_tokens={prompt_tokens}: prompts must be '
      'positive and prompt_tokens must not be negative'
    )
  config_lib.validate(config)
  tokens = prompts * (prompt_tokens + config.sample.gen_length)
  if tokens > MAX_TOKENS:
    raise UserError(
      f'--prompts={prompts} --prompt_tokens={prompt_tokens}: the batch has '
      f'{tokens:,} tokens; at most {MAX_TOKENS:,} are planned'
    )
  # Sampling uses the mesh of interop.load, not the training mesh of the config.
  config = config.copy_and_resolve_references()
  config.mesh.update(replica=num_slices, fsdp=-1, sequence=1, tensor=tensor)
  target = open_target(config, topology, num_slices)
  model = load.network(config, None).config
  params = params_on(model, target.mesh, jnp.dtype(dtype))
  return plan_sample_on(config, target, prompts, prompt_tokens, params)


def plan_sample_on(config, target, prompts, prompt_tokens, params):
  """Plans sampling on a target from `open_target`; see `plan_sample`.

  Args:
    config: ConfigDict that passed config.validate.
    target: target.Target.
    prompts: number of prompts in the batch.
    prompt_tokens: tokens of each prompt.
    params: parameter tree of ShapeDtypeStructs with shardings.
  """
  _, settings = sampler_config(config)
  steps, slots = settings.steps, settings.gen_length
  length = prompt_tokens + slots
  shards = mesh_lib.batch_shards(target.mesh)
  split = prompts % shards == 0  # otherwise every chip computes all rows
  facts = pricing.facts(config, target, 'sample') | {
    'length': length,
    'batch': prompts,
    'microbatches': 1,
    'rows_per_chip': prompts / shards if split else float(prompts),
    'denoising_steps': steps,
  }

  begins = _begins(config, prompt_tokens, slots, steps)

  def price(window):
    return pricing.price(
      facts,
      target,
      lambda: compile_denoise(config, target, prompts, length, params, window),
      expected_trips=None,
      regime=sampling_regime(config, length),
      branch_shares=lambda op_name: (
        begins if part(op_name) == 'sampling: bookkeeping' else None
      ),
    )

  result = price(window=False)
  if result['status'] == 'does not fit':
    result['levers'] = ['fewer --prompts', 'a larger --topology']
  if result['step_s'] is None:
    return result
  if config.sample.cache != 'none':
    cached = price(window=True)
    if cached['step_s'] is None:
      return cached
    result['window_step_s'] = cached['step_s']
  exact = OBJECTIVES[config.objective.name].exact_cache
  cached_steps = _cached_steps(config.sample, steps, exact)
  latency = (steps - cached_steps) * result['step_s']
  latency += cached_steps * (result['window_step_s'] or 0)
  return result | {
    'latency_s': latency,
    'tokens_per_s': prompts * slots / latency,
    'tokens_per_s_per_chip': prompts * slots / latency / facts['chips'],
  }


def sampling_regime(config, length):
  """Returns the masks.Regime of a forward pass over rows of L positions."""
  network = load.network(config, None)
  _, labels = jax.eval_shape(
    lambda tokens: show(network, tokens, tokens >= 0),
    jax.ShapeDtypeStruct((1, length), jnp.int32),
  )
  return labels.regime


def _begins(config, prompt_tokens, slots, steps):
  """Returns how often a step with the cache computes one block, and two.

  Two shares of the steps; None if the network was not trained on blocks. The
  first step of all, over the canvas, begins the first block.
  """
  if not OBJECTIVES[config.objective.name].by_blocks or steps < 2:
    return None
  size = block_length(config)
  blocks = -(-(prompt_tokens % size + slots) // size)
  share = min(1.0, (blocks - 1) / (steps - 1))
  return 1 - share, share


def _cached_steps(s, steps, exact):
  """Returns the number of denoising steps that use the cache.

  Args:
    s: ConfigDict, config.sample.
    steps: total number of denoising steps.
    exact: whether the cache stays exact, so that it is filled once.
  """
  if s.cache == 'none':
    return 0
  if exact:
    return steps - 1
  slots = s.gen_length
  blocks = -(-slots // min(s.block_length, slots))
  steps_per_block = steps // blocks
  # A block fills the cache at its start and every s.refresh steps.
  fills = -(-steps_per_block // s.refresh) if s.refresh else 1
  return steps - blocks * fills
