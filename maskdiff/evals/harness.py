"""A run as a model of lm-eval (github.com/EleutherAI/lm-evaluation-harness).

Importing this registers it under the name maskdiff:

  from maskdiff.evals import harness
  lm_eval.simple_evaluate(model=harness.MaskDiff('runs/tiny'), tasks=[...])
  lm_eval.simple_evaluate(model='maskdiff', model_args='workdir=runs/tiny', ...)

or `python launch/harness.py --workdir runs/tiny --tasks ...`. Needs the package
lm-eval, and no PyTorch.

lm-eval's conventions are kept: white space at the end of a context is scored
with the continuation, the two are encoded together and cut where the context
ends, contexts that are too long lose their beginning, and an empty one becomes
an eos, after which documents begin in rows of training. (Not if these were
trained with attention within documents, where nothing is before a document.)
"""

import dataclasses
import logging
import zlib

import jax

from maskdiff import config as config_lib
from maskdiff.errors import UserError
from maskdiff.evals import answered
from maskdiff.interop import load
from maskdiff.likelihood import bounds, queries
from maskdiff.likelihood.estimators import Estimator
from maskdiff.sampling.request import describe, sampler_config

try:
  from lm_eval import utils
  from lm_eval.api.model import TemplateLM
  from lm_eval.api.registry import register_model
except ImportError as error:
  raise UserError(
    f'lm-eval is not there ({error}): pip install "lm-eval>=0.4.13,<0.5"'
  ) from error

GREEDY = {'temperature': 0.0, 'top_k': 0, 'top_p': 1.0}


@register_model('maskdiff')
class MaskDiff(TemplateLM):
  """Scores and answers the requests of lm-eval's tasks."""

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
    batch_size=16,
    max_batch_size=None,
    device=None,
    **sampler,
  ):
    """Loads a run.

    Args:
      workdir: of the run.
      form: count, bernoulli or left_to_right, as in launch/evaluate.py.
      samples, strata, coupled: see estimators.Estimator.
      guidance: classifier-free guidance of likelihoods and of sampling.
      check_greedy: whether continuations are compared with greedy decoding;
        else is_greedy is False for all.
      seed: of noise and sampling.
      tokens_per_call: see queries.LikelihoodConfig.
      tensor: devices that share every layer; see run.load.
      dtype: of the weights, float32 or bfloat16; by default as stored.
      batch_size: texts that are continued together.
      max_batch_size, device: given by lm-eval, not used.
      sampler: keys of config.sample. They are put before what a task asks for;
        gen_length also before its max_gen_toks.

    Raises:
      UserError: there is no such run, or a setting is not possible.
    """
    super().__init__()
    if dtype is not None and dtype not in config_lib.WEIGHTS:
      raise UserError(
        f'dtype={dtype!r}: choose among {", ".join(config_lib.WEIGHTS)}'
      )
    del max_batch_size, device
    self.check_greedy, self.seed, self.batch = check_greedy, seed, batch_size
    self.values = {**sampler, 'guidance': guidance}
    self.estimator = None
    if form != 'left_to_right':
      self.estimator = Estimator(form, samples, strata, coupled)
    self.model = answered.Model(*load.load(workdir, tensor, dtype))
    config = self.model.config
    # Whether steps fit is known when a task says how long its answers are.
    checked = {k: v for k, v in self.values.items() if k != 'steps'}
    config_lib.with_settings(config, {**GREEDY, **checked})
    self.likelihood = queries.likelihood_config(
      config, guidance, tokens_per_call
    )
    self.info = {
      'workdir': str(workdir),
      'dtype': self.model.dtype,
      'seed': seed,
      'guidance': guidance,
      'check_greedy': check_greedy,
      'estimator': dataclasses.asdict(self.estimator)
      if self.estimator
      else form,
      'sampler_settings': self.values,
      'samplers': [],  # as used, one for each kind of request
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
    """What lm-eval stores with the results, under `config`."""
    return {'maskdiff': self.info}

  def tok_encode(self, string, add_special_tokens=None, **kwargs):
    """Token ids; special tokens are never added."""
    del add_special_tokens, kwargs
    return self.model.tokenizer.encode(string)

  def _encode_pair(self, context, continuation):
    """As lm-eval's, unless the continuation has no token of its own so."""
    pair = super()._encode_pair(context, continuation)
    if not pair[1]:
      pair = self.tok_encode(context), self.tok_encode(continuation)
    return pair

  def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
    """The log-likelihood of each continuation, and whether it is greedy.

    Continuations of one context have one seed: if they are equally long, they
    are compared under the same masks.
    """
    del disable_tqdm, kwargs
    pairs = [self._fit(context, rest) for _, context, rest in requests]
    seeds = [_seed(self.seed, context) for _, context, _ in requests]
    values = self._bound(pairs, seeds)
    greedy = [False] * len(pairs)
    if self.check_greedy:
      with jax.set_mesh(self.model.mesh):
        greedy = bounds.greedy_matches(
          self.model.network,
          self.likelihood,
          bounds.lay_out(*zip(*pairs, strict=True)),
        ).tolist()
    answers = list(zip(values, greedy, strict=True))
    for (texts, _, _), answer in zip(requests, answers, strict=True):
      if texts is not None:
        self.cache_hook.add_partial('loglikelihood', texts, answer)
    return answers

  def loglikelihood_rolling(self, requests, disable_tqdm=False):
    """The log-likelihood of each text, an empty one's being 0.

    Texts that are longer than the context are cut by lm-eval: a piece is shown
    the last token of the one before, and the last piece as many as fit, which
    are not scored again.
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
    """Texts that the sampler continues contexts with, each cut before the first
    of its stop strings and the first eos.

    A request's own sampling settings count where it says do_sample; else the
    most probable tokens are taken.
    """
    del disable_tqdm
    groups = {}
    for i, request in enumerate(requests):
      until, values = self._decoding(request.args[1])
      key = tuple(sorted(values.items()))
      groups.setdefault(key, []).append((i, request.args[0], until))
    answers = [''] * len(requests)
    for key, members in groups.items():
      config = config_lib.with_settings(self.model.config, dict(key))
      slots = config.sample.gen_length
      room = self.max_length - slots
      if room < 0:
        raise UserError(
          f'{slots} tokens are to be generated, more than the '
          f'{self.max_length} that the network was trained on: set gen_length'
        )
      c = sampler_config(config)
      described = describe(self.model.network, c)
      if described not in self.info['samplers']:
        self.info['samplers'].append(described)
      prompts = [_last(self.tok_encode(text), room) for _, text, _ in members]
      seeds = [self.seed + i for i, _, _ in members]
      filled = answered.complete(
        self.model,
        c,
        prompts,
        [[]] * len(members),
        [slots] * len(members),
        seeds,
        self.batch,
      )
      for (i, _, until), tokens in zip(members, filled.tokens, strict=True):
        text = self.model.tokenizer.decode(tokens)
        ends = [text.find(stop) for stop in until if stop in text]
        answers[i] = text[: min(ends, default=len(text))]
        self.cache_hook.add_partial(
          'generate_until', requests[i].args, answers[i]
        )
    return answers

  def _decoding(self, asked):
    """Stop strings and sampler settings of a request."""
    asked = dict(asked)
    until = asked.pop('until', None) or []
    until = [until] if isinstance(until, str) else list(until)
    values = dict(GREEDY)
    sampling = {key: asked.pop(key) for key in GREEDY if key in asked}
    if asked.pop('do_sample', sampling.get('temperature', 0) > 0):
      values |= sampling
    length = asked.pop('max_gen_toks', None)
    if length is not None:
      values['gen_length'] = int(length)
    if asked:
      logging.warning('maskdiff: no use for %s of a task', sorted(asked))
    return [stop for stop in until if stop], {**values, **self.values}

  def _fit(self, context, rest):
    """Takes from the beginning of a context what is too much."""
    if len(rest) > self.max_length:
      raise UserError(
        f'a continuation has {len(rest)} tokens, more than the '
        f'{self.max_length} that the network was trained on'
      )
    within = self.model.config.objective.attend_within == 'document'
    if within and context == [self.prefix_token_id]:
      context = []
    return _last(context, self.max_length - len(rest)), rest

  def _bound(self, pairs, seeds):
    """[log-likelihood in nats] of the second of each pair given the first."""
    if not pairs:
      return []
    answers = bounds.lay_out(*zip(*pairs, strict=True))
    network, c = self.model.network, self.likelihood
    with jax.set_mesh(self.model.mesh):
      if self.estimator is None:
        estimate = bounds.left_to_right(network, c, answers)
      else:
        estimate = bounds.bound(network, c, answers, self.estimator, seeds)
    return estimate.log_likelihood.tolist()


def _last(tokens, n):
  return tokens[max(0, len(tokens) - n) :]


def _seed(seed, tokens):
  """A seed that depends on a request alone, not on those beside it."""
  return zlib.crc32(repr((seed, list(tokens))).encode())
