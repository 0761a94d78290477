"""Small networks, identities, sessions, and three real party processes on the loopback."""

from __future__ import annotations

import importlib.util
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from fedinfer_flower.mpc import Disclosed, MpcRule, NetworkSpec, tls
from fedinfer_flower.mpc.network import Conv2d, Flatten, Linear, MaxPool2d, ReLU
from fedinfer_flower.mpc.party_process import Credentials, PartyProcess
from fedinfer_flower.mpc.sealed_shares import open_shares, seal_shares
from fedinfer_flower.mpc.session import MpcSession
from fedinfer_flower.mpc.statement import SiteStatement
from fedinfer_flower.wire.identity import Identity

CLASSES = ("a", "b", "c")

SMALL = NetworkSpec(
    input_shape=(2, 6, 6),
    layers=(
        Conv2d(inputs=2, outputs=3, kernel_height=3, kernel_width=3),
        ReLU(),
        MaxPool2d(kernel=2, stride=2),
        Flatten(),
        Linear(inputs=12, outputs=3),
    ),
)
OTHER = NetworkSpec(
    input_shape=(2, 6, 6), layers=(Flatten(), Linear(inputs=72, outputs=3, bias=False))
)


_MISSING = [name for name in ("spu", "jax") if importlib.util.find_spec(name) is None]

NEEDS_SPU = pytest.mark.skipif(
    bool(_MISSING),
    reason=f"{' and '.join(_MISSING)} not installed: extra 'mpc', on Python 3.11",
)


def weights_of(spec: NetworkSpec, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 0.3, shape).astype(np.float32) for shape in spec.parameter_shapes]


def free_addresses(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return [f"127.0.0.1:{port}" for port in ports]


@dataclass
class Trio:
    """Three parties that own a network each, a querier, and their session."""

    sites: list[Identity]
    querier: Identity
    statements: list[SiteStatement]
    session: MpcSession
    weights: list[list[np.ndarray]] = field(repr=False)

    def credentials(self, rank: int) -> Credentials:
        places = self.session.party_places
        return Credentials(
            certificate=tls.pem_of(places[rank].certificate),
            key=tls.secret_pem(self.sites[rank], places[rank].salt),
            trusted=b"".join(tls.pem_of(p.certificate) for i, p in enumerate(places) if i != rank),
        )

    def process(self, rank: int, *, link_id: str = "of this test") -> PartyProcess:
        return PartyProcess(
            computation=self.session.computation,
            link_id=link_id,
            rank=rank,
            addresses=tuple(place.address for place in self.session.party_places),
            credentials=self.credentials(rank),
            stall_s=10.0,
        )

    def held_weights(self, rank: int) -> bytes:
        parts = []
        for number, arrays in enumerate(self.weights):
            label = f"weights-{number}"
            maker = self.sites[number]
            sealed = self._sealed(
                label, lambda m=maker, a=arrays, la=label: seal_shares(m, self.session, a, label=la)
            )
            parts.append(
                open_shares(
                    self.sites[rank],
                    self.session,
                    sealed[rank],
                    maker=maker.public,
                    label=label,
                    shapes=self.session.specs[number].parameter_shapes,
                )[1]
            )
        return b"".join(parts)

    def held_query(self, rank: int, inputs: np.ndarray) -> bytes:
        sealed = self._sealed(
            "query-0", lambda: seal_shares(self.querier, self.session, [inputs], label="query-0")
        )
        return open_shares(
            self.sites[rank],
            self.session,
            sealed[rank],
            maker=self.querier.public,
            label="query-0",
            shapes=[self.session.computation.input_shape],
        )[1]

    def _sealed(self, label: str, make: Callable[[], tuple[bytes, ...]]) -> tuple[bytes, ...]:
        cache = self.__dict__.setdefault("cache", {})
        if label not in cache:
            cache[label] = make()
        return cache[label]


def make_trio(
    specs: Sequence[NetworkSpec] = (SMALL, OTHER, SMALL),
    *,
    rule: MpcRule = MpcRule.MEAN_LOGIT,
    disclosed: Disclosed = Disclosed.TOTALS,
    n_queries: int = 4,
    **changes: object,
) -> Trio:
    sites, querier = [Identity.generate() for _ in specs], Identity.generate()
    statements = [
        SiteStatement.of_party(
            site, name=f"site-{i}", address=address, network=spec, classes=CLASSES
        )
        for i, (site, spec, address) in enumerate(zip(sites, specs, free_addresses(3), strict=True))
    ]
    signed = tuple(s.to_bytes(i) for s, i in zip(statements, sites, strict=True))
    session = MpcSession(
        session_id="0123456789abcdef",
        querier=querier.public,
        parties=signed,
        owners=signed,
        rule=rule,
        disclosed=disclosed,
        n_queries=n_queries,
        n_batches=1,
        expires_at=int(time.time()) + 600,
    )
    if changes:
        session = replace(session, **changes)
    weights = [weights_of(spec, seed) for seed, spec in enumerate(specs)]
    return Trio(sites, querier, statements, session, weights)


@pytest.fixture
def trio() -> Trio:
    return make_trio()


def in_parallel(function: Callable[[int], object], count: int = 3) -> list:
    """Run a function for every rank at once; an exception is returned in its place."""

    def caught(rank: int) -> object:
        try:
            return function(rank)
        except Exception as exc:
            return exc

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(caught, range(count)))
