"""Numbers of a method of policy optimization."""

import dataclasses
import math

from maskdiff.errors import UserError
from maskdiff.rl import divergence


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a loss and of its masks.

  `table.METHODS` has the published settings of each method. A method ignores
  the settings that it does not name.

  Attributes:
    clip_low: ratios below 1 - clip_low have no gradient if the advantage is
      negative; inf: no bound.
    clip_high: ratios above 1 + clip_high have no gradient if the advantage is
      positive; inf: no bound.
    max_log_ratio: log-ratios are cut to +- this number, without a gradient.
    kl: estimate of the divergence, a key of divergence.ESTIMATES.
    kl_weight: beta, weight of the divergence in the loss.
    kl_to: 'reference' or 'old', the policy that sampled the answers.
    per_token: (methods of sequences) divide the log-likelihood of an answer by
      its number of tokens, in ratios, in the divergence and in REINFORCE.
    after_eos: whether slots after the first eos belong to the answer.
    times: number of times, or mask counts, drawn per row: M of ESPO, n_t of
      VRPO, num_t of SPG.
    masks_per_time: masks drawn for each time, n_y of VRPO.
    coupled: follow each mask by its complement.
    prompt_mask: probability with which a token of the prompt is masked.
    time_range: lowest and highest mask ratio of coupled-GRPO and of random
      masks.
    block_length: (SPG) slots of a block.
    shrink: (TraceRL) steps of the sampler that are merged into one copy.
    padding_per_copy: (TraceRL) number of slots without a loss that each copy
      scores nevertheless, the first that it commits (post_num of rl_sdar.py;
      rl_llada.py takes the first of a row, as batch.until_eos does).
    copies: (TraceRL, JustGRPO) copies of a row, at least `num_copies` of its
      slots or steps; 0: the number of positions of a row.
    upper_power: (SPG) beta, the exponent of the upper bound.
    upper_share: (SPG) omega, weight of the upper bound in the score of answers
      whose advantage is not positive; 0: the lower bound only.
    negative_weight: (SPG) weight of answers whose advantage is not positive.
    softmax_over: (wd1) 'batch', as in the published code, or 'group', as in
      the paper.
    group: (wd1) G.
    max_ratio: (StableDRL) largest ratio before normalization.
    preference_scale: (VRPO) beta, scale of the difference of two answers.
    chosen_weight: (VRPO) weight of the negative log-likelihood per token of
      the chosen answer.
  """

  clip_low: float = math.inf
  clip_high: float = math.inf
  max_log_ratio: float = math.inf
  kl: str = 'k2'
  kl_weight: float = 0.0
  kl_to: str = 'reference'
  per_token: bool = False
  after_eos: bool = False
  times: int = 1
  masks_per_time: int = 1
  coupled: bool = False
  prompt_mask: float = 0.0
  time_range: tuple[float, float] = (0.0, 1.0)
  block_length: int = 32
  shrink: int = 1
  padding_per_copy: int = 0
  copies: int = 0
  upper_power: float = 1.5
  upper_share: float = 0.5
  negative_weight: float = 1.0
  softmax_over: str = 'batch'
  group: int = 1
  max_ratio: float = 5.0
  preference_scale: float = 0.2
  chosen_weight: float = 0.0

  def __post_init__(self):
    for name, known in (
      ('kl', tuple(divergence.ESTIMATES)),
      ('kl_to', ('reference', 'old')),
      ('softmax_over', ('batch', 'group')),
    ):
      if getattr(self, name) not in known:
        raise UserError(
          f'{name}={getattr(self, name)!r}: choose one of {", ".join(known)}'
        )
    for name in ('times', 'masks_per_time', 'block_length', 'shrink', 'group'):
      if getattr(self, name) < 1:
        raise UserError(f'{name}={getattr(self, name)} must be at least 1')
    for name in ('clip_low', 'clip_high', 'kl_weight', 'copies'):
      if getattr(self, name) < 0:
        raise UserError(f'{name}={getattr(self, name)} must not be negative')
    if not 0 <= self.prompt_mask <= 1:
      raise UserError(f'prompt_mask={self.prompt_mask} must lie in [0, 1]')
    if self.softmax_over == 'group' and self.group == 1:
      raise UserError("softmax_over='group' needs group=2 or more")
    low, high = self.time_range
    if not 0 <= low <= high <= 1:
      raise UserError(f'time_range={self.time_range} must ascend in [0, 1]')
