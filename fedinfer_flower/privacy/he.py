"""Additive homomorphic encryption: the coordinator adds ciphertexts that it cannot read."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedinfer_flower.ensemble.base import Array, Disclosure, EnsembleRule
from fedinfer_flower.errors import (
    BindingError,
    CapacityError,
    EnvelopeError,
    InvalidValueError,
    KeyAtCoordinatorError,
    ProtectionRefusedError,
    SizeLimitError,
)
from fedinfer_flower.privacy import he_context
from fedinfer_flower.privacy.base import PROTECTIONS, KeyPair, Protection, ScorePlan
from fedinfer_flower.privacy.checks import ROUNDING_SLACK, check_scores, require_within
from fedinfer_flower.privacy.ciphertext_gate import packed_bytes
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.fixed_point import FixedPoint, IntArray
from fedinfer_flower.privacy.he_context import Vector
from fedinfer_flower.privacy.he_schemes import BFV, CKKS, SCHEMES, Scheme
from fedinfer_flower.wire.identity import Identity

__all__ = ["HomomorphicEncryption", "ckks_tolerance"]

_MAX_COHORT = 4096
"""Sums of this many ciphertexts were measured exact, and are far from the noise limit."""

# Magic, version, scheme, reserved, number of values, SHA-256 of the public key.
_HEADER = struct.Struct("<3sBBBI32s")
_MAGIC, _VERSION = b"FHE", 1

_CKKS_HALF_RANGE = 8192.0


def ckks_tolerance(n_sites: int) -> float:
    """Return how far a CKKS sum may be from the clear sum, entry by entry.

    Independent errors of 7e-6 standard deviation a site add up like a square root; the
    bound is 14 deviations (measured: 4.4e-5 for 1 site, 2.3e-4 for 100).

    Examples
    --------
    >>> ckks_tolerance(100)
    0.001
    """
    return 1e-4 * math.sqrt(n_sites)


@PROTECTIONS.register("he")
@dataclass(frozen=True, kw_only=True)
class HomomorphicEncryption(Protection):
    """Encrypt scores to the querier's key; the coordinator adds them blind.

    Use where the coordinator must not see answers, and coordinator and querier are run by
    parties that do not pool what they see. Prefer `dp` where they might, or where the
    querier is the coordinator: then the key is where the ciphertexts are, and encryption
    protects nothing.

    Parameters
    ----------
    scheme : str
        ``"bfv"``: integers on a fixed-point grid, exact on it, 2.5 times the bytes of
        float32 (256 x 1000 scores). ``"ckks"``: approximate reals, 5.0 times the bytes,
        error within `ckks_tolerance`.

    Raises
    ------
    InvalidValueError
        If there is no such scheme.

    Privacy
    -------
    Against parties that follow the protocol, with a fresh key a session. The coordinator
    alone sees ciphertexts, sizes and who answered. The querier alone sees the sum of at
    least three sites, and what follows from it: all but one of the sites, with the querier,
    can subtract their own answers and see the last one. Coordinator and querier who pool
    their views see every answer, because one key opens everything. A sum is not
    differentially private: the querier learns about a site from two sums that differ in it.
    Whoever relays the query and puts its own public key in reads every answer, unless the
    site knows the querier's `KeyPair.key_id` and checks it.

    The secret key is in `KeyPair.secret_key` and the querier's side, nowhere else. Neither
    scheme withstands chosen ciphertexts: the querier tells nobody whether, or how, opening
    failed. A CKKS sum carries its decryption error; do not show it, in full precision, to
    anyone who holds the ciphertexts [2]_. BFV sums carry none.

    References
    ----------
    .. [1] Fan and Vercauteren, IACR ePrint 2012/144 (BFV); Cheon, Kim, Kim and Song,
       ASIACRYPT 2017 (CKKS).
    .. [2] Li and Micciancio, EUROCRYPT 2021.

    Examples
    --------
    >>> from fedinfer_flower.ensemble import RULES
    >>> rule = RULES.get("mean-probability")()
    >>> plan = ScorePlan.for_rule(rule, n_classes=2, n_sites_max=3)
    >>> he = HomomorphicEncryption()
    >>> keys = he.make_keys()
    >>> site = he.site_side(plan, public_key=keys.public_key)
    >>> coordinator = he.coordinator_side(
    ...     plan, n_queries=1, rule=rule, public_key=keys.public_key
    ... )
    >>> for _ in range(3):
    ...     coordinator.add(site.protect(np.array([[0.25, 0.75]])))
    >>> querier = he.querier_side(plan, keys=keys)
    >>> querier.open(coordinator.total(), n_queries=1, n_sites=3)
    array([[0.75, 2.25]])
    """

    scheme: str = "bfv"

    reveals = Disclosure.SUM
    needs_key = True
    min_cohort = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme not in SCHEMES:
            raise InvalidValueError(
                f"protection 'he' has no scheme {self.scheme[:32]!r}",
                hint=f"schemes: {', '.join(SCHEMES)}",
            )

    def codec(self, plan: ScorePlan) -> FixedPoint:
        """Return the integer codec of a plan, under ``"bfv"``."""
        return FixedPoint.fitted(
            clip=plan.bound, n_sites_max=plan.n_sites_max, modulus=BFV.plain_modulus
        )

    def noise(self, plan: ScorePlan, shape: tuple[int, ...]) -> IntArray | None:  # noqa: ARG002
        """Return the noise that one site adds, in grid steps; None for an exact sum."""
        return None

    def sum_slack(self, plan: ScorePlan, n_sites: int) -> float:
        """Return how far a sum of honest sites may lie beyond their bounds."""
        return n_sites * self.codec(plan).step / 2.0

    def payload_bytes(self, plan: ScorePlan, n_queries: int) -> int:
        """Return the exact size: 20,480 bytes a ciphertext, and a header."""
        scheme = SCHEMES[self.scheme]
        n_chunks = -(-n_queries * plan.width // scheme.slots)
        return _HEADER.size + n_chunks * packed_bytes(scheme.ciphertext_primes)

    def site_side(
        self,
        plan: ScorePlan,
        *,
        public_key: bytes,
        cohort: Cohort | None = None,  # noqa: ARG002
        identity: Identity | None = None,  # noqa: ARG002
    ) -> _HeSite:
        """Build the site's side around the querier's public key.

        Raises
        ------
        ProtectionRefusedError
            If it is the secret key: then whoever relayed it reads every answer.
        ProtocolError
            If the bytes are no public key of this scheme.
        CapacityError
            If the cohort does not fit the scheme.
        """
        if he_context.holds_secret(public_key):
            raise ProtectionRefusedError(
                "the key that came with the query is a secret key",
                hint="the querier sends KeyPair.public_key only, and makes new keys",
            )
        return _HeSite(_Frame(self, plan, public_key))

    def coordinator_side(
        self,
        plan: ScorePlan,
        *,
        n_queries: int,
        rule: EnsembleRule,  # noqa: ARG002
        public_key: bytes,
        cohort: Cohort | None = None,  # noqa: ARG002
    ) -> _HeCoordinator:
        """Build the coordinator's side around the querier's public key.

        Raises
        ------
        KeyAtCoordinatorError
            If it is the secret key.
        ProtocolError
            If the bytes are no public key of this scheme.
        CapacityError
            If the cohort does not fit the scheme.
        """
        if he_context.holds_secret(public_key):
            raise KeyAtCoordinatorError(
                "the key handed to the coordinator is the secret key",
                hint="hand over KeyPair.public_key only, and make new keys",
            )
        return _HeCoordinator(_Frame(self, plan, public_key), n_queries)

    def make_keys(self) -> KeyPair:
        """Make a fresh key pair at the querier; 29 KB public, about 10 ms."""
        public, secret = he_context.new_keys(SCHEMES[self.scheme])
        return KeyPair(public_key=public, secret_key=secret)

    def querier_side(
        self,
        plan: ScorePlan,
        *,
        keys: KeyPair,
        cohort: Cohort | None = None,  # noqa: ARG002
    ) -> _HeQuerier:
        """Build the querier's side around its own keys."""
        return _HeQuerier(_Frame(self, plan, keys.public_key), keys)


class _Frame:
    """What the three sides share: codec, key id, and how ciphertexts are laid out in bytes.

    A header, then the ciphertexts, all of one size. Values are the scores in row order,
    packed full; how many there are follows from the plan and the batch.
    """

    def __init__(self, protection: HomomorphicEncryption, plan: ScorePlan, public: bytes) -> None:
        self.protection = protection
        self.plan = plan
        self.scheme: Scheme = SCHEMES[protection.scheme]
        self._key_digest = hashlib.sha256(public).digest()
        _check_cohort_size(protection, plan, self.scheme)
        self.codec: FixedPoint | None = None
        if self.scheme is BFV:
            self.codec = protection.codec(plan)
        if len(public) > he_context.public_key_bytes(self.scheme):
            most = he_context.public_key_bytes(self.scheme)
            raise SizeLimitError(f"a public key has {most} bytes, got {len(public)}")
        self.context = he_context.load_public(public, self.scheme)

    def sizes(self, n_queries: int) -> list[int]:
        """Return the number of values in each ciphertext of a batch."""
        full, rest = divmod(n_queries * self.plan.width, self.scheme.slots)
        return [self.scheme.slots] * full + ([rest] if rest else [])

    def write(self, n_queries: int, ciphertexts: Iterator[bytes]) -> bytes:
        """Lay out packed ciphertexts one after the other."""
        n_values = n_queries * self.plan.width
        header = _HEADER.pack(_MAGIC, _VERSION, self.scheme.code, 0, n_values, self._key_digest)
        return b"".join([header, *ciphertexts])

    def read(self, data: bytes | memoryview, n_queries: int, context: Any) -> list[Vector]:
        """Check the layout, then load every ciphertext, each through the gate."""
        data = memoryview(data)
        self._check_layout(data, n_queries)
        step = packed_bytes(self.scheme.ciphertext_primes)
        starts = range(_HEADER.size, len(data), step)
        return [
            he_context.read_vector(context, self.scheme, data[start : start + step], n_values)
            for start, n_values in zip(starts, self.sizes(n_queries), strict=True)
        ]

    def _check_layout(self, data: memoryview, n_queries: int) -> None:
        expected = self.protection.payload_bytes(self.plan, n_queries)
        if len(data) > expected:
            raise SizeLimitError(f"a payload of this batch has {expected} bytes, got {len(data)}")
        if len(data) < _HEADER.size:
            raise EnvelopeError("the payload ends within its header")
        magic, version, code, reserved, n_values, digest = _HEADER.unpack_from(data)
        if (magic, version, reserved) != (_MAGIC, _VERSION, 0):
            raise EnvelopeError("the payload does not start with the header of protection 'he'")
        if code != self.scheme.code or n_values != n_queries * self.plan.width:
            raise BindingError("the payload is of another scheme or batch shape")
        # Ciphertexts under two keys add up without an error, to noise.
        if digest != self._key_digest:
            raise BindingError("the payload was encrypted under another key")
        if len(data) != expected:
            raise EnvelopeError(f"a payload of this batch has {expected} bytes, got {len(data)}")


def _check_cohort_size(protection: Protection, plan: ScorePlan, scheme: Scheme) -> None:
    """Refuse a cohort that is too small to hide in, or whose sum the scheme cannot hold."""
    if plan.n_sites_max < protection.min_cohort:
        raise InvalidValueError(
            f"protection 'he' needs a cohort of at least {protection.min_cohort} sites,"
            f" got {plan.n_sites_max}",
            hint="ask more sites; the sum of one or two tells too much about each",
        )
    most = _MAX_COHORT
    if scheme is CKKS:
        # One unit below half the range is room for decryption errors of any such cohort.
        room = (_CKKS_HALF_RANGE - 1.0) / (plan.bound * (1.0 + ROUNDING_SLACK))
        most = min(most, math.floor(room))
    if plan.n_sites_max > most:
        raise CapacityError(
            f"a sum of {plan.n_sites_max} sites with entries up to {plan.bound:g} does not"
            f" fit scheme {scheme.name!r}",
            hint=f"at most {most} sites fit; ask fewer, or pick a rule with a smaller bound",
        )


class _HeSite:
    def __init__(self, frame: _Frame) -> None:
        self._frame = frame

    def __repr__(self) -> str:
        return f"<he site side, scheme {self._frame.scheme.name}>"

    def protect(self, scores: Array) -> bytes:
        if self._frame.codec is not None:
            return self.finish(self.draw(scores))
        check_scores(scores, self._frame.plan)
        return self._written(len(scores), scores.ravel().tolist())

    def draw(self, scores: Array) -> IntArray:
        """Return the scores as integers of shape (n_queries, width), noise included."""
        frame = self._frame
        if frame.codec is None:
            raise InvalidValueError("CKKS encrypts reals, which have no integer form")
        check_scores(scores, frame.plan)
        exact = frame.codec.encode(scores)
        noise = frame.protection.noise(frame.plan, exact.shape)
        return exact if noise is None else exact + noise

    def finish(self, entries: IntArray) -> bytes:
        """Encrypt integers that `draw` made."""
        return self._written(len(entries), entries.ravel().tolist())

    def _written(self, n_queries: int, values: Sequence[float]) -> bytes:
        frame = self._frame
        step = frame.scheme.slots
        chunks = (list(values[start : start + step]) for start in range(0, len(values), step))
        encrypted = (he_context.encrypt(frame.context, frame.scheme, chunk) for chunk in chunks)
        return frame.write(n_queries, encrypted)


class _HeCoordinator:
    """Holds the public key and the running sum: one ciphertext for each chunk of the batch."""

    def __init__(self, frame: _Frame, n_queries: int) -> None:
        self.n_sites = 0
        self._frame = frame
        self._n_queries = n_queries
        self._sum: list[Vector] = []

    def __repr__(self) -> str:
        return f"<he coordinator side, scheme {self._frame.scheme.name}, {self.n_sites} sites>"

    def add(self, payload: bytes | memoryview, *, sender: str = "") -> None:  # noqa: ARG002
        self._frame.plan.require_room(self.n_sites)
        vectors = self._frame.read(payload, self._n_queries, self._frame.context)
        if self._sum:
            # A new list, put in place only when every addition has worked.
            vectors = [he_context.add(a, b) for a, b in zip(self._sum, vectors, strict=True)]
        self._sum = vectors
        self.n_sites += 1

    def total(self) -> bytes:
        self._frame.protection.require_cohort(self.n_sites, self._frame.plan)
        scheme = self._frame.scheme
        packed = (he_context.pack_vector(vector, scheme) for vector in self._sum)
        return self._frame.write(self._n_queries, packed)


class _HeQuerier:
    """The only side with the secret key."""

    def __init__(self, frame: _Frame, keys: KeyPair) -> None:
        self._frame = frame
        self._context = he_context.load_secret(keys.secret_key, keys.public_key, frame.scheme)

    def __repr__(self) -> str:
        return f"<he querier side, scheme {self._frame.scheme.name}, secret key hidden>"

    def open(self, total: bytes | memoryview, *, n_queries: int, n_sites: int) -> Array:
        frame = self._frame
        frame.protection.check_cohort(n_sites, frame.plan)
        vectors = frame.read(total, n_queries, self._context)
        numbers = [number for vector in vectors for number in he_context.decrypt(vector)]
        if frame.codec is None:
            opened = np.array(numbers, dtype=np.float64)
            slack = ckks_tolerance(n_sites)
        else:
            opened = frame.codec.decode(numbers)
            slack = frame.protection.sum_slack(frame.plan, n_sites)
        # What no honest cohort can send came from a site that broke the protocol, or from
        # a sum that was altered on its way.
        limit = n_sites * frame.plan.bound * (1.0 + ROUNDING_SLACK) + slack
        require_within(opened, limit, what="the combined scores")
        return opened.reshape(n_queries, frame.plan.width)
