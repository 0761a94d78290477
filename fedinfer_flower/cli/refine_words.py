"""What the refinement report says in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["DEFAULT_CODEC", "MEASURED", "TITLE", "WHO_LEARNS", "title_of"]

TITLE: Final = "Three language models answer together"
DEFAULT_CODEC: Final = "static4"

_TITLES: Final = {
    "alone": "each receiver alone",
    "text-both": "text from both others",
    "cache-both": "cache from both others",
    "cache-gated": "cache from both others, gated",
    "cache-verbatim": "cache from both others, questions not rephrased",
    "control": "control: caches that belong to other questions",
    "control-gated": "control: caches that belong to other questions, gated",
    "auto": "medium chosen by the planner, gated",
}

MEASURED: Final = (
    "Every accuracy is of answers that travelled through the federation: the querier, a process"
    " of its own, sealed the questions to the receivers, opened what came back, and compared it"
    " with the right answers. Nothing is computed beside it.",
    "Each institution is there several times: as it is, with a gate, with another encoding, and"
    " as a control that takes every question for another one. The copies share model, documents"
    " and fusers.",
    "Fusers and gates were trained beforehand in one process on public facts; people, values and"
    " documents of the test questions were in no training.",
    "Intervals are Wilson's, at 95 %. Where receivers are counted together, each question counts"
    " once a receiver, and the interval takes these for independent.",
    "A document at a receiver itself is in no figure: receivers answer from their model and from"
    " what sharers send.",
    "Seconds are of whole exchanges, divided by questions and receivers: two workers of Flower's"
    " engine share the cores, models are small, and messages cost as much as the models do. They"
    " compare media in this run and say nothing of large models or slow links.",
    "Bytes are of the bodies that sharers send, sealed, with signatures and evidence.",
    "The models have about half a million parameters and answer in one word. Direction, not"
    " size, is what carries over to large models.",
)

WHO_LEARNS: Final[tuple[Mapping[str, str], ...]] = (
    {
        "party": "coordinator",
        "learns": "who asks whom, in which medium, how many questions, sizes and times. No"
        " question, rephrased question, note, cache or answer: all are sealed to others",
    },
    {"party": "receiver", "learns": "the questions, and what sharers send for them"},
    {
        "party": "receiver that looks closer",
        "learns": "from a cache of the last tokens more than the answer: what was asked, and"
        " often values of the sharer's document that nobody asked for. Small encodings do not"
        " prevent it",
    },
    {
        "party": "sharer",
        "learns": "the rephrased questions: other words, the same names and relations",
    },
    {
        "party": "querier",
        "learns": "the answers, and for each question the sites whose help it rests on",
    },
    {
        "party": "receiver and coordinator together",
        "learns": "the questions with all that was sent for them",
    },
)


def title_of(label: str) -> str:
    """Return the name of a step for people.

    Examples
    --------
    >>> title_of("cache-llama"), title_of("codec-int8")
    ('cache from llama only', 'cache from both others, gated, int8')
    """
    if label in _TITLES:
        return _TITLES[label]
    kind, _, name = label.partition("-")
    if kind == "codec":
        return f"cache from both others, gated, {name}"
    return f"{kind} from {name} only"
