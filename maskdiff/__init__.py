"""maskdiff: masked diffusion language models in JAX.

This module imports nothing, so that processes that only read tokens start
without JAX. WORKSPACE.md describes the rooms; the training loop is
training.loop.run.
"""

__version__ = '0.2.0'
