"""The complete default configuration, its checks, and the command line.

`default()` names every key there is, with its type; files in configs/ override
some and return the result locked, so that a key that does not exist is an
error in a file and on the command line alike. ml_collections stops here;
run.py turns the sections into frozen dataclasses.
"""

import difflib

from ml_collections import config_dict

from maskdiff.errors import UserError


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
  # Saves in a row that may fail; after one more a run stops, and at once with
  # several processes.
  checkpoint.max_failures = 2

  c.mesh = mesh = config_dict.ConfigDict()
  mesh.replica = 1
  mesh.fsdp = -1  # -1: all devices that the other axes leave
  mesh.sequence = 1
  mesh.tensor = 1
  return c.lock()


def check_keys(c):
  """Raises UserError unless the config has exactly the keys of `default`."""
  differ = sorted(flatten(c).keys() ^ flatten(default()).keys())
  if differ:
    some = ', '.join(differ[:6]) + ', ...' * (len(differ) > 6)
    raise UserError(
      f'config keys {some} are missing or unknown: override single keys, not a '
      'whole section'
    )


def choose(machines, name):
  """The entry of a config file's table that FILE:NAME on the flag asks for.

  Raises:
    UserError: there is no such entry.
  """
  if name not in machines:
    raise UserError(
      f'--config FILE:{name}: choose one of {", ".join(machines)}'
      + suggestion(name, machines)
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


def suggestion(word, known):
  close = difflib.get_close_matches(str(word), list(known), n=1)
  return f'; did you mean {close[0]!r}?' if close else ''
