"""maskdiff: masked diffusion language models in JAX.

    model = maskdiff.load('runs/tiny')
    maskdiff.sample(model, ['def read('], gen_length=64)

docs/library.md shows the functions, which are those of maskdiff/library/. They
are imported at their first use, so that processes that only read tokens start
without JAX. WORKSPACE.md describes the rooms; the training loop is
training.loop.run.
"""

__version__ = '0.2.0'
_MODULES = {
  'load': 'library.loading',
  'logits': 'library.forward',
  'loss': 'library.forward',
  'sample': 'library.samples',
  'log_likelihood': 'library.likelihoods',
  'greedy_matches': 'library.likelihoods',
  'to_published': 'library.weights',
  'from_published': 'library.weights',
  'Model': 'interop.load',
  'UserError': 'errors',
}


def __getattr__(name):
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  import importlib

  module = importlib.import_module(f'{__name__}.{_MODULES[name]}')
  globals()[name] = getattr(module, name)
  return globals()[name]


def __dir__():
  return sorted({*globals(), *_MODULES})
