"""Examples in the docstrings of the refinement's server side."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = [
    "fedinfer_flower.querier.language_querier",
    "fedinfer_flower.strategies.fed_refine",
    "fedinfer_flower.strategies.refine_options",
    "fedinfer_flower.strategies.refine_parts",
    "fedinfer_flower.strategies.refine_result",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)

    assert found.attempted > 0
    assert found.failed == 0
