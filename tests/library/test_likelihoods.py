"""Likelihoods: those of launch/evaluate.py, golden values, errors."""

import math

import every_mask
import golden_models
import jax
import numpy as np
import pytest

import maskdiff
from maskdiff.evals import scored
from maskdiff.likelihood import bounds, estimators, queries

PAIRS = [('def read( ', 'self):'), ('return', ' alpha'), ('', 'x = 1')]
PROMPTS, ANSWERS = zip(*PAIRS, strict=True)
FEW = dict(samples=16, strata=4)


def arrays(field):
  """Returns the golden arrays of model_a under a name, such as mc0."""
  with np.load(golden_models.GOLDEN / 'likelihood.npz') as file:
    prefix = f'model_a.{field}.'
    return {k.removeprefix(prefix): file[k] for k in file if prefix in k}


# As launch/evaluate.py


def by_script(model, score, task='bound', suffix=''):
  """Returns lines and totals by the functions that launch/evaluate.py calls.

  Args:
    model: Model.
    score: function of network, LikelihoodConfig, answers and seeds.
    task: key of scored.TASKS.
    suffix: text after every answer.
  """
  lines = [
    scored.Line('', {'prompt': p, 'answer': a, 'suffix': suffix})
    for p, a in PAIRS
  ]
  c = queries.likelihood_config(model.config, 0.0, 4096)
  with jax.set_mesh(model.mesh):
    return scored.TASKS[task](
      lines,
      model.tokenizer,
      c.context,
      lambda *rows: score(model.network, c, *rows),
    )


def assert_same(estimate, lines):
  stderr = [None if np.isnan(s) else s for s in estimate.stderr]
  assert [-x for x in estimate.log_likelihood] == [row['nats'] for row in lines]
  assert stderr == [row['stderr_nats'] for row in lines]


@pytest.mark.parametrize('form', estimators.FORMS)
def test_bounds_equal_those_of_the_script(run, form):
  e = estimators.Estimator(form, **FEW)
  seeds = lambda numbers: [7 + i for i in numbers]
  lines, _ = by_script(
    run,
    lambda network, c, rows, numbers: bounds.bound(
      network, c, rows, e, seeds(numbers)
    ),
  )
  found = maskdiff.log_likelihood(
    run, PROMPTS, ANSWERS, form=form, seed=7, **FEW
  )
  assert_same(found, lines)


def test_exact_forms_equal_those_of_the_script(run, causal):
  left_to_right = lambda network, c, rows, _: bounds.left_to_right(
    network, c, rows
  )
  for model in (run, causal):
    lines, _ = by_script(model, left_to_right)
    found = maskdiff.log_likelihood(
      model, PROMPTS, ANSWERS, form='left_to_right'
    )
    assert_same(found, lines)
  assert_same(maskdiff.log_likelihood(causal, PROMPTS, ANSWERS), lines)


def test_multi_sample_bounds_equal_those_of_the_script(run):
  lines, _ = by_script(
    run,
    lambda network, c, rows, seeds: bounds.multi_sample(
      network, c, rows, 3, seeds
    ),
    suffix=' y',
  )
  found = maskdiff.log_likelihood(
    run,
    PROMPTS,
    ANSWERS,
    suffixes=[' y'] * 3,
    form='multi_sample',
    orders=3,
  )
  assert_same(found, lines)
  both = maskdiff.log_likelihood(
    run, PROMPTS, ANSWERS, suffixes=[' y'] * 3, form='two_sided', orders=3
  )
  assert_same(both.lower, lines)
  width = both.upper.log_likelihood - both.lower.log_likelihood
  assert (width > -1e-6).all() and width.max() > 0.1


def test_token_lists_equal_texts(run):
  encode = run.tokenizer.encode
  texts = [['return', ' alpha']] * 2
  (prompts, answers) = zip(*texts, strict=True)
  by_text = maskdiff.log_likelihood(run, prompts, answers, seed=[3, 3], **FEW)
  by_ids = maskdiff.log_likelihood(
    run,
    [encode(p) for p in prompts],
    [np.array(encode(a)) for a in answers],
    seed=[3, 4],
    **FEW,
  )
  one, two = by_text.log_likelihood
  assert one == two  # the same masks
  assert by_ids.log_likelihood[0] == one


def test_greedy_answers_match(run):
  lines, _ = by_script(run, bounds.greedy_matches, task='greedy')
  found = maskdiff.greedy_matches(run, PROMPTS, ANSWERS)
  assert found.tolist() == [row['match'] for row in lines]
  greedy = maskdiff.sample(run, ['def read('], gen_length=3, steps=3)[0]['ids']
  rows = [run.tokenizer.encode('def read(')] * 2
  found = maskdiff.greedy_matches(run, rows, [greedy, [*greedy[:-1], 9]])
  assert found.tolist() == [True, False]


# Golden values and given masks


def test_golden_log_likelihoods_for_given_masks(golden):
  of = arrays('mc0')
  size = of['perms'].shape[-1]
  counts = [
    every_mask.reference_counts(int(k), size, int(of['batch_size']))
    for k in of['k']
  ]
  masks = of['perms'].reshape(-1, size) < np.concatenate(counts)[:, None]
  value, stderr = maskdiff.log_likelihood(
    golden, [of['prompt']], [of['answer']], masks=[masks]
  )
  np.testing.assert_allclose(value, [of['log_likelihood']], atol=2e-4)
  again = maskdiff.log_likelihood(
    golden, [of['prompt']], [of['answer']], masks=masks[None], seed=9
  )
  assert (again.log_likelihood, again.stderr) == (value, stderr)


def test_golden_bound_by_the_enumeration_of_masks(golden):
  """The standard error is that of the mean of the weighted queries."""
  of = arrays('enum0')
  size = len(of['answer'])
  masks = every_mask.subsets(size)
  counts = masks.sum(axis=1)
  weights = np.array(
    [len(masks) / l / math.comb(size, l) if l else 0 for l in counts]
  )
  value, stderr = maskdiff.log_likelihood(
    golden, [of['prompt']], [of['answer']], masks=[masks], weights=[weights]
  )
  np.testing.assert_allclose(value, [of['elbo']], atol=2e-4)
  terms = weights * of['token_logp'].sum(axis=1)
  expected = terms.std(ddof=1) / len(terms) ** 0.5
  np.testing.assert_allclose(stderr, [expected], rtol=1e-4)
  one = maskdiff.log_likelihood(
    golden, [of['prompt']], [of['answer']], masks=[masks[-1:]]
  )
  assert np.isnan(one.stderr)
  recorded = of['token_logp'][-1].sum()
  np.testing.assert_allclose(one.log_likelihood, [recorded], atol=2e-4)


def test_golden_chain_rule_and_greedy_check(golden):
  of = arrays('chain0')
  value, stderr = maskdiff.log_likelihood(
    golden,
    [of['prefix']],
    [of['target']],
    form='left_to_right',
    guidance=float(of['cfg_scale']),
  )
  np.testing.assert_allclose(value, [-of['nll']], atol=2e-4)
  assert stderr == [0]
  of = arrays('greedy0')
  found = maskdiff.greedy_matches(
    golden,
    [of['prefix']] * 3,
    list(of['target']),
    guidance=float(of['cfg_scale']),
  )
  assert found.tolist() == of['result'].tolist()


def test_other_seeds_and_masks_compile_nothing(run):
  def call(seed, mask):
    maskdiff.log_likelihood(run, PROMPTS, ANSWERS, seed=seed, **FEW)
    maskdiff.log_likelihood(run, [[9 + seed]], [[10, 11]], masks=[[mask]])

  call(0, [True, True])
  size = queries._log_probs._cache_size()
  call(5, [False, True])
  assert queries._log_probs._cache_size() == size


# Errors


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'answers': ['a', 'b']}, '1 prompts, 2 answers: give lists of one length'),
    ({'suffixes': []}, 'suffixes is empty'),
    ({'answers': ['']}, 'row 0 has no answer'),
    ({'answers': [[4096]]}, 'answer: token id 4096 is outside'),
    ({'answers': [[4]]}, 'is the mask token, id 4'),
    ({'answers': [[9] * 40]}, 'have 41 tokens together'),
    ({'answers': 'a'}, "answers='a': give a list"),
    ({'form': 'cuont'}, "form='cuont': choose one of .*did you mean 'count'"),
    ({'samples': 10}, 'samples=10 must be a positive multiple of 16'),
    ({'samples': 0}, 'samples=0 must be an integer of at least 1'),
    ({'form': 'multi_sample', 'orders': 1.5}, 'orders=1.5 must be an integer'),
    ({'seed': [1, 2]}, 'give an integer, or a list of 1'),
    ({'seed': [[1], [2, 3]]}, 'give an integer, or a list of 1'),
    ({'seed': np.zeros((9, 99), int)}, 'give an integer, or a list of 1'),
    ({'seed': jax.random.key(0)}, 'give an integer, or a list of 1'),
    ({'samples': 1 << 30}, 'GiB of memory.*lower samples'),
    ({'form': 'two_sided', 'orders': 1 << 30}, 'GiB.*lower orders'),
    ({'guidance': np.ones(2)}, 'guidance=.*must be float'),
    ({'guidance': math.nan}, 'guidance=nan: must be finite'),
    ({'guidance': '1'}, "guidance='1': must be float, not str"),
    ({'guidance': 1e6}, 'guidance=1000000.0: must be at most 1000'),
    ({'tokens_per_call': 0}, 'tokens_per_call=0 must be an integer'),
    ({'weights': [[1.0]]}, 'weights: are for given masks'),
    ({'masks': 5}, 'masks has 0 elements'),
    ({'masks': []}, 'masks has 0 elements for 1 rows'),
    (
      {'masks': [[[True, True]]]},
      r'masks\[0\] is bool of shape \[1, 2\]: give',
    ),
    ({'masks': [[[True], [True, True]]]}, r'masks\[0\]: give .*\[2, 1\]'),
    ({'masks': [True]}, r'masks\[0\] is bool of shape \[\]'),
    (
      {'masks': [[[True]]], 'weights': [[math.nan]]},
      r'weights\[0\] has values that are not finite',
    ),
    ({'masks': [[[1]]]}, r'masks\[0\] is int64'),
    ({'masks': [np.zeros((0, 1), bool)]}, r'masks\[0\] is empty'),
    (
      {'masks': [[[True]]], 'weights': [[1, 2]]},
      r'weights\[0\] is int64 of sh',
    ),
  ],
)
def test_bad_arguments_are_one_line(run, arguments, message):
  arguments = {'answers': [[10]], **arguments}
  with pytest.raises(maskdiff.UserError, match=message) as error:
    maskdiff.log_likelihood(run, [[9]], **arguments)
  assert '\n' not in str(error.value)


def test_masks_are_refused_by_an_autoregressive_model(causal):
  with pytest.raises(maskdiff.UserError, match='without masks; leave them out'):
    maskdiff.log_likelihood(causal, [[9]], [[10]], masks=[[[True]]])
  with pytest.raises(maskdiff.UserError, match='decodes in one order only'):
    maskdiff.log_likelihood(causal, [[9]], [[10]], form='multi_sample')
