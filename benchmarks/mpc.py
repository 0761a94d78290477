"""`mpc`: LeNet on secret shares, three party processes over mutual TLS on one machine.

python benchmarks/mpc.py --queries 10

Seconds of a warm query beside the clear network in torch in the same run, the largest error,
bytes of shares, and what it takes to open a session. `--rtt-ms` puts a relay with that delay
between any two parties: what comes on top between sites that are apart.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fedinfer_flower.clients.mpc_answering import MpcSite
from fedinfer_flower.mpc import Disclosed, MpcRule, tls
from fedinfer_flower.mpc.party_process import Credentials, PartyProcess
from fedinfer_flower.mpc.sealed_shares import link_id, open_shares, seal_shares
from fedinfer_flower.mpc.session import MpcConsent, MpcSession
from fedinfer_flower.mpc.shares import decode_reals, held_from_bytes, join
from fedinfer_flower.wire.identity import Identity

CLASSES = [str(digit) for digit in range(10)]
SHAPE = (3, 32, 32)


def lenet(pool: Any) -> Any:
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        pool(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        pool(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def addresses() -> list[str]:
    sockets = [socket.socket() for _ in range(3)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    found = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return found


class Relay:
    """Forwards TCP to a target, each byte `delay_s` later; one for each ordered pair."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def to(self, target: str) -> str:
        """Return the address of a new relay to `target`."""
        host, port = target.split(":")

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                far_reader, far_writer = await asyncio.open_connection(host, int(port))
            except OSError:
                writer.close()
                return
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

        started = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(serve, "127.0.0.1", 0), self.loop
        )
        return f"127.0.0.1:{started.result().sockets[0].getsockname()[1]}"

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                self.loop.call_later(self.delay_s, writer.write, data)
        except ConnectionError:
            pass
        self.loop.call_later(self.delay_s, writer.close)


def measure(models: list[Any], *, rows: int, n_queries: int, rtt_ms: float) -> dict[str, float]:
    import torch

    identities, querier = [Identity.generate() for _ in range(3)], Identity.generate()
    consent = MpcConsent(
        parties=frozenset(i.key_id for i in identities),
        queriers=frozenset({querier.key_id}),
        min_owners=1,
    )
    sites = [
        MpcSite(
            identity=identities[i],
            consent=consent,
            name=f"site-{i}",
            model=models[i] if i < len(models) else None,
            input_shape=SHAPE,
            classes=CLASSES if i < len(models) else (),
            address=address,
        )
        for i, address in enumerate(addresses())
    ]
    signed = tuple(site.statement.to_bytes(site.identity) for site in sites)
    session = MpcSession(
        session_id="benchmark",
        querier=querier.public,
        parties=signed,
        owners=signed[: len(models)],
        rule=MpcRule.MEAN_LOGIT,
        disclosed=Disclosed.TOTALS,
        n_queries=rows,
        n_batches=1,
        expires_at=int(time.time()) + 3600,
    )
    inputs = np.random.default_rng(0).normal(size=(rows, *SHAPE)).astype(np.float32)
    shared_weights = [site.share_weights(session) for site in sites[: len(models)]]
    start = time.perf_counter()
    shared_query = seal_shares(querier, session, [inputs], label="query-0")
    seal_s = time.perf_counter() - start

    relay = Relay(rtt_ms / 2000.0) if rtt_ms else None

    def seen_from(rank: int, other: int, address: str) -> str:
        return address if relay is None or rank == other else relay.to(address)

    def party(rank: int) -> tuple[float, list[float], bytes]:
        me, places = identities[rank], session.party_places
        opened = [
            open_shares(
                me,
                session,
                shared_weights[i][rank],
                maker=place.identity,
                label=f"weights-{i}",
                shapes=session.specs[i].parameter_shapes,
            )
            for i, place in enumerate(session.owner_places)
        ]
        query = open_shares(
            me,
            session,
            shared_query[rank],
            maker=querier.public,
            label="query-0",
            shapes=[session.computation.input_shape],
        )
        credentials = Credentials(
            certificate=tls.pem_of(places[rank].certificate),
            key=tls.secret_pem(me, places[rank].salt),
            trusted=b"".join(tls.pem_of(p.certificate) for i, p in enumerate(places) if i != rank),
        )
        seconds = []
        with PartyProcess(
            computation=session.computation,
            link_id=link_id(session, [secret for secret, _ in (*opened, query)]),
            rank=rank,
            addresses=tuple(seen_from(rank, i, place.address) for i, place in enumerate(places)),
            credentials=credentials,
        ) as process:
            start = time.perf_counter()
            process.open(b"".join(held for _, held in opened), ends_at=time.monotonic() + 120)
            open_s = time.perf_counter() - start
            for _ in range(n_queries + 1):
                start = time.perf_counter()
                result = process.query(query[1], ends_at=time.monotonic() + 120)
                seconds.append(time.perf_counter() - start)
        return open_s, seconds, result

    with ThreadPoolExecutor(3) as pool:
        opened, taken, results = zip(*pool.map(party, range(3)), strict=True)
    shape = session.computation.output_shape
    totals = decode_reals(join([held_from_bytes(result, shape) for result in results]))
    clear: list[float] = []
    with torch.no_grad():
        for _ in range(20):
            start = time.perf_counter()
            answers = [model(torch.tensor(inputs)) for model in models]
            clear.append(time.perf_counter() - start)
    expected = torch.stack(answers).mean(dim=0).numpy()
    # A query is over when its slowest party is; the first one also warms up.
    slowest = [max(times) for times in zip(*taken, strict=True)]
    return {
        "owners": len(models),
        "rows": rows,
        "open_s": max(opened),
        "first_s": slowest[0],
        "warm_s": statistics.median(slowest[1:]),
        "warm_max_s": max(slowest[1:]),
        "clear_s": statistics.median(clear),
        "seal_s": seal_s,
        "max_error": float(np.abs(totals - expected).max()),
        "query_bytes": len(shared_query[0]),
        "weight_bytes": len(shared_weights[0][0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=10, help="warm queries of each case")
    parser.add_argument("--rtt-ms", type=float, default=0.0, help="delay between two parties")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    missing = [m for m in ("spu", "jax", "torch") if importlib.util.find_spec(m) is None]
    if missing:
        print(
            f"{', '.join(missing)} not installed. In a virtual environment of Python 3.11:\n"
            "  pip install 'fedinfer-flower[mpc,torch]'"
        )
        return
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    average, maximum = torch.nn.AvgPool2d, torch.nn.MaxPool2d
    cases = [
        ("LeNet, average pooling", [lenet(average)], 1),
        ("LeNet, average pooling", [lenet(average)], 16),
        ("LeNet, max pooling", [lenet(maximum)], 1),
        ("3 LeNets, mean logit", [lenet(average) for _ in range(3)], 1),
    ]
    found = []
    for name, models, rows in cases:
        found.append(
            {
                "network": name,
                **measure(models, rows=rows, n_queries=options.queries, rtt_ms=options.rtt_ms),
            }
        )
    if options.json:
        print(json.dumps(found))
        return
    print(
        "| network | rows | open, s | warm query, s | slowest, s | clear, s | ratio | max error"
        " | query, bytes a party | weights, bytes a party |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in found:
        print(
            f"| {row['network']} | {row['rows']} | {row['open_s']:.1f} | {row['warm_s']:.3f} |"
            f" {row['warm_max_s']:.3f} | {row['clear_s']:.5f} |"
            f" {row['warm_s'] / row['clear_s']:.0f} | {row['max_error']:.1e} |"
            f" {row['query_bytes']} | {row['weight_bytes']} |"
        )


if __name__ == "__main__":
    main()
