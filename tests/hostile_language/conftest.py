"""The federation of `tests/clients/language`, with untrained models, for sites that attack."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent
_PATH = _HERE.parent / "clients" / "language" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("hostile_language_federation", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
_shared = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = _shared
_SPEC.loader.exec_module(_shared)

world = _shared.world
bank = _shared.bank
federation = _shared.federation
questions = _shared.questions
pair = _shared.pair
make_ask = _shared.make_ask
open_policy = _shared.open_policy
make_site_of = _shared.make_site_of
refusal = _shared.refusal


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(world):
    """One model of each family with random weights: nobody here minds what it says."""
    from fedinfer_flower.language.model import LanguageModel
    from fedinfer_flower.simulation.facts.families import FAMILIES, build
    from fedinfer_flower.simulation.facts.prompts import FactPrompts

    prompts = FactPrompts(world.words)
    return {
        family.name: LanguageModel(*build(family, world), prompts=prompts) for family in FAMILIES
    }
