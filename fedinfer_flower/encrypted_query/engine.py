"""The native library's objects for one plan, and the gate on the way into them.

Uses the library's lower interface, where sums are divided once and not term by term. It has no
threads. It reads from files, so messages pass through a temporary one; what is in it,
ciphertexts and public keys, is no secret.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fedinfer_flower.encrypted_query.native import Version, ciphertext_message
from fedinfer_flower.encrypted_query.plans import Plan
from fedinfer_flower.encrypted_query.residues import Residues, pack_pair, read_pairs
from fedinfer_flower.errors import InvalidCiphertextError
from fedinfer_flower.privacy.base import optional_module

__all__ = ["NATIVE_ERRORS", "Engine", "refusing"]

# What pybind11 makes of the library's exceptions. Their texts are not passed on.
NATIVE_ERRORS = (ValueError, RuntimeError, TypeError, IndexError)


def _seal() -> ModuleType:
    return optional_module("tenseal.sealapi", extra="he")


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn the library's exceptions inside the block into an `InvalidCiphertextError`."""
    try:
        yield
    except NATIVE_ERRORS:
        raise InvalidCiphertextError(what) from None


class Engine:
    """Parameters, encoder and evaluator of one plan; no keys.

    Parameters
    ----------
    plan : Plan
    """

    def __init__(self, plan: Plan) -> None:
        seal = _seal()
        parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        parameters.set_poly_modulus_degree(plan.degree)
        parameters.set_coeff_modulus([seal.Modulus(prime) for prime in plan.key_primes])
        self.seal, self.plan = seal, plan
        self.context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
        self.encoder = seal.CKKSEncoder(self.context)
        self.evaluator = seal.Evaluator(self.context)
        self.version = self._version()

    def level(self, n_primes: int) -> list[int]:
        """Return the library's id of the level with so many primes left."""
        return list(struct.unpack("<4Q", self.plan.parameter_id(self.plan.primes[:n_primes])))

    def _version(self) -> Version:
        own = self.seal.Plaintext(16)
        with tempfile.TemporaryDirectory(prefix="fedinfer-") as folder:
            path = Path(folder) / "own"
            own.save(str(path))
            header = path.read_bytes()
        return header[3], header[4]

    def encoded(self, value: object, n_primes: int, scale: float) -> Any:
        """Encode a number or a list of numbers at a level."""
        plain = self.seal.Plaintext()
        self.encoder.encode(value, self.level(n_primes), scale, plain)
        return plain

    def read(self, target: Any, message: bytes) -> Any:
        """Load a message that `native` wrote."""
        with tempfile.TemporaryDirectory(prefix="fedinfer-") as folder:
            path = Path(folder) / "message"
            path.write_bytes(message)
            target.load(self.context, str(path))
        return target

    def ciphertexts(
        self, packed: bytes | memoryview, *, count: int, primes: tuple[int, ...]
    ) -> list[Any]:
        """Pass `count` ciphertexts through the gate, and load them."""
        loaded = []
        pairs = read_pairs(packed, count=count, degree=self.plan.degree, primes=primes)
        for residues in pairs:
            message = ciphertext_message(residues, self.plan, primes, self.version)
            with refusing("a ciphertext could not be loaded"):
                loaded.append(self.read(self.seal.Ciphertext(), message))
        return loaded

    def packed(self, ciphertexts: Sequence[Any], primes: tuple[int, ...]) -> bytes:
        """Pack ciphertexts for another role."""
        size = 2 * self.plan.degree * len(primes)
        return b"".join(
            pack_pair(_residues(one, size), self.plan.degree, primes) for one in ciphertexts
        )


def _residues(polynomials: Any, size: int) -> Residues:
    # One by one: the library offers no array.
    return np.fromiter(map(polynomials.__getitem__, range(size)), np.uint64, count=size)
