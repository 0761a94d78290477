"""Every example in the docstrings of settlement runs."""

import doctest
import importlib
from pathlib import Path

import pytest

import fedinfer_flower.settlement as package

NAMES = sorted(path.stem for path in Path(package.__file__).parent.glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name):
    module = importlib.import_module(f"fedinfer_flower.settlement.{name}")
    assert doctest.testmod(module).failed == 0
