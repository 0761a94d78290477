"""A query round beside a bare Flower round that moves the same bytes; LocalGrid's rate.

python benchmarks/overhead.py
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedinfer_flower import FedEnsemble, InferenceMod, LocalModel
from fedinfer_flower.simulation.engine import run_on_engine
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.pull_loop import stream_replies

N_SITES, N_ROUNDS, N_QUERIES, N_CLASSES = 10, 40, 256, 10


def load_model(context: object) -> LocalModel:
    uniform = np.full((1, N_CLASSES), 1 / N_CLASSES)
    return LocalModel(
        model=lambda rows: np.repeat(uniform, len(rows), axis=0), classes=range(N_CLASSES)
    )


def make_app() -> ClientApp:
    app = InferenceMod(load_model).attach(ClientApp())

    @app.query("bare")
    def bare(message: Message, context: object) -> Message:
        data = bytes(4 * N_QUERIES * N_CLASSES)
        return Message(bytes_content(data), reply_to=message)

    return app


def bytes_content(data: bytes) -> RecordDict:
    array = Array(dtype="uint8", shape=(len(data),), stype="raw", data=data)
    return RecordDict({"bare": ArrayRecord({"bytes": array})})


def bare_round(grid: Grid, content: RecordDict, nodes: list[int]) -> float:
    messages = [Message(content, node, "query.bare") for node in nodes]
    start = time.monotonic()
    replies = list(grid.send_and_receive(messages, timeout=60))
    assert len(replies) == len(nodes)
    return time.monotonic() - start


def on_engine() -> None:
    server_app = ServerApp()
    inputs = np.random.default_rng(0).random((N_QUERIES, 64))

    @server_app.main()
    def main(grid: Grid, context: object) -> None:
        strategy = FedEnsemble(rule="mean-probability", min_available_nodes=N_SITES)
        strategy.start(grid, inputs)
        nodes = sorted(grid.get_node_ids())
        content = bytes_content(inputs.tobytes())
        from fedinfer_flower.querier import Querier

        ours: list[float] = []
        bare: list[float] = []
        for number in range(N_ROUNDS):  # turn by turn, so that drift hits both alike
            bare.append(bare_round(grid, content, nodes))
            start = time.monotonic()
            job = Querier(protection="plain").ask(inputs, clear=True)
            strategy._run_batch(grid, f"{job.job_id}-{number}", inputs)
            ours.append(time.monotonic() - start)
        Path(sys.argv[2]).write_text(json.dumps({"ours": ours, "bare": bare}))

    run_on_engine(server_app, make_app(), num_supernodes=N_SITES)


def local_rate() -> float:
    inputs = np.zeros((1, 4))
    with LocalGrid(make_app(), num_supernodes=N_SITES) as grid:
        strategy = FedEnsemble(rule="mean-probability", min_available_nodes=N_SITES)
        strategy.start(grid, inputs)
        rounds = 100
        start = time.monotonic()
        for number in range(rounds):
            strategy._run_batch(grid, f"rate-{number}", inputs)
        ours = rounds * N_SITES / (time.monotonic() - start)
        start = time.monotonic()
        content = bytes_content(bytes(64))
        for _ in range(rounds):
            messages = [Message(content, n, "query.bare") for n in grid.get_node_ids()]
            assert len(list(stream_replies(grid, messages, timeout_s=60, poll_s=0.001))) == N_SITES
        bare = rounds * N_SITES / (time.monotonic() - start)
    print(f"LocalGrid: {bare:.0f} bare messages a second, {ours:.0f} whole answers a second")
    return bare


def main() -> None:
    logging.disable(logging.WARNING)
    if len(sys.argv) == 3:
        on_engine()
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        command = [sys.executable, __file__, "engine", str(out)]
        subprocess.run(command, check=True, capture_output=True)
        times = json.loads(out.read_text())
    ours, bare = statistics.median(times["ours"]), statistics.median(times["bare"])
    print(
        f"engine, {N_SITES} sites, median of {N_ROUNDS} rounds: bare Flower {1e3 * bare:.0f} ms,"
        f" ours {1e3 * ours:.0f} ms, ratio {ours / bare:.2f}"
    )
    local_rate()


if __name__ == "__main__":
    main()
