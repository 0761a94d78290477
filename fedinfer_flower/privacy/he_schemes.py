"""Parameters of the two encryption schemes, from first principles.

All roles have these numbers from here and none from a message: there is nothing to
negotiate, hence nothing to downgrade.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

__all__ = ["BFV", "CKKS", "DEGREE", "SCHEMES", "Prime", "Scheme"]

DEGREE = 2048
"""n, coefficients of a polynomial. At 2048 the homomorphicencryption.org standard (table 1)
allows 54 bits of primes for 128-bit security; we use all of them."""


@dataclass(frozen=True)
class Prime:
    """One prime of the chain, 1 modulo 2n.

    Parameters
    ----------
    value : int
    wire_bytes : int
        Bytes of a residue between roles.
    """

    value: int
    wire_bytes: int


_CIPHERTEXT_PRIME = Prime(1_099_511_590_913, 5)
_KEY_PRIME = Prime(12_289, 2)
"""TenSEAL always makes relinearisation keys, which take a second prime. Public keys are
modulo both; ciphertexts modulo the first only."""


@dataclass(frozen=True)
class Scheme:
    """Fixed parameters of one encryption scheme.

    Parameters
    ----------
    name : str
    code : int
        SEAL's number of the scheme; ours in messages too.
    slots : int
        Values in one ciphertext.
    scale : float, optional
        CKKS scale; None for BFV.
    plain_modulus : int
        BFV plaintext modulus; 0 for CKKS.
    """

    name: str
    code: int
    slots: int
    scale: float | None
    plain_modulus: int

    @property
    def ciphertext_primes(self) -> tuple[Prime, ...]:
        """Primes of a ciphertext."""
        return (_CIPHERTEXT_PRIME,)

    @property
    def key_primes(self) -> tuple[Prime, ...]:
        """Primes of a public key."""
        return (_CIPHERTEXT_PRIME, _KEY_PRIME)

    def parameter_id(self, primes: tuple[Prime, ...]) -> bytes:
        """Return SEAL's hash of the parameters, which its objects carry (32 bytes)."""
        facts = (self.code, DEGREE, *(prime.value for prime in primes), self.plain_modulus)
        packed = struct.pack(f"<{len(facts)}Q", *facts)
        return hashlib.blake2b(packed, digest_size=32).digest()


BFV = Scheme(name="bfv", code=1, slots=DEGREE, scale=None, plain_modulus=67_104_769)
"""Integers, exact. The modulus is the largest 26-bit prime that is 1 modulo 2n, as packing
needs. The sum of 4096 ciphertexts stays 12 standard deviations of its own noise away from a
wrong decryption."""

CKKS = Scheme(name="ckks", code=2, slots=DEGREE // 2, scale=2.0**26, plain_modulus=0)
"""Approximate reals; wraps around silently beyond ``2**40 / (2 * 2**26) = 8192``."""

SCHEMES = {scheme.name: scheme for scheme in (BFV, CKKS)}
