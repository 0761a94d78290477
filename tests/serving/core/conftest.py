"""A gateway core over real sites in this process, whose behaviour tests can bend."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod, LocalModel
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.core import GatewayCore
from fedinfer_flower.serving.jobs import Job, JobKind, JobRequest
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire.arrays import array_to_bytes
from fedinfer_flower.wire.identity import Identity

N_FEATURES = 4
CLASSES = ("a", "b", "c")
ENDS_S = 30.0


def weights(partition: int) -> np.ndarray:
    return np.random.default_rng(100 + partition).standard_normal((N_FEATURES, len(CLASSES)))


def expected(rows: np.ndarray, partitions=range(3)) -> np.ndarray:
    """Return the mean probability of linear models, the rule of the tests."""
    total = np.zeros((len(rows), len(CLASSES)))
    for partition in partitions:
        logits = rows.astype(float) @ weights(partition)
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        total += scores / scores.sum(axis=1, keepdims=True)
    return total / len(partitions)


class Sites:
    """The sites of one test: what they were asked, and what they do instead of answering."""

    def __init__(self, n_sites: int = 3, *, prices: tuple[float, ...] = (), **options) -> None:
        self.asked: Counter[tuple[str, int]] = Counter()
        self.rows: list[int] = []
        self.instead: Callable | None = None
        self.poison: float | None = None
        self.hanging = threading.Event()
        self.calls = threading.Lock()
        self.n_sites = n_sites

        def load(context):
            partition = context.node_config["partition-id"]

            def model(rows):
                rows = np.asarray(rows, dtype=float)
                with self.calls:
                    self.rows.append(len(rows))
                if self.poison is not None and (rows == self.poison).any():
                    raise RuntimeError("a row that this model cannot take")
                return rows @ weights(partition)

            return LocalModel(
                model=model,
                classes=CLASSES,
                outputs="logits",
                price_per_query=prices[partition] if prices else 0.0,
            )

        mod = InferenceMod(load, share_counts="withheld", **options)
        app = ClientApp()
        for action in ("fi_hello", "fi_predict", "fi_recover", "fi_ping"):

            @app.query(action)
            def handle(message, context, action=action):
                partition = context.node_config["partition-id"]
                with self.calls:
                    self.asked[action, partition] += 1
                if self.instead is not None:
                    reply = self.instead(action, partition, message, context, mod.handle)
                    if reply is not None:
                        return reply
                return mod.handle(message, context)

        self.grid = LocalGrid(app, num_supernodes=n_sites, workers=n_sites + 2)

    def n_asked(self, action: str = "fi_predict") -> int:
        """How many messages of one kind all sites got together."""
        return sum(n for (name, _), n in self.asked.items() if name == action)

    def hang(self, action, partition, message, context, handle):
        """Do not answer questions at site 2 until the test is over."""
        if action == "fi_predict" and partition == 2:
            self.hanging.wait(ENDS_S)

    def close(self) -> None:
        self.hanging.set()
        self.grid.close()


class Bed:
    """Sites, and cores on the same state folder one after the other."""

    def __init__(self, folder) -> None:
        self.folder, self.identity = folder, Identity.generate()
        self.cores: list[GatewayCore] = []
        self.all_sites: list[Sites] = []

    def sites(self, n_sites: int = 3, **options) -> Sites:
        self.all_sites.append(Sites(n_sites, **options))
        return self.all_sites[-1]

    def core(self, sites: Sites, *, start: bool = True, run_id=None, audit=None, **tables):
        model = {"rule": "mean-probability", "min-sites": sites.n_sites}
        models = {n: model | dict(t) for n, t in tables.pop("models", {"m": {}}).items()}
        gateway = {"state": str(self.folder)} | tables.pop("gateway", {})
        core = GatewayCore(
            GatewayConfig.from_mapping({"gateway": gateway, "models": models} | tables),
            tables.pop("grid", sites.grid),
            run_id=sites.grid.run_id if run_id is None else run_id,
            identity=self.identity,
            audit=audit,
        )
        self.cores.append(core)
        if start:
            core.start()
            self.until(lambda: core.ready()[0])
        return core

    def until(self, true: Callable[[], bool], *, timeout_s: float = ENDS_S) -> None:
        end = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.002)

    def request(self, rows, *, owner="alice", model="m", timeout_s=20.0, key="") -> JobRequest:
        dtype, body = array_to_bytes(np.asarray(rows))
        return JobRequest(
            owner=owner,
            model=model,
            kind=JobKind.ROWS,
            body=body,
            facts={"dtype": dtype, "shape": list(np.shape(rows))},
            n_rows=len(rows),
            timeout_s=timeout_s,
            idempotency_key=key,
        )

    def sealed(self, data: bytes, n_rows: int, *, owner="alice", timeout_s=20.0) -> JobRequest:
        return JobRequest(
            owner=owner,
            model="m",
            kind=JobKind.SEALED,
            body=data,
            n_rows=n_rows,
            timeout_s=timeout_s,
        )

    def ended(self, core: GatewayCore, job: Job) -> Job:
        """Wait for a job's end, by listening as HTTP routes do."""
        done = threading.Event()
        stop = core.listen(
            job.job_id, owner=job.owner, tell=lambda j: done.set() if j.state.ended else None
        )
        assert done.wait(ENDS_S), "the job never ended"
        stop()
        return core.find(job.job_id, owner=job.owner)

    def close(self) -> None:
        for sites in self.all_sites:
            sites.hanging.set()
        for core in self.cores:
            core.close()
        for sites in self.all_sites:
            sites.close()


@pytest.fixture
def bed(tmp_path) -> Iterator[Bed]:
    bed = Bed(tmp_path)
    yield bed
    bed.close()


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((5, N_FEATURES))


@pytest.fixture
def mean_probability() -> Callable[..., np.ndarray]:
    return expected
