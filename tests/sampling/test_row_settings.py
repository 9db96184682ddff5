"""Settings that differ between the rows of a batch; one program serves all."""

import dataclasses

import fake_networks
import jax.numpy as jnp
import numpy as np
import pytest
import sampled
import tiny

from maskdiff import config as config_lib
from maskdiff.config.sample import PER_REQUEST, SETTINGS
from maskdiff.errors import UserError
from maskdiff.sampling import layouts, sampler
from maskdiff.sampling import settings as settings_lib
from maskdiff.sampling.settings import SamplerConfig, Settings, split

MASK, EOS, EOT, VOCAB = 4, 5, 6, tiny.MODEL.vocab_size
# No prompt is empty, because all positions of an all-masked row tie.
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15], [18], [9, 9], [16, 17]]
# Settings of six rows, by remasking rule.
OFF = Settings(gen_length=8, steps=8)
ROWS = [
  OFF,
  OFF._replace(temperature=0.8, threshold=0.2, factor=2.0),
  OFF._replace(temperature=1.2, top_k=3, steps=4),
  OFF._replace(
    temperature=0.9, top_p=0.7, confidence_eos_eot_inf=True, eot_id=EOT
  ),
  OFF._replace(stop_at_eos=True, guidance=0.7, eot_id=EOT, steps=6),
  OFF._replace(logits_eos_inf=True, threshold=0.5, factor=0.3),
]


@pytest.fixture(scope='module')
def network():
  """Returns a Network that predicts eos often."""
  params = tiny.strong_params()
  params = params | {'head': params['head'].at[:, EOS].multiply(2)}
  return fake_networks.network(tiny.MODEL, params, mask_id=MASK, eos_id=EOS)


def stacked(rows):
  return Settings(*map(np.array, zip(*rows, strict=True)))


def complete(network, c, rows, which=slice(None)):
  request = layouts.continue_prompts(
    PROMPTS[which], 8, range(6)[which], settings=stacked(rows[which])
  )
  # One length, so that one program serves the rows alone.
  return sampler.complete(network, c, layouts.widen(request, 16))


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    dict(block_length=4),
    dict(block_length=4, remasking='threshold', cache='dual'),
    dict(block_length=8, remasking='factor', confidence='entropy'),
  ],
  ids=lambda c: c.get('remasking', 'low_confidence'),
)
def test_each_row_has_its_own_settings(network, changes):
  """Rows sampled together equal rows alone, each with its settings."""
  c = SamplerConfig(guided=True, **changes)
  sampler.run.clear_cache()
  together = complete(network, c, ROWS)
  assert sampler.run._cache_size() == 1
  for row in range(6):
    alone = complete(network, c, ROWS, slice(row, row + 1))
    for field in ('canvas', 'forwards', 'positions'):
      np.testing.assert_array_equal(
        getattr(alone, field)[0], getattr(together, field)[row], err_msg=field
      )
  assert sampler.run._cache_size() == 2  # batches of six, and of one
  assert len(set(together.forwards.tolist())) > 2


@pytest.mark.slow
def test_a_new_value_of_a_setting_compiles_nothing(network):
  c = SamplerConfig(block_length=4, guided=True)
  sampler.run.clear_cache()
  random = np.random.default_rng(0)
  for i in range(8):
    rows = [ROWS[j] for j in random.permutation(6)]
    scale = 1 + i / 10
    rows[0] = rows[0]._replace(temperature=scale, guidance=scale, top_k=i)
    complete(network, c, rows)
  assert sampler.run._cache_size() == 1


def test_rows_without_guidance_equal_a_program_without_it(network):
  rows = [row._replace(guidance=0.0) for row in ROWS]
  plain = complete(network, SamplerConfig(block_length=4), rows)
  rows[4] = rows[4]._replace(guidance=0.7)
  c = SamplerConfig(block_length=4, guided=True)
  guided = complete(network, c, rows)
  others = np.array([0, 1, 2, 3, 5])
  for field in ('canvas', 'forwards', 'positions'):
    np.testing.assert_array_equal(
      getattr(plain, field)[others], getattr(guided, field)[others]
    )
  assert guided.forwards[4] == 2 * plain.forwards[4]
  assert (guided.canvas[4] != plain.canvas[4]).any()


# Declarations


def test_every_setting_is_of_the_program_or_of_the_request():
  of_program = {f.name for f in dataclasses.fields(SamplerConfig)} - {'guided'}
  assert of_program | set(Settings._fields) == set(SETTINGS)
  assert not of_program & set(Settings._fields)
  assert Settings._fields == PER_REQUEST
  values = {name: key.default for name, key in SETTINGS.items()}
  c, settings = split(values | {'guidance': 2.0})
  assert (c, settings) == (
    SamplerConfig(guided=True),
    Settings(gen_length=64, steps=64, guidance=2.0),
  )


def test_settings_become_arrays_of_their_types():
  settings = settings_lib.per_row(stacked(ROWS), 6)
  for name, array in settings._asdict().items():
    kind = {bool: bool, int: np.int32, float: np.float32}
    assert array.dtype == kind[type(SETTINGS[name].default)]
    assert array.shape == (6,)
  assert settings_lib.row(settings, 5) == ROWS[5]._replace(
    factor=float(np.float32(0.3)), threshold=0.5, top_p=1.0
  )


def of_request(changes, gaps=False, steps=None, **values):
  config = config_lib.default()
  return settings_lib.of_request(config, values, changes, gaps, steps)


def test_settings_of_a_line_override_those_of_the_command_line():
  values = dict(temperature=0.5, gen_length=8, block_length=4)
  c, settings = of_request({'temperature': 0.7, 'top_k': 3}, **values)
  assert (settings.temperature, settings.top_k) == (0.7, 3)
  assert (settings.gen_length, settings.steps, c.block_length) == (8, 8, 4)
  _, settings = of_request({'gen_length': 20}, **values)  # a step per token
  assert (settings.gen_length, settings.steps) == (20, 20)
  _, settings = of_request({'steps': 2}, **values)
  assert settings.steps == 2
  c, settings = of_request({'guidance': 1}, **values)
  assert (c.guided, settings.guidance) == (True, 1.0)


def test_settings_of_a_line_with_gaps():
  """Steps are counted per text; they need not be a multiple of the blocks."""
  of = lambda changes, steps: of_request(
    changes, gaps=True, steps=steps, block_length=4, lookahead=2
  )
  c, settings = of({}, None)
  assert (settings.steps, settings.gen_length, c.lookahead) == (0, 0, -1)
  assert of({}, 3)[1].steps == 3
  assert of({'steps': 5, 'top_p': 1}, 3)[1].steps == 5


@pytest.mark.parametrize(
  'changes, gaps, message',
  [
    ({'top_k': 3}, False, 'top_k=3 has no effect at temperature 0'),
    ({'steps': 3}, False, 'steps=3 cannot be divided equally among 2 blocks'),
    ({'temperature': 'hot'}, False, "temperature='hot': must be float"),
    ({'temperature': None}, False, 'temperature=None: must be float'),
    ({'cache': 'dual'}, False, 'another cache needs another program: set --ca'),
    ({'seed': 3}, False, "unknown setting 'seed'"),
    ({'gen_length': 3}, True, 'gen_length is for prompts: text follows a gap'),
    ({'stop_at_eos': True}, True, 'stop_at_eos is for prompts'),
    ({'steps': 'x'}, True, "steps='x': must be int"),
    ({'steps': 0}, True, 'steps=0: must be at least 1'),
    ({'temperature': '0.5'}, False, "temperature='0.5': must be float"),
    ({'guidance': float('inf')}, False, 'guidance=inf: must be a finite'),
    ({'guidance': -1}, False, 'guidance=-1.0: must be at least 0'),
    ({'gen_length': True}, False, 'gen_length=True: must be int'),
    ({'gen_length': 10**9}, False, 'data.length=256.*at most 256'),
    ({'steps': 10**9}, False, 'steps=1000000000: must be at most 25600, 100'),
    ({'steps': 10**9}, True, 'steps=1000000000: must be at most 25600, 100'),
    ({'top_k': 10**40}, False, 'top_k=1000.*: must be between'),
    ({'threshold': 0.5}, False, 'no effect with remasking=low_confidence'),
    ({'factor': 0.5}, True, 'set remasking=factor, or remove factor'),
    ({'confidence_eos_eot_inf': True}, False, 'needs an end-of-turn token'),
  ],
)
def test_bad_settings_of_a_line_are_refused(changes, gaps, message):
  with pytest.raises(UserError, match=message):
    of_request(changes, gaps, gen_length=8, block_length=4)


# Refusals


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(temperature=-1.0), 'temperature=-1.0: must be at least 0'),
    (dict(top_p=0.0), 'top_p=0.0: must be above 0'),
    (dict(threshold=np.nan), 'threshold=nan: must be finite'),
    (dict(temperature='hot'), "temperature='hot': must be float"),
    (dict(top_k=1.5), 'top_k=1.5: must be int'),
    (dict(stop_at_eos=1), 'stop_at_eos=1: must be bool'),
    (dict(top_k=[1, 2]), r'top_k has shape \(2,\): give one value, or 1'),
    (dict(steps=-1), 'steps=-1 cannot be shared'),
    (dict(steps=3, gen_length=8), 'steps=3 cannot be shared equally by 2'),
    (dict(steps=0, gen_length=8), 'steps=0 cannot be shared'),
    (
      dict(guidance=1.5),
      r"guidance=1.5 needs another program than this sampler's "
      r'\(guided=False\); settings that may differ by request: gen_length, '
      'steps, temperature, top_k, top_p, threshold, factor, guidance, ',
    ),
  ],
)
def test_bad_settings_of_a_row_are_refused(network, changes, message):
  request = layouts.continue_prompts([[7]], 8, settings=Settings(**changes))
  with pytest.raises(UserError, match=message):
    sampler.complete(network, SamplerConfig(block_length=4), request)
  request = request._replace(settings=Settings(steps=jnp.array(8)))
  sampled.begin(network, {'block_length': 4}, request)
