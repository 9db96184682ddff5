"""Names of the parts of the model, from what the compiler keeps of the code."""

import pytest

from maskdiff.planner.parts import model_part

FORWARD = 'jit(train_step)/jvp()/while/body/closed_call/'
BACKWARD = 'jit(train_step)/transpose(jvp())/while/body/closed_call/checkpoint/'
AGAIN = BACKWARD + 'rematted_computation/'
LOSS = 'jit(train_step)/jvp()/shard_map/while/body/'


@pytest.mark.parametrize(
  'op_name, part',
  [
    (FORWARD + 'bld,df->blf/dot_general', 'mlp gate/up forward'),
    (BACKWARD + 'bld,df->blf/dot_general', 'mlp gate/up backward'),
    (AGAIN + 'bld,df->blf/dot_general', 'mlp gate/up recomputed'),
    (FORWARD + 'blf,fd->bld/dot_general', 'mlp down forward'),
    (FORWARD + 'bld,dhk->blhk/dot_general', 'attention query forward'),
    (FORWARD + 'bld,dhk->bhlk/dot_general', 'attention query forward'),
    (BACKWARD + 'bld,dgk->bglk/dot_general', 'attention key/value backward'),
    (AGAIN + 'bhlk,hkd->bld/dot_general', 'attention output recomputed'),
    (FORWARD + 'bghlk,bgsk->bghls/dot_general', 'attention forward'),
    (LOSS + 'td,dv->tv/dot_general', 'loss: logits'),
    (LOSS + 'tv,dv->td/dot_general', 'loss: gradient of hidden states'),
    (LOSS + 'td,tv->dv/dot_general', 'loss: gradient of the head'),
    ('jit(denoise)/...d,dv->...v/dot_general', 'logits'),
  ],
)
def test_einsums_by_their_letters(op_name, part):
  assert model_part(op_name, ()) == part


@pytest.mark.parametrize(
  'op_name, part',
  [
    (FORWARD + 'splash_mha_fwd_residuals/pallas_call', 'forward'),
    (AGAIN + 'splash_mha_fwd_residuals/pallas_call', 'recomputed'),
    (BACKWARD + 'splash_mha_dkv_no_residuals/pallas_call', 'backward'),
  ],
)
def test_attention_kernels(op_name, part):
  assert model_part(op_name, ()) == f'attention kernel {part}'


@pytest.mark.parametrize(
  'functions, part',
  [
    (('layers.rms_norm', 'transformer.block'), 'normalisation forward'),
    (('layers.rotate', 'transformer.block'), 'rotary positions forward'),
    (('transformer.block', 'step.train_step'), 'layer: elementwise forward'),
    (('_transform.scale_by_adam.<locals>.update_fn',), 'optimizer'),
    (('cross_entropy._walk.<locals>.body',), 'loss'),
    (('guard.judge.<locals>.note', 'step.train_step'), 'guard'),
    (('schedule.sample_times', 'masked_diffusion.masked_diffusion'), 'noise'),
    (
      ('transformer.Transformer._layers.<locals>.<lambda>', 'sampler.refresh'),
      'weights: cast and copy',
    ),
    (('transformer.Transformer.logits', 'sampler.refresh'), 'logits'),
    (
      ('step.batch_gradients.<locals>.accumulate',),
      'gradient sum over microbatches',
    ),
    (('somewhere.unheard_of', 'layers.lookup'), 'embedding forward'),
  ],
)
def test_functions_from_the_innermost_outwards(functions, part):
  assert model_part('jit(train_step)/mul', functions) == part


def test_slices_of_the_stacked_layers():
  name = BACKWARD.replace('closed_call/checkpoint/', '')
  name += 'jit(dynamic_index_in_dim)/dynamic_slice'
  functions = ('transformer.Transformer._layers',)
  assert model_part(name, functions) == 'layer: stacked arrays backward'


def test_what_cannot_be_told_keeps_its_name():
  assert model_part('jit(train_step)/cumsum', ()) == 'cumsum'
  assert model_part('copy.12', ()) == 'copy'
  # The model has no named scopes, so a word is no sign of a part.
  assert model_part('jit(train_step)/loss/mul', ()) == 'loss/mul'


def test_arguments_are_weights():
  name = "state.params[\\'blocks\\'][\\'q\\']"
  assert model_part(name, ()) == 'weights: cast and copy'
