"""A tiny network that predicts windows of three tokens, and its answers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from objective_cases import strong_params

from maskdiff.likelihood import bounds, queries
from maskdiff.model import masks, transformer
from maskdiff.model.network import Network

SIZE, VOCAB, MASK = 3, 4, 4
CONFIG = tiny.model(vocab_size=VOCAB + 1, embed=8, layers=1, head_dim=4, mlp=8)
NETWORK = Network(
  config=CONFIG,
  params=jax.tree.map(lambda w: w / 2, strong_params(CONFIG)),
  objective='sdlm',
  predict_mask=False,
  mask_id=MASK,
  bos_id=3,
  window_length=SIZE,
)
PROMPT = [1, 2]
# All answers of three tokens.
ANSWERS = list(itertools.product(range(VOCAB), repeat=3))
LIKELIHOOD = queries.LikelihoodConfig(
  context=16, guidance=0.0, tokens_per_call=4096, loss_chunk_tokens=512
)


def laid_out(answers=ANSWERS):
  """Returns queries.Answers of PROMPT and each answer."""
  return bounds.lay_out([PROMPT] * len(answers), answers)


def log_p(prefix):
  """Returns log p of the window after a prefix, [SIZE, VOCAB] float64."""
  shifted = np.array([NETWORK.bos_id, *prefix])
  start = len(prefix)
  tokens = np.append(shifted, [MASK] * (SIZE - 1))
  pos = np.arange(len(tokens))
  inside = pos >= start
  labels = masks.Labels(
    *(
      jnp.asarray(x, jnp.int32)[None]
      for x in (
        np.zeros(len(pos)),
        pos,
        np.where(inside, 0, -1),
        np.where(inside, start, pos + 1),
      )
    )
  )
  model = transformer.bind(CONFIG, NETWORK.params)
  logits = np.array(
    model.logits(model(jnp.asarray(tokens)[None], labels))[0, start:],
    np.float64,
  )[:, :VOCAB]
  return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
