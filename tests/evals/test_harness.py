"""The model class for lm-eval gives the same results as the library.

Tasks are local files, and the network has random weights.
"""

import json
import os
import pathlib
from types import SimpleNamespace

import forked
import jax
import numpy as np
import pytest
import untrained_run

from maskdiff.errors import UserError
from maskdiff.likelihood import bounds, queries
from maskdiff.sampling import layouts, sampler
from maskdiff.sampling.settings import sampler_config

lm_eval = pytest.importorskip('lm_eval')  # requirements-eval-test.txt

from lm_eval.tasks import TaskManager  # noqa: E402

from maskdiff.evals import harness  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUESTIONS = [
  {'question': 'for i in ', 'choices': ['range(3):', '3)(range:'], 'label': 0},
  {'question': 'def read(', 'choices': ['self):', ')) == ('], 'label': 1},
  {'question': '', 'choices': ['import os', 'os os'], 'label': 0},
]
TEXTS = [
  {'text': 'def read(self):\n  return alpha + beta\n' * 4},
  {'text': 'x'},
]
TASKS = {
  'md_choice': ('multiple_choice', 'questions', """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}]
"""),
  'md_rolling': ('loglikelihood_rolling', 'texts', """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""),
  'md_until': ('generate_until', 'questions', """
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "a"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""),
}  # fmt: skip


@pytest.fixture(scope='module')
def workdir(tokenizer, tmp_path_factory):
  path = tmp_path_factory.mktemp('run')
  untrained_run.save(path, tokenizer)
  return path


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
  """Returns a directory with lm-eval tasks and their data."""
  path = tmp_path_factory.mktemp('tasks')
  for name, lines in (('questions', QUESTIONS), ('texts', TEXTS)):
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (path / f'{name}.jsonl').write_text(text)
  for name, (kind, data, rest) in TASKS.items():
    (path / f'{name}.yaml').write_text(
      f'task: {name}\noutput_type: {kind}\ndataset_path: json\n'
      'test_split: test\ndataset_kwargs:\n  data_files:\n'
      f'    test: {path}/{data}.jsonl\n{rest}'
    )
  return path


@pytest.fixture(scope='module')
def model(workdir):
  """Returns a model with exact likelihoods, which do not depend on seeds."""
  return harness.MaskDiff(
    str(workdir), form='left_to_right', batch_size=2, block_length=3
  )


@pytest.fixture(scope='module')
def results(model, tasks, tmp_path_factory):
  cache = tmp_path_factory.mktemp('cache')
  os.environ['HF_DATASETS_CACHE'] = str(cache)
  return lm_eval.simple_evaluate(
    model=model,
    tasks=list(TASKS),
    task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
  )


def exact(model, prompt, answer):
  """Returns the log-likelihood of tokens, and whether they are greedy."""
  c = queries.likelihood_config(
    model.model.config, guidance=0.0, tokens_per_call=4096
  )
  arguments = model.model.network, c, bounds.lay_out([prompt], [answer])
  with jax.set_mesh(model.model.mesh):
    value = bounds.left_to_right(*arguments).log_likelihood[0]
    return value, bounds.greedy_matches(*arguments)[0]


@pytest.mark.slow
def test_choices_are_scored_given_their_question(results, model, tokenizer):
  for sample, question in zip(
    results['samples']['md_choice'], QUESTIONS, strict=True
  ):
    encode = tokenizer.encode
    text = question['question']
    prompt = encode(text.rstrip()) or [tokenizer.eos_id]
    for choice, response in zip(
      question['choices'], sample['filtered_resps'], strict=True
    ):
      # White space moves to the choice, and both are encoded as one text.
      whole = encode(text + choice)
      answer = whole[len(prompt) :] if text else whole
      value, greedy = exact(model, prompt, answer)
      assert response[0] == pytest.approx(value, rel=1e-5)
      assert response[1] == greedy
    values = [r[0] for r in sample['filtered_resps']]
    assert sample['acc'] == (np.argmax(values) == question['label'])


def test_long_texts_are_cut_into_pieces(results, model, tokenizer):
  """Each token is scored once, given the last token of the piece before.

  The last piece is scored given as many tokens as fit.
  """
  total = 0.0
  for sample, line in zip(results['samples']['md_rolling'], TEXTS, strict=True):
    ids = [tokenizer.eos_id, *tokenizer.encode(line['text'])]
    starts = range(1, len(ids), 31)  # of 32
    pieces = [(ids[s - 1 : s], ids[s : s + 31]) for s in starts]
    last = pieces[-1][1]
    pieces[-1] = ids[-32 : len(ids) - len(last)], last
    value = sum(exact(model, *piece)[0] for piece in pieces)
    assert sample['filtered_resps'][0] == pytest.approx(value, rel=1e-5)
    total += value
  assert len(starts) == 1 and len(tokenizer.encode(TEXTS[0]['text'])) > 32
  size = sum(len(line['text'].encode()) for line in TEXTS)
  assert results['results']['md_rolling']['bits_per_byte,none'] == (
    pytest.approx(-total / size / np.log(2), rel=1e-5)
  )


def test_answers_are_cut_at_stop_strings(results, model, tokenizer):
  config = model.model.config.copy_and_resolve_references()
  config.sample.update(gen_length=6, block_length=3, steps=6, temperature=0.0)
  prompts = [tokenizer.encode(q['question']) for q in QUESTIONS]
  c, settings = sampler_config(config)
  request = layouts.continue_prompts(prompts, 6, settings=settings)
  with jax.set_mesh(model.model.mesh):
    out = np.asarray(sampler.generate(model.model.network, c, request))
  cuts = 0
  for i, sample in enumerate(results['samples']['md_until']):
    ids = out[i, request.fill[i]].tolist()
    ids = ids[: (ids + [tokenizer.eos_id]).index(tokenizer.eos_id)]
    text = tokenizer.decode(ids)
    expected = text.partition('e')[0].partition('a')[0]
    assert sample['filtered_resps'][0] == expected
    cuts += expected != text
  assert cuts


def test_results_contain_the_settings(results, workdir):
  stored = results['config']['maskdiff']
  assert stored['workdir'] == str(workdir)
  assert stored['estimator'] == 'left_to_right'
  assert stored['sampler_settings'] == {'block_length': 3, 'guidance': 0.0}
  (used,) = stored['samplers']
  assert (used['gen_length'], used['block_length'], used['steps']) == (6, 3, 6)
  assert used['temperature'] == 0.0
  json.dumps(stored)


def requests(*args):
  return [SimpleNamespace(args=a) for a in args]


def test_long_context_loses_its_beginning(model, tokenizer):
  context, continuation = 'alpha = beta\n' * 20, ' self.read'
  whole = tokenizer.encode(context.rstrip() + '\n' + continuation)
  answer = whole[len(tokenizer.encode(context.rstrip())) :]
  ids = whole[: len(whole) - len(answer)]
  ((value, greedy),) = model.loglikelihood(
    requests((context, continuation)), disable_tqdm=True
  )
  assert len(ids) > 32
  prompt = ids[len(ids) - (32 - len(answer)) :]
  expected = exact(model, prompt, answer)
  assert (value, greedy) == pytest.approx(expected, rel=1e-5)


def test_bound_depends_on_its_request_only(workdir):
  model = harness.MaskDiff(str(workdir), samples=16, check_greedy=False)
  pairs = [('for i in', ' range(3):'), ('def read(', 'self):')]
  together = model.loglikelihood(requests(*pairs), disable_tqdm=True)
  for pair, (value, greedy) in zip(pairs, together, strict=True):
    ((alone, _),) = model.loglikelihood(requests(pair), disable_tqdm=True)
    assert alone == pytest.approx(value, rel=1e-5)
    assert greedy is False
  twice = [pairs[0]] * 2 + [pairs[1]]
  values = model.loglikelihood(requests(*twice), disable_tqdm=True)
  assert values[0] == values[1] != values[2]
  assert model.loglikelihood_rolling(requests(('',))) == [0.0]
  info = model.get_model_info()['maskdiff']
  assert info['estimator']['samples'] == 16 and not info['check_greedy']


def test_tensor_and_dtype_are_applied(model, workdir):
  pairs = requests(('for i in', ' range(3):'), ('def read(', 'self):'))
  expected = model.loglikelihood(pairs, disable_tqdm=True)
  spread = harness.MaskDiff(str(workdir), form='left_to_right', tensor=2)
  assert spread.model.mesh.shape['tensor'] == 2
  found = spread.loglikelihood(pairs, disable_tqdm=True)
  for one, other in zip(found, expected, strict=True):
    assert one == pytest.approx(other, rel=1e-5)
  half = harness.MaskDiff(str(workdir), dtype='bfloat16')
  dtypes = {x.dtype.name for x in jax.tree.leaves(half.model.params)}
  assert dtypes == {'bfloat16'}
  assert half.get_model_info()['maskdiff']['dtype'] == 'bfloat16'
  assert model.get_model_info()['maskdiff']['dtype'] == 'float32'


def test_do_sample_enables_a_tasks_sampling_settings(model):
  kwargs = {'until': 'x', 'temperature': 0.9, 'top_p': 0.5, 'max_gen_toks': 4}
  until, values = model._decoding({**kwargs, 'do_sample': True})
  assert until == ['x']
  assert (values['temperature'], values['top_p']) == (0.9, 0.5)
  assert (values['gen_length'], values['block_length']) == (4, 3)
  _, values = model._decoding({**kwargs, 'do_sample': False})
  assert (values['temperature'], values['top_p']) == (0.0, 1.0)


def test_invalid_requests_and_settings_are_user_errors(model, workdir):
  too_long = requests(('x', {'until': [], 'max_gen_toks': 64}))
  with pytest.raises(UserError, match='64 tokens, .* set gen_length'):
    model.generate_until(too_long)
  with pytest.raises(UserError, match='training rows had 32'):
    model.loglikelihood(requests(('x', ' y = 1' * 40)), disable_tqdm=True)
  with pytest.raises(UserError, match="sampler setting 'stpes'"):
    harness.MaskDiff(str(workdir), stpes=3)
  with pytest.raises(UserError, match="dtype='auto': choose among float32"):
    harness.MaskDiff(str(workdir), dtype='auto')
  with pytest.raises(UserError, match='not divisible by mesh.tensor = 4'):
    harness.MaskDiff(str(workdir), tensor=4)


# Reading the tasks of lm-eval itself takes seconds.
WITHOUT_OTHER_TASKS = """
import functools, runpy, sys
from lm_eval import tasks
tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.slow
def test_script_prints_a_table_and_the_settings(workdir, tasks, tmp_path):
  def launch(*flags, program=()):
    return forked.run(
      [
        *(*program, 'launch/harness.py', f'--workdir={workdir}'),
        *(f'--include_path={tasks}', *flags),
      ],
      cwd=ROOT,
      env={
        **os.environ,
        'PYTHONPATH': str(ROOT),
        'HF_DATASETS_CACHE': str(tmp_path / 'cache'),
      },
    )

  out = tmp_path / 'results.json'
  flags = ('--tensor=2', '--dtype=bfloat16', '--model=samples=16')
  done = launch('--tasks=md_choice', *flags, f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert '|md_choice|' in done.stdout
  stored = json.loads(out.read_text())['config']['maskdiff']
  assert json.loads(done.stdout.splitlines()[-1])['maskdiff'] == stored
  assert stored['estimator']['samples'] == 16
  assert stored['dtype'] == 'bfloat16'
  program = ('-c', WITHOUT_OTHER_TASKS)
  unknown = launch('--tasks=no_such_task', program=program)
  assert unknown.returncode == 2
  assert 'no_such_task' in unknown.stderr.splitlines()[-1]


@pytest.mark.slow
def test_script_refuses_a_setting_that_is_a_flag(workdir, tasks):
  done = forked.run(
    [
      *('-c', WITHOUT_OTHER_TASKS, 'launch/harness.py'),
      *(f'--workdir={workdir}', f'--include_path={tasks}'),
      *('--tasks=md_choice', '--model=tensor=2'),
    ],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )
  assert done.returncode == 2
  assert 'use the flag --tensor' in done.stderr.splitlines()[-1]
