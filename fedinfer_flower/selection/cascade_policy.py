"""What a cascade has learnt: which group first, and for which labels whom to ask as well.

Axis: C classes.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Final

from fedinfer_flower.errors import InvalidValueError

__all__ = ["ALWAYS", "NOBODY", "CascadePolicy"]

NOBODY: Final = -1
"""Add-on of a label for which nobody else is asked."""

ALWAYS: Final = 2.0
"""A threshold above every margin."""

_FORMAT: Final = "fedinfer-cascade/1"
_MAX_TEXT: Final = 1_000_000


@dataclass(frozen=True, kw_only=True)
class CascadePolicy:
    """A base group, and for each label that it predicts a threshold and an add-on group.

    Parameters
    ----------
    classes : tuple of str
    groups : tuple of tuple of str
        Sites by key id, or by name where a site has no key; disjoint.
    base : int
        Place in `groups` of the group that answers every row.
    thresholds_c : tuple of float
        A row that the base gives label c goes on if its margin is below ``thresholds_c[c]``.
    addons_c : tuple of int
        Place in `groups` of the group that it goes on to, or `NOBODY`.
    accuracy, cost : float
        On the audits that it was learnt from: share of right answers, mean price of a row.
        Chosen to look good on just these, so expect somewhat less on others.
    n_audits : int

    Raises
    ------
    InvalidValueError
        If the parts do not fit together.

    Privacy
    -------
    Tells whoever reads it for which labels the base group is weak.

    Examples
    --------
    >>> policy = CascadePolicy(
    ...     classes=("x", "y"),
    ...     groups=(("a", "b", "c"), ("d", "e", "f")),
    ...     base=0,
    ...     thresholds_c=(0.0, 0.4),
    ...     addons_c=(NOBODY, 1),
    ... )
    >>> CascadePolicy.from_json(policy.to_json()) == policy
    True
    """

    classes: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    base: int
    thresholds_c: tuple[float, ...]
    addons_c: tuple[int, ...]
    accuracy: float = 0.0
    cost: float = 0.0
    n_audits: int = 0

    def __post_init__(self) -> None:
        sites = [site for group in self.groups for site in group]
        n_classes = len(self.classes)
        places = range(len(self.groups))
        _require(n_classes > 0 and len(set(self.classes)) == n_classes, "classes are distinct")
        _require(all(self.groups), "every group has sites")
        # A site in two groups would answer the same rows twice.
        _require(all(sites) and len(set(sites)) == len(sites), "each site is in one group")
        _require(self.base in places, "the base is one of the groups")
        _require(
            len(self.thresholds_c) == n_classes == len(self.addons_c),
            "there is one threshold and one add-on a class",
        )
        _require(all(0.0 <= t <= ALWAYS for t in self.thresholds_c), "a threshold is in [0, 2]")
        _require(
            all(a == NOBODY or (a in places and a != self.base) for a in self.addons_c),
            "an add-on is another group than the base, or -1",
        )
        _require(
            0.0 <= self.accuracy <= 1.0
            and math.isfinite(self.cost)
            and self.cost >= 0.0
            and self.n_audits >= 0,
            "accuracy, cost and n_audits are what audits can give",
        )

    def to_json(self) -> str:
        """Return the text that `from_json` reads and that option ``policy`` takes."""
        return json.dumps({"format": _FORMAT} | asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> CascadePolicy:
        """Read what `to_json` wrote.

        Raises
        ------
        InvalidValueError
            If it is anything else.
        """
        _require(len(text) <= _MAX_TEXT, "it is too long")
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError):
            raise _malformed("it is no JSON") from None
        names = {"format", *cls.__dataclass_fields__}
        _require(isinstance(plain, dict) and set(plain) == names, f"its keys are {sorted(names)}")
        _require(plain.pop("format") == _FORMAT, f"its format is {_FORMAT!r}")
        for name in ("base", "n_audits"):
            _require(type(plain[name]) is int, f"{name} is a whole number")
        for name in ("accuracy", "cost"):
            plain[name] = _number(plain[name], name)
        _require(isinstance(plain["groups"], list), "groups is a list")
        plain["classes"] = _row(plain["classes"], str, "classes")
        plain["groups"] = tuple(_row(group, str, "a group") for group in plain["groups"])
        plain["addons_c"] = _row(plain["addons_c"], int, "addons_c")
        _require(isinstance(plain["thresholds_c"], list), "thresholds_c is a list")
        plain["thresholds_c"] = tuple(_number(t, "a threshold") for t in plain["thresholds_c"])
        return cls(**plain)


def _malformed(why: str) -> InvalidValueError:
    return InvalidValueError(
        f"the cascade policy cannot be read: {why}",
        hint="pass the text that CascadePolicy.to_json() returned",
    )


def _require(condition: bool, why: str) -> None:
    if not condition:
        raise _malformed(why)


def _number(value: Any, name: str) -> float:
    is_number = type(value) in (int, float) and abs(value) < 1e300
    _require(is_number, f"{name} is a finite number")
    return float(value)


def _row(values: Any, kind: type, name: str) -> tuple[Any, ...]:
    _require(
        isinstance(values, list) and all(type(value) is kind for value in values),
        f"{name} is a list of {kind.__name__}",
    )
    return tuple(values)
