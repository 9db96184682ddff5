"""Settings of the sampler: of the compiled program, and of each request.

maskdiff/config/sample.py declares the settings, and marks the settings that may
differ between the requests of a batch. These are arrays with one value per row,
so a new value compiles nothing. The other settings shape the compiled program.
"""

import collections
import dataclasses

import numpy as np

from maskdiff.config.key import check_value
from maskdiff.config.sample import PER_REQUEST, SETTINGS, block_length
from maskdiff.config.settings import (
  check_names,
  check_steps,
  check_types,
  with_settings,
)
from maskdiff.errors import UserError
from maskdiff.objectives.table import OBJECTIVES

# One field for each key of config.sample that shapes the program.
_OfProgram = dataclasses.make_dataclass(
  '_OfProgram',
  [
    (name, type(key.default), key.default)
    for name, key in SETTINGS.items()
    if not key.per_request
  ],
  frozen=True,
)
# In code, these two default to 0; see Settings.
_DEFAULTS = {name: SETTINGS[name].default for name in PER_REQUEST} | {
  'gen_length': 0,
  'steps': 0,
}
_DTYPES = {bool: np.bool_, int: np.int32, float: np.float32}
_KINDS = {bool: 'b', int: 'iu', float: 'iuf'}  # of NumPy dtypes


@dataclasses.dataclass(frozen=True)
class SamplerConfig(_OfProgram):
  """Settings that shape the compiled program; all rows share their values.

  maskdiff/config/sample.py declares them, with defaults and help.

  A `cache` stores the keys and values of the first forward pass of a block,
  which covers the whole canvas. Later steps of the block reuse them (Fast-dLLM,
  arXiv 2505.22618). `prefix` stores the positions before the block; later steps
  compute from the start of the block to the end of the row. `dual` stores all
  positions outside the block; later steps compute the block only. Cached values
  do not reflect tokens committed since that pass, so results differ a little
  from results without a cache. With refresh=1 they are equal. For left-to-right
  networks, `prefix` is an exact cache: results equal those without a cache.

  Attributes:
    guided: whether the program computes each row twice, the second time with
      the prompt masked, for classifier-free guidance. Rows with guidance=0
      equal those of a program without guidance.
  """

  guided: bool = False


class Settings(
  collections.namedtuple(
    'Settings', PER_REQUEST, defaults=[_DEFAULTS[name] for name in PER_REQUEST]
  )
):
  """Settings of a request, or of the rows of a batch.

  maskdiff/config/sample.py declares them, with help. A field is a number or a
  bool; in a Layout it is an array [B] of int32, float32 or bool. Two fields may
  also be 0, unlike the config keys. `gen_length` is the number of slots over
  which `steps` is divided; 0 stands for the slots of the row, whose blocks then
  have equally many steps, rounded up. With gen_length=0, steps=0 stands for one
  step per slot.

  Models tuned on answers padded with eos predict eos early. The published
  evaluations of LLaDA (EVAL.md) suppress eos in one of two ways. With
  `logits_eos_inf` (HumanEval) eos is never predicted. With
  `confidence_eos_eot_inf` (GSM8K, MATH, GPQA, MBPP) eos and the end-of-turn
  token are predicted, but have confidence 0 and are committed last. The
  confidence of other tokens is normalized without these two. At temperatures
  above 0, a bug in LLaDA's code applies `confidence_eos_eot_inf` to the
  end-of-turn token only. This package applies it to both tokens at any
  temperature. Remasking rules that do not read the confidence ignore it.
  """

  __slots__ = ()


DEFAULT = Settings()


def split(values):
  """Returns settings as a SamplerConfig and the Settings of a request.

  Args:
    values: dict from keys of config.sample to values; missing keys have the
      defaults of the two classes.

  Returns:
    SamplerConfig and Settings. The program is guided if the request is.
  """
  of_request = {k: v for k, v in values.items() if k in PER_REQUEST}
  of_program = {k: v for k, v in values.items() if k not in PER_REQUEST}
  settings = Settings(**of_request)
  return SamplerConfig(guided=settings.guidance > 0, **of_program), settings


def sampler_config(config):
  """Returns the SamplerConfig and the Settings of a run's config.

  For a left-to-right network, each block has one slot and takes one step. With
  a cache, later slots are hidden, so that the first pass ends at the prompt. A
  network trained on blocks fills no longer blocks than these.
  """
  values = {name: config.sample[name] for name in SETTINGS}
  values['block_length'] = block_length(config)
  if OBJECTIVES[config.objective.name].left_to_right:
    values |= dict(steps=values['gen_length'], block_length=1)
    if values['cache'] != 'none':
      values['lookahead'] = 0
  return split(values)


def fit_blocks(network, c, slots):
  """Returns a SamplerConfig whose blocks are no longer than a number of slots.

  Further slots of a block would be computed for nothing. Blocks of a network
  that was trained on blocks have their places in the row, and do not change.
  """
  if network.block_length:
    return c
  return dataclasses.replace(c, block_length=max(min(c.block_length, slots), 1))


def for_gaps(c, settings, steps=None):
  """Returns settings for texts with gaps, with steps counted per text.

  Args:
    c: SamplerConfig for prompts.
    settings: Settings for prompts.
    steps: denoising steps per text; by default one per token.

  Returns:
    SamplerConfig and Settings.
  """
  return dataclasses.replace(c, lookahead=-1), settings._replace(
    gen_length=0, steps=steps or 0, stop_at_eos=False
  )


def of_request(config, values, changes=None, gaps=False, steps=None):
  """Returns the SamplerConfig and the Settings of a request.

  Args:
    config: ConfigDict of the run.
    values: dict, settings of all requests, for config.with_settings.
    changes: dict, settings in which this request differs.
    gaps: whether to fill the gaps of a text. `steps` is then per text.
    steps: with gaps, denoising steps unless `changes` has them; None: one per
      slot.

  Raises:
    UserError: see config.with_settings, config.settings.check_names and
      check_types; gen_length is larger than the context; or a setting does not
      go with gaps.
  """
  changes = dict(changes or {})
  check_names(changes)
  check_types(changes)
  if gaps:
    for name in ('gen_length', 'stop_at_eos'):
      if name in changes:
        raise UserError(f'{name} is for prompts: text follows a gap')
    # The number of blocks of a text with gaps need not divide its steps.
    steps = changes.pop('steps', steps)
    if steps is not None:
      check_value('steps', SETTINGS['steps'], steps)
      check_steps(steps, config.data.length)
  length = (values | changes).get('gen_length', 0)
  if not gaps and length > config.data.length:
    raise UserError(
      f'gen_length={length}: the model was trained on rows of '
      f'config.data.length={config.data.length} tokens, with the prompt; set '
      f'gen_length to at most {config.data.length}'
    )
  c, settings = sampler_config(with_settings(config, values | changes))
  return for_gaps(c, settings, steps) if gaps else (c, settings)


def per_row(settings, batch):
  """Returns Settings whose fields are NumPy arrays [batch].

  Args:
    settings: Settings; a field is one value for all rows, or has one per row.
    batch: number of rows.

  Raises:
    UserError: a field has another number of values, or a value has the wrong
      type or is out of the bounds of its key.
  """
  fields = {}
  for name, value in settings._asdict().items():
    key, array = SETTINGS[name], np.asarray(value)
    kind = type(key.default)
    if array.dtype.kind not in _KINDS[kind]:
      raise UserError(f'{name}={value!r}: must be {kind.__name__}')
    if array.shape not in ((), (batch,)):
      raise UserError(
        f'{name} has shape {array.shape}: give one value, or {batch}, one per '
        'row'
      )
    # request.py checks steps and gen_length, which may be 0 here.
    if name not in ('gen_length', 'steps'):
      for one in np.unique(array):
        check_value(name, key, one.item())
    if kind is int and (abs(array) >= 2**31).any():
      raise UserError(f'{name}={value}: must lie between -2^31 and 2^31')
    array = array.astype(_DTYPES[kind])
    fields[name] = np.broadcast_to(array, (batch,))
  return Settings(**fields)


def row(settings, i):
  """Returns the Settings of row i as Python values.

  Args:
    settings: Settings with fields as in `per_row`.
    i: int.
  """
  return Settings(*(np.asarray(x)[i].item() for x in settings))


def describe(network, c, settings):
  """Returns the settings that sampling depends on, a dict for reports.

  Args:
    network: Network.
    c: SamplerConfig.
    settings: Settings of one request.
  """
  values = settings._asdict() | dataclasses.asdict(c)
  keys = ('objective', 'predict_mask', 'mask_id', 'bos_id', 'eos_id')
  found = {name: values[name] for name in SETTINGS} | {
    key: getattr(network, key) for key in keys
  }
  if network.block_length:
    found['trained_on_blocks_of'] = network.block_length
  return found
