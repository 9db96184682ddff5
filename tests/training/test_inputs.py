"""Datasets of a config: the columns that a stage needs."""

import numpy as np
import pytest
import tiny

from maskdiff.data import row_writer
from maskdiff.data.rows import Rows
from maskdiff.errors import UserError
from maskdiff.training import inputs


@pytest.fixture
def config(tokenizer):
  return tiny.config({'data.tokenizer': str(tokenizer.path)})


@pytest.fixture
def documents(tokenizer, tmp_path):
  """Returns a directory of rows that store only their documents."""
  doc = np.repeat([[0, 0, 1, -1]], 3, axis=0)
  rows = Rows(np.full((3, 4), 20), doc)
  row_writer.write_rows(
    tmp_path / 'rows', {'train': [rows]}, tokenizer, source=''
  )
  return str(tmp_path / 'rows')


def test_missing_columns_are_named(config, tokenizer, corpus, documents):
  opened = lambda path, *columns: inputs.open_data(
    config, tokenizer, path, columns
  )
  (dataset,) = opened(documents, 'doc')
  assert dataset.manifest.columns == {'doc': 'int16'}
  with pytest.raises(UserError) as e:
    opened(documents, 'doc', 'answer')
  assert str(e.value) == (
    f'the rows of {documents} have the columns tokens, doc; this run also '
    'needs answer: prepare conversations with launch/prepare.py --chat, write '
    'the columns with maskdiff.data.row_writer, or set --config.data.path to '
    'data that has them'
  )
  with pytest.raises(UserError, match='columns tokens; .* needs doc, answer:'):
    opened(str(corpus), 'doc', 'answer')


def test_every_dataset_of_a_mixture_needs_the_columns(
  config, tokenizer, corpus, documents
):
  mixture = f'{documents}=1,{corpus}=1'
  assert len(inputs.open_data(config, tokenizer, mixture)) == 2
  with pytest.raises(UserError, match=f'the rows of {corpus} have'):
    inputs.open_data(config, tokenizer, mixture, ('doc',))
