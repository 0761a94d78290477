"""What a query costs from an HTTP client through gateway, SuperLink and sites, and back.

python benchmarks/serving.py [--json FILE] [--quick] [--sites 1,3] [--queries 40]

A whole deployment of processes on loopback for every line: SuperLink, sites with a torch model
of 5 MB, gateway with audit log and outbox on disk. "memory" and "file" are where the SuperLink
keeps its state: in memory is Flower's default, and a file outlives a restart. "stock" has
Flower's own SuperNode, which starts a process for every message.

"gateway adds" is the mean of what the client waited less the mean of the rounds of sites, as
the gateway's own metrics have them. "processor" is user and system time of all processes but
this one, per query, for one client: unlike the seconds it hardly depends on what else the
machine does. The load average stands beside each line.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from fedinfer_flower.simulation.loopback import Deployment, SiteSpec
from fedinfer_flower.simulation.loopback.models import held_out_digits

Row = dict[str, Any]

ROWS = 1000
CLIENTS = 8
LOADER = "fedinfer_flower.simulation.loopback.models:digits_network"
MODELS = """
[models.digits]
rule = "mean-probability"
protection = "plain"
timeout-s = 60.0
"""
ANY_CODE = f'[code]\napp = "fab"\nfab-hashes = ["{"0" * 64}"]\n'
"""A stock SuperNode runs the app that the SuperLink sends, and checks no hash."""
P50_S = {1: 0.15, 3: 0.5}
P95_S = {1: 0.3}
TIMES_FASTER, ADDS_S, PER_SECOND, TIMES_BATCH = 25.0, 0.05, 20.0, 2.0


class Client:
    """One caller with one connection, that asks new rows every time."""

    def __init__(self, deployment: Deployment, key: str, *, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._rows, _ = held_out_digits(1)
        self._http = httpx.Client(
            base_url=deployment.gateway_url,
            verify=deployment.trust(),
            headers={"Authorization": f"Bearer {key}"},
            timeout=120.0,
        )

    def ask(self, n_rows: int = 1) -> float:
        """Return the seconds that a query took."""
        noise = self._rng.normal(scale=0.01, size=(n_rows, *self._rows.shape[1:]))
        rows = (self._rows + noise).astype(np.float32)
        body = io.BytesIO()
        np.save(body, rows)
        begun = time.perf_counter()
        answer = self._http.post(
            "/v1/query",
            params={"model": "digits", "wait_s": 60},
            content=body.getvalue(),
            headers={"Content-Type": "application/octet-stream"},
        )
        seconds = time.perf_counter() - begun
        if answer.status_code != 200:
            raise SystemExit(f"HTTP {answer.status_code}: {answer.text[:300]}")
        return seconds

    def rounds(self) -> tuple[float, float]:
        """Return (seconds, number) of the rounds of sites so far."""
        text = self._http.get("/metrics").text
        found = [
            sum(map(float, re.findall(rf"^\w*round_seconds_{what}\{{.*\}} (\S+)", text, re.M)))
            for what in ("sum", "count")
        ]
        return found[0], found[1]

    def close(self) -> None:
        """Let the connection go."""
        self._http.close()


def measure(
    *, sites: int, secure: bool, durable: bool, stock: bool, queries: int, seconds: float
) -> Row:
    """Return one line of the table."""
    with tempfile.TemporaryDirectory() as name:
        deployment = Deployment(
            Path(name) / "run",
            sites=[
                SiteSpec(name=f"site-{i}", loader=LOADER, policy=ANY_CODE if stock else "")
                for i in range(sites)
            ],
            models=MODELS,
            secure=secure,
            stock=stock,
            durable=durable,
        )
        with deployment:
            key = deployment.api_key("bench", scopes=("query", "metrics"))
            found = measured(
                deployment, key, queries=queries, seconds=seconds, batches=1 if stock else 5
            )
    return {"sites": sites, "tls": secure, "durable": durable, "stock": stock} | found


def measured(
    deployment: Deployment, key: str, *, queries: int, seconds: float, batches: int
) -> Row:
    """Return what one client, a large query, and several clients see."""
    client = Client(deployment, key, seed=1)
    for _ in range(1 if seconds <= 0 else 6):  # connections, and the model
        client.ask()
    pids = sorted(children(os.getpid()))
    load, processor, rounds = os.getloadavg()[0], cpu_seconds(pids), client.rounds()
    waited = [client.ask() for _ in range(queries)]
    row: Row = {"load": load, "seconds": waited}
    row["processor_s"] = (cpu_seconds(pids) - processor) / queries
    after = client.rounds()
    if after[1] > rounds[1]:
        round_s = (after[0] - rounds[0]) / (after[1] - rounds[1])
        row["adds_s"] = statistics.mean(waited) - round_s
    row["batch_s"] = [client.ask(ROWS) for _ in range(batches)]
    client.close()
    row["per_second"] = throughput(deployment, key, seconds=seconds) if seconds > 0 else None
    return row


def throughput(deployment: Deployment, key: str, *, seconds: float) -> float:
    """Return the single queries a second that eight clients get answered."""
    end = time.monotonic() + seconds
    done = [0] * CLIENTS

    def ask(index: int) -> None:
        client = Client(deployment, key, seed=100 + index)
        while time.monotonic() < end:
            client.ask()
            done[index] += 1
        client.close()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(CLIENTS)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.monotonic() - begun)


def children(pid: int) -> Iterator[int]:
    """Give the processes that a process has started, and those that they have."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = [int(one) for one in task.read_text().split()]
        except OSError:
            continue
        for one in found:
            yield one
            yield from children(one)


def cpu_seconds(pids: list[int]) -> float:
    """Return the processor time of processes and of those that they have waited for."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def print_tables(rows: list[Row]) -> None:
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}\n")
    print(
        "| sites | SuperNode | TLS | SuperLink's state | load | n | p50, s | p95, s | least, s"
        f" | gateway adds, s | processor, s | {ROWS} rows, s | {CLIENTS} clients, 1/s |"
    )
    print("|---" * 13 + "|")
    for row in rows:
        waited = row["seconds"]
        print(
            f"| {row['sites']} | {'stock' if row['stock'] else 'warm'}"
            f" | {'on' if row['tls'] else 'off'} | {'file' if row['durable'] else 'memory'}"
            f" | {row['load']:.1f} | {len(waited)} | {statistics.median(waited):.3f}"
            f" | {quantile(waited, 0.95):.3f} | {min(waited):.3f}"
            f" | {figure(row.get('adds_s'), '.3f')} | {row['processor_s']:.3f}"
            f" | {statistics.median(row['batch_s']):.3f} | {figure(row['per_second'], '.1f')} |"
        )
    print()
    stock = {row["sites"]: statistics.median(row["seconds"]) for row in rows if row["stock"]}
    for row in rows:
        if not row["stock"]:
            print_targets(row, stock.get(row["sites"]))


def print_targets(row: Row, stock_s: float | None) -> None:
    p50, p95 = statistics.median(row["seconds"]), quantile(row["seconds"], 0.95)
    state = "file" if row["durable"] else "memory"
    where = f"{row['sites']} site(s), TLS {'on' if row['tls'] else 'off'}, {state}"
    judge(f"{where}: p50 {p50:.3f} s", p50, P50_S.get(row["sites"]))
    judge(f"{where}: p95 {p95:.3f} s", p95, P95_S.get(row["sites"]))
    if stock_s is not None and row["sites"] == 1:
        judge(f"{where}: {stock_s / p50:.0f} times faster", p50 / stock_s, 1 / TIMES_FASTER)
    if "adds_s" in row:
        judge(f"{where}: the gateway adds {row['adds_s']:.3f} s", row["adds_s"], ADDS_S)
    share = statistics.median(row["batch_s"]) / p50
    judge(f"{where}: {ROWS} rows take {share:.2f} of one", share, TIMES_BATCH)
    if row["per_second"]:
        many = row["per_second"]
        judge(f"{where}: {CLIENTS} clients get {many:.1f} a second", -many, -PER_SECOND)


def judge(what: str, value: float, most: float | None) -> None:
    if most is not None:
        print(f"- {what}: {'met' if value <= most else 'MISSED'}")


def cases(options: argparse.Namespace) -> Iterator[Row]:
    if options.quick:
        yield {"sites": 1, "secure": False, "durable": False, "stock": False}
        return
    for sites in map(int, options.sites.split(",")):
        if options.stock_queries:
            yield {"sites": sites, "secure": False, "durable": False, "stock": True}
        for secure, durable in ((False, False), (True, False), (True, True)):
            yield {"sites": sites, "secure": secure, "durable": durable, "stock": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one line, few queries")
    parser.add_argument("--sites", default="1,3")
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--stock-queries", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="with eight clients")
    options = parser.parse_args()
    rows: list[Row] = []
    for case in cases(options):
        queries = options.stock_queries if case["stock"] else options.queries
        seconds = 0.0 if case["stock"] else options.seconds
        if options.quick:
            queries, seconds = 5, 1.0
        rows.append(measure(**case, queries=queries, seconds=seconds))
        if options.json:
            options.json.write_text(json.dumps(rows, indent=2))
    print_tables(rows)


if __name__ == "__main__":
    main()
