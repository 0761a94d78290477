"""The three small models that come with the package, and what they know."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedinfer_flower.errors import UnknownNameError
from fedinfer_flower.simulation.facts.families import FAMILIES
from fedinfer_flower.simulation.facts.prompts import FactPrompts
from fedinfer_flower.simulation.facts.world import Fact, FactWorld

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedinfer_flower.language.model import LanguageModel

__all__ = ["CHECKPOINTS", "NAMES", "examine", "load"]

CHECKPOINTS: Final = Path(__file__).parent.parent / "checkpoints"
"""Folders as `save_pretrained` writes them; made by ``scripts/train_fact_models.py``."""

NAMES: Final = tuple(family.name for family in FAMILIES)
"""Institution *i* of the world is ``NAMES[i]``."""


def load(name: str, *, folder: Path = CHECKPOINTS) -> LanguageModel:
    """Load one of the small models.

    Parameters
    ----------
    name : str
        One of `NAMES`.
    folder : path
        Where the model folders are.

    Raises
    ------
    UnknownNameError

    Examples
    --------
    >>> from fedinfer_flower.language.decoding import Decoding
    >>> world, model = FactWorld(), load("qwen3")
    >>> fact = world.facts(world.private[0])[0]
    >>> prompt = model.prompts.ask(fact.question())
    >>> model.generate([prompt], Decoding(max_new_tokens=4, stop=(" .",))) == [fact.value]
    True
    """
    from fedinfer_flower.language.model import LanguageModel

    if name not in NAMES:
        raise UnknownNameError(f"no model {name!r}", hint=f"one of {', '.join(NAMES)}")
    return LanguageModel.from_folder(folder / name, prompts=FactPrompts(FactWorld().words))


def examine(
    model: LanguageModel, facts: Sequence[Fact], documents: Sequence[str] | None = None
) -> float:
    """Return the share of questions that a model answers rightly, alone.

    Parameters
    ----------
    model : LanguageModel
    facts : sequence of Fact
    documents : sequence of str, optional
        One a question, put in front of it.
    """
    from fedinfer_flower.language.decoding import Decoding

    settings = Decoding(max_new_tokens=4, stop=model.prompts.stop)
    given = [[]] * len(facts) if documents is None else [[d] for d in documents]
    prompts = [
        model.prompts.ask(fact.question(), documents=read)
        for fact, read in zip(facts, given, strict=True)
    ]
    right = 0
    for start in range(0, len(prompts), 256):
        texts = model.generate(prompts[start : start + 256], settings)
        answers = [model.prompts.answer_in(text) for text in texts]
        asked = facts[start : start + 256]
        right += sum(a == fact.value for a, fact in zip(answers, asked, strict=True))
    return right / max(1, len(facts))
