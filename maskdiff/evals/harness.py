"""A model class for lm-eval (github.com/EleutherAI/lm-evaluation-harness).

Importing this module registers the class under the name maskdiff:

  from maskdiff.evals import harness
  lm_eval.simple_evaluate(model=harness.MaskDiff('runs/tiny'), tasks=[...])
  lm_eval.simple_evaluate(model='maskdiff', model_args='workdir=runs/tiny', ...)

or `python launch/harness.py --workdir runs/tiny --tasks ...`. This module needs
the package lm-eval, but not PyTorch.

The class follows lm-eval's conventions. White space at the end of a context is
scored with the continuation. Context and continuation are encoded together and
split where the context ends. A context that is too long loses its beginning. An
empty context becomes an eos token, since an eos precedes a document in training
rows. With attention within documents, no token precedes a document, and an
empty context stays empty.
"""

import dataclasses
import logging
import zlib

import jax

from maskdiff import config as config_lib
from maskdiff.errors import UserError
from maskdiff.evals import answered, scored
from maskdiff.interop import load
from maskdiff.likelihood import bounds, queries
from maskdiff.likelihood.estimators import Estimator
from maskdiff.sampling import layouts
from maskdiff.sampling.serve import RowRequest
from maskdiff.sampling.settings import describe, sampler_config

try:
  from lm_eval import utils
  from lm_eval.api.model import TemplateLM
  from lm_eval.api.registry import register_model
except ImportError as error:
  raise UserError(
    f'lm-eval is not installed ({error}): pip install "lm-eval>=0.4.13,<0.5"'
  ) from error

GREEDY = {'temperature': 0.0, 'top_k': 0, 'top_p': 1.0}


@register_model('maskdiff')
class MaskDiff(TemplateLM):
  """Scores and answers requests of lm-eval's tasks."""

  def __init__(
    self,
    workdir,
    form='count',
    samples=128,
    strata=16,
    coupled=False,
    guidance=0.0,
    check_greedy=True,
    seed=0,
    tokens_per_call=4096,
    tensor=1,
    dtype=None,
    ema=False,
    rope_scaling=None,
    batch_size=16,
    max_batch_size=None,
    device=None,
    **sampler,
  ):
    """Loads a model.

    Args:
      workdir: work directory or Hugging Face folder.
      form: count, bernoulli or left_to_right, as in launch/evaluate.py.
      samples, strata, coupled: see estimators.Estimator.
      guidance: classifier-free guidance for likelihoods and sampling.
      check_greedy: whether to compare continuations with greedy decoding. If
        not, is_greedy is False for all continuations.
      seed: seed of noise and sampling.
      tokens_per_call: see queries.LikelihoodConfig.
      tensor: number of devices among which every layer is split, see load.load.
      dtype: dtype of the weights, float32 or bfloat16; default: as stored.
      ema: take the moving average of the weights instead of the weights.
      rope_scaling: tokens of a training row and of the longest row, a list.
      batch_size: number of texts sampled together.
      max_batch_size, device: passed by lm-eval, not used.
      sampler: keys of config.sample. They override the settings of a task;
        gen_length overrides its max_gen_toks.

    Raises:
      UserError: the model cannot be loaded, or a setting is not valid.
    """
    super().__init__()
    for name, value, least in (
      ('samples', samples, 1),
      ('strata', strata, 1),
      ('seed', seed, 0),
      ('tokens_per_call', tokens_per_call, 1),
      ('tensor', tensor, 1),
      ('batch_size', batch_size, 1),
    ):
      _check_integer(name, value, least)
    if dtype is not None and dtype not in config_lib.WEIGHT_DTYPES:
      raise UserError(
        f'dtype={dtype!r}: choose among {", ".join(config_lib.WEIGHT_DTYPES)}'
      )
    if not isinstance(ema, bool):
      raise UserError(f'ema={ema!r}: choose True or False')
    del max_batch_size, device
    self.check_greedy, self.seed, self.batch = check_greedy, seed, batch_size
    self.sampler_settings = {**sampler, 'guidance': guidance}
    self.estimator = None
    if form != 'left_to_right':
      self.estimator = Estimator(form, samples, strata, coupled)
    self.model = load.Model(
      *load.load(workdir, tensor, dtype, ema, rope_scaling)
    )
    config = self.model.config
    # `steps` is checked later, since it depends on a task's gen_length.
    checked = {k: v for k, v in self.sampler_settings.items() if k != 'steps'}
    config_lib.with_settings(config, {**GREEDY, **checked})
    self.likelihood = queries.likelihood_config(
      config, guidance, tokens_per_call
    )
    self.used = {}  # (SamplerConfig, Settings) by settings of requests
    self.info = {
      'workdir': str(workdir),
      'dtype': self.model.dtype,
      'ema': ema,
      'rope_scaling': list(config.model.rope_scaling),
      'seed': seed,
      'guidance': guidance,
      'check_greedy': check_greedy,
      'estimator': dataclasses.asdict(self.estimator)
      if self.estimator
      else form,
      'sampler_settings': self.sampler_settings,
      'samplers': [],  # settings of the sampler; one entry per distinct set
    }

  @property
  def eot_token_id(self):
    return self.model.tokenizer.eos_id

  @property
  def max_length(self):
    return self.likelihood.context

  @property
  def tokenizer_name(self):
    return self.model.tokenizer.fingerprint

  def get_model_info(self):
    """Returns the dict that lm-eval stores with the results, under `config`."""
    return {'maskdiff': self.info}

  def tok_encode(self, string, add_special_tokens=None, **kwargs):
    """Returns token ids, without special tokens."""
    del add_special_tokens, kwargs
    return self.model.tokenizer.encode(string)

  def _encode_pair(self, context, continuation):
    """Encodes context and continuation together, as lm-eval does.

    If that leaves the continuation without tokens, the two are encoded
    separately.
    """
    pair = super()._encode_pair(context, continuation)
    if not pair[1]:
      pair = self.tok_encode(context), self.tok_encode(continuation)
    return pair

  def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
    """Returns log-likelihoods of continuations, and whether they are greedy.

    Continuations of one context share a seed. Continuations with equally many
    tokens are then compared under the same masks.
    """
    del disable_tqdm, kwargs
    pairs = [self._fit(*request[1:]) for request in requests]
    seeds = [_seed(self.seed, context) for _, context, _ in requests]
    log_likelihoods = self._bound(pairs, seeds)
    greedy = [False] * len(pairs)
    if self.check_greedy:
      with jax.set_mesh(self.model.mesh):
        greedy = bounds.greedy_matches(
          self.model.network,
          self.likelihood,
          bounds.lay_out(*zip(*pairs, strict=True)),
        ).tolist()
    answers = list(zip(log_likelihoods, greedy, strict=True))
    for (texts, _, _), answer in zip(requests, answers, strict=True):
      if texts is not None:
        self.cache_hook.add_partial('loglikelihood', texts, answer)
    return answers

  def loglikelihood_rolling(self, requests, disable_tqdm=False):
    """Returns the log-likelihood of each text, 0 for an empty text.

    lm-eval cuts a text that is longer than the context into pieces. Each piece
    is scored given the last token before it. The last piece is scored given as
    many tokens as fit.
    """
    del disable_tqdm
    pairs, text_of = [], []
    for i, request in enumerate(requests):
      windows = utils.get_rolling_token_windows(
        self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length - 1,
        context_len=1,
      )
      for window in windows:
        pairs.append(self._fit(*utils.make_disjoint_window(window)))
        text_of.append(i)
    seeds = [_seed(self.seed + i, sum(p, [])) for i, p in enumerate(pairs)]
    totals = [0.0] * len(requests)
    for i, value in zip(text_of, self._bound(pairs, seeds), strict=True):
      totals[i] += value
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
    return totals

  def generate_until(self, requests, disable_tqdm=False):
    """Samples a continuation of each context.

    A continuation is cut before its first stop string and its first eos. The
    temperature, top_k and top_p of a request are used if do_sample is true;
    otherwise the temperature is 0. A request without do_sample samples if its
    temperature is above 0.
    """
    del disable_tqdm
    if not requests:
      return []
    rows, stops = [], []
    for i, request in enumerate(requests):
      text, gen_kwargs = request.args
      until, values = self._decoding(gen_kwargs)
      c, settings = self._settings(tuple(sorted(values.items())))
      max_prompt = self.max_length - settings.gen_length
      if max_prompt < 0:
        raise UserError(
          f'the task generates {settings.gen_length} tokens, but training rows '
          f'had {self.max_length}: set gen_length to at most {self.max_length}'
        )
      prompt = _last(self.tok_encode(text), max_prompt)
      row = layouts.prompt_row(prompt, settings.gen_length)
      rows.append(RowRequest(i, row, self.seed + i, settings))
      stops.append(until)
    # Requests differ only in settings that share a program, so `c` is that of
    # all requests.
    sampled = answered.complete(self.model, c, rows, self.batch)
    answers = []
    for request, until, tokens in zip(
      requests, stops, sampled.tokens, strict=True
    ):
      text = self.model.tokenizer.decode(tokens)
      ends = [text.find(stop) for stop in until if stop in text]
      answers.append(text[: min(ends, default=len(text))])
      self.cache_hook.add_partial('generate_until', request.args, answers[-1])
    return answers

  def _settings(self, values):
    """Returns the SamplerConfig and Settings of a request, and notes them.

    Args:
      values: tuple of (key of config.sample, value), sorted.
    """
    if values not in self.used:
      config = config_lib.with_settings(self.model.config, dict(values))
      self.used[values] = sampler_config(config)
      described = describe(self.model.network, *self.used[values])
      if described not in self.info['samplers']:
        self.info['samplers'].append(described)
    return self.used[values]

  def _decoding(self, gen_kwargs):
    """Returns the stop strings and the sampler settings of a request."""
    gen_kwargs = dict(gen_kwargs)
    until = gen_kwargs.pop('until', None) or []
    until = [until] if isinstance(until, str) else list(until)
    settings = dict(GREEDY)
    sampling = {k: gen_kwargs.pop(k) for k in GREEDY if k in gen_kwargs}
    if gen_kwargs.pop('do_sample', sampling.get('temperature', 0) > 0):
      settings |= sampling
    length = gen_kwargs.pop('max_gen_toks', None)
    if length is not None:
      settings['gen_length'] = int(length)
    if gen_kwargs:
      logging.warning(
        'maskdiff ignores these settings of a task: %s', sorted(gen_kwargs)
      )
    until = [stop for stop in until if stop]
    return until, {**settings, **self.sampler_settings}

  def _fit(self, context, continuation):
    """Cuts the beginning of a context so that the row fits the model.

    Returns:
      (context, continuation), token lists.

    Raises:
      UserError: the continuation is too long.
    """
    if len(continuation) > self.max_length:
      raise UserError(
        f'a continuation has {len(continuation)} tokens, but training rows had '
        f'{self.max_length}: choose another task'
      )
    by_document = self.model.config.objective.attend_within == 'document'
    if by_document and context == [self.prefix_token_id]:
      context = []
    return _last(context, self.max_length - len(continuation)), continuation

  def _bound(self, pairs, seeds):
    """Returns log-likelihoods of continuations given contexts, list of nats.

    Args:
      pairs: list of (context, continuation).
      seeds: list of int.
    """
    if not pairs:
      return []
    answers = bounds.lay_out(*zip(*pairs, strict=True))
    network, c = self.model.network, self.likelihood
    with jax.set_mesh(self.model.mesh):
      if self.estimator is None:
        estimate = bounds.left_to_right(network, c, answers)
      else:
        scored.check_masks(answers, samples=self.estimator.samples)
        estimate = bounds.bound(network, c, answers, self.estimator, seeds)
    return estimate.log_likelihood.tolist()


def _check_integer(name, value, least):
  """Raises UserError unless a setting is an integer of at least `least`."""
  whole = isinstance(value, int) and not isinstance(value, bool)
  if not whole or not least <= value < 2**31:
    raise UserError(
      f'{name}={value!r}: must be an integer from {least} to {2**31 - 1}'
    )


def _last(tokens, n):
  return tokens[max(0, len(tokens) - n) :]


def _seed(seed, tokens):
  """Returns a seed that depends only on the given seed and the tokens."""
  return zlib.crc32(repr((seed, list(tokens))).encode())
