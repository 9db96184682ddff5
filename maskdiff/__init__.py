"""maskdiff: masked diffusion language models in JAX.

Nothing is imported here, so that a process that only reads tokens does not
pay for JAX. WORKSPACE.md is the map; start at `train.run`.
"""
