"""Two small untrained models, and a few public examples for them."""

from __future__ import annotations

import pytest
import torch

from fedinfer_flower.language.model import LanguageModel
from fedinfer_flower.refine.examples import FuserExample
from fedinfer_flower.simulation.facts.families import FAMILIES, build
from fedinfer_flower.simulation.facts.fuser_data import fuser_examples
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import FactWorld


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world() -> FactWorld:
    return FactWorld()


@pytest.fixture(scope="session")
def models(world: FactWorld) -> list[LanguageModel]:
    """One model of each family, with random weights."""
    prompts = FactPrompts(world.words)
    return [LanguageModel(*build(family, world), prompts=prompts) for family in FAMILIES]


@pytest.fixture(scope="session")
def examples(world: FactWorld) -> list[FuserExample]:
    """Some of every task, from model 1 to model 0."""
    every = fuser_examples(world, sharer=1, receiver=0, documents=30)
    return [e for task in ("doc1", "doc3", "fact", "own", "nobody") for e in _some(every, task)]


def _some(every: list[FuserExample], task: str) -> list[FuserExample]:
    return [e for e in every if e.task == task][:10]
