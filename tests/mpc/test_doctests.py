"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fedinfer_flower.mpc as package

MODULES = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
OTHERS = [
    "fedinfer_flower.clients.mpc_answering",
    "fedinfer_flower.querier.mpc_querier",
    "fedinfer_flower.strategies.fed_mpc",
]


@pytest.mark.parametrize("name", [*MODULES, *OTHERS])
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
