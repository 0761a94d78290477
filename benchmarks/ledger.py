"""The ledger: milliseconds an entry, what kill -9 does to it, and many settling at once.

python benchmarks/ledger.py [--json FILE] [--steps 10000] [--jobs 300] [--dialects sqlite ...]

PostgreSQL runs as a private cluster, durable (fsync), on this disk; it is left out, and that is
said, where there is no server or driver.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

from fedinfer_flower.incentives.ledger import Ledger

N_TIMED = 300
GROWTH = 5_000
LOAD = Path(__file__).parents[1] / "tests" / "chaos" / "test_ledger_kill.py"


def load_module() -> ModuleType:
    """Return the load of the chaos test, which is this benchmark's too."""
    spec = importlib.util.spec_from_file_location("ledger_load", LOAD)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def timed(ledger: Ledger, prefix: str) -> dict[str, float]:
    """Time posts one by one: from the call until the entry is on disk."""
    times = []
    for number in range(N_TIMED):
        start = time.perf_counter()
        ledger.post("fee", f"{prefix}{number}", {"clinic": -1, f"site {number % 7}": 1})
        times.append(1e3 * (time.perf_counter() - start))
    times.sort()
    return {"median_ms": statistics.median(times), "p99_ms": times[int(0.99 * N_TIMED)]}


def latency(url: str) -> dict[str, float]:
    """Time posting at the start and after thousands of entries, then verifying them."""
    ledger = Ledger(url)
    ledger.migrate()
    ledger.deposit("clinic", 10**9, key="first")
    timed(ledger, "warm")
    early = timed(ledger, "early")
    with ledger.writing() as book:
        from fedinfer_flower.incentives.ledger.entry import Draft

        for number in range(GROWTH):
            draft = Draft(kind="fee", key=f"g{number}", amounts={"clinic": -1, "north": 1})
            book.append(draft)
    late = timed(ledger, "late")
    start = time.perf_counter()
    found = ledger.verify()
    seconds = time.perf_counter() - start
    assert found.ok
    return {
        "post_median_ms": early["median_ms"],
        "post_p99_ms": early["p99_ms"],
        f"post_median_ms_after_{GROWTH}_entries": late["median_ms"],
        f"post_p99_ms_after_{GROWTH}_entries": late["p99_ms"],
        "verified_entries_a_second": found.n_entries / seconds,
    }


def settling(load: ModuleType, url: str) -> dict[str, float]:
    """Time one job's way through escrow, with a receipt of two sites."""
    ledger = Ledger(url, clock=lambda: load.NOW)
    ledger.deposit("clinic", 10**9, key="more")
    work = load.Load(url, load.random.Random(1), "")
    receipts = {f"timed{number}": load.receipt_of(f"timed{number}") for number in range(60)}
    opening, releasing = [], []
    for job, receipt in receipts.items():
        start = time.perf_counter()
        work.open(job, "")
        opening.append(1e3 * (time.perf_counter() - start))
        payout = load.Payout(paid=(600, 300), refund=100, fee=load.FEE)
        start = time.perf_counter()
        work.escrow.release(job, payout, receipt, payees=load.PAYEES)
        releasing.append(1e3 * (time.perf_counter() - start))
    return {
        "open_escrow_median_ms": statistics.median(opening),
        "release_with_receipt_median_ms": statistics.median(releasing),
    }


def chaos(mode: str, url: str, folder: Path, size: int) -> dict[str, object]:
    """Run the chaos load in a process of its own, which forks."""
    folder.mkdir()
    words = [sys.executable, str(LOAD), mode, url, str(folder), str(size), "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--dialects", nargs="*", default=["sqlite", "postgresql"])
    options = parser.parse_args()
    load, found = load_module(), {}
    for dialect in options.dialects:
        if dialect == "postgresql" and (reason := load._cluster_module().why_not()):
            found[dialect] = {"left_out": reason}
            continue
        parts = {}
        for part in ("latency", "crash", "race"):
            with (
                tempfile.TemporaryDirectory() as name,
                load.database(dialect, Path(name), durable=True) as url,
            ):
                folder = Path(name) / "load"
                if part == "latency":
                    parts[part] = latency(url) | settling(load, url)
                else:
                    size = options.steps if part == "crash" else options.jobs
                    parts[part] = chaos(part, url, folder, size)
        found[dialect] = parts
    print("| database | part | figure | value |\n|---|---|---|---|")
    for dialect, parts in found.items():
        for part, figures in parts.items():
            for name, value in figures.items() if isinstance(figures, dict) else [("", figures)]:
                shown = f"{value:.4g}" if isinstance(value, float) else value
                print(f"| {dialect} | {part} | {name.replace('_', ' ')} | {shown} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
