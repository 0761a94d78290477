"""What a protection is: three objects, one per role, so that no secret is in the wrong process.

==================  ===============  =====================================================
object              runs at          may hold
==================  ===============  =====================================================
`SiteSide`          SuperNode        public key material, its own scores
`CoordinatorSide`   ServerApp        what the protection reveals, and no key at all
`QuerierSide`       outside, or      the secret key (`he`), the combined answer
                    beside a site
==================  ===============  =====================================================

Axes: K sites, B queries, S width of a score.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import Array, Disclosure, EnsembleRule
from fedinfer_flower.ensemble.options import Scalar, checked_options, require_known_options
from fedinfer_flower.errors import (
    CapacityError,
    EnvelopeError,
    InvalidValueError,
    MissingExtraError,
    QuorumNotMetError,
)
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.registry import Registry
from fedinfer_flower.wire.identity import Identity

IntArray = npt.NDArray[np.int64]

__all__ = [
    "PROTECTIONS",
    "CoordinatorSide",
    "KeyPair",
    "NoisySiteSide",
    "Protection",
    "QuerierSide",
    "ScorePlan",
    "SiteSide",
    "key_id_of",
    "make_protection",
    "optional_module",
]


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """Public facts of a round that all three sides must agree on.

    Each side works them out for itself from rule, classes and cohort; only names and
    options travel, so a coordinator cannot slip a site a smaller sensitivity.

    Parameters
    ----------
    width : int
        S, entries of one score.
    bound : float
        Largest absolute value of an entry.
    sensitivity_l2 : float
        How far one row can move when a site's whole answer is replaced.
    n_sites_max : int
        Most sites that may enter the sum; fixes the codec's capacity.
    n_classes : int
    discloses : Disclosure
        What the rule's coordinator needs. Under SUM the total is a sum, so the querier
        can bound its entries; under SCORES it is whatever the rule's `combine` returns.
        Both have shape (n_queries, width).

    Raises
    ------
    InvalidValueError
        If a number is not one that a round can have.
    """

    width: int
    bound: float
    sensitivity_l2: float
    n_sites_max: int
    n_classes: int
    discloses: Disclosure = Disclosure.SUM

    def __post_init__(self) -> None:
        for name in ("width", "n_sites_max", "n_classes"):
            if getattr(self, name) < 1:
                raise InvalidValueError(f"{name} is at least 1, got {getattr(self, name)!r}")
        for name in ("bound", "sensitivity_l2"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0.0):
                raise InvalidValueError(f"{name} is a positive number, got {getattr(self, name)!r}")

    @classmethod
    def for_rule(cls, rule: EnsembleRule, *, n_classes: int, n_sites_max: int) -> ScorePlan:
        """Derive the plan from a rule."""
        return cls(
            width=rule.score_width(n_classes),
            bound=rule.score_bound(n_classes),
            sensitivity_l2=rule.sensitivity_l2(n_classes),
            n_sites_max=n_sites_max,
            n_classes=n_classes,
            discloses=rule.discloses,
        )

    def require_room(self, n_sites: int) -> None:
        """Refuse one more site if `n_sites` are already in the sum.

        Raises
        ------
        CapacityError
            If the cohort that the round was planned for is complete.
        """
        if n_sites >= self.n_sites_max:
            raise CapacityError(
                f"the sum was planned for {self.n_sites_max} sites and holds {n_sites}",
                hint="plan the round with a larger n_sites_max",
            )


class SiteSide(Protocol):
    """Protects one site's scores."""

    def protect(self, scores: Array) -> bytes:
        """Turn finite, bounded scores of shape (n_queries, width) into a payload."""


@runtime_checkable
class NoisySiteSide(Protocol):
    """A site side whose noise is drawn apart, so that a drawn answer can be kept."""

    def draw(self, scores: Array) -> IntArray:
        """Return noisy answers as integers of shape (n_queries, m)."""

    def finish(self, entries: IntArray) -> bytes:
        """Turn drawn answers into a payload."""


class CoordinatorSide(Protocol):
    """Adds payloads as they arrive. One object a batch; not thread-safe.

    Under a protection that reveals `Disclosure.SUM` memory does not grow with the
    number of sites. Nothing that `add` raises leaves a trace in the sum.
    """

    @property
    def n_sites(self) -> int:
        """Sites in the sum."""

    def add(self, payload: bytes | memoryview, *, sender: str = "") -> None:
        """Validate a payload and fold it in.

        `sender` is the site's key id; protections that bind payloads to sites need it.

        Raises
        ------
        ProtocolError
            If the payload is not what an honest site would send; the sum is unchanged.
        """

    def total(self) -> bytes:
        """Return the combined payload for the querier."""


@dataclass(frozen=True, kw_only=True)
class KeyPair:
    """The querier's keys of one session; empty bytes where a protection needs none.

    Parameters
    ----------
    public_key : bytes
        Travels to the sites with the query.
    secret_key : bytes
        Stays with the querier; never shown by `repr`.
    """

    public_key: bytes = b""
    secret_key: bytes = field(default=b"", repr=False)

    @property
    def key_id(self) -> str:
        """Fingerprint of the public key; empty if there is none."""
        return key_id_of(self.public_key)


def key_id_of(public_key: bytes) -> str:
    """Return the SHA-256 fingerprint of a public key in hex; empty for no key.

    Examples
    --------
    >>> key_id_of(b"")
    ''
    """
    return hashlib.sha256(public_key).hexdigest() if public_key else ""


class QuerierSide(Protocol):
    """Opens a combined payload."""

    def open(self, total: bytes | memoryview, *, n_queries: int, n_sites: int) -> Array:
        """Return combined scores of shape (n_queries, width).

        Raises
        ------
        ProtocolError
            If the payload does not open to scores that `n_sites` honest sites could send.
        """


@dataclass(frozen=True, kw_only=True)
class Protection(ABC):
    """Base of all protections: a frozen dataclass whose fields are its options.

    Attributes
    ----------
    name : str
        Registered name.
    reveals : Disclosure
        What the coordinator is shown.
    needs_key : bool
        Whether the querier holds a secret that must not be at the coordinator.
    needs_roster : bool
        Whether payloads are bound to the keys of all sites of the batch.
    min_cohort : int
        Fewest sites whose combination may ever be released.
    """

    name: ClassVar[str] = ""
    reveals: ClassVar[Disclosure] = Disclosure.SUM
    needs_key: ClassVar[bool] = False
    needs_roster: ClassVar[bool] = False
    min_cohort: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name, value in checked_options(f"protection {self.name!r}", self).items():
            object.__setattr__(self, name, value)

    def options(self) -> dict[str, Scalar]:
        """Return the options that make the same protection elsewhere; see `make_protection`."""
        return dataclasses.asdict(self)

    def check_rule(self, rule: EnsembleRule) -> str:  # noqa: ARG002
        """Return why this rule cannot work under this protection; empty if it can.

        The comparison of disclosures is made by `legality`; this is for further reasons.
        """
        return ""

    def epsilon_delta(self, plan: ScorePlan) -> tuple[float, float] | None:  # noqa: ARG002
        """Return (epsilon, delta) of one row of one site's answer, or None.

        A site's total grows with every row that it answers.
        """
        return None

    def charge(self, plan: ScorePlan, n_rows: int) -> Charge | None:  # noqa: ARG002
        """Return the privacy cost of `n_rows` drawn answers of one site; None without noise."""
        return None

    def least_sites(self, n_sites_max: int) -> int:  # noqa: ARG002
        """Return the fewest sites of a cohort of `n_sites_max` whose combination is released."""
        return self.min_cohort

    def require_cohort(self, n_sites: int, plan: ScorePlan) -> None:
        """Refuse to release a combination of too few sites (coordinator).

        Raises
        ------
        QuorumNotMetError
            If there are fewer than `least_sites`.
        """
        least = self.least_sites(plan.n_sites_max)
        if n_sites < least:
            raise QuorumNotMetError(
                f"{n_sites} sites answered; protection {self.name!r} combines at least {least}"
                f" of {plan.n_sites_max}",
                hint=f"ask more sites, or set quorum to {least} or more",
            )

    def check_cohort(self, n_sites: int, plan: ScorePlan) -> None:
        """Check how many sites a combined payload claims to hold (querier).

        Raises
        ------
        EnvelopeError
            If no round of this plan can end with so many sites.
        """
        least = self.least_sites(plan.n_sites_max)
        if not least <= n_sites <= plan.n_sites_max:
            raise EnvelopeError(
                f"a total of {n_sites} sites does not fit protection {self.name!r}, which"
                f" combines {least} to {plan.n_sites_max} in this round"
            )

    @abstractmethod
    def payload_bytes(self, plan: ScorePlan, n_queries: int) -> int:
        """Return the most bytes that an honest payload can have; a longer one is refused."""

    @abstractmethod
    def site_side(
        self,
        plan: ScorePlan,
        *,
        public_key: bytes,
        cohort: Cohort | None = None,
        identity: Identity | None = None,
    ) -> SiteSide:
        """Build the site's side from public material and, for masks, the site's own keys."""

    @abstractmethod
    def coordinator_side(
        self,
        plan: ScorePlan,
        *,
        n_queries: int,
        rule: EnsembleRule,
        public_key: bytes,
        cohort: Cohort | None = None,
    ) -> CoordinatorSide:
        """Build the coordinator's side. `rule` is used where scores are revealed."""

    def make_keys(self) -> KeyPair:
        """Make fresh keys at the querier; empty ones for a protection without keys."""
        return KeyPair()

    @abstractmethod
    def querier_side(
        self, plan: ScorePlan, *, keys: KeyPair, cohort: Cohort | None = None
    ) -> QuerierSide:
        """Build the querier's side around its own keys."""


PROTECTIONS: Registry[Protection] = Registry(
    kind="protection", package="fedinfer_flower.privacy", group="fedinfer_flower.protections"
)
"""All protections by name."""


def make_protection(name: str, options: Mapping[str, object] | None = None) -> Protection:
    """Build a protection from its registered name and its options, trusting neither.

    The way in for run configs and for messages. Nothing unknown is ignored: a privacy
    option that is silently dropped is a promise that is silently broken.

    Parameters
    ----------
    name : str
    options : mapping of str to JSON scalar, optional
        Left-out options keep their defaults.

    Raises
    ------
    UnknownNameError
        If no protection has that name.
    InvalidValueError
        If an option does not exist, has the wrong type or lies outside its range.

    Examples
    --------
    >>> from fedinfer_flower.privacy import make_protection
    >>> make_protection("dp", {"epsilon": 2})
    DP(mechanism='gaussian', epsilon=2.0, delta=1e-05)
    >>> make_protection("dp", {"epsilonn": 2.0})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fedinfer_flower.errors.InvalidValueError: FI202 ...
    """
    cls = PROTECTIONS.get(name)
    given: dict[str, Any] = dict(options or {})
    known = [spec.name for spec in dataclasses.fields(cls) if spec.init]
    require_known_options(f"protection {name!r}", given, known)
    return cls(**given)


def optional_module(module: str, *, extra: str) -> ModuleType:
    """Import a module that comes with an extra of this distribution.

    Raises
    ------
    MissingExtraError
        Naming the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(
            f"{module.partition('.')[0]} is not installed",
            hint=f"pip install 'fedinfer-flower[{extra}]'",
        ) from None
