"""Runs a training: the main function of the scripts that train."""

import os

import jax

from maskdiff.distributed import runtime
from maskdiff.distributed.host_memory import keep_freed_memory
from maskdiff.training import loop


def run(args, make_stage, complete=None):
  """Trains a stage with the flags of config.define_training_flags.

  Args:
    args: FLAGS, parsed.
    make_stage: (config, RunSetup) -> Stage.
    complete: (config, dotted keys that flags have set) -> config, of stages
      whose config depends on other files; None for others.

  Raises:
    UserError: see `loop.run` and `complete`.
    Preempted: see `loop.run`.
  """
  config = args.config
  if complete:
    config = complete(config, args['config'].override_values)
  if args.profile:
    # The planner is only for profiles here.
    from maskdiff.planner import profiling

    profiling.without_command_buffers(os.environ)
    make_stage = profiling.profiled(make_stage, args.workdir, args.profile)
  keep_freed_memory(os.environ, jax.config.jax_platforms)
  with runtime.started(heartbeat_s=config.train.heartbeat_s):
    loop.run(config, args.workdir, make_stage)
