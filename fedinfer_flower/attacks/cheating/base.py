"""What a cheat is: what a site answers that would be paid for what it has not got.

Axes: K honest sites, A attackers, N rows, C classes.

A cheat sees the honest answers to all rows, labels and a source of chance, and makes the
attackers' answers. It never learns which rows are audits. What it does look at, of all that
it is given, it declares as `Knowledge`: an attacker in a federation has to come by that.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.options import Scalar, checked_options, require_known_options
from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.registry import Registry

__all__ = ["CHEATS", "Cheat", "Cheated", "Knowledge", "make_cheat", "one_hot"]

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class Knowledge(StrEnum):
    """What an attacker must come by before it answers."""

    NOTHING = "nothing"
    OWN_ANSWER = "its own honest answer"
    CLASS_FREQUENCIES = "how often each class is right"
    PAST_ANSWERS = "joint answers to past queries"
    ACCOMPLICE = "another attacker's answer to this query"
    JOINT_ANSWER = "the honest sites' joint answer to this query"
    ONE_SITES_ANSWER = "another honest site's own answer to this query"

    @property
    def within_round(self) -> bool:
        """Whether honest sites' answers to the very query are needed.

        Nobody but whoever combines has them before the round is over, and under `secagg` and
        `he` nobody ever has a single site's.
        """
        return self in (Knowledge.JOINT_ANSWER, Knowledge.ONE_SITES_ANSWER)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cheated:
    """Attackers' answers, and how they join the honest sites.

    Parameters
    ----------
    answers_anc : float array of shape (n_attackers, n_rows, n_classes)
    replaces : tuple of int
        Honest sites whose answers the first attackers' take the place of; further attackers
        join as new sites.
    keeps : tuple of int
        Honest sites that are of the attackers' party and go on answering honestly.
    copies : tuple of int
        Honest sites whose answers are copied.
    """

    answers_anc: Array = field(repr=False)
    replaces: tuple[int, ...] = ()
    keeps: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()

    @property
    def party(self) -> tuple[int, ...]:
        """Honest sites that the attackers would be if they did not cheat."""
        return self.replaces + self.keeps

    def join(self, answers_knc: Array) -> tuple[Array, tuple[int, ...]]:
        """Return everybody's answers, and the places of all of the attackers' party.

        Returns
        -------
        answers_knc : float array of shape (n_sites, n_rows, n_classes)
            Honest sites keep their places; new sites come last.
        party : tuple of int
        """
        n_replaced = len(self.replaces)
        answers = answers_knc.copy()
        answers[list(self.replaces)] = self.answers_anc[:n_replaced]
        joined = np.concatenate([answers, self.answers_anc[n_replaced:]])
        return joined, self.party + tuple(range(len(answers_knc), len(joined)))


@dataclass(frozen=True, kw_only=True)
class Cheat(ABC):
    """Base of all cheats: a frozen dataclass whose fields are its options.

    Attributes
    ----------
    name : str
        Registered name.
    knows : frozenset of Knowledge
        What the attackers must come by.
    pays_because : str
        Why it pays where it pays.
    stopped_by : str
        What makes it impossible, or not worth while.
    has_model : bool
        Whether attackers are honest sites that cheat; else they join with no model.
    """

    name: ClassVar[str] = ""
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.NOTHING})
    pays_because: ClassVar[str] = ""
    stopped_by: ClassVar[str] = ""
    has_model: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in checked_options(f"cheat {self.name!r}", self).items():
            object.__setattr__(self, name, value)

    def options(self) -> dict[str, Scalar]:
        """Return the options that make the same cheat elsewhere; see `make_cheat`."""
        return dataclasses.asdict(self)

    @property
    def party_size(self) -> int:
        """Honest sites that it takes."""
        return int(self.has_model)

    @property
    def within_round(self) -> bool:
        """Whether it needs honest sites' answers to the very query; see `Knowledge`."""
        return any(known.within_round for known in self.knows)

    def __call__(
        self,
        answers_knc: Array,
        labels_n: IntArray,
        rng: np.random.Generator,
        *,
        sites: tuple[int, ...] | None = None,
    ) -> Cheated:
        """Return what the attackers answer.

        Parameters
        ----------
        answers_knc : float array of shape (n_sites, n_rows, n_classes)
            Honest answers; rows sum to 1.
        labels_n : int array of shape (n_rows,)
        rng : numpy.random.Generator
        sites : tuple of int, optional
            Honest sites that cheat, `party_size` of them; default the most accurate.

        Raises
        ------
        ShapeError
            If the arrays do not belong together.
        InvalidValueError
            If `sites` does not fit the cheat, or there are too few sites for it.
        """
        answers = np.asarray(answers_knc, dtype=float)
        if answers.ndim != 3 or 0 in answers.shape or labels_n.shape != answers.shape[1:2]:
            raise ShapeError("a cheat needs answers (n_sites, n_rows, n_classes), a label a row")
        if len(answers) < self.party_size:
            raise InvalidValueError(
                f"cheat {self.name!r} takes {self.party_size} sites, there are {len(answers)}"
            )
        if sites is None:
            sites = by_accuracy(answers, labels_n)[: self.party_size]
        places = set(sites)
        if len(sites) != self.party_size or len(places) != len(sites):
            raise InvalidValueError(f"cheat {self.name!r} takes {self.party_size} different sites")
        if not places <= set(range(len(answers))):
            raise InvalidValueError(f"sites lie in [0, {len(answers)})")
        return self.forge(answers, labels_n, rng, sites)

    @abstractmethod
    def forge(
        self, answers: Array, labels: IntArray, rng: np.random.Generator, sites: tuple[int, ...]
    ) -> Cheated:
        """Return what the attackers answer; arguments are as checked by the call."""


def by_accuracy(answers_knc: Array, labels_n: IntArray) -> tuple[int, ...]:
    """Return sites from the most to the least accurate."""
    accuracy = (answers_knc.argmax(axis=-1) == labels_n).mean(axis=1)
    return tuple(int(k) for k in np.argsort(-accuracy, kind="stable"))


def one_hot(classes: IntArray, n_classes: int) -> Array:
    """Return answers that are sure of these classes, shape (n_rows, n_classes)."""
    return np.asarray(np.eye(n_classes)[classes])


CHEATS: Registry[Cheat] = Registry(
    kind="cheat", package="fedinfer_flower.attacks.cheating", group="fedinfer_flower.cheats"
)
"""All cheats by name."""


def make_cheat(name: str, options: Mapping[str, object] | None = None) -> Cheat:
    """Build a cheat from its registered name and its options.

    Raises
    ------
    UnknownNameError
        If no cheat has that name.
    InvalidValueError
        If an option does not exist, has the wrong type or lies outside its range.

    Examples
    --------
    >>> make_cheat("copycat").within_round
    True
    """
    cls = CHEATS.get(name)
    given: dict[str, Any] = dict(options or {})
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    require_known_options(f"cheat {name!r}", given, known)
    return cls(**given)
