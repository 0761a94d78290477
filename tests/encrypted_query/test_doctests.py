from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fedinfer_flower.encrypted_query as package

pytest.importorskip("tenseal")

MODULES = [f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
OTHERS = [
    "fedinfer_flower.clients.encrypted_answering",
    "fedinfer_flower.querier.encrypted_querier",
    "fedinfer_flower.strategies.encrypted_round",
    "fedinfer_flower.strategies.fed_encrypted_query",
]


@pytest.mark.parametrize("name", MODULES + OTHERS)
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
