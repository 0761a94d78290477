"""Keys, encryption, evaluation, addition and decryption of batches of queries under CKKS.

A batch is one ciphertext a *feature*, with one query a slot. Weights are scalars then, no slot
ever moves, and no rotation keys are needed; a batch costs the same whether it has one query or
`Plan.slots`. Scales are kept exact by encoding each layer's weights at the scale that the
division after it takes away.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.encrypted_query.engine import NATIVE_ERRORS, Engine, refusing
from fedinfer_flower.encrypted_query.native import (
    key_message,
    switching_keys_message,
)
from fedinfer_flower.encrypted_query.plans import REPLY_SCALE, SCALE, Plan
from fedinfer_flower.encrypted_query.quadratic import NEGLIGIBLE, QuadraticForm
from fedinfer_flower.encrypted_query.residues import (
    packed_bytes,
    read_pairs,
)
from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import (
    BindingError,
    CapacityError,
    EnvelopeError,
    InvalidCiphertextError,
    MissingExtraError,
)
from fedinfer_flower.privacy.base import key_id_of

__all__ = [
    "PublicKeys",
    "ReplySum",
    "SecretKeys",
    "public_key_bytes",
    "query_bytes",
    "reply_bytes",
]

ComplexArray = npt.NDArray[np.complex128]

_KEY_HEADER: Final = struct.Struct("<3sBB")
_KEY_MAGIC, _VERSION = b"FEQ", 1


def _engine(plan: Plan) -> Engine:
    # By process: a native object must not be used on the other side of a fork.
    return _checked_engine(plan, os.getpid())


@functools.lru_cache(maxsize=4)
def _checked_engine(plan: Plan, process: int) -> Engine:  # noqa: ARG001
    """Make an engine, after a check that the library reads what we write."""
    engine = Engine(plan)
    probe = np.array([[0.5], [-2.0]])
    try:
        keys = SecretKeys(plan, engine)
        loaded = PublicKeys(plan, keys.public_key, engine)
        reply = loaded.evaluate(
            QuadraticForm.linear(np.array([[3.0]]), np.array([1.0])),
            keys.encrypt(probe),
            noise=np.zeros((1, plan.slots), dtype=np.complex128),
        )
        opened = keys.decrypt(reply, n_classes=1)[0, :2].real
    except (InvalidCiphertextError, *NATIVE_ERRORS):
        opened = np.zeros(2)
    if not np.allclose(opened, [2.5, -5.0], atol=1e-4):
        raise MissingExtraError(
            "the installed TenSEAL stores ciphertexts in a way that this release does not know",
            hint="pip install 'fedinfer-flower[he]' for a version that fits",
        )
    return engine


def public_key_bytes(plan: Plan) -> int:
    """Return the exact size of the public bytes.

    Examples
    --------
    >>> from fedinfer_flower.encrypted_query.plans import HIDDEN_LAYER
    >>> public_key_bytes(HIDDEN_LAYER)
    2293765
    """
    pair = packed_bytes(plan.degree, plan.key_primes)
    return _KEY_HEADER.size + plan.n_key_polynomial_pairs * pair


def query_bytes(plan: Plan, n_features: int) -> int:
    """Return the exact size of an encrypted batch."""
    return n_features * packed_bytes(plan.degree, plan.primes)


def reply_bytes(plan: Plan, n_classes: int) -> int:
    """Return the exact size of a reply, or of a sum of replies."""
    return n_classes * packed_bytes(plan.degree, plan.reply_primes)


class SecretKeys:
    """The querier's keys. The secret half is in no bytes that this class returns.

    Parameters
    ----------
    plan : Plan
    """

    def __init__(self, plan: Plan, engine: Engine | None = None) -> None:
        self.plan = plan
        self._engine = _engine(plan) if engine is None else engine
        seal, context = self._engine.seal, self._engine.context
        generator = seal.KeyGenerator(context)
        secret, public = generator.secret_key(), seal.PublicKey()
        generator.create_public_key(public)
        pairs = [public]
        if plan.relinearises:
            squares = seal.RelinKeys()
            generator.create_relin_keys(squares)
            pairs += squares.data()[0]
        self._encryptor = seal.Encryptor(context, public, secret)
        self._decryptor = seal.Decryptor(context, secret)
        data = [pair.data() for pair in pairs]  # must outlive the views of it
        header = _KEY_HEADER.pack(_KEY_MAGIC, _VERSION, plan.code)
        self.public_key = header + self._engine.packed(data, plan.key_primes)

    def __repr__(self) -> str:
        return f"SecretKeys({self.plan.name!r}, key_id={self.key_id[:16]!r}, secret hidden)"

    @property
    def key_id(self) -> str:
        """Fingerprint of the public bytes: what a site pins."""
        return key_id_of(self.public_key)

    def encrypt(self, inputs: Array) -> bytes:
        """Encrypt a batch of shape (n_queries, n_features), n_queries at most `plan.slots`.

        Raises
        ------
        CapacityError
            If the batch has more rows than slots.
        """
        if len(inputs) > self.plan.slots:
            raise CapacityError(f"a batch has at most {self.plan.slots} queries, got {len(inputs)}")
        engine = self._engine
        encrypted = []
        for column in np.asarray(inputs, dtype=np.float64).T:
            plain = engine.encoded(column.tolist(), len(self.plan.primes), SCALE)
            # With the secret key: one small error term instead of three.
            one = engine.seal.Ciphertext()
            self._encryptor.encrypt_symmetric(plain, one)
            encrypted.append(one)
        return engine.packed(encrypted, self.plan.primes)

    def decrypt(self, reply: bytes | memoryview, *, n_classes: int) -> ComplexArray:
        """Decrypt a reply; return all slots, shape (n_classes, plan.slots).

        Raises
        ------
        InvalidCiphertextError
            If the bytes are not exactly so many ciphertexts.
        """
        engine = self._engine
        columns = []
        for one in engine.ciphertexts(reply, count=n_classes, primes=self.plan.reply_primes):
            plain = engine.seal.Plaintext()
            with refusing("a ciphertext could not be decrypted"):
                self._decryptor.decrypt(one, plain)
                columns.append(engine.encoder.decode_complex(plain))
        return np.array(columns)


class PublicKeys:
    """A querier's public bytes, checked and loaded: what a site computes with.

    Parameters
    ----------
    plan : Plan
    public_key : bytes
        The caller has compared their fingerprint with the one that it pins.

    Raises
    ------
    EnvelopeError, InvalidCiphertextError
        If the bytes are not exactly the public bytes of this plan.
    BindingError
        If they are of another plan.
    """

    def __init__(
        self, plan: Plan, public_key: bytes | memoryview, engine: Engine | None = None
    ) -> None:
        self.plan = plan
        self._engine = _engine(plan) if engine is None else engine
        seal, version = self._engine.seal, self._engine.version
        if len(public_key) < _KEY_HEADER.size:
            raise EnvelopeError("the public key is missing or cut short")
        magic, layout, code = _KEY_HEADER.unpack_from(public_key)
        if (magic, layout) != (_KEY_MAGIC, _VERSION):
            raise EnvelopeError("the bytes are no public key of an encrypted query")
        if code != plan.code:
            raise BindingError(f"the public key is of another plan than {plan.name!r}")
        public, *squares = read_pairs(
            memoryview(public_key)[_KEY_HEADER.size :],
            count=plan.n_key_polynomial_pairs,
            degree=plan.degree,
            primes=plan.key_primes,
        )
        with refusing("the public key could not be loaded"):
            key = self._engine.read(seal.PublicKey(), key_message(public, plan, version))
            self._squares = (
                self._engine.read(seal.RelinKeys(), switching_keys_message(squares, plan, version))
                if squares
                else None
            )
            self._encryptor = seal.Encryptor(self._engine.context, key)

    def evaluate(
        self, form: QuadraticForm, query: bytes | memoryview, *, noise: ComplexArray
    ) -> bytes:
        """Evaluate a form on an encrypted batch; return packed logits, one ciphertext a class.

        Parameters
        ----------
        form : QuadraticForm
            Without hidden units under a plan that takes no squares.
        query : bytes
            Of `SecretKeys.encrypt` at the querier.
        noise : complex array of shape (n_classes, plan.slots)
            Encrypted afresh under the public key and added, which re-randomises the reply.

        Raises
        ------
        InvalidCiphertextError
            If the query is not exactly one ciphertext a feature.
        """
        plan = self.plan
        inputs = self._engine.ciphertexts(query, count=form.n_features, primes=plan.primes)
        with refusing("the query could not be evaluated"):
            squares = self._squared_units(form, inputs)
            short = [self._shortened(one) for one in inputs]
            reply = [
                self._logit(form, short, squares, column, noise[column])
                for column in range(form.n_classes)
            ]
            return self._engine.packed(reply, plan.reply_primes)

    def _shortened(self, one: Any) -> Any:
        """Return an input with two primes left: the linear part needs no more."""
        short = self._engine.seal.Ciphertext()
        self._engine.evaluator.mod_switch_to(one, self._engine.level(2), short)
        return short

    def _squared_units(self, form: QuadraticForm, inputs: Sequence[Any]) -> list[Any]:
        """Return the squares of the hidden units, with two primes left; none is empty."""
        engine = self._engine
        n_primes = len(self.plan.primes)
        squares = []
        for weights, bias in zip(form.hidden_weights.T, form.hidden_bias, strict=True):
            unit = self._weighted(inputs, weights, n_primes, float(self.plan.primes[-1]))
            if unit is None:
                raise CapacityError("a hidden unit that no input reaches", hint="form.pruned()")
            unit.scale = SCALE
            engine.evaluator.add_plain_inplace(
                unit, engine.encoded(float(bias), n_primes - 1, SCALE)
            )
            engine.evaluator.square_inplace(unit)
            engine.evaluator.relinearize_inplace(unit, self._squares)
            engine.evaluator.rescale_to_next_inplace(unit)
            squares.append(unit)
        return squares

    def _logit(
        self,
        form: QuadraticForm,
        inputs: Sequence[Any],
        squares: Sequence[Any],
        column: int,
        noise: ComplexArray,
    ) -> Any:
        engine, primes = self._engine, self.plan.primes
        shift = (noise + form.offset[column]).tolist()
        logit = engine.seal.Ciphertext()
        self._encryptor.encrypt(engine.encoded(shift, 1, REPLY_SCALE), logit)
        # At these scales of the weights the last division leaves exactly REPLY_SCALE.
        scale = REPLY_SCALE * primes[1] / SCALE
        parts = [self._weighted(inputs, form.linear_weights[:, column], 2, scale)]
        if squares:
            scale = REPLY_SCALE * primes[1] / squares[0].scale
            parts.append(self._weighted(squares, form.square_weights[:, column], 2, scale))
        for part in parts:
            if part is not None:
                part.scale = REPLY_SCALE
                engine.evaluator.add_inplace(logit, part)
        return logit

    def _weighted(
        self, terms: Sequence[Any], weights: Array, n_primes: int, scale: float
    ) -> Any | None:
        """Return the weighted sum, divided by its last prime; None if all weights are zero."""
        engine = self._engine
        total, product = None, engine.seal.Ciphertext()
        for term, weight in zip(terms, weights, strict=True):
            if abs(weight) < NEGLIGIBLE:
                continue
            plain = engine.encoded(float(weight), n_primes, scale)
            if total is None:
                total = engine.seal.Ciphertext()
                engine.evaluator.multiply_plain(term, plain, total)
            else:
                engine.evaluator.multiply_plain(term, plain, product)
                engine.evaluator.add_inplace(total, product)
        if total is not None:
            engine.evaluator.rescale_to_next_inplace(total)
        return total


class ReplySum:
    """Adds the replies of several sites under one key; holds no key itself.

    Parameters
    ----------
    plan : Plan
    n_classes : int
    """

    def __init__(self, plan: Plan, *, n_classes: int) -> None:
        self.n_sites = 0
        self._engine, self._n_classes = _engine(plan), n_classes
        self._sum: list[Any] = []

    def add(self, reply: bytes | memoryview) -> None:
        """Check a reply and add it; one that is refused leaves no trace.

        Raises
        ------
        InvalidCiphertextError
        """
        engine = self._engine
        replies = engine.ciphertexts(reply, count=self._n_classes, primes=engine.plan.reply_primes)
        if self._sum:
            with refusing("a reply could not be added"):
                for total, one in zip(self._sum, replies, strict=True):
                    engine.evaluator.add_inplace(one, total)
        self._sum = replies
        self.n_sites += 1

    def total(self) -> bytes:
        """Return the packed sum."""
        return self._engine.packed(self._sum, self._engine.plan.reply_primes)
