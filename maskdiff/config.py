"""The complete default configuration, its checks, and the command line.

`default()` names every key there is, with its type; files in configs/ override
some and return the result locked, so that a key that does not exist is an
error in a file and on the command line alike. ml_collections stops here;
run.py turns the sections into frozen dataclasses.
"""

import difflib
import math
import re
import sys

from absl import flags
from ml_collections import config_dict, config_flags

from maskdiff.errors import STATUS_AGAIN, STATUS_USER, Preempted, UserError


def default():
  """Returns every key with a small, working value; locked."""
  c = config_dict.ConfigDict()
  c.seed = 0
  # Where fresh parameters come from: a Hugging Face folder or a work directory;
  # '': drawn at random
  c.init_from = ''

  c.model = model = config_dict.ConfigDict()
  model.vocab_size = 4096  # V
  model.embed = 256  # D
  model.layers = 4  # N
  model.heads = 4  # H
  model.kv_heads = 4  # G, divides heads; equal: multi-head attention
  model.head_dim = 64  # K
  model.mlp = 704  # F
  model.tie_embeddings = True  # one matrix for input and output
  model.rope_theta = 500_000.0
  model.norm_eps = 1e-5
  model.dtype = 'bfloat16'  # of activations; parameters are float32
  # none | minimal | attention | attended | offload | full: what a layer keeps
  # for the backward pass, from everything to nothing
  model.remat = 'full'
  model.attention = 'auto'  # auto | xla | splash (TPU) | cudnn (NVIDIA GPU)
  model.qkv_bias = False  # on queries, keys and values, as in Qwen2
  model.qk_norm = False  # queries and keys normalised by head, as in Qwen3
  # The output at a position predicts the next token, as in Dream and in a
  # network that was autoregressive before
  model.predict_next = False
  # Llama 3.1's, () for none: (factor, low, high, length trained on before)
  model.rope_scaling = ()

  c.tokens = tokens = config_dict.ConfigDict()
  tokens.mask_id = 4
  tokens.bos_id = 1
  tokens.eos_id = 2

  c.objective = objective = config_dict.ConfigDict()
  objective.name = 'masked_diffusion'  # masked_diffusion | autoregressive
  objective.schedule = 'linear'  # linear | cosine | polynomial
  objective.schedule_power = 2.0  # of the polynomial schedule
  objective.eps = 1e-3  # times lie in [eps, 1)
  objective.time_sampling = 'antithetic'  # antithetic | stratified | iid
  objective.random_length_fraction = 0.01  # of sequences, cut at random
  objective.attend_within = 'row'  # row | document
  objective.predict_mask = False  # the mask id takes part in the softmax
  objective.loss_chunk_tokens = 512  # memory: this x vocab_size float32

  c.optimizer = optimizer = config_dict.ConfigDict()
  optimizer.schedule = 'wsd'  # wsd | cosine | piecewise
  optimizer.learning_rate = 4e-4
  optimizer.final_learning_rate = 1e-5
  optimizer.warmup_steps = 100
  optimizer.decay_steps = 100  # wsd: length of the final linear decay
  # piecewise: (last step, rate at its start, rate at its end), ...
  optimizer.pieces = ()
  optimizer.b1 = 0.9
  optimizer.b2 = 0.95
  optimizer.eps = 1e-8
  optimizer.weight_decay = 0.1  # of matrices
  optimizer.clip_norm = 1.0
  optimizer.moments = 'float32'  # float32 | bfloat16: Adam's two, as stored

  c.data = data = config_dict.ConfigDict()
  # 'embedded', a prepared directory, or a mixture: DIR=WEIGHT,DIR=WEIGHT
  data.path = 'embedded'
  data.tokenizer = 'tokenizer/stdlib_4k.model'
  data.cache_dir = '~/.cache/maskdiff'  # where the embedded corpus is prepared
  data.length = 256  # L, tokens per sequence; fits the prepared rows
  data.verify = 'sample'  # sample | all: rows compared with checksums at start
  data.max_damaged_rows = 0  # of a dataset, replaced before a run stops
  data.allow_change = False  # resume on other data, at the same sample number
  # (first, end), ...: sample numbers that a run passes over from its next
  # start, e.g. those of updates that were skipped as bad
  data.skip_samples = ()

  c.train = train = config_dict.ConfigDict()
  train.steps = 1000
  train.batch = 32  # B, sequences per step over all devices
  train.microbatches = 1  # gradients are summed over this many parts
  train.log_every_steps = 10  # between rows of metrics
  # Rows and samples go to this project of wandb as well, if it is installed;
  # its own WANDB_MODE=offline keeps them for `wandb sync`. '': they do not
  train.wandb_project = ''
  train.stall_s = 600.0  # a step or a batch that takes longer is reported
  train.heartbeat_s = 10  # processes end when one was silent for so long

  c.guard = guard = config_dict.ConfigDict()
  # An update is skipped if its loss or gradient is not finite, or is so many
  # standard deviations above those of the last 128 steps; 0: any height goes.
  # With few tokens a batch, weights of 1/t make spikes of their own.
  guard.spike_sigmas = 0.0
  guard.max_in_a_row = 10  # updates skipped before a run stops

  c.eval = evaluation = config_dict.ConfigDict()
  evaluation.path = ''  # data whose held-out part is used; '': that of training
  evaluation.every_steps = 500  # between evaluations; one more at the end
  evaluation.batch = 32  # sequences per batch over all devices
  evaluation.batches = 8  # of each dataset

  c.sample = sample = config_dict.ConfigDict()
  sample.prompts = ('',)  # at every evaluation; empty tuple: no samples
  sample.gen_length = 64
  sample.block_length = 64
  sample.steps = 64
  sample.temperature = 0.0
  sample.top_k = 0  # of the most probable tokens one is drawn; 0: of all
  sample.top_p = 1.0  # of those that have this probability together
  # low_confidence | random | threshold | factor | ancestral | first_hitting;
  # the last two are exact, or nearly, at temperature 1; steps and schedule
  # mean nothing to threshold, factor and first_hitting
  sample.remasking = 'low_confidence'
  sample.schedule = 'linear'  # linear | cosine: tokens still masked over time
  sample.confidence = 'probability'  # probability | entropy | margin
  sample.threshold = 0.9  # confidence from which threshold keeps a token
  sample.factor = 1.0  # of remasking=factor: keeps more tokens when larger
  sample.guidance = 0.0  # classifier-free, extrapolates from no prompt; 0: off
  sample.stop_at_eos = False  # what would follow an eos is not sampled
  sample.logits_eos_inf = False  # eos is never predicted
  sample.confidence_eos_eot_inf = False  # eos and eot are committed last
  sample.eot_id = -1  # end of turn; -1: none
  # none | prefix | dual: keys and values kept from a block's first step, for
  # fewer positions in later ones; changes results a little unless refresh is 1
  sample.cache = 'none'
  sample.refresh = 0  # steps between passes over all, in a block; 0: the first
  # Blocks after the current one whose masks the network sees; -1: all. From 0
  # on it does not know how long an answer may become
  sample.lookahead = -1

  c.checkpoint = checkpoint = config_dict.ConfigDict()
  checkpoint.every_steps = 1000  # between checkpoints; one more at the end
  checkpoint.keep = 2  # latest ones kept
  checkpoint.keep_every_steps = 0  # those of multiples are kept for ever
  checkpoint.max_failures = 2  # in a row put up with; one process alone

  c.mesh = mesh = config_dict.ConfigDict()
  mesh.replica = 1
  mesh.fsdp = -1  # -1: all devices that the other axes leave
  mesh.sequence = 1
  mesh.tensor = 1
  return c.lock()


CHOICES = {
  'model.dtype': ('float32', 'bfloat16'),
  'optimizer.moments': ('float32', 'bfloat16'),
  'model.remat': (
    'none',
    'minimal',
    'attention',
    'attended',
    'offload',
    'full',
  ),
  'model.attention': ('auto', 'xla', 'splash', 'cudnn'),
  'objective.name': ('masked_diffusion', 'autoregressive'),
  'objective.schedule': ('linear', 'cosine', 'polynomial'),
  'objective.time_sampling': ('antithetic', 'stratified', 'iid'),
  'objective.attend_within': ('row', 'document'),
  'data.verify': ('sample', 'all'),
  'optimizer.schedule': ('wsd', 'cosine', 'piecewise'),
  'sample.remasking': (
    'low_confidence',
    'random',
    'threshold',
    'factor',
    'ancestral',
    'first_hitting',
  ),
  'sample.schedule': ('linear', 'cosine'),
  'sample.confidence': ('probability', 'entropy', 'margin'),
  'sample.cache': ('none', 'prefix', 'dual'),
}
POSITIVE = (
  'model.vocab_size model.embed model.layers model.heads model.kv_heads '
  'model.head_dim model.mlp model.rope_theta model.norm_eps '
  'objective.eps objective.schedule_power objective.loss_chunk_tokens '
  'optimizer.clip_norm data.length '
  'train.steps train.batch train.microbatches train.log_every_steps '
  'eval.every_steps eval.batch eval.batches '
  'sample.gen_length sample.block_length sample.steps '
  'checkpoint.every_steps checkpoint.keep '
  'train.heartbeat_s guard.max_in_a_row'
).split()
NOT_NEGATIVE = (
  'optimizer.learning_rate optimizer.final_learning_rate '
  'optimizer.warmup_steps optimizer.decay_steps optimizer.weight_decay '
  'optimizer.eps data.max_damaged_rows sample.temperature '
  'sample.top_k sample.threshold sample.factor sample.guidance '
  'sample.refresh '
  'train.stall_s guard.spike_sigmas checkpoint.keep_every_steps '
  'checkpoint.max_failures'
).split()


def validate(c):
  """Checks what the types cannot, before anything is compiled.

  What depends on the machine (devices) and on files (tokenizer, data) is
  checked where they are opened.

  Raises:
    UserError: names the keys and the fix.
  """

  def require(condition, message):
    if not condition:
      raise UserError(message)

  check_keys(c)
  for key, choices in CHOICES.items():
    value = lookup(c, key)
    require(
      value in choices,
      f'config.{key}={value!r}: choose one of {", ".join(choices)}'
      + _suggestion(value, choices),
    )
  for key in POSITIVE:
    require(
      lookup(c, key) > 0, f'config.{key}={lookup(c, key)}: must be positive'
    )
  for key in NOT_NEGATIVE:
    require(
      lookup(c, key) >= 0,
      f'config.{key}={lookup(c, key)}: must not be negative',
    )
  for key in ('optimizer.b1', 'optimizer.b2'):
    require(
      0 <= lookup(c, key) < 1,
      f'config.{key}={lookup(c, key)}: must be in [0, 1)',
    )
  require(
    all(isinstance(prompt, str) for prompt in c.sample.prompts),
    f'config.sample.prompts={c.sample.prompts}: must be strings',
  )
  m, t, o, e = c.model, c.train, c.optimizer, c.objective
  require(
    m.heads % m.kv_heads == 0,
    f'config.model.heads={m.heads} is not a multiple of '
    f'config.model.kv_heads={m.kv_heads}',
  )
  require(
    m.head_dim % 2 == 0,
    f'config.model.head_dim={m.head_dim} must be even: rotary positions turn '
    'pairs',
  )
  for name, value in c.tokens.items():
    require(
      0 <= value < m.vocab_size,
      f'config.tokens.{name}={value} is outside the vocabulary of '
      f'config.model.vocab_size={m.vocab_size}',
    )
  require(
    t.batch % t.microbatches == 0,
    f'config.train.batch={t.batch} is not divisible by '
    f'config.train.microbatches={t.microbatches}',
  )
  for section in ('train', 'eval'):
    batch = c[section].batch
    require(
      e.time_sampling != 'antithetic' or batch % 2 == 0,
      f'config.{section}.batch={batch} must be even: antithetic time sampling '
      'draws times for pairs of rows',
    )
  require(
    not m.predict_next or e.name == 'masked_diffusion',
    'config.model.predict_next=True is for '
    "config.objective.name='masked_diffusion': an autoregressive row is "
    'shifted already',
  )
  require(
    len(m.rope_scaling) in (0, 4) and all(x > 0 for x in m.rope_scaling),
    f"config.model.rope_scaling={m.rope_scaling}: must be () or Llama 3.1's "
    '(factor, low_freq_factor, high_freq_factor, length)',
  )
  require(e.eps < 1, f'config.objective.eps={e.eps} must be below 1')
  require(
    0 <= e.random_length_fraction <= 1,
    f'config.objective.random_length_fraction={e.random_length_fraction} must '
    'lie in [0, 1]',
  )
  skip = c.data.skip_samples
  pairs = all(isinstance(r, tuple) and len(r) == 2 for r in skip)
  bounds = [n for pair in skip for n in pair] if pairs else []
  require(
    pairs
    and all(isinstance(n, int) and n >= 0 for n in bounds)
    and bounds == sorted(set(bounds)),
    f'config.data.skip_samples={skip}: must be (first, end) pairs of sample '
    'numbers, ascending and apart, as in ((128, 256), (512, 544))',
  )
  warmup = o.warmup_steps + (o.decay_steps if o.schedule == 'wsd' else 0)
  require(
    o.schedule == 'piecewise' or warmup <= t.steps,
    f'config.optimizer: warmup and decay take {warmup} steps, more than '
    f'config.train.steps={t.steps}; shorten them',
  )
  require(
    o.schedule != 'cosine' or o.warmup_steps < t.steps,
    f'config.optimizer.warmup_steps={o.warmup_steps} leaves no step of '
    f'config.train.steps={t.steps} for the cosine',
  )
  if o.schedule == 'piecewise':
    triples = all(isinstance(p, tuple) and len(p) == 3 for p in o.pieces)
    ends = [piece[0] for piece in o.pieces] if triples else []
    require(
      ends and ends == sorted(ends) and ends[-1] == t.steps,
      'config.optimizer.pieces must be (last step, first rate, last rate) in '
      f'order, and end at config.train.steps={t.steps}',
    )
  s = c.sample
  require(0 < s.top_p <= 1, f'config.sample.top_p={s.top_p} must lie in (0, 1]')
  for key, off in (('top_k', 0), ('top_p', 1)):
    require(
      s.temperature > 0 or s[key] == off,
      f'config.sample.{key}={s[key]} chooses among tokens to draw from: set '
      'config.sample.temperature above 0',
    )
  require(
    -1 <= s.eot_id < m.vocab_size,
    f'config.sample.eot_id={s.eot_id} is outside the vocabulary of '
    f'config.model.vocab_size={m.vocab_size}; -1 for none',
  )
  require(
    not s.guidance or e.name == 'masked_diffusion',
    f'config.sample.guidance={s.guidance} needs '
    "config.objective.name='masked_diffusion'",
  )
  require(
    s.lookahead >= -1,
    f'config.sample.lookahead={s.lookahead} must be a number of blocks, or -1 '
    'for all',
  )
  require(
    not s.refresh or s.cache != 'none',
    f'config.sample.refresh={s.refresh} is how often a cache is made anew: set '
    'config.sample.cache too',
  )
  require(
    s.cache == 'none' or not m.predict_next,
    f'config.sample.cache={s.cache} is not for config.model.predict_next=True: '
    'the first prediction of a block would stand to the left of it; set '
    'config.sample.cache=none',
  )
  for key, off in (('cache', 'none'), ('lookahead', -1)):
    require(
      s[key] == off or e.name == 'masked_diffusion',
      f'config.sample.{key}={s[key]} needs '
      "config.objective.name='masked_diffusion'",
    )
  blocks = -(-s.gen_length // min(s.block_length, s.gen_length))
  require(
    s.steps % blocks == 0,
    f'config.sample.steps={s.steps} cannot be shared equally by {blocks} '
    f'blocks; choose a multiple of {blocks}',
  )


def check_keys(c):
  """Raises UserError unless the config has exactly the keys of `default`."""
  differ = sorted(flatten(c).keys() ^ flatten(default()).keys())
  if differ:
    some = ', '.join(differ[:6]) + ', ...' * (len(differ) > 6)
    raise UserError(
      f'config keys {some} are missing or unknown: override single keys, not a '
      'whole section'
    )


def validate_mesh(c, sizes):
  """Checks that batches split over the devices of a mesh.

  Args:
    c: the config.
    sizes: dict from mesh axis to its size.

  Raises:
    UserError: names the key and values that would do.
  """
  shards = sizes['replica'] * sizes['fsdp']
  for section, parts in (('train', c.train.microbatches), ('eval', 1)):
    batch, unit = c[section].batch, shards * parts
    if batch % unit:
      if c.objective.time_sampling == 'antithetic':
        unit = math.lcm(unit, 2)
      near = max(1, round(batch / unit)) * unit
      over = f'{shards} devices' + (
        f' x {parts} microbatches' if parts > 1 else ''
      )
      raise UserError(
        f'config.{section}.batch={batch} is not divisible by the mesh '
        f'({over}); --config.{section}.batch={near} is'
      )
  if c.data.length % sizes['sequence']:
    raise UserError(
      f'config.data.length={c.data.length} is not divisible by '
      f'config.mesh.sequence={sizes["sequence"]}'
    )


def choose(machines, name):
  """The entry of a config file's table that FILE:NAME on the flag asks for.

  Raises:
    UserError: there is no such entry.
  """
  if name not in machines:
    raise UserError(
      f'--config FILE:{name}: choose one of {", ".join(machines)}'
      + _suggestion(name, machines)
    )
  return machines[name]


def lookup(c, dotted):
  """The value at a dotted key, like 'model.heads'."""
  for part in dotted.split('.'):
    c = c[part]
  return c


def flatten(c):
  """A ConfigDict, or dict of dicts, as a dict from dotted keys to values."""
  flat = {}
  for key, value in c.items():
    if isinstance(value, (dict, config_dict.ConfigDict)):
      flat |= {f'{key}.{k}': v for k, v in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def from_dict(tree):
  """The config saved as a plain dict in a checkpoint, checked for its keys.

  A key that did not exist when it was saved has its default, which is what was
  done before.

  Raises:
    UserError: the dict has keys that this version's config does not have.
  """
  c = default()
  theirs, ours = flatten(config_dict.ConfigDict(tree)), flatten(c)
  if theirs.keys() - ours.keys():
    unknown = ', '.join(sorted(theirs.keys() - ours.keys()))
    raise UserError(
      f'this checkpoint is from another version of maskdiff, whose config has '
      f'the keys {unknown}: use that version'
    )
  with c.unlocked():
    c.update(config_dict.ConfigDict(tree))
  for key, value in theirs.items():
    if isinstance(value, list):
      section, _, name = key.rpartition('.')
      (lookup(c, section) if section else c)[name] = _tuples(value)
  return c


def _tuples(value):
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _suggestion(word, known):
  close = difflib.get_close_matches(str(word), list(known), n=1)
  return f'; did you mean {close[0]!r}?' if close else ''


def run_script(main, argv=None, positional=False):
  """Parses the command line of a script in launch/ and calls main(FLAGS).

  The script has defined its absl flags; one that is `positional` takes other
  arguments too, and is called as main(FLAGS, arguments). --help prints them
  after its docstring. Everything that the user can fix ends with one line on
  standard error and status 2: an unknown flag or config key, forgotten dashes,
  and every UserError. Status 75 means: start me again.
  """
  argv = sys.argv if argv is None else argv
  if '--help' in argv[1:]:
    print(_help())
    return
  try:
    args, rest = _parse(argv)
    if positional:
      main(args, rest)
    elif rest:
      hint = f'; did you mean --{rest[0]}?' if '=' in rest[0] else ''
      raise UserError(f'unexpected argument {rest[0]!r}{hint}')
    else:
      main(args)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(STATUS_USER)
  except Preempted:  # it has been said
    sys.exit(STATUS_AGAIN)


def _help():
  # Those of this module are --config.
  known = (flags.FLAGS.main_module_help(), flags.FLAGS.module_help(__name__))
  return '\n'.join([sys.modules['__main__'].__doc__, *filter(None, known)])


def _parse(argv):
  try:
    rest = flags.FLAGS(argv)[1:]
    if 'config' in flags.FLAGS:
      check_keys(flags.FLAGS.config)  # the flag puts its errors off till read
  except UserError:
    raise
  except Exception as e:  # a config file is a program, and may raise anything
    raise UserError(_explain(e, argv)) from e
  return flags.FLAGS, rest


def _explain(error, argv):
  """Says in one line what is wrong with a flag or a config file."""
  if isinstance(error, flags.UnrecognizedFlagError):
    return f'unknown flag --{error.flagname}' + _suggestion(
      error.flagname, flags.FLAGS
    )
  keys = flatten(default())
  for argument in argv[1:]:
    match = re.match(r'--config\.([^=]+)', argument)
    if match and match[1] not in keys and match[1] not in default():
      return f'unknown config key {match[1]!r}' + _suggestion(match[1], keys)
  # What is left are errors raised by the file, ml_collections' own among them.
  message = str(error).replace('\\', '')
  if match := re.search(r'errors\.UserError: (.*)', message):
    return match[1]
  if match := re.search(r"No such file or directory: ('.*')", message):
    return f'there is no config file {match[1]}'
  if match := re.search(r'Key "(\w+)" does not exist', message):
    neighbours = re.findall(r"'(\w+)':", message)
    return f'unknown config key {match[1]!r} in the config file' + _suggestion(
      match[1], neighbours
    )
  if match := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message):
    return (
      f'unknown config key {match[2]!r} in the config file; '
      f'did you mean {match[1]!r}?'
    )
  if match := re.search(r"override field '(\w+)' .*cast.* to type", message):
    _, _, detail = message.partition('(reference). ')
    return f'config key {match[1]!r}: {_short(detail)}'
  if isinstance(error, flags.Error):
    return _short(message)
  return f'cannot load the config file: {_short(message)}'


def _short(message):
  return ' '.join(str(message).split())[:200]


def define_config_flag():
  """Defines --config FILE with its --config.key=value overrides."""
  config_flags.DEFINE_config_file(
    'config', None, 'A file of configs/, e.g. configs/tiny.py.'
  )
