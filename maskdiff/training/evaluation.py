"""The bound on held-out text, the rows of metrics, and samples in passing."""

import dataclasses
import functools

import jax
import numpy as np

from maskdiff.distributed.mesh import whole
from maskdiff.sampling import layouts, request, sampler
from maskdiff.training import inputs
from maskdiff.training import step as step_lib


def step_config(c):
  """A training's StepConfig for its evaluations: all of every row, and times
  in no pairs."""
  objective = dataclasses.replace(
    c.objective, random_length_fraction=0.0, time_sampling='stratified'
  )
  return dataclasses.replace(c, objective=objective)


def evaluate(c, params, batches, tokens_per_byte, between=lambda: None):
  """The bound on held-out text, under noise that is the same every time.

  Args:
    c: StepConfig.
    params: parameter tree.
    batches: list of [B, L] int32.
    tokens_per_byte: of the held-out text, for bits per byte.
    between: called before every batch; may raise to break off.

  Returns:
    loss in nats per token with its standard error over batches (0 for a single
    one), bits per byte, and the nll of masked tokens by mask ratio.
  """
  c = step_config(c)
  keys = jax.random.split(jax.random.key(0), len(batches))
  sums = []
  for tokens, key in zip(batches, keys, strict=True):
    between()
    sums.append(_eval_step(c, params, tokens, key))
    sums[-2:-1] = jax.device_get(sums[-2:-1])  # one at most is waiting
  sums = jax.device_get(sums)
  total = jax.tree.map(lambda *x: np.sum(x, axis=0), *sums)
  means = [s['weighted_nll'] / s['num_tokens'] for s in sums]
  spread = np.std(means, ddof=1) if len(means) > 1 else 0.0
  loss = float(total['weighted_nll'] / total['num_tokens'])
  return {
    'eval/loss_nats_per_token': loss,
    'eval/stderr_nats_per_token': float(spread / len(means) ** 0.5),
    'eval/bits_per_byte': loss * tokens_per_byte / float(np.log(2)),
    **by_ratio('eval', total),
  }


@dataclasses.dataclass(frozen=True)
class Heldout:
  """The held-out part of a dataset.

  Attributes:
    name: of the dataset.
    share: of it in the mixture, in (0, 1].
    tokens_per_byte: of its held-out text.
    unigram_entropy_nats: per token, of its held-out text.
    batches: list of [B, L] int32 arrays on the mesh.
  """

  name: str
  share: float
  tokens_per_byte: float
  unigram_entropy_nats: float
  batches: list


def open_heldout(config, datasets, mesh):
  """The batches to evaluate on, of each dataset; see run.heldout_batches.

  Raises:
    UserError: a dataset has less held-out text than asked for.
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


def evaluate_mixture(c, params, heldout, between=lambda: None):
  """The bound on a mixture: `evaluate` of each dataset, and their mean.

  Args:
    c: StepConfig.
    params: parameter tree.
    heldout: list of Heldout. A single one gives what `evaluate` gives.
    between: see `evaluate`.

  Returns:
    as `evaluate`, for a token drawn from the mixture; and for each dataset
    under 'eval/NAME/' in place of 'eval/'.
  """
  results = [
    evaluate(c, params, h.batches, h.tokens_per_byte, between) for h in heldout
  ]
  if len(heldout) == 1:
    return results[0]
  share = np.array([h.share for h in heldout])
  of = lambda key: np.array([r[f'eval/{key}_nats_per_token'] for r in results])
  bytes_per_token = share @ [1 / h.tokens_per_byte for h in heldout]
  loss = float(share @ of('loss'))
  row = {
    'eval/loss_nats_per_token': loss,
    'eval/stderr_nats_per_token': float(np.linalg.norm(share * of('stderr'))),
    'eval/bits_per_byte': float(loss / np.log(2) / bytes_per_token),
  }
  for h, result in zip(heldout, results, strict=True):
    row |= {
      key.replace('eval/', f'eval/{h.name}/', 1): value
      for key, value in result.items()
    }
  return row


@functools.partial(jax.jit, static_argnums=0)
def _eval_step(c, params, tokens, key):
  return whole(step_lib.eval_step(c, params, tokens, key))


def by_ratio(prefix, sums):
  """Mean nll of the predicted tokens in each bucket of the mask ratio."""
  buckets = zip(sums['ratio_nll'], sums['ratio_count'], strict=True)
  return {
    f'{prefix}/nll_at_mask_ratio_{(i + 0.5) / step_lib.RATIO_BUCKETS:.1f}': (
      float(nll / count)
    )
    for i, (nll, count) in enumerate(buckets)
    if count > 0
  }


def train_row(fetched, learning_rate, step_s):
  """The metrics of a window of steps, by name.

  Args:
    fetched: what `step.train_step` returned at each step, on the host.
    learning_rate: of the last step.
    step_s: seconds per step.

  Returns:
    dict of floats; losses are means over the window without the updates that
    were skipped, the gradient norm its largest.
  """
  made = [f for f in fetched if not f['skipped']]
  row = {
    'train/param_norm': float(fetched[-1]['param_norm']),
    'train/learning_rate': float(learning_rate),
    'train/step_s': step_s,
    'train/skipped_updates': len(fetched) - len(made),
  }
  if not made:
    return row
  total = jax.tree.map(lambda *x: np.sum(x, axis=0), *made)
  return row | {
    'train/loss_nats_per_token': float(
      total['weighted_nll'] / total['num_tokens']
    ),
    'train/grad_norm': float(max(f['grad_norm'] for f in made)),
    'train/masked_share': float(total['num_predicted'] / total['num_tokens']),
    **by_ratio('train', total),
  }


def sample_texts(config, params, tokenizer):
  """The configured prompts with their continuations, a list of texts."""
  if not config.sample.prompts:
    return []
  s = request.sampler_config(config)
  prompts = [tokenizer.encode(p) for p in config.sample.prompts]
  canvas, fill, valid = layouts.continue_prompts(
    prompts, config.sample.gen_length
  )
  model = request.sampler_model(config)
  # Not `generate`, which raises when logits are NaN: what is wrong with a
  # training is told elsewhere, and a sample must not end it.
  carry = sampler.complete(
    model, s, params, canvas, fill, valid, seeds=range(len(prompts))
  )
  out = np.asarray(carry.canvas)
  if s.stop_at_eos:
    valid = valid & layouts.cut(out, fill, s.eos_id)
  return [tokenizer.decode(row[ok]) for row, ok in zip(out, valid, strict=True)]


def conclude(result, heldout):
  """Compares the last bound with the entropy of single tokens."""
  lines = []
  for h in heldout:
    prefix = f'eval/{h.name}/' if len(heldout) > 1 else 'eval/'
    unigram = h.unigram_entropy_nats
    lines += [f'{h.name}:'] if len(heldout) > 1 else []
    lines += [
      f'held-out bound   {result[prefix + "loss_nats_per_token"]:.4f} '
      f'nats/token  {result[prefix + "bits_per_byte"]:.4f} bits/byte',
      f'unigram entropy  {unigram:.4f} nats/token  '
      f'{unigram * h.tokens_per_byte / np.log(2):.4f} bits/byte',
    ]
  return '\n'.join(lines)
