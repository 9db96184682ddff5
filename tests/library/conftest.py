"""Models of the tests of the library."""

import golden_models
import published_folders
import pytest
import untrained_run

import maskdiff


@pytest.fixture(scope='session')
def golden():
  """Returns a published folder without a tokenizer: LLaDA's model_a."""
  return maskdiff.load(golden_models.GOLDEN / 'model_a')


@pytest.fixture(scope='session')
def run(tokenizer, tmp_path_factory):
  """Returns the model of a run of masked diffusion, before its first step."""
  path = tmp_path_factory.mktemp('run')
  untrained_run.save(path, tokenizer)
  return maskdiff.load(path)


@pytest.fixture(scope='session')
def causal(tokenizer, tmp_path_factory):
  """Returns the model of an autoregressive run, before its first step."""
  path = tmp_path_factory.mktemp('causal')
  untrained_run.save(path, tokenizer, objective_name='autoregressive')
  return maskdiff.load(path)


@pytest.fixture(scope='session')
def of_blocks(tokenizer, tmp_path_factory):
  """Returns the model of a run of block diffusion, before its first step."""
  path = tmp_path_factory.mktemp('of_blocks')
  untrained_run.save(
    path,
    tokenizer,
    objective_name='block_diffusion',
    objective_block_length=4,
  )
  return maskdiff.load(path)


@pytest.fixture(scope='session')
def dream(tmp_path_factory):
  """Returns a model whose output at a position predicts the next token."""
  folder = tmp_path_factory.mktemp('published') / 'dream'
  return maskdiff.load(published_folders.make(folder, 'dream'))
