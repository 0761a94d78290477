"""Every example in the package's ensemble modules runs."""

import doctest
import importlib
import pkgutil

import pytest

from fedinfer_flower import ensemble

MODULES = sorted(module.name for module in pkgutil.iter_modules(ensemble.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_module_examples_run(name):
    module = importlib.import_module(f"fedinfer_flower.ensemble.{name}")

    assert doctest.testmod(module).failed == 0
