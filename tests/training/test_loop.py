"""Runs the training loop on a tiny corpus: resume, meshes, bad input."""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import pathlib
import re
import runpy
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saved
import tiny
from compiled import compilations

from maskdiff import config as config_lib
from maskdiff.checkpoints import checkpoint
from maskdiff.config.sample import SETTINGS
from maskdiff.data import pipeline, prepare, records, row_reader, sources
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import load as load_lib
from maskdiff.model import transformer
from maskdiff.monitoring import metrics, wandb_run
from maskdiff.sampling import layouts, sampler
from maskdiff.sampling.settings import sampler_config
from maskdiff.training import evaluation, loop
from maskdiff.training import step as step_lib
from maskdiff.training import workdir as workdir_lib

BATCH, LENGTH, STEPS = 32, 16, 8
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def make_config(tokenizer, corpus):
  def make(**changes):
    settings = {
      **tiny.TRAIN_KEYS,
      'optimizer.decay_steps': 4,
      'data.path': str(corpus),
      'data.tokenizer': tokenizer.path,
      'data.length': LENGTH,
      'train.steps': STEPS,
      'train.batch': BATCH,
      'train.log_every_steps': 1,
      'eval.every_steps': 4,
      'sample.prompts': ('def read(',),
      'sample.gen_length': 4,
      'sample.block_length': 4,
      'sample.steps': 4,
      'checkpoint.every_steps': 3,
    }
    changes = {k.replace('__', '.'): v for k, v in changes.items()}
    return tiny.config(settings | changes)

  return make


class Run(types.SimpleNamespace):
  """A finished run: work directory, result and records of its compilations."""

  @property
  def rows(self):
    return metrics.read(self.workdir / 'metrics.jsonl')

  def scalars(self, name):
    return {row['step']: row[name] for row in self.rows if name in row}

  def state(self):
    """Returns the arrays of the last checkpoint by name."""
    return saved_state(self.workdir)


def saved_state(workdir):
  return saved.newest(workdir)[2]


def run_with_copies(config, workdir, copies):
  """Runs a config; returns a Run with copies of its work directory.

  `killed` holds the copies: after the checkpoint of step 3 was saved, and
  after the row of step 5 was written. A kill would leave the same files.
  `compiled` lists (step, number of compilations so far) at every row.
  """
  compiled = []
  save, scalars = checkpoint.Checkpointer.save, metrics.Writer.scalars

  def save_and_copy(self, step, *args):
    save(self, step, *args)
    self._manager.wait_until_finished()
    if step == 3:
      shutil.copytree(workdir, copies / 'after_saving_step_3')

  def scalars_and_copy(self, step, values):
    scalars(self, step, values)
    compiled.append((step, len(compilations)))
    if step == 5:
      shutil.copytree(workdir, copies / 'after_the_row_of_step_5')

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint.Checkpointer, 'save', save_and_copy)
    patch.setattr(metrics.Writer, 'scalars', scalars_and_copy)
    before = len(compilations)
    result = loop.run(config, str(workdir))
  return Run(
    workdir=workdir,
    config=config,
    result=result,
    killed=copies,
    compiled=compiled,
    before=before,
    names=compilations[before:],
  )


@pytest.fixture(scope='module')
def finished(make_config, tmp_path_factory):
  """An uninterrupted run, from `run_with_copies`."""
  return run_with_copies(
    make_config(),
    tmp_path_factory.mktemp('finished'),
    tmp_path_factory.mktemp('killed'),
  )


@contextlib.contextmanager
def one_device():
  """Makes a run use only the first device."""
  with pytest.MonkeyPatch.context() as patch:
    make_mesh = functools.partial(mesh_lib.make_mesh, devices=jax.devices()[:1])
    patch.setattr(mesh_lib, 'make_mesh', make_mesh)
    yield


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert x.tobytes() == y.tobytes()


# Output of a run


@pytest.mark.slow
def test_every_step_has_one_row_of_metrics(finished):
  steps = [r['step'] for r in finished.rows if 'train/learning_rate' in r]
  assert steps == list(range(1, STEPS + 1))
  names = {
    'train/loss_nats_per_token',
    'train/learning_rate',
    'train/tokens_per_s',
    'train/step_s',
    'train/grad_norm',
  }
  for row in finished.rows:
    if row['step'] in steps and 'train/learning_rate' in row:
      assert names <= row.keys()
      assert all(np.isfinite(v) and v >= 0 for v in row.values())


def test_evaluates_at_the_first_every_nth_and_the_last_step(finished):
  for name in ('loss_nats_per_token', 'bits_per_byte', 'stderr_nats_per_token'):
    assert finished.scalars(f'eval/{name}').keys() == {0, 4, 8}
  assert finished.scalars('sample/0').keys() == {0, 4, 8}
  last = {k: v for r in finished.rows[-2:] for k, v in r.items()}
  assert {k: last[k] for k in finished.result} == finished.result


def test_learning_rate_follows_the_schedule(finished):
  rates = finished.scalars('train/learning_rate')
  peak, end = 1e-2, finished.config.optimizer.final_learning_rate
  expected = [0, peak / 2, peak, peak, peak]
  expected += [peak + (end - peak) * n / 4 for n in (1, 2, 3)]
  np.testing.assert_allclose(list(rates.values()), expected, rtol=1e-5)


def test_training_reduces_the_bound(finished):
  bounds = finished.scalars('eval/loss_nats_per_token')
  assert bounds[0] == pytest.approx(np.log(4096), rel=0.2)
  assert bounds[8] < bounds[0] - 0.5


def test_bits_per_byte_count_the_bytes_of_the_text(finished, corpus, tokenizer):
  rows = row_reader.RowSource(corpus, records.read_manifest(corpus), 'heldout')
  text = tokenizer.decode(np.concatenate([rows[i] for i in range(len(rows))]))
  bits = finished.result['eval/loss_nats_per_token'] / np.log(2)
  assert finished.result['eval/bits_per_byte'] == pytest.approx(
    bits * len(rows) * LENGTH / len(text.encode()), rel=1e-4
  )


def test_workdir_holds_config_tokenizer_and_checkpoints(finished, tokenizer):
  saved = json.loads((finished.workdir / 'config.json').read_text())
  again = config_lib.flatten(config_lib.from_dict(saved))
  assert again == config_lib.flatten(finished.config)
  model_file = finished.workdir / 'tokenizer.model'
  assert model_file.read_bytes() == pathlib.Path(tokenizer.path).read_bytes()
  checkpoints = (finished.workdir / 'checkpoints').iterdir()
  assert {path.name for path in checkpoints} == {'6', '8'}
  assert list((finished.workdir / 'tensorboard').iterdir())


def test_step_compiles_once(finished):
  """Later compilations are only those of the first checkpoint."""
  names = finished.names
  assert [n for n in names if 'train_step' in n] == ['jit(train_step)']
  counts = [count for step, count in finished.compiled if step > 0]
  in_training = names[
    counts[0] - finished.before : counts[-1] - finished.before
  ]
  assert set(in_training) <= {'jit(slice)', 'jit(fingerprints)'}
  after_saving = [count for step, count in finished.compiled if step > 3]
  assert len(set(after_saving)) == 1


# Resume


TIMES = ('train/step_s', 'train/tokens_per_s')


def without_times(rows):
  return [{k: v for k, v in r.items() if k not in TIMES} for r in rows]


@pytest.fixture
def killed(finished, tmp_path):
  """Copies the work directory of a killed run into tmp_path."""

  def copy(moment):
    shutil.copytree(finished.killed / moment, tmp_path / moment)
    return tmp_path / moment

  return copy


@pytest.mark.parametrize(
  'moment', ['after_saving_step_3', 'after_the_row_of_step_5']
)
def test_resume_is_bitwise_exact(finished, killed, moment):
  """Parameters, optimizer state and metrics are equal bit for bit."""
  workdir = killed(moment)
  result = loop.run(finished.config, str(workdir))
  assert result == finished.result
  assert_same_bits(saved_state(workdir), finished.state())
  rows = metrics.read(workdir / 'metrics.jsonl')
  assert without_times(rows) == without_times(finished.rows)


@pytest.mark.slow
def test_resume_across_a_change_of_times_is_bitwise_exact(
  make_config, tmp_path
):
  """It resumes at step 3; times become uniform after step 4."""
  config = make_config(
    objective__time_density='bell',
    objective__bell_uniform_share=0.1,
    objective__weight='power',
    objective__weight_power=0.5,
    objective__uniform_after=0.5,
    sample__prompts=(),
  )
  whole = run_with_copies(config, tmp_path / 'whole', tmp_path)
  resumed = Run(workdir=tmp_path / 'after_saving_step_3')
  assert loop.run(config, str(resumed.workdir)) == whole.result
  assert_same_bits(resumed.state(), whole.state())
  assert without_times(resumed.rows) == without_times(whole.rows)


def test_finished_run_is_only_evaluated(finished, tmp_path):
  workdir = shutil.copytree(finished.workdir, tmp_path / 'again')
  assert loop.run(finished.config, str(workdir)) == finished.result
  assert_same_bits(saved_state(workdir), finished.state())


@pytest.mark.slow
def test_new_batch_size_resumes_at_the_same_sample(
  killed, make_config, corpus, monkeypatch
):
  workdir, smaller = killed('after_the_row_of_step_5'), BATCH // 2
  batches, train_batches = [], pipeline.train_batches

  def recorded(*args, **kwargs):
    for batch in train_batches(*args, **kwargs):
      batches.append(batch.tokens)
      yield batch

  monkeypatch.setattr(pipeline, 'train_batches', recorded)
  loop.run(make_config(train__batch=smaller), str(workdir))
  step, meta, _ = saved.newest(workdir)
  assert (step, meta['position']) == (STEPS, 3 * BATCH + 5 * smaller)
  in_pairs = train_batches(
    datasets(corpus),
    global_batch=2,
    length=LENGTH,
    seed=0,
    start_sample=0,
    rows=[0, 1],
    num_threads=0,
  )
  order = [batch.tokens for batch in itertools.islice(in_pairs, 3 * BATCH)]
  order = np.concatenate(order)
  np.testing.assert_array_equal(
    np.concatenate(batches)[: 3 * BATCH], order[3 * BATCH :]
  )


def test_batch_of_one_row(corpus):
  batches = pipeline.train_batches(
    datasets(corpus),
    global_batch=1,
    length=LENGTH,
    seed=0,
    start_sample=5,
    rows=[0],
    num_threads=0,
  )
  assert next(batches).tokens.shape == (1, LENGTH)


def datasets(corpus):
  manifest = records.read_manifest(corpus)
  return [pipeline.Dataset('corpus', str(corpus), 1.0, manifest)]


def other_corpus(tokenizer, directory):
  directory.mkdir()
  for n in range(20):
    (directory / f'{n}.txt').write_text(f'another text, {n}\n' * 40)
  prepare.prepare(
    sources.plan([str(directory)]),
    tokenizer,
    directory / 'rows',
    row_length=LENGTH,
    heldout_fraction=0.5,
    workers=0,
  )
  return str(directory / 'rows')


@pytest.mark.parametrize(
  'field, changes',
  [
    ('seed', dict(seed=1)),
    ('rows|shards', dict(data__path='another')),
    ('checkpoints/3', dict(model__embed=32)),
    ('checkpoints/3', dict(model__tie_embeddings=False)),
    ('config.optimizer.name', dict(optimizer__name='muon')),
    (
      "config.model.embed=16, not 32; .*name='adamw', not 'muon'; use the same "
      'values',
      dict(model__embed=32, model__zero_outputs=True, optimizer__name='muon'),
    ),
  ],
)
def test_resume_refuses_other_model_or_data(
  killed, make_config, tokenizer, tmp_path, field, changes
):
  workdir, config = killed('after_the_row_of_step_5'), make_config(**changes)
  if config.data.path == 'another':
    config.data.path = other_corpus(tokenizer, tmp_path / 'another')
  before = (workdir / 'metrics.jsonl').read_bytes()
  with pytest.raises(UserError, match=field) as error:
    loop.run(config, str(workdir))
  assert '\n' not in str(error.value)
  assert 'zero_outputs' not in str(error.value)
  assert (workdir / 'metrics.jsonl').read_bytes() == before


def test_allowed_other_data_continues_at_the_same_sample(
  killed, make_config, tokenizer, tmp_path, capfd
):
  workdir = killed('after_the_row_of_step_5')
  other = other_corpus(tokenizer, tmp_path / 'another')
  config = make_config(data__path=other, data__allow_change=True)
  loop.run(config, str(workdir))
  step, meta, _ = saved.newest(workdir)
  assert (step, meta['position']) == (STEPS, STEPS * BATCH)
  assert meta['identity'] == pipeline.fingerprint(
    datasets(other), seed=0, length=LENGTH
  )
  assert 'was trained on data with rows=' in capfd.readouterr().err


# Meshes and microbatches


VARIANTS = {
  'one_device': {},
  'all_axes_and_microbatches': dict(
    mesh__replica=2, mesh__tensor=2, train__microbatches=4
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize('variant', VARIANTS)
def test_losses_of_a_run_do_not_depend_on_mesh_or_microbatches(
  finished, make_config, tmp_path, variant
):
  config = make_config(sample__prompts=(), **VARIANTS[variant])
  context = (
    one_device() if variant == 'one_device' else contextlib.nullcontext()
  )
  with context:
    loop.run(config, str(tmp_path))
  other = Run(workdir=tmp_path)
  for name in ('train', 'eval'):
    expected = finished.scalars(f'{name}/loss_nats_per_token')
    actual = other.scalars(f'{name}/loss_nats_per_token')
    assert actual.keys() == expected.keys()
    np.testing.assert_allclose(
      list(actual.values()), list(expected.values()), rtol=1e-4
    )


# Using a finished run


def evaluate(workdir):
  """Loads and evaluates a run; returns the row of metrics."""
  config, _, params, mesh = load_lib.load(str(workdir))
  (dataset,) = datasets(config.data.path)
  e, split = config.eval, dataset.manifest.splits['heldout']
  batches = pipeline.heldout_batches(
    dataset,
    batch=e.batch,
    length=LENGTH,
    num_batches=e.batches,
    rows=range(e.batch),
    num_threads=0,
  )
  sharding = mesh_lib.batch_sharding(mesh)
  batches = list(pipeline.to_device(batches, sharding, (e.batch, LENGTH)))
  with jax.set_mesh(mesh):
    return evaluation.evaluate(
      step_lib.step_config(config),
      params,
      batches,
      split.tokens / split.text_bytes,
    ).row()


def test_loaded_run_evaluates_to_the_same_bound(finished):
  assert evaluate(finished.workdir) == finished.result
  assert evaluate(finished.workdir) == finished.result


def test_evaluation_does_not_depend_on_the_mesh(finished):
  with one_device():
    result = evaluate(finished.workdir)
  assert result == pytest.approx(finished.result, rel=1e-5)


def test_loaded_run_draws_the_same_samples(finished):
  """Compares samples of the checkpoint with those in metrics.jsonl."""
  config, tokenizer, params, mesh = load_lib.load(str(finished.workdir))
  prompt = tokenizer.encode(config.sample.prompts[0])
  c, settings = sampler_config(config)
  with jax.set_mesh(mesh):
    (row,) = np.asarray(
      sampler.generate(
        load_lib.network(config, params),
        c,
        layouts.continue_prompts([prompt], 4, settings=settings),
      )
    )
  text = tokenizer.decode(row)
  assert text.startswith('def read(')
  assert text == finished.scalars('sample/0')[STEPS]


@pytest.fixture(scope='module')
def sample_script():
  return runpy.run_path(str(ROOT / 'launch' / 'sample.py'))['main']


def run_script(script, workdir, **changes):
  flags = dict(
    workdir=str(workdir),
    prompt=[],
    infill=[],
    prompts=None,
    interactive=False,
    out=None,
    trajectory=False,
    batch=16,
    seed=0,
    show=False,
    html=None,
    open_length=False,
    tensor=1,
    suppress_mask=False,
    dtype=None,
    ema=False,
    rope_scaling=None,
    length='given',
    **dict.fromkeys(SETTINGS) | {'gen_length': 4},
  )
  script(types.SimpleNamespace(**(flags | changes)))


def sample(script, workdir, capsys, **changes):
  capsys.readouterr()
  run_script(script, workdir, **changes)
  return capsys.readouterr().out


def test_sample_script_continues_a_prompt(finished, sample_script, capsys):
  out = sample(sample_script, finished.workdir, capsys, prompt=['def read('])
  assert out == finished.scalars('sample/0')[STEPS] + '\n'


def test_sample_script_shows_every_step(finished, sample_script, capsys):
  out = sample(
    sample_script, finished.workdir, capsys, prompt=['def read('], show=True
  )
  *shown, end = out.split('=' * 8 + '\n')
  masks = [text.count('░') for text in shown]
  assert (masks, end) == ([4, 3, 2, 1, 0], '')


def test_sample_script_fills_gaps(finished, sample_script, capsys):
  texts = ['def {{2}}(alpha):\n', '  return {{1}} + {{3}}']
  out = sample(sample_script, finished.workdir, capsys, infill=texts)
  first, second = out.split('\n---\n')
  assert re.fullmatch(r'def .*\(alpha\):\n', first, re.DOTALL)
  assert re.fullmatch(r'  return .* \+ .*\n', second, re.DOTALL)


def test_infill_does_not_depend_on_the_batch(
  finished, sample_script, capsys, tmp_path
):
  """Rows may have different numbers of blocks; texts may come from a file."""
  sample_infill = functools.partial(
    sample,
    sample_script,
    finished.workdir,
    capsys,
    steps=2,
    block_length=2,
    temperature=1.0,
  )
  texts = ['def {{2}}(a):', 'return {{7}}']
  together = sample_infill(infill=texts)
  alone = sample_infill(infill=texts[:1])
  assert together.split('\n---\n')[0] == alone.rstrip('\n')
  path = tmp_path / 'gaps.jsonl'
  path.write_text(''.join(json.dumps({'infill': t}) + '\n' for t in texts))
  assert sample_infill(prompts=str(path)) == together


def test_sample_script_answers_a_file_of_prompts(
  finished, sample_script, capsys, tmp_path
):
  """Batches of two give the same answers as single prompts."""
  rows = [
    {'prompt': 'def read('},
    {'prompt': 'def write(alpha, ', 'seed': 9},
    {'prompt': ''},
  ]
  file, out = tmp_path / 'prompts.jsonl', tmp_path / 'answers.jsonl'
  file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  how = dict(temperature=1.0, remasking='threshold', threshold=0.05)
  printed = sample(
    sample_script,
    finished.workdir,
    capsys,
    prompts=str(file),
    out=str(out),
    batch=2,
    seed=5,
    **how,
  )
  assert printed == ''
  answers = [json.loads(line) for line in out.read_text().splitlines()]
  assert [a['prompt'] for a in answers] == [row['prompt'] for row in rows]
  assert [a['seed'] for a in answers] == [5, 9, 7]
  for answer in answers:
    assert answer['text'] == answer['prompt'] + answer['answer']
    assert answer['tokens'] == 4
    assert 1 <= answer['forwards'] <= 4
  alone = sample(
    sample_script,
    finished.workdir,
    capsys,
    prompt=[rows[1]['prompt']],
    seed=9,
    **how,
  )
  assert alone == answers[1]['text'] + '\n'


@pytest.mark.slow
def test_lines_of_a_file_have_settings_of_their_own(
  finished, sample_script, tmp_path
):
  """Each answer equals that of a command with its settings as flags."""
  own = [{}, {'temperature': 0.9, 'top_k': 5}, {'gen_length': 3, 'steps': 2}]
  file, out = tmp_path / 'prompts.jsonl', tmp_path / 'answers.jsonl'
  lines = [{'prompt': 'def read(', 'settings': changes} for changes in own]
  file.write_text(''.join(json.dumps(line) + '\n' for line in lines))

  def answers(**flags):
    run_script(sample_script, finished.workdir, out=str(out), **flags)
    return [json.loads(line) for line in out.read_text().splitlines()]

  found = answers(prompts=str(file), trajectory=True, batch=2)
  for seed, (answer, changes) in enumerate(zip(found, own, strict=True)):
    (alone,) = answers(prompt=['def read('], seed=seed, **changes)
    assert {key: answer[key] for key in alone} == alone
    assert len(answer['ids']) == answer['tokens'] == len(answer['steps'])
    assert max(answer['steps']) == answer['forwards']
    for key, value in changes.items():
      assert answer['settings'][key] == value
  file.write_text('{"prompt": "a"}\n{"prompt": "b", "settings": {"top_p": 2}}')
  with pytest.raises(UserError, match='jsonl:2: config.sample.top_p=2.0: must'):
    answers(prompts=str(file))


def test_sample_script_writes_an_html_replay(
  finished, sample_script, capsys, tmp_path
):
  """--html alone, with --show, and with --out."""
  flags = dict(prompt=['def </script>(', 'x = "'], block_length=2)
  plain = sample(sample_script, finished.workdir, capsys, **flags)
  for number, more in enumerate((dict(), dict(show=True), dict(out='out'))):
    path = tmp_path / f'{number}.html'
    more = {
      key: str(tmp_path / v) if v == 'out' else v for key, v in more.items()
    }
    out = sample(
      sample_script, finished.workdir, capsys, html=str(path), **flags, **more
    )
    if 'out' in more:
      rows = (tmp_path / 'out').read_text().splitlines()
      out = '\n---\n'.join(json.loads(row)['text'] for row in rows) + '\n'
    assert out.replace('=' * 8 + '\n', '').endswith(plain)
    (recording,) = re.findall(
      r'"application/json">(.*?)</script>', path.read_text()
    )
    data = json.loads(recording)
    assert data['steps'] == 4
    assert [t['title'] for t in data['texts']] == [
      'prompt 1, seed 0',
      'prompt 2, seed 1',
    ]
    for text, printed in zip(
      data['texts'], plain.split('\n---\n'), strict=True
    ):
      given = text['steps'].count(0)
      assert text['blocks'] == [-1] * given + [0, 0, 1, 1]
      assert sorted(text['steps'][given:]) == [1, 2, 3, 4]
      assert all(0 <= c <= 1 for c in text['confidence'][given:])
      if all(isinstance(piece, str) for piece in text['pieces']):
        assert ''.join(text['pieces']) == printed.rstrip('\n')
    settings = dict(data['settings'])
    assert (settings['steps'], settings['block_length']) == ('4', '2')


class Typed(io.BytesIO):
  """Standard input that ends with Ctrl-C."""

  def readline(self, size=-1):
    line = super().readline(size)
    if not line:
      raise KeyboardInterrupt
    return line


@pytest.mark.parametrize('ended_by', [io.BytesIO, Typed])
def test_sample_script_answers_lines_of_standard_input(
  finished, sample_script, capsys, monkeypatch, tmp_path, ended_by
):
  """The answers equal those of --prompt. Ctrl-C ends without an error."""
  lines = ['def read(', '', 'def write(']
  stdin = lambda text: io.TextIOWrapper(ended_by(text.encode()))
  monkeypatch.setattr('sys.stdin', stdin('\n'.join(lines) + '\n'))
  out = sample(sample_script, finished.workdir, capsys, interactive=True)
  prompts = [line for line in lines if line]
  assert out == sample(sample_script, finished.workdir, capsys, prompt=prompts)
  monkeypatch.setattr('sys.stdin', stdin('\n'.join(lines)))
  path = tmp_path / 'out.jsonl'
  run_script(sample_script, finished.workdir, interactive=True, out=str(path))
  captured = capsys.readouterr()
  assert captured.out == ''
  assert captured.err.splitlines()[-1].startswith('8 tokens, 8 forward')
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert [(r['prompt'], r['seed']) for r in rows] == [
    ('def read(', 0),
    ('def write(', 1),
  ]


@pytest.mark.slow
def test_sampling_with_refill_equals_sampling_at_once(
  finished, sample_script, capsys, tmp_path
):
  """Another mesh, a cache refreshed at every step, and batches of two."""
  path = tmp_path / 'out.jsonl'
  texts = ['def read(', 'class ', 'import ']
  expected = sample(
    sample_script, finished.workdir, capsys, prompt=texts, block_length=2
  )
  flags = dict(tensor=2, cache='dual', refresh=1, batch=2, out=str(path))
  run_script(
    sample_script, finished.workdir, prompt=texts, block_length=2, **flags
  )
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert '---\n'.join(r['text'] + '\n' for r in rows) == expected


@pytest.mark.slow
def test_sample_script_gives_answers_of_open_length(
  finished, sample_script, tmp_path
):
  """An answer ends at eos or at config.data.length."""
  path = tmp_path / 'out.jsonl'
  texts = ['def read(', 'x']
  run_script(
    sample_script,
    finished.workdir,
    prompt=texts,
    open_length=True,
    gen_length=None,
    block_length=4,
    dtype='bfloat16',
    out=str(path),
  )
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  encode = load_lib.load(str(finished.workdir))[1].encode
  for text, row in zip(texts, rows, strict=True):
    room = 16 - len(encode(text))  # config.data.length
    assert row['tokens'] == row['forwards'] == room  # no eos
    assert row['positions'] < room * 16


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_sample_script_casts_weights_to_the_dtype(
  finished, sample_script, capsys, monkeypatch, dtype
):
  """Without a dtype, the weights stay float32, as stored."""
  loaded = []
  load = load_lib.load
  monkeypatch.setattr(
    load_lib, 'load', lambda *a: loaded.append(load(*a)) or loaded[-1]
  )
  texts = ['def read(', 'x']
  sample(sample_script, finished.workdir, capsys, prompt=texts, dtype=dtype)
  config, tokenizer, params, mesh = loaded[0]
  _, _, stored = saved.newest(finished.workdir)
  leaves = jax.tree_util.tree_leaves_with_path({'params': params})
  for path, leaf in leaves:
    original = stored[jax.tree_util.keystr(path)]
    assert original.dtype == jnp.float32
    assert leaf.dtype == jnp.dtype(dtype or 'float32')
    np.testing.assert_array_equal(leaf, original.astype(leaf.dtype))
  c, settings = sampler_config(config)
  request = layouts.continue_prompts(
    [tokenizer.encode(text) for text in texts],
    settings.gen_length,
    settings=settings,
  )
  with jax.set_mesh(mesh):
    out = sampler.generate(load_lib.network(config, params), c, request)
  out, given = np.asarray(out), ~request.fill
  np.testing.assert_array_equal(out[given], request.canvas[given])
  assert not (out == tokenizer.mask_id).any()


def test_sample_script_prints_its_cost(finished, sample_script, capsys):
  capsys.readouterr()
  flags = dict(remasking='threshold', threshold=0.0, block_length=2)
  run_script(sample_script, finished.workdir, prompt=['def '], **flags)
  assert re.match(
    r'4 tokens, 2 forward passes of a row \(0.50 per token\), (\d+) '
    r'positions \([0-9.]+ per token\), .* s including compilation$',
    capsys.readouterr().err.splitlines()[-1],
  )


REFUSED_FLAGS = {
  'rule': (dict(threshold=0.5), '--threshold is for --remasking threshold'),
  'nucleus': (dict(top_p=0.9), 'top_p=0.9.*temperature above 0'),
  'gaps': (
    dict(infill=['a{{2}}b'], stop_at_eos=True),
    '--stop_at_eos and --open_length are for prompts',
  ),
  'open': (
    dict(infill=['a{{2}}b'], open_length=True),
    '--open_length are for prompts',
  ),
  'refresh': (dict(refresh=2), 'refresh=2 recomputes a cache'),
  'heads': (dict(prompt=['a'], tensor=8), 'not divisible by mesh.tensor = 8'),
  'context': (dict(gen_length=100), 'gen_length=100.*data.length=16'),
  'two': (dict(prompt=['a'], infill=['a{{2}}b']), 'give one of'),
  'shown': (dict(show=True, out='o.jsonl'), '--show'),
  'steps': (dict(trajectory=True), '--trajectory adds fields .* set --out'),
  'talk': (dict(interactive=True, show=True), '--show prints'),
  'both': (dict(interactive=True, prompt=['a']), 'give one of'),
  'page': (dict(interactive=True, html='a.html'), '--html replays'),
  'no_page': (dict(html='/nowhere/a.html'), '--html: cannot write'),
  'bytes': (dict(prompt=['\udcff']), 'not UTF-8'),
  'unwritable': (dict(out='/nowhere/o.jsonl'), '--out: cannot write'),
}


@pytest.mark.parametrize('case', REFUSED_FLAGS)
def test_sample_script_refuses_conflicting_flags(finished, sample_script, case):
  flags, message = REFUSED_FLAGS[case]
  with pytest.raises(UserError, match=message):
    run_script(sample_script, finished.workdir, **flags)


# Autoregressive


@pytest.mark.slow
def test_one_config_key_trains_an_autoregressive_model(make_config, tmp_path):
  config = make_config(objective__name='autoregressive')
  result = loop.run(config, str(tmp_path))
  rows = Run(workdir=tmp_path)
  bounds = rows.scalars('eval/loss_nats_per_token')
  assert bounds[0] == pytest.approx(np.log(4096), rel=0.1)
  assert result['eval/loss_nats_per_token'] < bounds[0] - 0.5
  assert set(rows.scalars('train/masked_share').values()) == {1.0}
  assert rows.scalars('sample/0')[STEPS].startswith('def read(')


# Mixtures


@pytest.mark.slow
def test_mixture_evaluates_each_dataset(
  make_config, corpus, tokenizer, tmp_path
):
  other = other_corpus(tokenizer, tmp_path / 'another')
  config = make_config(
    data__path=f'{corpus}=0.75,{other}=0.25', eval__batches=1
  )
  result = loop.run(config, str(tmp_path / 'run'))
  header = (tmp_path / 'run' / 'header.txt').read_text()
  for path, share in ((corpus, '75.00%'), (other, '25.00%')):
    (line,) = [x for x in header.splitlines() if f' {path}: an epoch' in x]
    assert line.endswith(f'{share} of its tokens')
  names = [str(path).strip('/') for path in (corpus, other)]
  value = lambda key: [result[f'eval/{name}/{key}'] for name in names]
  losses = value('loss_nats_per_token')
  assert losses[0] != losses[1]
  assert result['eval/loss_nats_per_token'] == pytest.approx(
    0.75 * losses[0] + 0.25 * losses[1]
  )
  # Bits per byte: mean bits per token over mean bytes per token.
  bytes_per_token = [
    loss / np.log(2) / bits
    for loss, bits in zip(losses, value('bits_per_byte'), strict=True)
  ]
  assert result['eval/bits_per_byte'] == pytest.approx(
    result['eval/loss_nats_per_token']
    / np.log(2)
    / (0.75 * bytes_per_token[0] + 0.25 * bytes_per_token[1])
  )
  assert not any('stderr' in key for key in result)  # of one batch


@pytest.mark.slow
def test_eval_path_evaluates_on_other_data(
  finished, make_config, tokenizer, tmp_path
):
  other = other_corpus(tokenizer, tmp_path / 'another')
  config = make_config(eval__path=other, eval__batches=1)
  result = loop.run(config, str(tmp_path / 'run'))
  assert result.keys() == finished.result.keys() - {
    'eval/stderr_nats_per_token'  # of one batch
  }
  losses = Run(workdir=tmp_path / 'run').scalars('train/loss_nats_per_token')
  assert losses == finished.scalars('train/loss_nats_per_token')


# Bad input


def with_swapped_shards(corpus, directory):
  """Both files are intact, but each has the name of the other."""
  shutil.copytree(corpus, directory)
  train, heldout = (
    directory / f'{split}-00000.array_record' for split in records.SPLITS
  )
  content = train.read_bytes(), heldout.read_bytes()
  heldout.write_bytes(content[0])
  train.write_bytes(content[1])
  return str(directory)


def with_another_eos(corpus, directory):
  shutil.copytree(corpus, directory)
  manifest = records.read_manifest(directory)
  records.write_manifest(directory, dataclasses.replace(manifest, eos_id=7))
  return str(directory)


def with_another_tokenizer(corpus, directory):
  shutil.copytree(corpus, directory)
  manifest = json.loads((directory / 'manifest.json').read_text())
  manifest['tokenizer_fingerprint'] = '0' * 16
  (directory / 'manifest.json').write_text(json.dumps(manifest))
  return str(directory)


REFUSED = {
  'tokenizer of the data': (
    dict(data__path='with_another_tokenizer'),
    'prepared with tokenizer 0000000000000000.*config.data.tokenizer',
  ),
  'shard': (
    dict(data__path='with_swapped_shards'),
    'train-00000.* its manifest says',
  ),
  'eos': (dict(data__path='with_another_eos'), 'eos id 7.*eos_id=2'),
  'mixture': (dict(data__path='a=1,b'), "'b' must be DIRECTORY=WEIGHT"),
  'no data': (dict(data__path='/nowhere/rows'), '/nowhere/rows.*data.path'),
  'no tokenizer': (
    dict(data__tokenizer='/nowhere/t.model'),
    '/nowhere/t.model.*config.data.tokenizer',
  ),
  'mask id': (dict(tokens__mask_id=5), 'config.tokens.mask_id=5.* needs 4'),
  'vocabulary': (dict(model__vocab_size=4000), 'config.model.vocab_size=4000'),
  'mesh': (dict(mesh__tensor=3), 'tensor=3.*number of devices, 8'),
  'heads': (
    dict(mesh__tensor=4, mesh__fsdp=2),
    'heads = 2 is not divisible by mesh.tensor = 4',
  ),
  'batch': (dict(train__batch=36), 'config.train.batch=36.*batch=32 is'),
  'eval batch': (dict(eval__batch=18), 'config.eval.batch=18.*batch=16 is'),
  'length': (dict(data__length=12), 'length of 12 .* rows of 16 tokens'),
  'held-out text': (dict(eval__batches=10_000), 'config.eval.batches'),
  'choice': (dict(objective__name='autoregresive'), "'autoregressive'"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_bad_input_is_refused_before_compilation(
  make_config, corpus, tmp_path, case
):
  changes, message = REFUSED[case]
  config = make_config(**changes)
  for make in (with_another_tokenizer, with_swapped_shards, with_another_eos):
    if config.data.path == make.__name__:
      config.data.path = make(corpus, tmp_path / 'data')
  before = len(compilations)
  with pytest.raises(UserError, match=message) as error:
    loop.run(config, str(tmp_path / 'run'))
  assert '\n' not in str(error.value)
  assert compilations[before:] == []


def test_missing_wandb_is_reported_first(make_config, tmp_path, monkeypatch):
  monkeypatch.setattr(wandb_run.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='pip install wandb'):
    loop.run(make_config(train__wandb_project='p'), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_at_most_one_step_is_queued(make_config, tmp_path, monkeypatch):
  """A checkpoint after SIGTERM has to wait for every queued step.

  The run writes metrics rarely, which must not let it queue more steps.
  """
  events, queued = [], []
  call, wait = jax.stages.Compiled.__call__, jax.block_until_ready

  def recorded_call(compiled, *args):
    found = call(compiled, *args)
    if isinstance(found, tuple) and isinstance(found[-1], step_lib.StepMetrics):
      queued.append(found[-1])
      events.append(f'step {len(queued)} is queued')
    return found

  def recorded_wait(x):
    for number, values in enumerate(queued, 1):
      if values is x:
        events.append(f'step {number} has ended')
    return wait(x)

  monkeypatch.setattr(jax.stages.Compiled, '__call__', recorded_call)
  monkeypatch.setattr(jax, 'block_until_ready', recorded_wait)
  config = make_config(
    train__steps=4,
    train__log_every_steps=100,
    eval__every_steps=100,
    checkpoint__every_steps=100,
    optimizer__decay_steps=1,
  )
  loop.run(config, str(tmp_path / 'run'))
  assert events == [
    'step 1 is queued',
    'step 2 is queued',
    'step 1 has ended',
    'step 3 is queued',
    'step 2 has ended',
    'step 4 is queued',
    'step 3 has ended',
  ]


@pytest.mark.parametrize('remat', ['full', 'minimal'])
def test_out_of_memory_error_names_config_keys(
  make_config, tmp_path, monkeypatch, remat
):
  def too_large():
    return jax.block_until_ready(jax.jit(lambda: jnp.zeros(1 << 44))())

  lowered = types.SimpleNamespace(compile=too_large)
  jitted = types.SimpleNamespace(lower=lambda *args: lowered)
  monkeypatch.setattr(step_lib, 'compile_train_step', lambda *args: jitted)
  with pytest.raises(UserError, match='too little memory') as error:
    loop.run(make_config(model__remat=remat), str(tmp_path / 'run'))
  for key in ('train.microbatches=', 'loss_chunk_tokens='):
    assert key in str(error.value)
  change = 'set --config.model.remat=minimal to full,'
  assert (change in str(error.value)) == (remat != 'full')
  assert ('model.remat' in str(error.value)) == (remat != 'full')
  assert '\n' not in str(error.value)


def test_header_counts_the_parameters(finished):
  model = step_lib.step_config(finished.config).model
  shapes = transformer.shapes(model)
  header = workdir_lib.describe(finished.config, model, mesh_lib.make_mesh())
  number = sum(x.size for x in jax.tree.leaves(shapes))
  assert re.search(rf'^total +{number:,}$', header, re.MULTILINE)
  assert '8 x cpu, replica=1, fsdp=8, sequence=1, tensor=1' in header
  assert 'objective.name' in header
