"""Opens the devices and the optimizer of a run."""

import dataclasses
from collections.abc import Callable

import jax
import optax

from maskdiff import config as config_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.model import transformer
from maskdiff.model.trainable import trainable
from maskdiff.model.transformer import TransformerConfig
from maskdiff.monitoring.ledger import Ledger
from maskdiff.training import resume, train_state
from maskdiff.training.optimizer import OptimizerConfig, make_optimizer
from maskdiff.training.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class RunSetup:
  """Objects of the loop that a stage uses; constant during a run.

  Attributes:
    model: TransformerConfig of the parameters.
    mesh: device mesh.
    optimizer: optax.GradientTransformation.
    shardings: TrainState of shardings.
    ledger: Ledger. `with ledger.span('rollout')` counts the time inside.
    between: function without arguments that `Stage.next_batch` and
      `Stage.evaluate` call between parts of long work, equally often in every
      process. It raises an exception if the run has received SIGTERM.
  """

  model: TransformerConfig
  mesh: jax.sharding.Mesh
  optimizer: optax.GradientTransformation
  shardings: TrainState
  ledger: Ledger
  between: Callable


def open_setup(config, ledger, between):
  """Opens the devices of a config; returns a RunSetup.

  All processes must call this function.

  Args:
    config: ConfigDict that `config.validate` has accepted.
    ledger: Ledger of the run.
    between: see RunSetup.

  Raises:
    UserError: the mesh does not fit the config, or the processes have different
      configs or code.
  """
  resume.agree_on_config(config)
  mesh = mesh_lib.make_mesh(**config.mesh)
  config_lib.validate_mesh(config, mesh.shape)
  return setup_on(config, mesh, ledger, between)


def setup_on(config, mesh, ledger=None, between=lambda: None):
  """Returns the RunSetup of a config on a mesh, such as one of a topology.

  Args:
    config: ConfigDict that `config.validate_mesh` has accepted.
    mesh: device mesh.
    ledger: see RunSetup; a plan has none.
    between: see RunSetup.
  """
  model = transformer.from_config(config)
  optimizer = make_optimizer(
    OptimizerConfig(**config.optimizer),
    config.train.steps,
    trainable(model, transformer.axes(model)),
  )
  return RunSetup(
    model=model,
    mesh=mesh,
    optimizer=optimizer,
    shardings=train_state.shardings(
      model, optimizer, mesh, config.train.ema_decay > 0
    ),
    ledger=ledger,
    between=between,
  )
