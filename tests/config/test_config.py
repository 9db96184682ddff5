"""Config files build and validate; errors are one line; the command line."""

import ast
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import forked
import pytest

from maskdiff import config as config_lib
from maskdiff.config import keys, sample
from maskdiff.errors import UserError
from maskdiff.interop import load
from maskdiff.model import transformer
from maskdiff.objectives import schedule
from maskdiff.objectives import table as table_lib
from maskdiff.sampling import candidates, remasking
from maskdiff.sampling.settings import sampler_config
from maskdiff.training import step as step_lib
from maskdiff.training.optimizer import OptimizerConfig, learning_rate

ROOT = pathlib.Path(__file__).parents[2]
# tests/interop/test_warm_start.py covers published.py, which needs a Hugging
# Face folder.
NAMES = sorted(
  path.name
  for path in (ROOT / 'configs').glob('*.py')
  if path.name != 'published.py'
)


def module(name):
  return runpy.run_path(str(ROOT / 'configs' / name.partition(':')[0]))


# Config files, and FILE:ENTRY for each machine or puzzle of their tables.
FILES = NAMES + [
  f'{name}:{entry}'
  for name in NAMES
  for table in ('MACHINES', 'PUZZLES', 'TASKS')
  for entry in module(name).get(table, {})
]


def build(name):
  machine = name.partition(':')[2]
  return module(name)['get_config'](*[machine] if machine else [])


def changed(**changes):
  """Returns the default config with some values changed; a__b means a.b."""
  c = config_lib.default()
  c.update_from_flattened_dict(
    {key.replace('__', '.'): value for key, value in changes.items()}
  )
  return c


def num_params(name):
  return transformer.num_params(step_lib.step_config(build(name)).model)[0]


# The files of configs/


@pytest.mark.parametrize('name', FILES)
def test_a_config_is_locked_and_valid_with_the_default_keys(name):
  c = build(name)
  assert c.is_locked
  config_lib.validate(c)
  default = config_lib.flatten(config_lib.default())
  flat = config_lib.flatten(c)
  assert flat.keys() == default.keys()
  assert {k: type(v) for k, v in flat.items()} == {
    k: type(v) for k, v in default.items()
  }


@pytest.mark.parametrize('name', FILES)
def test_a_config_builds_the_frozen_configs_of_the_library(name):
  c = build(name)
  step, sampler = step_lib.step_config(c), sampler_config(c)
  assert hash((step, sampler)) == hash(
    (step_lib.step_config(c), sampler_config(c))
  )
  assert step.length == c.data.length
  learning_rate(OptimizerConfig(**c.optimizer), c.train.steps)(0)


def test_a_training_kernel_is_not_used_to_sample():
  """Prompts have other lengths, and may be sampled on other hardware."""
  c = build('tiny.py')
  for trains, samples in (('splash', 'auto'), ('xla', 'xla')):
    c.model.attention = trains
    assert step_lib.step_config(c).model.attention == trains
    assert load.network(c, None).config.attention == samples


@pytest.mark.parametrize(
  'name, number', [('8b.py', 8_015_581_184), ('1b.py', 1_487_243_264)]
)
def test_llada_has_its_published_number_of_parameters(name, number):
  assert num_params(name) == number


def test_illada_has_its_published_number_of_parameters():
  """7.62B, of which 6.98B are not in the tied embedding (its model card)."""
  model = step_lib.step_config(build('8b.py:illada')).model
  total, inner = transformer.num_params(model)
  assert (round(total / 1e9, 2), round(inner / 1e9, 2)) == (7.62, 6.98)


@pytest.mark.parametrize('machine', ['illada', 'illada-v6e-256'])
def test_illada_has_llada_rates_for_its_tokens(machine):
  c, llada = build(f'8b.py:{machine}'), build('8b.py')
  tokens = lambda c: c.train.steps * c.train.batch * c.data.length
  assert tokens(c) == pytest.approx(12e12, rel=1e-5)
  share = lambda c: [end / c.train.steps for end, *_ in c.optimizer.pieces[1:]]
  assert share(c) == pytest.approx(share(llada), rel=1e-5)
  rates = lambda c: [piece[1:] for piece in c.optimizer.pieces]
  assert rates(c) == rates(llada)


def test_tpu_shape_of_1b_fills_matrix_units():
  c, llada = build('1b.py:tpu'), build('1b.py')
  assert c.model.head_dim == 128 and c.model.mlp % 256 == 0
  width = lambda c: c.model.heads * c.model.head_dim
  assert width(c) == width(llada) == c.model.embed
  assert num_params('1b.py:tpu') == pytest.approx(num_params('1b.py'), rel=0.02)


def test_llada_recipe_of_8b_is_that_of_the_paper():
  c = build('8b.py:llada')
  assert (c.objective.time_density, c.objective.weight) == ('uniform', 'bound')
  assert (c.objective.schedule, c.objective.eps) == ('linear', 1e-3)
  assert c.objective.random_length_fraction == 0.01
  assert (c.optimizer.name, c.optimizer.weight_decay) == ('adamw', 0.1)
  assert not c.model.zero_outputs
  assert c.train.batch == 1280 and c.optimizer.pieces[0] == (2000, 0.0, 4e-4)
  assert config_lib.flatten(c) == config_lib.flatten(build('8b.py'))


@pytest.mark.parametrize(
  'name, least, most',
  [('tiny.py', 1e6, 1e7), ('150m.py', 135e6, 165e6)],
)
def test_a_config_has_the_size_in_its_name(name, least, most):
  assert least < num_params(name) < most


@pytest.mark.parametrize('name', NAMES)
def test_a_docstring_counts_parameters_exactly(name):
  docstring = runpy.run_path(str(ROOT / 'configs' / name))['__doc__']
  for number in re.findall(r'([\d,]{7,}) parameters', docstring):
    assert num_params(name) == int(number.replace(',', ''))


@pytest.mark.parametrize('name', NAMES)
def test_the_command_in_a_docstring_names_its_file(name):
  docstring = runpy.run_path(str(ROOT / 'configs' / name))['__doc__']
  scripts = {'sft': 'finetune', 'rl_': 'rl', 'pre': 'preferences'}
  script = scripts.get(name[:3], 'pretrain')
  assert f'launch/{script}.py --config configs/{name} ' in docstring


@pytest.mark.parametrize(
  'step, rate',
  [
    (0, 0.0),
    (1_000, 2e-4),
    (2_000, 4e-4),
    (100_000, 4e-4),
    (228_881, 4e-4),
    (228_882, 1e-4),
    (381_470, 1e-4),
    (410_080, 5.5e-5),
    (438_690, 1e-5),
  ],
)
def test_the_learning_rate_of_8b_matches_llada(step, rate):
  c = build('8b.py')
  plan = learning_rate(OptimizerConfig(**c.optimizer), c.train.steps)
  assert float(plan(step)) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize(
  'machine', ['v5e-256', 'v6e-256', 'tpu7x-128', '32k', '128k']
)
def test_8b_reads_the_same_tokens_on_other_machines(machine):
  c, paper = build(f'8b.py:{machine}'), build('8b.py')
  ends = lambda c: [
    end * c.train.batch * c.data.length for end, _, _ in c.optimizer.pieces[1:]
  ]
  assert ends(c) == pytest.approx(ends(paper), rel=1e-5)
  rates = lambda c: [piece[1:] for piece in c.optimizer.pieces]
  assert rates(c) == rates(paper)


def test_8b_changes_its_rate_at_the_tokens_of_llada():
  c = build('8b.py')
  tokens = [
    end * c.train.batch * c.data.length for end, _, _ in c.optimizer.pieces
  ]
  assert tokens[1:] == pytest.approx([1.2e12, 2.0e12, 2.3e12], rel=1e-5)


# Validation


PIECEWISE = dict(optimizer__schedule='piecewise', train__steps=100)
WINDOWS = dict(objective__name='sdlm', sample__remasking='longest_prefix')
INVALID = {
  'train.microbatches': dict(train__batch=32, train__microbatches=5),
  'train.batch': dict(train__batch=33),
  'eval.batch': dict(eval__batch=31),
  'data.skip_samples': dict(data__skip_samples=((0, 1 << 63),)),
  'data.length_tokens': dict(data__length_tokens=((4, 7), (8, 7))),
  'tokens.mask_id': dict(tokens__mask_id=4096),
  'tokens.bos_id': dict(tokens__bos_id=-1),
  'tokens.eos_id': dict(tokens__eos_id=4096),
  'model.kv_heads': dict(model__heads=4, model__kv_heads=3),
  'model.head_dim': dict(model__head_dim=7),
  'model.layers': dict(model__layers=0),
  'objective.eps': dict(objective__eps=1.0),
  'objective.bell_width': dict(objective__bell_width=float('nan')),
  'objective.bell_mean': dict(
    objective__time_density='bell', objective__time_interval=(0.6, 1.0)
  ),
  'objective.time_interval': dict(objective__time_interval=(0.5, 0.5)),
  'objective.weight': dict(
    objective__weight='importance', objective__time_interval=(0.0, 0.9)
  ),
  'objective.bell_uniform_share': dict(
    objective__weight='importance', objective__time_density='bell'
  ),
  'objective.random_length_fraction': dict(objective__random_length_fraction=2),
  'objective.window_length': dict(objective__window_length=1 << 20, **WINDOWS),
  'objective.window_length_shift': dict(  # no divisor of the rows
    objective__window_length=3, **WINDOWS
  ),
  'objective.complementary_masks': dict(
    objective__complementary_masks=True, **WINDOWS
  ),
  'sample.remasking': dict(objective__name='sdlm'),
  'sample.remasking_shift': dict(sample__remasking='speculative'),
  'sample.threshold_shift': dict(sample__threshold=1.5, **WINDOWS),
  'model.predict_next': dict(model__predict_next=True, **WINDOWS),
  'train.steps': dict(train__steps=150),  # less than warmup and decay
  'sample.steps': dict(sample__steps=63, sample__block_length=32),
  'sample.top_p': dict(sample__top_p=0.0, sample__temperature=1.0),
  'sample.top_k': dict(sample__top_k=5),  # at temperature 0
  'sample.eot_id': dict(sample__eot_id=4096),
  'sample.refresh': dict(sample__refresh=2),  # without a cache
  'sample.refresh_shift': dict(  # of a cache that is exact
    sample__refresh=2, sample__cache='prefix', objective__name='autoregressive'
  ),
  'sample.lookahead': dict(sample__lookahead=-2),
  'sample.cache': dict(sample__cache='dual', objective__name='autoregressive'),
  'sample.guidance': dict(
    sample__guidance=1.0, objective__name='autoregressive'
  ),
  'sample.threshold': dict(sample__threshold=-0.1),
  'checkpoint.keep': dict(checkpoint__keep=0),
}


@pytest.mark.parametrize('key', INVALID)
def test_an_invalid_value_is_refused_by_its_key(key):
  name = key.partition('_shift')[0]
  with pytest.raises(UserError, match=rf'config\.{name}=') as error:
    config_lib.validate(changed(**INVALID[key]))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('key', config_lib.CHOICES)
def test_a_mistyped_choice_is_refused_with_the_right_one(key):
  right = config_lib.CHOICES[key][-1]
  c = changed(**{key.replace('.', '__'): right[:-1]})
  with pytest.raises(
    UserError, match=rf'config\.{key}=.*did you mean {right!r}'
  ):
    config_lib.validate(c)


@pytest.mark.parametrize(
  'pieces',
  [
    (),
    ((90, 0.0, 1.0),),
    ((50, 0.0, 1.0), (110, 1.0, 0.0)),
    ((100, 0.0, 1.0), (50, 1.0, 0.0)),
    ((100, 0.1),),
    (100,),
  ],
)
def test_pieces_must_end_at_the_last_step(pieces):
  c = changed(**PIECEWISE)
  c.optimizer.pieces = pieces
  with pytest.raises(UserError, match='config.optimizer.pieces.*steps=100'):
    config_lib.validate(c)


@pytest.mark.parametrize('schedule', ['wsd', 'cosine', 'piecewise'])
def test_a_valid_schedule_has_a_rate_at_every_step(schedule):
  """The warmup may take all steps, or all but one."""
  warmup = 99 if schedule == 'cosine' else 100
  c = changed(
    train__steps=100, optimizer__warmup_steps=warmup, optimizer__decay_steps=0
  )
  c.optimizer.schedule = schedule
  c.optimizer.pieces = ((100, 0.0, 1.0),)
  config_lib.validate(c)
  plan = learning_rate(OptimizerConfig(**c.optimizer), c.train.steps)
  assert float(plan(0)) == 0
  assert 0 < float(plan(99)) <= 1


def test_cosine_needs_a_step_after_the_warmup():
  c = changed(
    train__steps=100, optimizer__warmup_steps=100, optimizer__decay_steps=0
  )
  c.optimizer.schedule = 'cosine'
  with pytest.raises(UserError, match='warmup_steps=100.*steps=100'):
    config_lib.validate(c)


def mesh_of(shards):
  return dict(replica=1, fsdp=shards, sequence=1, tensor=1)


@pytest.mark.parametrize('section', ['train', 'eval'])
@pytest.mark.parametrize('microbatches', [1, 2])
@pytest.mark.parametrize('shards', [3, 5, 6, 8, 12, 64])
def test_the_batch_suggested_for_a_mesh_is_valid(shards, microbatches, section):
  c = changed(train__microbatches=microbatches)
  c.train.batch = c.eval.batch = 2 * shards * microbatches
  c[section].batch += 2
  config_lib.validate(c)
  flag = rf'--config\.{section}\.batch=(\d+)'
  with pytest.raises(UserError, match=flag) as error:
    config_lib.validate_mesh(c, mesh_of(shards))
  c[section].batch = int(re.search(flag, str(error.value))[1])
  config_lib.validate(c)
  config_lib.validate_mesh(c, mesh_of(shards))


def test_the_length_must_divide_over_the_sequence_axis():
  c = changed(data__length=36, mesh__sequence=8)
  with pytest.raises(UserError, match=r'config\.data\.length=36'):
    config_lib.validate_mesh(c, mesh_of(1) | dict(sequence=8))


# Saved configs


@pytest.mark.parametrize('name', FILES)
def test_a_config_survives_json(name):
  c = build(name)
  again = config_lib.from_dict(json.loads(c.to_json()))
  flat, back = config_lib.flatten(c), config_lib.flatten(again)
  assert back == flat
  assert {k: type(v) for k, v in back.items()} == {
    k: type(v) for k, v in flat.items()
  }
  hash((step_lib.step_config(again), OptimizerConfig(**again.optimizer)))


def test_unknown_keys_of_a_saved_config_are_named():
  tree = json.loads(config_lib.default().to_json())
  tree['model']['fast'] = True
  tree['train']['micro_batches'] = 1
  with pytest.raises(UserError, match=r'model\.fast, train\.micro_batches'):
    config_lib.from_dict(tree)


def test_a_renamed_key_of_a_saved_config_is_read(monkeypatch):
  tree = json.loads(config_lib.default().to_json())
  tree['train']['num_steps'] = tree['train'].pop('steps') + 1
  renamed = {'train.num_steps': 'train.steps'}
  monkeypatch.setattr(keys, 'RENAMED', renamed)
  assert config_lib.from_dict(tree).train.steps == 1001


def test_a_missing_key_of_a_saved_config_gets_its_default():
  tree = json.loads(config_lib.default().to_json())
  del tree['sample']['cache']
  tree['sample']['gen_length'] = 7
  c = config_lib.from_dict(tree)
  assert (c.sample.cache, c.sample.gen_length) == ('none', 7)


# The command line


def command(*argv, timeout=60):
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  return forked.run(
    argv,
    cwd=ROOT,
    env=environment,
    timeout=timeout,
  )


def parse(*argv):
  """Runs a script with tiny.py and the flags; it prints the flat config."""
  script = (
    'from maskdiff import config; config.define_config_flag(); '
    'config.run_script(lambda args: print(config.flatten(args.config)))'
  )
  return command('-c', script, '--config=configs/tiny.py', *argv)


def refused(result):
  """Returns the one line of an error."""
  assert result.returncode == 2, result.stderr[-1000:]
  assert result.stdout == ''
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ')
  assert '\\n' not in line
  assert len(line) < 300
  return line


def test_flags_override_values_with_their_types():
  result = parse(
    '--config.model.heads=2',
    '--config.optimizer.learning_rate=1',
    '--config.model.tie_embeddings=false',
    '--config.objective.name=autoregressive',
    '--config.sample.prompts=("a", "b")',
    '--config.optimizer.pieces=((10, 0.0, 1.0), (20, 1.0, 0.5))',
  )
  flat = ast.literal_eval(result.stdout)
  expected = config_lib.flatten(build('tiny.py')) | {
    'model.heads': 2,
    'optimizer.learning_rate': 1.0,
    'model.tie_embeddings': False,
    'objective.name': 'autoregressive',
    'sample.prompts': ('a', 'b'),
    'optimizer.pieces': ((10, 0.0, 1.0), (20, 1.0, 0.5)),
  }
  assert flat == expected
  assert isinstance(flat['optimizer.learning_rate'], float)


def test_replacing_a_section_keeps_its_other_keys():
  result = parse('--config.model={"embed": 32}')
  if result.returncode:
    assert 'model' in refused(result)
  else:
    flat = config_lib.flatten(build('tiny.py'))
    assert ast.literal_eval(result.stdout) == flat | {'model.embed': 32}


CONFIG_FILE = """
from maskdiff.config import default

def get_config():
  c = default()
  {line}
  return c
"""
TINY = '--config=configs/tiny.py'
WORKDIR = '--workdir=/nowhere/run'
REFUSED = {
  'key': (
    [TINY, WORKDIR, '--config.model.head=2'],
    "'model.head'; did you mean 'model.heads'?",
  ),
  'section': (
    [TINY, WORKDIR, '--config.modle.heads=2'],
    "'modle.heads'; did you mean 'model.heads'?",
  ),
  'type': ([TINY, WORKDIR, '--config.model.heads=two'], 'config.model.heads'),
  'no dashes': (
    [TINY, WORKDIR, 'config.model.heads=2'],
    'did you mean --config.model.heads=2?',
  ),
  'argument': ([TINY, WORKDIR, 'resume'], "'resume'"),
  'flag': ([TINY, '--wrkdir=/nowhere/run'], "did you mean 'workdir'?"),
  'no workdir': ([TINY], '--workdir'),
  'no config': ([WORKDIR], '--config'),
  'flag file': (['--flagfile=configs', TINY, WORKDIR], '--flagfile'),
  'no file': (['--config=configs/tinny.py', WORKDIR], 'configs/tinny.py'),
  'machine': (
    ['--config=configs/8b.py:v5e-265', WORKDIR],
    "illada, illada-v6e-256, 32k, 128k; did you mean 'v5e-256'?",
  ),
  'choice': (
    [TINY, WORKDIR, '--config.objective.name=autoregresive'],
    "did you mean 'autoregressive'?",
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_a_bad_command_line_is_one_line_with_a_hint(case):
  argv, message = REFUSED[case]
  assert message in refused(command('launch/pretrain.py', *argv))


@pytest.mark.parametrize(
  'line, message',
  [
    (
      'c.train.batchs = 64',
      "unknown config key 'batchs'.*did you mean 'batch'",
    ),
    ('c.modle.heads = 2', "unknown config key 'modle'.*did you mean 'model'"),
    ('c.train.batch = "many"', 'batch'),
    ('c.train.batch = ', 'invalid syntax'),
  ],
  ids=['key', 'section', 'type', 'syntax'],
)
def test_a_bad_config_file_is_one_line_with_a_hint(tmp_path, line, message):
  path = tmp_path / 'mine.py'
  path.write_text(CONFIG_FILE.format(line=line))
  result = command('launch/pretrain.py', f'--config={path}', WORKDIR)
  assert re.search(message, refused(result))


def without_jax(script, *arguments):
  """Runs a script in a process where importing JAX fails."""
  code = (
    'import runpy, sys; sys.modules["jax"] = None; '
    f'sys.argv = {[script, *arguments]}; '
    f'runpy.run_path({script!r}, run_name="__main__")'
  )
  return subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  'script, message',
  [
    (('sample', '--workdir'), 'no checkpoint.*launch/pretrain.py'),
    (('evaluate', '--task=cloze', '--workdir'), 'no checkpoint'),
    (('harness', '--tasks=x', '--workdir'), 'no checkpoint'),
    (('checkpoints', '--workdir'), 'no checkpoint'),
    (('goodput', '--workdir'), 'cannot read .*ledger.jsonl'),
    (('report',), 'no work directory'),
    (('convert', '--check', '--in'), 'no such directory'),
  ],
  ids=lambda value: value[0] if isinstance(value, tuple) else '',
)
def test_a_missing_workdir_is_refused_without_jax(tmp_path, script, message):
  """Importing JAX takes seconds."""
  name, *flags = script
  result = without_jax(f'launch/{name}.py', *flags, f'{tmp_path}/none')
  assert re.search(message, refused(result))


@pytest.mark.parametrize(
  'path', sorted(ROOT.glob('launch/*.py')), ids=lambda path: path.stem
)
def test_help_lists_the_flags_without_jax(path):
  result = without_jax(f'launch/{path.name}', '--help')
  assert result.returncode == 0, result.stderr
  # The scripts that train have no flags of their own.
  places = f'launch/{path.name}:', 'maskdiff.config.command_line:'
  assert any(place in result.stdout for place in places)
  assert '  --' in result.stdout


def test_h_is_short_for_help():
  short, long = (without_jax('launch/goodput.py', f) for f in ('-h', '--help'))
  assert (short.returncode, short.stdout) == (0, long.stdout)


def test_numbers_that_are_not_finite_or_negative_are_refused_by_name():
  pretrain = ['launch/pretrain.py', [TINY, WORKDIR]]
  sampler = ['launch/sample.py', [WORKDIR]]
  commands = [
    (script, [*flags, f'{flag}={value}'])
    for (script, flags), flag in (
      (pretrain, '--config.optimizer.learning_rate'),
      (pretrain, '--config.guard.spike_sigmas'),
      (sampler, '--temperature'),
      (sampler, '--guidance'),
      (sampler, '--threshold'),
      (['launch/evaluate.py', [WORKDIR, '--task=cloze']], '--guidance'),
      (
        ['launch/prepare.py', ['--source=configs', '--out=/nowhere/rows']],
        '--heldout_fraction',
      ),
      (['launch/convert.py', ['--check', '--in=configs']], '--shard_gb'),
    )
    for value in (
      'nan',
      'inf',
      '-inf',
      '-1',
      *['1e30'] * (flag == '--guidance'),
    )
  ]
  result = forked.run(
    [ROOT / 'tests' / 'parse_flags.py'], cwd=ROOT, input=json.dumps(commands)
  )
  for (script, flags), line in zip(
    commands, json.loads(result.stdout), strict=True
  ):
    assert re.fullmatch('error: .*\n', line), (script, flags, line)
    name, value = flags[-1].lstrip('-').split('=')
    assert name in line and value in line


def test_sdlm_takes_the_rule_of_its_windows_unless_a_flag_sets_one():
  flat = ast.literal_eval(parse('--config.objective.name=sdlm').stdout)
  assert flat['sample.remasking'] == 'longest_prefix'
  c = build('tiny.py')
  sample.fit_rule(c)
  assert c.sample.remasking == 'low_confidence'
  c.objective.name = 'sdlm'
  sample.fit_rule(c, {'sample.remasking': 'low_confidence'})
  assert c.sample.remasking == 'low_confidence'
  c.sample.remasking = 'speculative'
  sample.fit_rule(c)
  assert c.sample.remasking == 'speculative'


def test_each_sampler_setting_is_a_flag_of_its_type():
  """A flag that is not given is None, and overrides nothing."""
  values = {bool: True, int: 3, float: 0.5}
  given = {
    name: key.choices[-1] if key.choices else values[type(key.default)]
    for name, key in sample.SETTINGS.items()
  }
  script = (
    'from maskdiff import config; config.define_sample_flags(); '
    'config.run_script(lambda args: print('
    '{name: getattr(args, name) for name in config.sample.SETTINGS}))'
  )
  result = command('-c', script, *(f'--{k}={v}' for k, v in given.items()))
  assert ast.literal_eval(result.stdout) == given
  nothing = ast.literal_eval(command('-c', script).stdout)
  assert nothing == dict.fromkeys(given)


def test_the_choices_match_the_code():
  choices = config_lib.CHOICES
  assert choices['model.remat'] == tuple(transformer.REMAT_POLICIES)
  assert choices['objective.name'] == tuple(table_lib.OBJECTIVES)
  assert choices['sample.remasking'] == (*remasking.RULES, 'speculative')
  assert choices['sample.confidence'] == tuple(candidates.CONFIDENCES)
  assert set(choices['sample.schedule']) <= set(schedule.SCHEDULES)
