"""Words of a site policy: which verb is which message, and what kind of answer a rule sends.

==============  ============================================================================
kind            what leaves the site
==============  ============================================================================
``votes``       which class is likeliest; shared where several are
``ranks``       the order of the classes
``scores``      numbers for every class: probabilities, logits, what is made of them
``candidates``  log-probabilities of answers that the querier gives
``text``        what a language model writes: answers, notes, rewritten questions
``cache``       KV entries of the last tokens of a prompt
``full-cache``  KV entries of whole prompts, from which the prompts can be read
==============  ============================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fedinfer_flower.ensemble.base import EnsembleRule, ScoreKind
from fedinfer_flower.wire.actions import (
    CALIBRATE,
    CANDIDATES,
    ENCRYPTED,
    GENERATE,
    HELLO,
    INTRODUCE,
    PING,
    PREDICT,
    RECOVER,
    REFINE,
    REPHRASE,
    SHARE_CACHE,
)
from fedinfer_flower.wire.stack_messages import STACK_ACTIONS, TRAIN_ACTION

__all__ = ["ACTION_VERBS", "KINDS", "LANGUAGE_VERBS", "kind_of", "verb_of"]

KINDS: Final = ("votes", "ranks", "scores", "candidates", "text", "cache", "full-cache")

_ACTIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        HELLO: "hello",
        PREDICT: "predict",
        RECOVER: "recover",
        PING: "ping",
        ENCRYPTED: "encrypted",
        CALIBRATE: "calibrate",
        **dict.fromkeys((*STACK_ACTIONS, TRAIN_ACTION), "stack"),
        INTRODUCE: "introduce",
        REPHRASE: "rephrase",
        SHARE_CACHE: "share-cache",
        GENERATE: "generate",
        REFINE: "refine",
        CANDIDATES: "candidates",
        "fi_mpc": "mpc",
    }
)

ACTION_VERBS: Final = tuple(dict.fromkeys(_ACTIONS.values()))
"""What ``[answers] actions`` may list."""

LANGUAGE_VERBS: Final = (
    *("introduce", "rephrase", "share-cache"),
    *("generate", "refine", "candidates"),
)


def verb_of(action: str) -> str:
    """Return the verb of an action of `wire.actions`; empty for one that nobody knows.

    Examples
    --------
    >>> verb_of("fi_share_cache"), verb_of("fi_other")
    ('share-cache', '')
    """
    return _ACTIONS.get(action, "")


def kind_of(rule: EnsembleRule) -> str:
    """Return what kind of answer a rule sends.

    A rule of another package counts as ``"scores"`` unless it says that it sends votes:
    the widest kind that it could be.

    Examples
    --------
    >>> from fedinfer_flower.ensemble.base import make_rule
    >>> [kind_of(make_rule(n)) for n in ("majority-vote", "borda", "competence-vote")]
    ['votes', 'ranks', 'scores']
    """
    if rule.score_kind is ScoreKind.VOTE:
        return "votes"
    # The vote of `competence-vote` comes times the site's confusion matrix: scores.
    return "ranks" if rule.name == "borda" else "scores"
