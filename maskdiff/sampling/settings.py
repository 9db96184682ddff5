"""Settings of the sampler: those of a program, and those of each request.

maskdiff/config/sample.py declares the settings and marks those that may differ
between the requests of a batch. Those are arrays with one value per row, so a
new value compiles nothing. The other settings shape the compiled program.
"""

import collections
import dataclasses

import numpy as np

from maskdiff.config.key import check_choice, check_value
from maskdiff.config.sample import PER_REQUEST, SETTINGS
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


@dataclasses.dataclass(frozen=True)
class SamplerConfig(_OfProgram):
  """Settings that shape the compiled program, and are equal in all its rows.

  maskdiff/config/sample.py declares them, with defaults and help.

  A `cache` stores the keys and values of the first forward pass of a block,
  which covers the whole canvas. Later steps of the block reuse them (Fast-dLLM,
  arXiv 2505.22618). `prefix` stores the positions before the block; later steps
  compute from the start of the block to the end of the row. `dual` stores all
  positions outside the block; later steps compute the block only. Cached values
  do not reflect tokens committed since that pass, so results differ a little
  from results without a cache. With refresh=1 they are equal.

  Attributes:
    guided: whether the program computes each row twice, the second time with
      the prompt masked, for classifier-free guidance. Rows with guidance=0 are
      those of a program without guidance.
  """

  guided: bool = False


class Settings(
  collections.namedtuple(
    'Settings', PER_REQUEST, defaults=[_DEFAULTS[name] for name in PER_REQUEST]
  )
):
  """Settings of a request, or of the rows of a batch.

  maskdiff/config/sample.py declares them, with help. A field is a number or a
  bool; in a Layout it is an array [B] of int32, float32 or bool. Two fields
  have one more value here. `gen_length` is the number of slots over which
  `steps` is divided. 0: the slots of the row; blocks of a row then have equally
  many steps, rounded up. steps=0 is one step per slot, with gen_length=0 only.

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
  """Divides settings into those of the program and those of the request.

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

  For a left-to-right network, each block has one slot and takes one step.
  """
  values = {name: config.sample[name] for name in SETTINGS}
  if OBJECTIVES[config.objective.name].left_to_right:
    values |= dict(steps=values['gen_length'], block_length=1)
  return split(values)


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


def per_row(settings, batch):
  """Returns Settings whose fields are NumPy arrays [batch].

  Args:
    settings: Settings; a field is one value for all rows, or has one per row.
    batch: number of rows.

  Raises:
    UserError: a field has another number of values, or a value is out of the
      bounds of its key.
  """
  fields = {}
  for name, value in settings._asdict().items():
    key, array = SETTINGS[name], np.asarray(value)
    if array.shape not in ((), (batch,)):
      raise UserError(
        f'{name} has shape {array.shape}: give one value, or {batch}, one per '
        'row'
      )
    # request.py checks steps and gen_length, which may be 0 here.
    if name not in ('gen_length', 'steps'):
      for one in np.unique(array):
        check_value(name, key, one.item())
    array = array.astype(_DTYPES[type(key.default)])
    fields[name] = np.broadcast_to(array, (batch,))
  return Settings(**fields)


def row(settings, i):
  """Returns the Settings of row i as Python values.

  Args:
    settings: Settings with fields as in `per_row`.
    i: int.
  """
  return Settings(*(np.asarray(x)[i].item() for x in settings))


def check(network, c, settings):
  """Checks settings against each other and against the network.

  Args:
    network: Network.
    c: SamplerConfig.
    settings: Settings with arrays, from `per_row`.

  Raises:
    UserError: a setting has an unknown value, does not fit a left-to-right
      network, needs eos_id, which is missing, or needs another program.
  """
  objective = OBJECTIVES[network.objective]
  if c.block_length < 1:
    raise UserError(f'block_length={c.block_length} must be at least 1')
  if objective.left_to_right and c.block_length != 1:
    raise UserError(
      f'block_length={c.block_length}: a model trained with objective '
      f'{network.objective} fills one token at a time; set block_length=1'
    )
  guidance = settings.guidance.max(initial=0)
  if (c.guided or guidance) and not objective.can_guide:
    raise UserError(
      f'guidance={guidance} needs a model trained with masked prompts, and '
      f'objective {network.objective} masks none; set guidance=0'
    )
  if guidance and not c.guided:
    raise another_program('guidance', guidance, 'guided=False')
  if objective.left_to_right and (c.cache, c.lookahead) != ('none', -1):
    raise UserError(
      f'cache={c.cache} and lookahead={c.lookahead} need a bidirectional '
      f'network, and objective {network.objective} trains a left-to-right one; '
      'set cache=none and lookahead=-1'
    )
  if c.refresh < 0 or (c.refresh and c.cache == 'none'):
    raise UserError(
      f'refresh={c.refresh} is the number of steps between cache refreshes: '
      'set cache=dual or cache=prefix, or set refresh=0'
    )
  for name, key in SETTINGS.items():
    if not key.per_request:
      check_choice(name, key, getattr(c, name))
  for name in ('stop_at_eos', 'logits_eos_inf', 'confidence_eos_eot_inf'):
    if getattr(settings, name).any() and network.eos_id < 0:
      raise UserError(
        f'{name}=True needs an eos token, and the tokenizer has none; set '
        f'{name}=False'
      )


def another_program(name, value, program):
  """Returns the UserError for a setting that the program does not have.

  Args:
    name: name of the setting.
    value: its value in the request.
    program: the setting of the program, as NAME=VALUE.
  """
  return UserError(
    f"{name}={value} needs another program than this sampler's ({program}); "
    f'settings that may differ by request: {", ".join(PER_REQUEST)}'
  )


def describe(network, c, settings):
  """Returns the settings that sampling depends on, a dict for reports.

  Args:
    network: Network.
    c: SamplerConfig.
    settings: Settings of one request.
  """
  values = settings._asdict() | dataclasses.asdict(c)
  keys = ('objective', 'predict_mask', 'mask_id', 'bos_id', 'eos_id')
  return {name: values[name] for name in SETTINGS} | {
    key: getattr(network, key) for key in keys
  }
