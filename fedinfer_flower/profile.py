"""What a site says about itself: its profile, and the commitment that binds it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from fedinfer_flower.errors import InvalidValueError

__all__ = ["MAX_CLASSES", "MAX_CLASS_COUNT", "CountsKind", "SiteProfile"]

MAX_CLASSES = 65_536
MAX_CLASS_COUNT = 1e12
"""Bound on a declared class count: a weight that a site declares is committed once, at
onboarding, and bounded; nothing that it says later can raise it."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidValueError(message)


class CountsKind(StrEnum):
    """What a site agrees to say about its classes."""

    COUNTS = "counts"
    PRESENCE = "presence"
    WITHHELD = "withheld"


@dataclass(frozen=True, kw_only=True)
class SiteProfile:
    """What a site says about itself at onboarding. Routing data: the coordinator reads it.

    Parameters
    ----------
    name : str
        The site's own name for itself; not an identity, which is Flower's node id.
    classes : tuple of str
        Names of the classes that the local model knows.
    counts_kind : CountsKind
        Whether `class_counts` are training counts, presence bits, or withheld.
    class_counts : tuple of float, optional
        One per class; None when withheld.
    calibrated : bool
        Whether a temperature was fitted on held-out data.
    temperature : float
        The fitted temperature; 1.0 when not calibrated.
    familiarity : bool
        Whether the site can say how close a query is to its own training data.
    model_card : mapping of str to str
        Free text such as ``{"kind": "random forest"}``.
    price_per_query : float
        What the site asks for one query row; 0.0 if nothing.
    model_digest : str
        Names the model behind the answers; empty if the site does not say.
    record_epsilon, record_delta : float, optional
        Differential privacy of the model's training, for replacing one training record;
        None without. The site's claim.

    Privacy
    -------
    Class counts tell the coordinator how a site's training data is distributed over
    classes. A site that does not consent shares presence bits, or nothing.
    """

    name: str
    classes: tuple[str, ...]
    counts_kind: CountsKind = CountsKind.WITHHELD
    class_counts: tuple[float, ...] | None = None
    calibrated: bool = False
    temperature: float = 1.0
    familiarity: bool = False
    model_card: Mapping[str, str] = field(default_factory=dict)
    price_per_query: float = 0.0
    model_digest: str = ""
    record_epsilon: float | None = None
    record_delta: float | None = None

    def __post_init__(self) -> None:
        # As they are after their journey: 1 and 1.0 are equal, but not in a digest.
        card = {str(key): str(value) for key, value in self.model_card.items()}
        object.__setattr__(self, "model_card", MappingProxyType(card))
        for name in ("temperature", "price_per_query"):
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("record_epsilon", "record_delta"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        if self.class_counts is not None:
            object.__setattr__(self, "class_counts", tuple(float(n) for n in self.class_counts))
        # The name ends in logs and terminals.
        _require(
            0 < len(self.name) <= 128 and self.name.isprintable(),
            "a site's name has 1 to 128 printable characters",
        )
        _require(0 < len(self.classes) <= MAX_CLASSES, f"a site has 1 to {MAX_CLASSES} classes")
        _require(
            all(0 < len(name) <= 256 and name.isprintable() for name in self.classes),
            "class names have 1 to 256 printable characters",
        )
        _require(len(set(self.classes)) == len(self.classes), "a site's class names are distinct")
        _require(
            (self.class_counts is None) == (self.counts_kind is CountsKind.WITHHELD),
            "class_counts are given exactly when counts_kind is not 'withheld'",
        )
        if self.class_counts is not None:
            _require(
                len(self.class_counts) == len(self.classes),
                f"{len(self.classes)} classes but {len(self.class_counts)} class counts",
            )
            limit = 1.0 if self.counts_kind is CountsKind.PRESENCE else MAX_CLASS_COUNT
            _require(
                all(math.isfinite(n) and 0.0 <= n <= limit for n in self.class_counts),
                f"class counts are finite numbers in [0, {limit:g}]",
            )
        _require(
            math.isfinite(self.temperature) and 0.0 < self.temperature < 1e3,
            "temperature is a number in (0, 1000)",
        )
        _require(
            math.isfinite(self.price_per_query) and self.price_per_query >= 0.0,
            "price_per_query is a number that is not negative",
        )
        _require(
            len(self.model_digest) <= 128 and (self.model_digest + "x").isprintable(),
            "a model's digest has at most 128 printable characters",
        )
        _require(
            (self.record_epsilon is None) == (self.record_delta is None),
            "record_epsilon and record_delta come together",
        )
        if self.record_epsilon is not None and self.record_delta is not None:
            _require(
                math.isfinite(self.record_epsilon)
                and self.record_epsilon >= 0.0
                and 0.0 <= self.record_delta < 1.0,
                "record_epsilon is not negative and record_delta is in [0, 1)",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        plain: dict[str, Any] = {n: getattr(self, n) for n in self.__dataclass_fields__}
        plain["classes"] = list(self.classes)
        plain["counts_kind"] = self.counts_kind.value
        plain["class_counts"] = None if self.class_counts is None else list(self.class_counts)
        plain["model_card"] = dict(self.model_card)
        return plain

    def commitment(self) -> str:
        """Return a digest that binds the site to what it declared.

        Every later answer repeats it: a site that changes its classes or counts after
        onboarding is refused until it is onboarded again.

        Examples
        --------
        >>> len(SiteProfile(name="a", classes=("x",)).commitment())
        64
        """
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def aligned_counts(self, classes: tuple[str, ...], kind: CountsKind) -> npt.NDArray[np.float64]:
        """Return class counts in the order of `classes`, 0.0 for absent ones.

        Parameters
        ----------
        classes : tuple of str
        kind : CountsKind
            ``COUNTS`` for the counts themselves, ``PRESENCE`` for 0.0 and 1.0.

        Raises
        ------
        InvalidValueError
            If the profile withholds what is asked for.
        """
        if self.class_counts is None or (
            kind is CountsKind.COUNTS and self.counts_kind is not CountsKind.COUNTS
        ):
            raise InvalidValueError(f"the profile of {self.name!r} has no class {kind.value}")
        known = dict(zip(self.classes, self.class_counts, strict=True))
        counts = np.array([known.get(name, 0.0) for name in classes])
        return (counts > 0).astype(float) if kind is CountsKind.PRESENCE else counts
