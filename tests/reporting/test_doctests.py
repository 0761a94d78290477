"""Examples in docstrings run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["contents", "extra", "formats", "intervals"])
def test_docstring_examples_hold(name):
    module = importlib.import_module(f"fedinfer_flower.reporting.{name}")
    outcome = doctest.testmod(module)
    assert outcome.attempted > 0
    assert outcome.failed == 0
