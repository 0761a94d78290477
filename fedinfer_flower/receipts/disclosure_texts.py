"""The words for who learns what, mode by mode. Data only: `disclosure` picks and orders them.

Every phrase is about **one site's answer** to a batch unless its key says otherwise. n is the
number of sites in the sum. A phrase never promises more than the code of its mode keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

__all__ = ["ANSWER", "EVERY", "EVIDENCE", "IN_CLEAR", "QUERY", "UNLESS_PINNED", "Party"]


class Party(StrEnum):
    """Who may learn something. Without *active* or *malicious* it follows the protocol."""

    COORDINATOR = "coordinator alone"
    QUERIER = "querier alone"
    POOLED = "coordinator and querier pooling"
    OTHER_SITES = "other sites"
    ACTIVE_COORDINATOR = "active coordinator"
    ACTIVE_POOLED = "active coordinator with the querier"
    MALICIOUS_SITE = "malicious site"


EVERY: Final = "every answer"
_EVERY: Final = EVERY
_POISON: Final = "not the others' answers; can send any answer within its rule's bound"
_UNSEEN_POISON: Final = (
    "not the others' answers; can send any answer, which nobody sees, also beyond its rule's"
    " bound while the sum stays within that of all sites"
)
_OWN_KEY: Final = (
    "if it puts its own key in place of the querier's and the site does not pin the querier"
)
UNLESS_PINNED: Final = ", unless the site pins its queriers"
_MADE_UP: Final = f"also to queries that it makes up{UNLESS_PINNED}"
_BY_SUBTRACTION: Final = "n-1 sites pooling with the querier: the last answer, by subtraction"
_HONEST_SUM: Final = (
    "alone: nothing; pooling with the querier: the sum of the other sites, so n-1 sites learn"
    " the last answer; pooling with the coordinator only: nothing; of more than 51 sites, the 50"
    " that share masks with one, pooling with coordinator and querier: its answer"
)
_SUM: Final = "the sum of the answers; one answer only as the sum determines it"
_SEALED_ANSWERS: Final = "sealed answers, their sizes, who answered and when: no scores"

_LATE: Final = "also the answer of a site whose reply came after it was counted as dropped"

_PLAIN: Final = {
    Party.COORDINATOR: f"{_EVERY}, to float32",
    Party.QUERIER: "the combined answer, and what follows from it",
    Party.POOLED: _EVERY,
    Party.OTHER_SITES: f"alone: nothing; {_BY_SUBTRACTION};"
    " pooling with the coordinator: every answer",
    Party.ACTIVE_COORDINATOR: f"{_EVERY}, {_MADE_UP}",
    Party.ACTIVE_POOLED: _EVERY,
    Party.MALICIOUS_SITE: _POISON,
}

_NOISY_SUM: Final = (
    "the sum with the noise of all sites that answered: (epsilon, delta) a row, while no more"
    " sites than planned tell or leave out their noise"
)

ANSWER: Final[Mapping[str, Mapping[Party, str]]] = {
    "plain": _PLAIN,
    "plain sealed": {
        Party.COORDINATOR: _SEALED_ANSWERS,
        Party.QUERIER: f"{_EVERY}, to float32",
        Party.OTHER_SITES: "alone: nothing; pooling with the querier: every answer; pooling with"
        " the coordinator only: sealed answers",
        Party.ACTIVE_COORDINATOR: f"{_SEALED_ANSWERS}; it can leave answers out; every answer to"
        f" queries that it makes up{UNLESS_PINNED}",
    },
    "dp": {
        Party.COORDINATOR: "each answer with noise: (epsilon, delta) a row",
        Party.QUERIER: "the combination of noisy answers: at most the same (epsilon, delta) a row",
        Party.POOLED: "each answer with noise: (epsilon, delta) a row",
        Party.OTHER_SITES: "alone: nothing; pooling with anyone: at most each answer with noise,"
        " (epsilon, delta) a row",
        Party.ACTIVE_COORDINATOR: f"(epsilon, delta) for each row that is asked, and rows add up;"
        f" {_MADE_UP}",
        Party.ACTIVE_POOLED: "(epsilon, delta) for each row that is asked, and rows add up",
        Party.MALICIOUS_SITE: f"{_POISON}; a site that leaves out its noise harms itself only",
    },
    "dp sealed": {
        Party.COORDINATOR: _SEALED_ANSWERS,
        Party.QUERIER: "each answer with noise: (epsilon, delta) a row",
        Party.OTHER_SITES: "alone: nothing; pooling with the querier: each answer with noise,"
        " (epsilon, delta) a row; pooling with the coordinator only: sealed answers",
        Party.ACTIVE_COORDINATOR: f"{_SEALED_ANSWERS}; it can leave answers out; (epsilon, delta)"
        f" for each row that it makes up{UNLESS_PINNED}, and rows add up",
    },
    "secagg": {
        Party.COORDINATOR: "masked vectors, their sizes, who answered and when: no scores",
        Party.QUERIER: _SUM,
        Party.POOLED: f"{_SUM}; {_LATE}",
        Party.OTHER_SITES: _HONEST_SUM,
        Party.ACTIVE_COORDINATOR: "no scores under the querier's key, but it can give the querier"
        " a sum of fewer sites, with members of its own; one answer"
        f" {_OWN_KEY}",
        Party.ACTIVE_POOLED: "one answer, by a lie about who dropped out",
        Party.MALICIOUS_SITE: _UNSEEN_POISON,
    },
    "secagg self-mask": {
        Party.POOLED: _SUM,
        Party.ACTIVE_POOLED: "the sum of the sites that it names as survivors, while fewer than a"
        " third of the sites are on its side, and of more than 51"
        " sites fewer than 12; else one answer, as with a roster of its own making",
    },
    "secagg coordinator key": {
        Party.OTHER_SITES: "alone: nothing; pooling with the coordinator: the sum of the other"
        " sites, so n-1 sites learn the last answer",
    },
    "secagg+dp": {
        Party.COORDINATOR: "masked vectors, their sizes, who answered and when: no scores",
        Party.QUERIER: _NOISY_SUM,
        Party.POOLED: f"{_NOISY_SUM}; {_LATE}, with its share of the noise only",
        Party.OTHER_SITES: "alone: nothing; k sites pooling with the querier: the sum of the rest,"
        " with the noise of the rest only, so epsilon holds up to the number of colluding sites"
        " that the noise was planned for",
        Party.ACTIVE_COORDINATOR: "no scores under the querier's key, but it can give the querier"
        " a sum with the noise of fewer sites; one answer with that site's share of the noise"
        f" {_OWN_KEY}",
        Party.ACTIVE_POOLED: "one answer with that site's share of the noise only, by a lie about"
        " who dropped out",
        Party.MALICIOUS_SITE: f"{_UNSEEN_POISON}; can leave out its share of the noise, which"
        " weakens epsilon for all",
    },
    "secagg+dp self-mask": {
        Party.POOLED: _NOISY_SUM,
        Party.ACTIVE_POOLED: "the sum of the sites that it names as survivors with their noise,"
        " while fewer than a third of the sites are on its side, and of more than 51"
        " sites fewer than 12; else one answer with that site's"
        " share of the noise, as with a roster of its own making",
    },
    "secagg+dp coordinator key": {
        Party.OTHER_SITES: "alone: nothing; k sites pooling with the coordinator: the sum of the"
        " rest, with the noise of the rest only, so epsilon holds up to the number of colluding"
        " sites that the noise was planned for",
    },
    "he": {
        Party.COORDINATOR: "ciphertexts, their sizes, who answered and when",
        Party.QUERIER: _SUM,
        Party.POOLED: f"{_EVERY}: one key opens everything",
        Party.OTHER_SITES: f"alone: nothing; {_BY_SUBTRACTION};"
        " pooling with the coordinator only: ciphertexts",
        Party.ACTIVE_COORDINATOR: f"{_EVERY} {_OWN_KEY}; under the querier's key ciphertexts, but"
        " it can give the querier a sum of fewer sites, with members of its own",
        Party.ACTIVE_POOLED: _EVERY,
        Party.MALICIOUS_SITE: _UNSEEN_POISON,
    },
    "he coordinator key": {
        Party.OTHER_SITES: f"alone: nothing; {_BY_SUBTRACTION};"
        " pooling with the coordinator: every answer",
    },
    "he+dp": {
        Party.COORDINATOR: "ciphertexts, their sizes, who answered and when",
        Party.QUERIER: _NOISY_SUM,
        Party.POOLED: "each answer with that site's share of the noise only: one key opens"
        " everything",
        Party.OTHER_SITES: "alone: nothing; k sites pooling with the querier: the sum of the rest,"
        " with the noise of the rest only; pooling with the coordinator only: ciphertexts",
        Party.ACTIVE_COORDINATOR: f"each answer with that site's share of the noise {_OWN_KEY};"
        " under the querier's key ciphertexts, but it can give the querier a sum with the noise"
        " of fewer sites",
        Party.ACTIVE_POOLED: "each answer with that site's share of the noise only",
        Party.MALICIOUS_SITE: f"{_UNSEEN_POISON}; can leave out its share of the noise, which"
        " weakens epsilon for all",
    },
    "he+dp coordinator key": {
        Party.OTHER_SITES: "alone: nothing; pooling with the coordinator: each answer with that"
        " site's share of the noise only",
    },
    "encrypted-query": {
        Party.COORDINATOR: "ciphertexts, numbers of rows, features and classes, who answered and"
        " when",
        Party.QUERIER: f"{_SUM}; the error in a decrypted sum can also tell about weights",
        Party.POOLED: f"{_EVERY}: one key opens everything",
        Party.OTHER_SITES: f"alone: nothing; {_BY_SUBTRACTION};"
        " pooling with the coordinator only: ciphertexts",
        Party.ACTIVE_COORDINATOR: "ciphertexts, which it can alter unnoticed; it can give the"
        " querier a sum of fewer sites, with members of its own; every answer to queries of its"
        f" own {_OWN_KEY}",
        Party.ACTIVE_POOLED: _EVERY,
        Party.MALICIOUS_SITE: _UNSEEN_POISON,
    },
    # A model that is cut in two hides no answer by itself. With another protection for the
    # answers, that protection's mode says what is learnt of them.
    "split": _PLAIN,
    "encrypted-query coordinator key": {
        Party.OTHER_SITES: f"alone: nothing; {_BY_SUBTRACTION};"
        " pooling with the coordinator: every answer",
    },
    "mpc": {
        Party.COORDINATOR: "answers, queries and weights: it relays the shares in clear",
        Party.QUERIER: "the joint output, and what follows from it",
        Party.POOLED: "answers, queries and weights: the coordinator relays the shares in clear",
        Party.OTHER_SITES: "one of the three parties alone: nothing; two pooling, or one with the"
        " coordinator: answers, queries and weights",
        Party.ACTIVE_COORDINATOR: "answers, queries and weights",
        Party.ACTIVE_POOLED: "answers, queries and weights",
        Party.MALICIOUS_SITE: "no claim: the protocol assumes that parties follow it; can make the"
        " output wrong, unnoticed",
    },
    "mpc sealed": {
        Party.COORDINATOR: "sealed shares, their sizes and when",
        Party.POOLED: "the joint output, and what follows from it",
        Party.OTHER_SITES: "one of the three parties: nothing, also pooling with the coordinator;"
        " two pooling: answers, queries and weights",
        Party.ACTIVE_COORDINATOR: "no claim: the protocol assumes that parties follow it",
        Party.ACTIVE_POOLED: "no claim: the protocol assumes that parties follow it",
    },
}
"""Mode to party to phrase. ``"mode variant"`` holds only what differs from ``mode``."""

IN_CLEAR: Final = "the query, in clear"
_SEALED: Final = "sealed bytes: their size, who is asked and when"
_SWAP: Final = (
    "the query, if it puts its own key in place of a site's and the querier does not pin the"
    " sites, or pooling with a site that is asked"
)
_NOISY_CUT: Final = "the embedding with noise: (epsilon, delta) a row, and rows add up"
_CUT: Final = "the embedding, from which the query can be rebuilt"

QUERY: Final[Mapping[str, Mapping[str, str]]] = {
    "": {
        Party.COORDINATOR: IN_CLEAR,
        Party.ACTIVE_COORDINATOR: "the query, in clear; can change it, or make one up",
        "sites that are asked": IN_CLEAR,
    },
    "sealed": {
        Party.COORDINATOR: _SEALED,
        Party.ACTIVE_COORDINATOR: _SWAP,
        "sites that are asked": IN_CLEAR,
    },
    "encrypted-query": {
        Party.COORDINATOR: "ciphertexts, their size, who is asked and when",
        Party.ACTIVE_COORDINATOR: "ciphertexts, which it can alter unnoticed",
        "sites that are asked": "ciphertexts: the model runs on them",
    },
    "mpc": {
        Party.COORDINATOR: "the query: it relays the shares in clear",
        Party.ACTIVE_COORDINATOR: "the query, in clear",
        "sites that are asked": "one share each; two of the three pooling: the query",
    },
    "mpc sealed": {
        Party.COORDINATOR: _SEALED,
        Party.ACTIVE_COORDINATOR: "no claim: the protocol assumes that parties follow it",
        "sites that are asked": "one share each; two of the three pooling: the query",
    },
    "split": {
        Party.COORDINATOR: _CUT,
        Party.ACTIVE_COORDINATOR: _CUT,
        "sites that are asked": _CUT,
    },
    "split noise": {
        Party.COORDINATOR: _NOISY_CUT,
        Party.ACTIVE_COORDINATOR: _NOISY_CUT,
        "sites that are asked": _NOISY_CUT,
    },
    "split noise sealed": {
        Party.COORDINATOR: _SEALED,
        Party.ACTIVE_COORDINATOR: _NOISY_CUT,
        "sites that are asked": _NOISY_CUT,
    },
    "split sealed": {
        Party.COORDINATOR: _SEALED,
        Party.ACTIVE_COORDINATOR: "the embedding, as the sites, if it puts its own key in"
        " place of a site's and the querier does not pin the sites, or pooling with a site",
        "sites that are asked": _CUT,
    },
}
"""Variant to party to phrase."""

_ROW_SUM: Final = (
    "once settled, which rows were audits, and one weighted sum over them a site; without noise,"
    " what that lets it solve for where answers are certain"
)
_TOTALS: Final = (
    "the sum of the second copies over all sites, a row; if it audits rows alike many times and is"
    " shown the scores, single answers"
)

EVIDENCE: Final[Mapping[str, Mapping[Party, str]]] = {
    "clear": {},
    "shares": {
        Party.COORDINATOR: _ROW_SUM,
        Party.QUERIER: _TOTALS,
        Party.POOLED: f"{EVERY}, from the second copies",
        Party.ACTIVE_COORDINATOR: _ROW_SUM,
        Party.ACTIVE_POOLED: f"{EVERY}, from the second copies",
    },
    "ckks": {
        Party.COORDINATOR: _ROW_SUM,
        Party.QUERIER: _TOTALS,
        Party.POOLED: f"{EVERY}, from the second copies",
        Party.ACTIVE_COORDINATOR: "once settled, single answers, up to the querier's noise",
        Party.ACTIVE_POOLED: f"{EVERY}, from the second copies",
    },
}
"""Form of evidence for a settlement to party to what that adds."""
