"""Parameters of tests that are slow."""

import functools

import pytest

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
