"""Log-likelihoods: `maskdiff.log_likelihood`, `maskdiff.greedy_matches`."""

import jax
import numpy as np

from maskdiff.config.key import check_value
from maskdiff.config.sample import SETTINGS
from maskdiff.errors import UserError, suggestion
from maskdiff.evals.scored import check_masks, split_space
from maskdiff.library import arguments
from maskdiff.likelihood import bounds, bracket, estimators, queries
from maskdiff.objectives.table import OBJECTIVES

FORMS = (
  *estimators.FORMS,
  *('left_to_right', 'multi_sample', 'two_sided', 'windows'),
)


def log_likelihood(
  model,
  prompts,
  answers,
  *,
  suffixes=None,
  form='count',
  samples=128,
  strata=16,
  coupled=False,
  orders=16,
  seed=0,
  masks=None,
  weights=None,
  guidance=0.0,
  tokens_per_call=4096,
):
  """Returns log-likelihoods of answers, or lower bounds, as launch/evaluate.py.

  A masked diffusion model has a bound, which is a mean over masks, or the exact
  chain rule of a decoding order. An autoregressive model has the log-likelihood
  itself, with a standard error of 0, and refuses multi_sample and two_sided.

  As in launch/evaluate.py, white space at the end of a prompt text moves to the
  answer. Token lists are not changed.

  Args:
    model: Model.
    prompts: list of B texts or token lists, which may be empty.
    answers: list of B texts or token lists, the scored tokens.
    suffixes: list of B texts or token lists that follow the answers and are
      never masked; default: empty.
    form: count or bernoulli, for the bound; left_to_right, for the chain rule;
      multi_sample, for the importance-weighted bound; two_sided, for this bound
      and one from the other side; windows, for whole windows of a model
      trained with sdlm.
    samples: masks per answer, for the bound.
    strata: masks that share a stratified draw; see estimators.Estimator.
    coupled: use each mask together with its complement.
    orders: random orders per answer, for multi_sample and two_sided.
    seed: seed of the first row, which grows by 1 per row; or a list of B. Rows
      with one seed and equally long answers have the same masks.
    masks: list of B arrays [n, A] of bool, masks of the A tokens of an answer
      in place of drawn ones. `form`, `samples`, `seed` have no effect then.
    weights: list of B arrays [n] of float, the weights of the masks; default:
      A / number of masked tokens, the weights of the form count, and 0 for an
      empty mask.
    guidance: scale of classifier-free guidance; 0: off.
    tokens_per_call: tokens per forward pass; memory grows with it.

  Returns:
    bounds.Estimate: log_likelihood and stderr, [B] float64 each, in nats. The
    standard error is nan if it is unknown. With `masks`, it is that of the mean
    of independent masks. For two_sided, a bracket.Bracket.

  Raises:
    UserError: lists have different lengths, an answer is empty, a row is longer
      than the training rows, or an argument is not valid.
  """
  rows, c = _answers(
    model, prompts, answers, suffixes, guidance, tokens_per_call
  )
  size, network = len(rows.tokens), model.network
  with jax.set_mesh(model.mesh):
    if masks is not None:
      return _given(network, c, rows, masks, weights)
    if weights is not None:
      raise UserError('weights: are for given masks; set masks too')
    if form == 'left_to_right':
      return bounds.left_to_right(network, c, rows)
    if form == 'windows':
      return bounds.whole_windows(network, c, rows)
    seeds = arguments.seeds_of(seed, size)
    arguments.check_whole(samples=samples, strata=strata, orders=orders)
    if form in ('multi_sample', 'two_sided'):
      check_masks(rows, orders=orders)
    else:
      check_masks(rows, samples=samples)
    if form == 'multi_sample':
      return bounds.multi_sample(network, c, rows, orders, seeds)
    if form == 'two_sided':
      return bracket.bracket(network, c, rows, orders, seeds)
    if form not in FORMS:
      raise UserError(
        f'form={form!r}: choose one of {", ".join(FORMS)}'
        + suggestion(form, FORMS)
      )
    estimator = estimators.Estimator(form, samples, strata, coupled)
    return bounds.bound(network, c, rows, estimator, seeds)


def greedy_matches(
  model, prompts, answers, *, suffixes=None, guidance=0.0, tokens_per_call=4096
):
  """Returns whether greedy decoding gives the answers, [B] bool.

  Args:
    model: Model.
    prompts: see `log_likelihood`.
    answers: see `log_likelihood`.
    suffixes: see `log_likelihood`.
    guidance: see `log_likelihood`.
    tokens_per_call: see `log_likelihood`.

  Raises:
    UserError: see `log_likelihood`.
  """
  rows, c = _answers(
    model, prompts, answers, suffixes, guidance, tokens_per_call
  )
  with jax.set_mesh(model.mesh):
    return bounds.greedy_matches(model.network, c, rows)


def _answers(model, prompts, answers, suffixes, guidance, tokens_per_call):
  """Returns queries.Answers and the LikelihoodConfig."""
  texts = {
    'prompts': arguments.texts_of(prompts),
    'answers': arguments.texts_of(answers, 'answers'),
  }
  if suffixes is not None:
    texts['suffixes'] = arguments.texts_of(suffixes, 'suffixes')
  sizes = {name: len(found) for name, found in texts.items()}
  if len(set(sizes.values())) > 1:
    named = ', '.join(f'{n} {name}' for name, n in sizes.items())
    raise UserError(f'{named}: give lists of one length')
  pairs = [
    split_space(p, a) if isinstance(p, str) and isinstance(a, str) else (p, a)
    for p, a in zip(texts['prompts'], texts['answers'], strict=True)
  ]
  parts = dict(zip(('prompt', 'answer'), zip(*pairs, strict=True), strict=True))
  if suffixes is not None:
    parts['suffix'] = texts['suffixes']
  encoded = [
    [arguments.ids_of(model, text, name) for text in found]
    for name, found in parts.items()
  ]
  guidance = arguments.python_value(guidance)
  check_value('guidance', SETTINGS['guidance'], guidance)
  arguments.check_whole(tokens_per_call=tokens_per_call)
  c = queries.likelihood_config(
    model.config, float(guidance), int(tokens_per_call)
  )
  return bounds.lay_out(*encoded), c


def _given(network, c, answers, masks, weights):
  """Returns the Estimate of given masks."""
  if OBJECTIVES[network.objective].likelihood == 'exact':
    raise UserError(
      f'masks: a network trained with objective {network.objective} has the '
      'log-likelihood itself, without masks; leave them out'
    )
  if network.block_length and weights is None:
    raise UserError(
      'masks: a network trained on blocks has a bound for each block, whose '
      'weights depend on how its masks were drawn; give weights too'
    )
  rows = queries.rows_of(network, c, answers)
  sizes = [int(row.answer.sum()) for row in rows]
  drawn = [
    _queries(i, size, masks, weights, len(rows)) for i, size in enumerate(sizes)
  ]
  values = queries.evaluate(network, c, rows, drawn.__getitem__)
  means = [bounds.mean_and_stderr(v[None]) for v in values]
  return bounds.Estimate(*np.array(means)[..., 0].T)


def _queries(i, size, masks, weights, num_rows):
  """Returns the estimators.Queries of the given masks of row i."""
  for name, given in (('masks', masks), ('weights', weights)):
    found = len(given) if hasattr(given, '__len__') else 0
    if given is not None and found != num_rows:
      raise UserError(f'{name} has {found} elements for {num_rows} rows')
  is_list = hasattr(masks[i], '__len__') and getattr(masks[i], 'ndim', 1)
  shape = len(masks[i]) if is_list else 1, size
  masked = arguments.checked(f'masks[{i}]', masks[i], shape, 'b')
  masked = np.asarray(masked)
  if not len(masked):
    raise UserError(f'masks[{i}] is empty: give at least one mask')
  count = masked.sum(axis=1)
  if weights is None:
    weight = size / np.maximum(count, 1) * (count > 0)
  else:
    weight = np.asarray(
      arguments.checked(f'weights[{i}]', weights[i], (len(masked),), 'fiu'),
      np.float64,
    )
    if not np.isfinite(weight).all():
      raise UserError(f'weights[{i}] has values that are not finite')
  return estimators.Queries(masked, masked, weight)
