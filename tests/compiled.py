"""Records what JAX compiles, for tests that count compilations."""

import jax

# Names of the compiled functions, in order.
compilations = []
jax.monitoring.register_event_duration_secs_listener(
  lambda event, seconds, **kwargs: (
    compilations.append(kwargs.get('fun_name'))
    if event == '/jax/core/compile/backend_compile_duration'
    else None
  )
)
