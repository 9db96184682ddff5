"""Opens the mesh, tokenizer, data and optimizer of a run."""

import dataclasses

import jax
import optax

from maskdiff import config as config_lib
from maskdiff.data import pipeline
from maskdiff.data.tokenizer import Tokenizer
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.model import transformer
from maskdiff.training import evaluation, inputs, resume, train_state
from maskdiff.training import step as step_lib
from maskdiff.training.optimizer import OptimizerConfig, make_optimizer
from maskdiff.training.step import StepConfig
from maskdiff.training.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class RunSetup:
  """Objects that `open_setup` makes from a config; constant during a run.

  Attributes:
    c: StepConfig.
    mesh: device mesh.
    tokenizer: tokenizer of the training data.
    datasets: list of data.pipeline.Dataset.
    data_identity: fingerprint of the data, a dict; compared on resume.
    optimizer: optax.GradientTransformation.
    shardings: TrainState of shardings.
    heldout: list of evaluation.Heldout.
  """

  c: StepConfig
  mesh: jax.sharding.Mesh
  tokenizer: Tokenizer
  datasets: list
  data_identity: dict
  optimizer: optax.GradientTransformation
  shardings: TrainState
  heldout: list


def open_setup(config):
  """Opens devices, tokenizer and data of a config; returns a RunSetup.

  All processes must call this function.

  Args:
    config: ConfigDict that `config.validate` has accepted.

  Raises:
    UserError: the mesh, the tokenizer or the data do not fit the config, or
      the processes have different configs, code or data.
  """
  c = step_lib.step_config(config)
  mesh = mesh_lib.make_mesh(**config.mesh)
  config_lib.validate_mesh(config, mesh.shape)
  tokenizer = inputs.open_tokenizer(config)
  datasets = inputs.open_data(config, tokenizer)
  data_identity = pipeline.fingerprint(
    datasets, seed=config.seed, length=c.length
  )
  resume.agree(config, data_identity)
  optimizer = make_optimizer(
    OptimizerConfig(**config.optimizer),
    config.train.steps,
    transformer.axes(c.model),
  )
  shardings = train_state.shardings(c.model, optimizer, mesh)
  eval_datasets = datasets
  if config.eval.path:
    eval_datasets = inputs.open_data(config, tokenizer, config.eval.path)
  return RunSetup(
    c=c,
    mesh=mesh,
    tokenizer=tokenizer,
    datasets=datasets,
    data_identity=data_identity,
    optimizer=optimizer,
    shardings=shardings,
    heldout=evaluation.open_heldout(config, eval_datasets, mesh),
  )
