"""Numbers of lengths that programs of the sampler are compiled for.

A program for two lengths compiles faster than one for five, and still chooses a
length for every pass.
"""

import pytest

from maskdiff.sampling import passes

MAX_SHAPES = passes.MAX_SHAPES


@pytest.fixture
def two_lengths(monkeypatch):
  """Compiles passes for at most two lengths."""
  monkeypatch.setattr(passes, 'MAX_SHAPES', 2)


@pytest.fixture
def all_lengths(two_lengths, monkeypatch):
  """Compiles passes for all lengths, in a module that uses `two_lengths`."""
  monkeypatch.setattr(passes, 'MAX_SHAPES', MAX_SHAPES)
