"""The table of methods, with every trait in which methods differ.

No other file compares methods. To add one, write what is new of its copies, its
units or its loss, and add an entry to METHODS.
"""

import dataclasses
import functools
from collections.abc import Callable

from maskdiff.errors import UserError
from maskdiff.rl import clipped, copies, spg, trace, units, weighted
from maskdiff.rl.settings import Settings


@dataclasses.dataclass(frozen=True)
class Method:
  """Traits of a method.

  Attributes:
    draw: (Network, Settings, Batch, key, numbers) -> RowQueries; see copies.py.
    units: units.of_sequences, of_tokens or of_copies, or another function with
      their arguments; what has one ratio.
    objective: (Settings, Units) -> the loss without divergence.
    mean: mean of the divergence over units; see clipped.py.
    settings: published settings.
    source: paper and code.
    masks: whether the copies need a network with mask tokens as inputs.
    needs_reference: whether the loss itself needs the reference.
    needs_steps: whether the copies need Batch.steps.
    baseline, deviation: published advantages, see advantages.py.
    num_eos: slots after an answer that carry a loss, see batch.until_eos.
    metrics: (Settings, Units) -> dict of scalars.
    pairs: whether rows are a chosen and a rejected answer, without rewards
      (launch/preferences.py).
  """

  draw: Callable
  units: Callable
  objective: Callable
  mean: Callable
  settings: Settings
  source: str
  masks: bool = True
  needs_reference: bool = False
  needs_steps: bool = False
  baseline: str = 'group_mean'
  deviation: str = 'none'
  num_eos: int = 1
  metrics: Callable = clipped.ratio_metrics
  pairs: bool = False


def _clipped(mean):
  return functools.partial(clipped.objective, mean=mean)


METHODS = {
  'espo': Method(
    draw=copies.bound,
    units=units.of_sequences,
    objective=_clipped(clipped.over_answers),
    mean=clipped.over_answers,
    settings=Settings(
      clip_low=0.2,
      clip_high=0.2,
      kl_weight=1e-3,
      per_token=True,
      after_eos=True,
      times=2,
      coupled=True,
    ),
    source='ESPO: ML-GSAI/ESPO, espo_trainer.py',
    masks=False,
    baseline='leave_one_out',
  ),
  'd1': Method(
    draw=copies.whole_answer,
    units=units.of_tokens,
    objective=_clipped(clipped.over_tokens),
    mean=clipped.over_tokens,
    settings=Settings(
      clip_low=0.5, clip_high=0.5, kl='k3', kl_weight=0.04, prompt_mask=0.15
    ),
    source='diffu-GRPO: dllm-reasoning/d1, diffu_grpo_trainer.py',
  ),
  'wd1': Method(
    draw=copies.whole_answer,
    units=units.of_sequences,
    objective=weighted.wd1,
    mean=clipped.over_answers,
    settings=Settings(prompt_mask=0.15),
    source='wd1: xiaohangt/wd1, rev_grpo_trainer.py',
  ),
  'coupled_grpo': Method(
    draw=copies.coupled_tokens,
    units=units.of_tokens,
    objective=_clipped(clipped.over_tokens),
    mean=clipped.over_tokens,
    settings=Settings(
      clip_low=0.5,
      clip_high=0.5,
      kl='k3',
      kl_weight=0.01,
      time_range=(0.2, 0.8),
    ),
    source='DiffuCoder: apple/ml-diffucoder, coupled_grpo.py',
    baseline='leave_one_out',
  ),
  'spg': Method(
    draw=spg.block_masks,
    units=spg.units,
    objective=weighted.spg,
    mean=clipped.over_answers,
    settings=Settings(times=2, prompt_mask=0.15),
    source='SPG: facebookresearch/SPG, spg_trainer.py',
  ),
  'stable_drl': Method(
    draw=spg.block_masks,
    units=spg.units,
    objective=weighted.self_normalized,
    mean=clipped.over_answers,
    settings=Settings(prompt_mask=0.15),
    source='StableDRL: arXiv 2603.06743; llada_svpo.py',
  ),
  'tracerl': Method(
    draw=trace.along_trace,
    units=units.of_copies,
    objective=_clipped(clipped.over_copies),
    mean=clipped.sums_over_copies,
    settings=Settings(
      clip_low=0.2,
      clip_high=0.2,
      kl='k3',
      kl_weight=0.01,
      kl_to='old',
      shrink=8,
    ),
    source='TraceRL, full attention: Gen-Verse/dLLM-RL, rl_llada.py',
    needs_steps=True,
    deviation='population',
    num_eos=0,
  ),
  'tracerl_blocks': Method(
    draw=trace.along_trace,
    units=units.of_copies,
    objective=_clipped(clipped.slots_over_copies),
    mean=clipped.slots_over_copies,
    settings=Settings(
      clip_low=0.2,
      clip_high=0.2,
      max_log_ratio=10.0,
      kl='k3',
      kl_weight=0.01,
      kl_to='old',
    ),
    source='TraceRL, block attention: Gen-Verse/dLLM-RL, rl_sdar.py',
    needs_steps=True,
    deviation='population',
    num_eos=0,
  ),
  'random_masks': Method(
    draw=copies.random_masks,
    units=units.of_copies,
    objective=_clipped(clipped.over_copies),
    mean=clipped.sums_over_copies,
    settings=Settings(
      clip_low=0.2,
      clip_high=0.2,
      kl='k3',
      kl_weight=0.01,
      kl_to='old',
      times=35,
      time_range=(0.1, 0.9),
    ),
    source='random masks instead of the trace: dLLM-RL, rl_llada.py',
    deviation='population',
    num_eos=0,
  ),
  'justgrpo': Method(
    draw=trace.left_to_right,
    units=units.of_tokens,
    objective=_clipped(clipped.over_informative_answers),
    mean=clipped.over_slots,
    settings=Settings(clip_low=0.2, clip_high=0.2, after_eos=True),
    source='JustGRPO: arXiv 2601.15165; LeapLabTHU/JustGRPO, grpo.py',
    masks=False,
    deviation='sample',
  ),
  'reinforce': Method(
    draw=copies.bound,
    units=units.of_sequences,
    objective=weighted.reinforce,
    mean=clipped.over_answers,
    settings=Settings(times=2, coupled=True),
    source='REINFORCE with the bound as log-likelihood',
    masks=False,
    baseline='leave_one_out',
  ),
  'vrpo': Method(
    draw=copies.bound,
    units=units.of_sequences,
    objective=weighted.preference,
    mean=clipped.over_answers,
    settings=Settings(times=8, chosen_weight=0.05),
    source='VRPO, LLaDA 1.5: arXiv 2505.19223',
    masks=False,
    needs_reference=True,
    metrics=weighted.preference_metrics,
    pairs=True,
  ),
}


def settings(name, **changes):
  """Returns the published Settings of a method, with some changed.

  Raises:
    UserError: an unknown method, or settings out of their range.
  """
  return dataclasses.replace(find(name).settings, **changes)


def find(name):
  """Returns the Method of a name.

  Raises:
    UserError: an unknown method.
  """
  if name not in METHODS:
    raise UserError(f'method {name!r}: choose one of {", ".join(METHODS)}')
  return METHODS[name]
