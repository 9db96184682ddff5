"""Evaluation during a run: the bound on held-out text, and samples."""

import dataclasses
import functools

import jax
import numpy as np

from maskdiff.config import objective as objective_keys
from maskdiff.distributed.mesh import replicate
from maskdiff.interop import load
from maskdiff.monitoring import history
from maskdiff.objectives.table import OBJECTIVES
from maskdiff.objectives.time_density import TimeDensity, Weight
from maskdiff.sampling import layouts, sampler
from maskdiff.sampling.settings import sampler_config
from maskdiff.training import inputs
from maskdiff.training import step as step_lib
from maskdiff.training.stage import Evaluation

# Held-out times are drawn from [EPS, 1), also if config.objective.eps differs.
EPS = objective_keys.KEYS['eps'].default
DRAFT = 'draft_'  # begins the last part of the names of metrics of drafts


@dataclasses.dataclass(frozen=True)
class Heldout:
  """Held-out text of one dataset of a mixture.

  Attributes:
    name: name of the dataset.
    share: share of the dataset in the mixture, in (0, 1].
    tokens_per_byte: tokens per byte of its held-out text.
    unigram_entropy_nats: entropy of single tokens of its held-out text, nats.
    batches: list of data.rows.Rows of [B, L] on the mesh.
  """

  name: str
  share: float
  tokens_per_byte: float
  unigram_entropy_nats: float
  batches: list


@dataclasses.dataclass(frozen=True)
class Bound:
  """Upper bound on the negative log-likelihood of held-out text.

  Attributes:
    loss_nats_per_token: the bound.
    stderr_nats_per_token: standard error over batches; None for one batch, from
      which it cannot be estimated.
    bits_per_byte: the bound in bits per byte of text.
    nll_of_parts: see the function `nll_of_parts`. {} for a mixture.
    parts: for a mixture, dict from the name of a dataset to its Bound; else {}.
  """

  loss_nats_per_token: float
  stderr_nats_per_token: float | None
  bits_per_byte: float
  nll_of_parts: dict
  parts: dict = dataclasses.field(default_factory=dict)

  def row(self, prefix='eval', weights=''):
    """Returns the metrics by name, as written to metrics.jsonl.

    Args:
      prefix: first part of the names.
      weights: history.EMA for the bound of the moving average; begins the last
        part of the names.
    """
    stderr, name = self.stderr_nats_per_token, f'{prefix}/{weights}'
    row = {
      f'{name}loss_nats_per_token': self.loss_nats_per_token,
      **({} if stderr is None else {f'{name}stderr_nats_per_token': stderr}),
      f'{name}bits_per_byte': self.bits_per_byte,
      **{f'{name}{part}': nll for part, nll in self.nll_of_parts.items()},
    }
    for dataset, part in self.parts.items():
      row |= part.row(f'{prefix}/{dataset}', weights)
    return row


def open_heldout(config, datasets, mesh):
  """Reads the batches to evaluate on; returns a list of Heldout.

  Args:
    config: ConfigDict of the run.
    datasets: list of data.pipeline.Dataset.
    mesh: device mesh.

  Raises:
    UserError: a dataset has less held-out text than config.eval needs.
  """
  total = sum(d.weight for d in datasets)
  heldout = []
  for d in datasets:
    split = d.manifest.splits['heldout']
    batches = list(inputs.heldout_batches(config, d, mesh))
    heldout.append(
      Heldout(
        name=d.name.strip('/'),
        share=d.weight / total,
        tokens_per_byte=split.tokens / split.text_bytes,
        unigram_entropy_nats=split.unigram_entropy_nats,
        batches=batches,
      )
    )
  return heldout


def evaluate_and_sample(
  config, c, params, tokenizer, heldout, between=lambda: None, average=None
):
  """Computes the held-out bound and draws samples; returns an Evaluation.

  Samples are drawn from `params`, so that a run with a moving average has the
  same samples as one without.

  Args:
    config: ConfigDict of the run.
    c: its StepConfig.
    params: parameter tree.
    tokenizer: data.tokenizer.Tokenizer.
    heldout: list of Heldout.
    between: called before every batch; may raise to stop the evaluation.
    average: moving average of the parameters, whose bound is computed too, on
      the same masks; or None.
  """
  bound = evaluate_mixture(c, params, heldout, between)
  row, of_average = bound.row(), None
  if average is not None:
    of_average = evaluate_mixture(c, average, heldout, between)
    row |= of_average.row(weights=history.EMA)
  if OBJECTIVES[c.objective.name].drafts:
    drafts = evaluate_mixture(c, params, heldout, between, drafts=True)
    row |= {
      name: value
      for name, value in drafts.row(weights=DRAFT).items()
      if 'bits_per_byte' not in name and 'mask_ratio' not in name
    }
  return Evaluation(
    row=row,
    texts=sample_texts(config, params, tokenizer),
    line=summary(bound, of_average),
    conclusion=conclude(bound, heldout, of_average),
  )


def summary(bound, average=None):
  """Returns a line with a Bound, and with the Bound of the moving average."""
  note = ''
  if bound.stderr_nats_per_token is None:
    note = '; one batch gives no standard error'

  def text(bound):
    stderr = bound.stderr_nats_per_token
    return (
      f'{bound.loss_nats_per_token:.4f} '
      + ('' if stderr is None else f'± {stderr:.4f} ')
      + f'nats/token, {bound.bits_per_byte:.4f} bits/byte'
    )

  line = f'held-out bound {text(bound)}'
  if average is not None:
    line += f'; of the moving average {text(average)}'
  return line + note


def evaluate_mixture(c, params, heldout, between=lambda: None, drafts=False):
  """Computes the bound of each dataset and of the mixture.

  Args:
    c: StepConfig.
    params: parameter tree.
    heldout: list of Heldout.
    between: see `evaluate`.
    drafts: see `evaluate`.

  Returns:
    Bound for a token drawn from the mixture, with a Bound for each dataset in
    `parts`. For a single dataset, the result of `evaluate`.
  """
  bounds = [
    evaluate(c, params, h.batches, h.tokens_per_byte, between, drafts)
    for h in heldout
  ]
  if len(heldout) == 1:
    return bounds[0]
  share = np.array([h.share for h in heldout])
  losses = np.array([b.loss_nats_per_token for b in bounds])
  stderrs = [b.stderr_nats_per_token for b in bounds]
  known = None not in stderrs
  bytes_per_token = share @ [1 / h.tokens_per_byte for h in heldout]
  loss = float(share @ losses)
  return Bound(
    loss_nats_per_token=loss,
    stderr_nats_per_token=(
      float(np.linalg.norm(share * np.array(stderrs))) if known else None
    ),
    bits_per_byte=float(loss / np.log(2) / bytes_per_token),
    nll_of_parts={},
    parts={h.name: b for h, b in zip(heldout, bounds, strict=True)},
  )


def evaluate(
  c, params, batches, tokens_per_byte, between=lambda: None, drafts=False
):
  """Computes the bound on held-out text, with the same noise every time.

  Args:
    c: StepConfig.
    params: parameter tree.
    batches: list of data.rows.Rows of [B, L].
    tokens_per_byte: tokens per byte of the text, for bits per byte.
    between: called before every batch; may raise to stop the evaluation.
    drafts: whether to compute the loss of the drafts of a drafter, which is no
      bound, instead of that of its network.

  Returns:
    Bound.
  """
  c = eval_config(c, drafts)
  keys = jax.random.split(jax.random.key(0), len(batches))
  sums = []
  for rows, key in zip(batches, keys, strict=True):
    between()
    sums.append(jit_eval_step(c, params, rows, key))
    # Waits for the previous batch, so that at most one batch is queued.
    sums[-2:-1] = jax.device_get(sums[-2:-1])
  sums = jax.device_get(sums)
  total = jax.tree.map(lambda *x: np.sum(x, axis=0), *sums)
  means = [s.loss for s in sums]
  stderr = None
  if len(means) > 1:
    stderr = float(np.std(means, ddof=1) / len(means) ** 0.5)
  loss = float(total.loss)
  return Bound(
    loss_nats_per_token=loss,
    stderr_nats_per_token=stderr,
    bits_per_byte=loss * tokens_per_byte / float(np.log(2)),
    nll_of_parts=nll_of_parts(total),
  )


def eval_config(c, drafts=False):
  """Returns a StepConfig for evaluation, whose loss is the bound.

  Rows are whole and have one mask each, times are stratified and uniform on
  [EPS, 1), and weights are those of the bound, whatever the training draws.
  """
  name = c.objective.name
  objective = dataclasses.replace(
    c.objective,
    # A drafter changes no prediction of its network.
    name='autoregressive' if OBJECTIVES[name].drafts and not drafts else name,
    eps=EPS,
    random_length_fraction=0.0,
    time_sampling='stratified',
    time_density=TimeDensity(),
    weight=Weight(),
    complementary_masks=False,
    autoregressive_weight=0.0,
    position_power=1.0,
    confidence_weight=0.0,
    denominator='token',
    anchors='stride',
  )
  return dataclasses.replace(c, objective=objective)


@functools.partial(jax.jit, static_argnums=0)
def jit_eval_step(c, params, rows, key):
  """Jitted `step.eval_step`; the LossSums are replicated on all devices."""
  return replicate(step_lib.eval_step(c, params, rows, key))


def nll_of_parts(sums):
  """Returns mean losses of parts of the predicted tokens, nats per token.

  The parts are buckets of mask ratios and, with windows, positions in a window:
  1 to 8, powers of two, and the last.

  Args:
    sums: step.LossSums on the host.

  Returns:
    dict from the last part of the name of a metric, such as
    'nll_at_mask_ratio_0.1' for the bucket around 0.1, or
    'nll_at_window_position_1', to a float; only parts with tokens.
  """
  ratio = lambda i: (i + 0.5) / step_lib.RATIO_BUCKETS
  parts = [
    (f'nll_at_mask_ratio_{ratio(i):.1f}', nll, count)
    for i, (nll, count) in enumerate(
      zip(sums.ratio_nll, sums.ratio_count, strict=True)
    )
  ]
  if sums.window_nll is not None:
    last = len(sums.window_nll)
    parts += [
      (f'nll_at_window_position_{n}', nll, count)
      for n, (nll, count) in enumerate(
        zip(sums.window_nll, sums.window_count, strict=True), start=1
      )
      if n <= 8 or n.bit_count() == 1 or n == last
    ]
  return {name: float(nll / count) for name, nll, count in parts if count > 0}


def sample_texts(config, params, tokenizer):
  """Returns the prompts of config.sample with their continuations."""
  if not config.sample.prompts:
    return []
  c, settings = sampler_config(config)
  prompts = [tokenizer.encode(p) for p in config.sample.prompts]
  network = load.network(config, params)
  request = layouts.continue_prompts(
    prompts, settings.gen_length, settings=settings
  )
  # `generate` would raise if logits are NaN. A sample must not end the run; the
  # guard and the bound report NaN.
  out = np.asarray(sampler.complete(network, c, request).canvas)
  valid = request.valid
  if settings.stop_at_eos:
    valid = valid & layouts.cut(out, request.fill, network.eos_id)
  return [tokenizer.decode(row[ok]) for row, ok in zip(out, valid, strict=True)]


def conclude(bound, heldout, average=None):
  """Returns lines with the bound and unigram entropy of each dataset.

  Args:
    bound: Bound.
    heldout: list of Heldout.
    average: Bound of the moving average, or None.
  """
  lines = []
  for h in heldout:
    lines += [f'{h.name}:'] if len(heldout) > 1 else []
    for label, found in (
      ('held-out bound', bound),
      ('moving average', average),
    ):
      if found is not None:
        part = found.parts.get(h.name, found)
        lines.append(
          f'{label}   {part.loss_nats_per_token:.4f} '
          f'nats/token  {part.bits_per_byte:.4f} bits/byte'
        )
    unigram = h.unigram_entropy_nats
    lines.append(
      f'unigram entropy  {unigram:.4f} nats/token  '
      f'{unigram * h.tokens_per_byte / np.log(2):.4f} bits/byte'
    )
  return '\n'.join(lines)
