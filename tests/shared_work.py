"""Evaluates and samples with a model, in one process or in several.

python tests/shared_work.py WORKDIR LINES OUT

in each of several processes prints results as JSON. `results` computes those of
one process.
"""

import contextlib
import io
import json
import os
import pathlib
import runpy
import sys
from types import SimpleNamespace

import jax
from absl import flags

from maskdiff.distributed import runtime, shares
from maskdiff.errors import UserError
from maskdiff.evals import answered
from maskdiff.interop import load
from maskdiff.likelihood import bounds, queries
from maskdiff.likelihood.estimators import Estimator
from maskdiff.sampling import serve_shares
from maskdiff.sampling.serve import RowRequest
from maskdiff.sampling.settings import sampler_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXTS = ['def read(', 'x = ', 'for i in range', 'return', '# a']
# Functions of a share of the work, and the argument with the share.
SHARED = (
  (queries, '_evaluate', 4),
  (bounds, '_any_order_matches', 3),
  (serve_shares, 'serve', 2),
)


@contextlib.contextmanager
def counted():
  """Yields a dict: the number of items that each function of SHARED is given.

  The items are those of the last call.
  """
  counts = {}
  with contextlib.ExitStack() as stack:
    for module, name, position in SHARED:
      real = getattr(module, name)

      def count(*args, real=real, name=name, position=position):
        counts[name] = len(args[position])
        return real(*args)

      setattr(module, name, count)
      stack.callback(setattr, module, name, real)
    yield counts


def library(model):
  """Returns likelihoods, answers and lengths by the library."""
  encoded = [model.tokenizer.encode(text) for text in TEXTS]
  c = queries.likelihood_config(model.config, 0.0, tokens_per_call=4096)
  answers = bounds.lay_out([[7]] * len(TEXTS), encoded)
  estimator = Estimator(samples=8, strata=4)
  with jax.set_mesh(model.mesh):
    arguments = model.network, c, answers
    bound = bounds.bound(*arguments, estimator, range(len(TEXTS)))
    greedy = bounds.greedy_matches(*arguments)
  c, settings = sampler_config(model.config)
  requests = [
    RowRequest(
      i,
      [*ids, *[None] * 4],
      seed=i,
      settings=settings._replace(temperature=1.0, gen_length=4, steps=4),
    )
    for i, ids in enumerate(encoded)
  ]
  sampled = answered.complete(model, c, requests, batch=2)
  values = {'gen_length': 16}
  _, lengths = answered.with_lengths(model, c, values, encoded, batch=2)
  return {
    'log_likelihoods': [bound.log_likelihood.tolist(), bound.stderr.tolist()],
    'greedy': greedy.tolist(),
    'answers': list(sampled),
    'lengths': list(map(list, lengths)),
  }


def harness(workdir):
  """Returns log-likelihoods for lm-eval; None if it is not installed."""
  try:
    from maskdiff.evals import harness
  except UserError:
    return None
  model = harness.MaskDiff(workdir, samples=8, strata=4, check_greedy=False)
  requests = [SimpleNamespace(args=(text, ' y = 1')) for text in TEXTS]
  return [x for x, _ in model.loglikelihood(requests, disable_tqdm=True)]


def script(name, *arguments):
  """Returns the output of a launch script without its start."""
  modules = flags.FLAGS.flags_by_module_dict().items()
  absl = {f.name for m, fs in modules if m.startswith('absl') for f in fs}
  # Those of scripts that other tests of this process have run.
  others = {x: flags.FLAGS[x] for x in set(flags.FLAGS) - absl}
  for other in others:
    delattr(flags.FLAGS, other)
  before = set(flags.FLAGS)
  module = runpy.run_path(str(ROOT / 'launch' / f'{name}.py'), run_name=name)
  flags.FLAGS([name, *map(str, arguments)])
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    module[name](flags.FLAGS)
  for added in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, added)
  for other, flag in others.items():
    flags.FLAGS[other] = flag
  return printed.getvalue()


def results(workdir, lines, out):
  """Returns results of the library, of lm-eval and of scripts.

  Args:
    workdir: work directory of a run.
    lines: file of JSON lines with `prompt` and `answer`.
    out: file that launch/sample.py writes.
  """
  model = load.Model(*load.load(workdir))
  found = {'library': library(model), 'harness': harness(workdir)}
  sampling = f'--prompts={lines}.txt', f'--out={out}', '--trajectory'
  sampling += '--gen_length=4', '--steps=4', '--batch=2'
  script('sample', f'--workdir={workdir}', *sampling)
  scoring = f'--data={lines}', '--task=bound', '--samples=8', '--strata=4'
  found['evaluate'] = script('evaluate', f'--workdir={workdir}', *scoring)
  return found


def fail():
  if jax.process_index():
    raise UserError('the text of process 1 is too long')
  return 1


def main(workdir, lines, out):
  with counted() as counts:
    found = results(workdir, lines, out)
    found['counts'] = dict(counts)
    # Two devices along `tensor` are those of two processes.
    model = load.Model(*load.load(workdir, tensor=2))
    found['spread'] = library(model)
    found['counts of spread'] = dict(counts)
  try:
    shares.exchange(fail)
  except UserError as error:
    found['error'] = str(error)
  print(json.dumps(found), flush=True)
  items = [shares.Item(os.environ['JAX_PROCESS_ID'].encode(), 1)]
  shares.computed({}, items, None)  # no parameters: a copy in each process


if __name__ == '__main__':
  with runtime.started(heartbeat_s=5):
    main(*sys.argv[1:])
