"""Every example in the ledger's modules runs."""

import doctest
import importlib
import pkgutil

import pytest

from fedinfer_flower.incentives import ledger

MODULES = sorted(module.name for module in pkgutil.iter_modules(ledger.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_module_examples_run(name):
    module = importlib.import_module(f"fedinfer_flower.incentives.ledger.{name}")

    assert doctest.testmod(module).failed == 0
