"""What is asked of SPU: compile a public function, connect three parties, run it on shares.

The protocol is ABY3 in a ring of 64 bits. SPU's two-party SEMI2K is not offered: by default
its correlated randomness comes from one of the two parties, who could then read everything.
Everything here is called in a party's own process (`mpc.party`).
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedinfer_flower.errors import PartyFailedError, ShapeError
from fedinfer_flower.mpc.forward import Disclosed, MpcRule, joint_function
from fedinfer_flower.mpc.network import NetworkSpec
from fedinfer_flower.mpc.shares import (
    FRACTION_BITS,
    N_PARTIES,
    Words,
    held_from_bytes,
    held_to_bytes,
    zero_masks,
)
from fedinfer_flower.privacy.base import optional_module

__all__ = ["Computation", "Link", "Machine", "compile_joint", "connect"]

_INPUT: Final = "in"
_OUTPUT: Final = "out"
_CONNECT_RETRY_MS: Final = 100


@dataclass(frozen=True, kw_only=True)
class Computation:
    """The public description of what runs on shares; the same at all parties.

    Parameters
    ----------
    specs : tuple of NetworkSpec
        One for each owner.
    rule : MpcRule
    disclosed : Disclosed
    n_queries : int
        Rows of every batch: compiled code has fixed shapes.
    """

    specs: tuple[NetworkSpec, ...]
    rule: MpcRule
    disclosed: Disclosed
    n_queries: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a batch."""
        return (self.n_queries, *self.specs[0].input_shape)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of a result."""
        if self.disclosed is Disclosed.LABEL:
            return (self.n_queries,)
        return (self.n_queries, self.specs[0].n_classes)

    @property
    def weight_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all owners' weights, in order."""
        return tuple(shape for spec in self.specs for shape in spec.parameter_shapes)


@dataclass(frozen=True, kw_only=True)
class Link:
    """How one party reaches the others.

    Parameters
    ----------
    link_id : str
        Part of the key of every message: a secret of the parties.
    rank : int
        This party's number.
    addresses : tuple of str
        ``host:port`` of every party; this party's own is what it listens on.
    certificate, key, trusted : Path
        PEM files: own certificate, its key, and the certificates of the other parties.
    connect_s : float
        Patience until all are connected.
    stall_s : float
        Longest silence of another party.
    """

    link_id: str
    rank: int
    addresses: tuple[str, ...]
    certificate: Path
    key: Path
    trusted: Path
    connect_s: float
    stall_s: float


def _libspu() -> Any:
    return optional_module("spu.libspu", extra="mpc")


def _config() -> Any:
    libspu = _libspu()
    return libspu.RuntimeConfig(
        protocol=libspu.ProtocolKind.ABY3,
        field=libspu.FieldType.FM64,
        fxp_fraction_bits=FRACTION_BITS,
    )


def compile_joint(computation: Computation) -> tuple[Any, str]:
    """Compile for shares; return (executable, SHA-256 of its code in hex).

    Every party compiles for itself from the public description: code that came over a wire
    could open what it should not. The digest lets them check that they run the same.
    """
    frontend = optional_module("spu.utils.frontend", extra="mpc")
    libspu = _libspu()
    shapes = (computation.input_shape, *computation.weight_shapes)
    names = [f"{_INPUT}{i}" for i in range(len(shapes))]
    executable, _ = frontend.compile(
        frontend.Kind.JAX,
        joint_function(computation.specs, computation.rule, computation.disclosed),
        [np.zeros(shape, dtype=np.float32) for shape in shapes],
        {},
        names,
        [libspu.Visibility.VIS_SECRET] * len(names),
        lambda flat: [f"{_OUTPUT}{i}" for i in range(len(flat))],
    )
    return executable, hashlib.sha256(executable.code).hexdigest()


def connect(link: Link) -> Any:
    """Connect to the other parties over mutual TLS.

    There is no way to connect without: a link in clear shows an eavesdropper all three
    parties' messages, and with them query and weights. Whatever a party sends goes over a
    connection that it opened itself, to a listener whose certificate it verified. The
    listener demands a certificate too, but the link library leaves it open to connections
    without TLS: those can only ever bring messages, and none is taken without `link_id`.
    """
    libspu = _libspu()
    desc = libspu.link.Desc()
    desc.id = link.link_id
    for rank, address in enumerate(link.addresses):
        desc.add_party(f"party-{rank}", address)
    desc.connect_retry_times = max(1, math.ceil(link.connect_s * 1000 / _CONNECT_RETRY_MS))
    desc.connect_retry_interval_ms = _CONNECT_RETRY_MS
    desc.recv_timeout_ms = desc.http_timeout_ms = math.ceil(link.stall_s * 1000)
    desc.enable_ssl = True
    # Both groups: with only one set, one direction of every pair would trust anybody.
    for options in (desc.client_ssl_opts, desc.server_ssl_opts):
        options.cert.certificate_path = str(link.certificate)
        options.cert.private_key_path = str(link.key)
        options.verify.ca_file_path = str(link.trusted)
        options.verify.verify_depth = 1
    return libspu.link.create_brpc(desc, link.rank)


class Machine:
    """One party's SPU with an owner's weights in it, for as many batches as come.

    Parameters
    ----------
    computation : Computation
    compiled : (executable, digest)
        From `compile_joint`.
    context : libspu.link.Context
        From `connect`.

    Raises
    ------
    PartyFailedError
        If another party has compiled something else.
    """

    def __init__(self, computation: Computation, compiled: tuple[Any, str], context: Any) -> None:
        self._computation = computation
        self._executable, digest = compiled
        if set(context.all_gather(digest)) != {digest}:
            raise PartyFailedError(
                "the parties compiled different code from the same description",
                hint="install the same releases of fedinfer-flower, spu and jax at all three",
            )
        # Public among the parties, unknown to the querier: see `zero_masks`.
        shares_of_seed = context.all_gather(secrets.token_hex(32))
        self._mask_seed = hashlib.sha256("".join(shares_of_seed).encode()).digest()
        self._rank: int = context.rank
        self._runs = 0
        api = optional_module("spu.api", extra="mpc")
        self._io = api.Io(N_PARTIES, _config())
        self._runtime = api.Runtime(context, _config())

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a batch."""
        return self._computation.input_shape

    def load_weights(self, held: Sequence[Words]) -> None:
        """Put this party's shares of all owners' weights into the machine."""
        shapes = self._computation.weight_shapes
        if tuple(h.shape[:-1] for h in held) != shapes:
            raise ShapeError("the shares of the weights do not have the networks' shapes")
        for number, words in enumerate(held, start=1):
            self._runtime.set_var(f"{_INPUT}{number}", self._to_share(words))

    def run(self, held: Words) -> bytes:
        """Run one batch; return this party's shares of the result, as bytes."""
        if held.shape[:-1] != self._computation.input_shape:
            raise ShapeError("the shares of the queries do not have the networks' input shape")
        self._runtime.set_var(f"{_INPUT}0", self._to_share(held))
        self._runtime.run(self._executable)
        name = f"{_OUTPUT}0"
        chunks = [_chunk(c) for c in self._runtime.get_var(name).share_chunks]
        result = b"".join(bytes(c.content) for c in sorted(chunks, key=lambda c: c.chunk_offset))
        held_result = held_from_bytes(result, self._computation.output_shape)
        masks = zero_masks(self._mask_seed, self._runs, self._computation.output_shape)
        self._runs += 1
        return held_to_bytes(held_result + masks[self._rank])

    def _to_share(self, held: Words) -> Any:
        # SPU's own shares of zeros lend their description; their content is replaced.
        zeros = np.zeros(held.shape[:-1], dtype=np.float32)
        libspu = _libspu()
        share = self._io.make_shares(zeros, libspu.Visibility.VIS_SECRET)[0]
        chunk = libspu.ValueChunk()
        content = held_to_bytes(held)
        chunk.total_bytes, chunk.chunk_offset, chunk.content = len(content), 0, content
        share.share_chunks = [chunk.SerializeToString()]
        return share


def _chunk(data: bytes) -> Any:
    chunk = _libspu().ValueChunk()
    chunk.ParseFromString(data)
    return chunk
