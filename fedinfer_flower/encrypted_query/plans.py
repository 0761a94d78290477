"""The two parameter sets of CKKS, fixed: all roles have them from here and none from a message.

A value sits in a slot as ``round(scale * value)`` modulo the primes of its level. A level is
spent by each multiplication that is followed by a division by the level's last prime. The
reply is at the last level, with one prime left.

Source: Cheon, Kim, Kim, Song, "Homomorphic Encryption for Arithmetic of Approximate Numbers"
(2017); sizes after the homomorphicencryption.org standard, table 1, 128-bit security.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from typing import Final

from fedinfer_flower.errors import EnvelopeError

__all__ = ["HIDDEN_LAYER", "LINEAR", "REPLY_SCALE", "SCALE", "Plan", "plan_of"]

SCALE: Final = 2.0**40
REPLY_SCALE: Final = 2.0**36
"""Smaller than `SCALE`: four bits of precision, of which there is plenty, for four bits of
range, of which worst-case bounds of logits take much (standardised inputs above all)."""
_CKKS: Final = 2
"""The native library's number of the scheme."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One parameter set.

    Parameters
    ----------
    name : str
    code : int
        In the first bytes of a public key.
    degree : int
        n, coefficients of a polynomial.
    primes : tuple of int
        Primes of a query, 1 modulo 2n; a reply keeps the first.
    key_prime : int
        Further prime of keys.
    relinearises : bool
        Whether squares are taken, which need a relinearisation key.
    """

    name: str
    code: int
    degree: int
    primes: tuple[int, ...]
    key_prime: int
    relinearises: bool

    @property
    def slots(self) -> int:
        """Queries in one batch: n / 2."""
        return self.degree // 2

    @property
    def key_primes(self) -> tuple[int, ...]:
        """Primes of a key."""
        return (*self.primes, self.key_prime)

    @property
    def reply_primes(self) -> tuple[int, ...]:
        """Primes of a reply."""
        return self.primes[:1]

    @property
    def n_key_polynomial_pairs(self) -> int:
        """Pairs of polynomials in the public bytes: the public key, and one a prime."""
        return 1 + (len(self.primes) if self.relinearises else 0)

    @property
    def capacity(self) -> float:
        """Largest sum of absolute logits.

        CKKS wraps around silently beyond ``q_0 / (2 * REPLY_SCALE)``, and the native encoder
        takes half of that. Half of what it takes is for the logits, a quarter for the noise
        in unused slots (`spill_std`).
        """
        return self.primes[0] / (8.0 * REPLY_SCALE)

    def spill_std(self, n_sites: int) -> float:
        """Return the noise in unused slots, standard deviation of each real number.

        As large as fits: eight deviations of a coefficient of the sum of `n_sites` such
        noises stay below a sixteenth of the last prime. A slot's noise is ``sqrt(n / 2)``
        times that of a coefficient, because the embedding is unitary up to that factor.

        Examples
        --------
        >>> round(HIDDEN_LAYER.spill_std(1))
        2097152
        """
        coefficient = self.primes[0] / (128.0 * REPLY_SCALE)
        return coefficient * math.sqrt(self.degree / 2) / math.sqrt(n_sites)

    def parameter_id(self, primes: tuple[int, ...]) -> bytes:
        """Return the native library's hash of the parameters at a level (32 bytes)."""
        facts = (_CKKS, self.degree, *primes, 0)
        packed = struct.pack(f"<{len(facts)}Q", *facts)
        return hashlib.blake2b(packed, digest_size=32).digest()


LINEAR: Final = Plan(
    name="linear",
    code=1,
    degree=4096,
    primes=(9_007_199_254_429_697, 1_099_511_480_321),
    key_prime=40_961,
    relinearises=False,
)
"""109 bits of primes (53 + 40 + 16), all that the standard allows at n = 4096."""

HIDDEN_LAYER: Final = Plan(
    name="hidden-layer",
    code=2,
    degree=8192,
    primes=(
        288_230_376_150_876_161,
        1_099_510_054_913,
        1_099_510_824_961,
        1_099_510_890_497,
    ),
    key_prime=1_099_511_480_321,
    relinearises=True,
)
"""218 bits (58 + 4 x 40), all that the standard allows at n = 8192. Three levels: weights,
squares, weights. A linear model can answer under this plan too."""

_PLANS: Final = {plan.name: plan for plan in (LINEAR, HIDDEN_LAYER)}


def plan_of(name: str) -> Plan:
    """Return the plan of that name.

    Raises
    ------
    EnvelopeError
        If there is none; names come from messages.

    Examples
    --------
    >>> plan_of("linear").slots
    2048
    """
    if name not in _PLANS:
        raise EnvelopeError(
            "an encrypted query of an unknown plan",
            hint="install the same release of fedinfer-flower at every role",
        )
    return _PLANS[name]
