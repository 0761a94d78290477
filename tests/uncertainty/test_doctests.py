"""Every example in a docstring of these modules runs."""

import doctest
import importlib
import pkgutil

import pytest

import fedinfer_flower.uncertainty as part

NAMES = [
    *(module.name for module in pkgutil.iter_modules(part.__path__, part.__name__ + ".")),
    *("fedinfer_flower.ensemble.skew_check", "fedinfer_flower.ensemble.group_median"),
    *(
        "fedinfer_flower.strategies.fed_calibrate",
        "fedinfer_flower.strategies.fed_group_median",
    ),
]


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
