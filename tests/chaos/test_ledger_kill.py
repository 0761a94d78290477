"""Kill -9 at any moment, and two at once: no money is made, none is paid twice.

As a script it is the load of the tests and of the benchmark. ``SCRIPT crash URL FOLDER STEPS
SEED`` forks pairs of children that do random things to one ledger, kills each without
warning, and compares the book with what the children were told was done. ``SCRIPT race URL
FOLDER JOBS SEED`` lets four children settle the same jobs at the same moment.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedinfer_flower.errors import LedgerError
from fedinfer_flower.incentives.ledger import Escrow, Ledger, Outcome, Payee, Stakes, Status
from fedinfer_flower.incentives.payments.base import Payout
from fedinfer_flower.receipts.batches import BatchRecord, CohortMember
from fedinfer_flower.receipts.receipt import Receipt
from fedinfer_flower.receipts.statement import SiteStatement, cohort_digest
from fedinfer_flower.wire.identity import Identity

NOW = 1_900_000_000
COORDINATOR = Identity.generate()
SITES = {name: Identity.generate() for name in ("east", "north")}
PAYEES = [Payee(key_id=site.key_id, account=name) for name, site in SITES.items()]
FEE = 1_000
N_JOBS = 40
"""Jobs of one pair of children: few, so that they come upon each other's."""
LIFE_S = 0.5
MIN_PAIRS = 5
"""Pairs that are killed, however quick the machine."""
N_RACERS = 4


def receipt_of(job: str) -> Receipt:
    """Return a receipt of a job of one batch that both sites answered."""
    keys = [site.key_id for site in SITES.values()]
    statements = [
        SiteStatement(
            query_id=f"{job}-0",
            run_id=1,
            site=name,
            site_key_id=site.key_id,
            querier_key_id="ab" * 32,
            protection="plain",
            rule="mean-probability",
            n_rows=1,
            n_fresh_rows=1,
            n_sites_asked=2,
            cohort_digest=cohort_digest(keys),
            min_cohort=1,
            profile_commitment="cd" * 32,
            payload_digest="ef" * 32,
            issued_at=NOW,
        ).sign(site)
        for name, site in SITES.items()
    ]
    return Receipt.for_job(
        statements,
        cohort=[CohortMember(name=n, key_id=s.key_id) for n, s in SITES.items()],
        batches=[BatchRecord(query_id=f"{job}-0", n_rows=1, answered=tuple(SITES), dropped=())],
        issued_at=NOW,
        coordinator=COORDINATOR,
    )


class Load:
    """Everything that can be done to a ledger, at random; the clock is past every deadline."""

    def __init__(self, url: str, rng: random.Random, prefix: str) -> None:
        self.ledger = Ledger(url, clock=lambda: NOW)
        self.escrow = Escrow(self.ledger, coordinator_key_id=COORDINATOR.key_id)
        self.stakes = Stakes(self.ledger)
        self.rng, self.prefix = rng, prefix
        self.acts: tuple[Callable[[str, str], object], ...] = (
            self.open,
            self.open,
            self.open,
            self.release,
            self.release,
            self.refund,
            lambda job, _: self.escrow.dispute(job, reason_code="wrong-score", by="eve"),
            self.resolve,
            lambda _, key: self.ledger.deposit("clinic", FEE, key=key),
            lambda _, key: self.ledger.withdraw("east", 7, key=key),
            lambda _, key: self.ledger.post("bonus", key, {"clinic": -3, "north": 3}),
            lambda _, key: self.stakes.lock("north", 5, key=key, until=NOW),
            lambda _, key: self.stakes.give_back("north", 2, key=key),
            self.slash,
        )

    def open(self, job: str, _: str) -> object:
        """Put a job's fee in escrow."""
        return self.escrow.open(
            job, "clinic", fee=FEE, deadline=NOW, query_ids=[f"{job}-0"], arbiter="board"
        )

    def release(self, job: str, _: str) -> object:
        """Pay a job out, always in the same shares."""
        payout = Payout(paid=(600, 300), refund=100, fee=FEE)
        return self.escrow.release(job, payout, receipt_of(job), payees=PAYEES)

    def refund(self, job: str, _: str) -> object:
        """Give a job's fee back."""
        return self.escrow.refund(job)

    def resolve(self, job: str, _: str) -> object:
        """End a dispute, one way or the other."""
        outcome = self.rng.choice(list(Outcome))
        return self.escrow.resolve(job, by="board", outcome=outcome, deadline=NOW + 1)

    def slash(self, _: str, key: str) -> object:
        """Charge a stake."""
        return self.stakes.slash("north", 1, to="fund", key=key, reason_code="bad-receipt")

    def steps(self, log: int) -> Iterator[None]:
        """Do things for ever; one yield an act. `log` takes what was done for certain."""
        number = 0
        while True:
            number += 1
            job = f"{self.prefix}j{self.rng.randrange(N_JOBS)}"
            act = self.rng.choice(self.acts)
            # Some keys come again: in this life, in the other child's, or after a crash.
            key = f"{self.prefix}k{self.rng.randrange(10**6)}"
            for _ in range(2 if self.rng.random() < 0.1 else 1):
                try:
                    entry = act(job, key)
                except LedgerError:
                    yield
                    continue
                # One write, so a line is there whole or not at all.
                os.write(log, f"{entry.draft.key} {entry.hash}\n".encode())
                yield


def work_and_be_killed(url: str, folder: Path, prefix: str, seed: int) -> None:
    """Fork two children on one ledger; kill each at a random moment."""
    rng = random.Random(seed)  # noqa: S311
    pids = []
    for child in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
                log, count = (os.open(folder / n, append, 0o600) for n in ("done", "steps"))
                load = Load(url, random.Random(seed * 2 + child), prefix)  # noqa: S311
                for _ in load.steps(log):
                    os.write(count, b".")
            finally:
                os._exit(3)  # only an error leads here
        pids.append(pid)
    for pid in pids:
        time.sleep(rng.uniform(0.0, LIFE_S))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            raise SystemExit("a child failed by itself")


def crash(url: str, folder: Path, n_steps: int, seed: int) -> dict[str, object]:
    """Crash until so many steps are done; say what the book has come to."""
    ledger = Ledger(url, clock=lambda: NOW)
    ledger.migrate()
    ledger.deposit("clinic", 50 * FEE, key="first")
    steps, generation, inside_a_write = folder / "steps", 0, 0
    steps.touch()
    journal = Path(url.removeprefix("sqlite:///") + "-journal")
    while generation < MIN_PAIRS or steps.stat().st_size < n_steps:
        work_and_be_killed(url, folder, f"g{generation // 8}", seed + generation)
        generation += 1
        # The journal of a write that was cut short; whoever opens the file next undoes it.
        inside_a_write += journal.exists()
    return {
        "steps": steps.stat().st_size,
        "kills": 2 * generation,
        "inside_a_write": inside_a_write,
        **outcome_of(ledger, (folder / "done").read_text().split("\n")[:-1]),
    }


def outcome_of(ledger: Ledger, done: list[str]) -> dict[str, object]:
    """Compare a book with what was said to be done."""
    found = ledger.verify()
    entries = {e.draft.key: e for e in ledger.entries()}
    paid = Counter(
        claim for e in entries.values() for claim in e.draft.claims if claim.startswith("settled:")
    )
    ended = Counter(
        e.draft.subject for e in entries.values() if e.draft.kind in {"release", "refund"}
    )
    # Worked out from the amounts alone, not from the balances that the book keeps.
    sums: Counter[str] = Counter()
    for entry in entries.values():
        sums.update(entry.draft.amounts)
    outside = sum(
        e.draft.amounts["external"]
        for e in entries.values()
        if e.draft.kind in {"deposit", "withdraw"}
    )
    lost = [line for line in done if getattr(entries.get(line.split()[0]), "hash", "") not in line]
    return {
        "verifies": found.ok,
        "what": found.first_bad.what if found.first_bad else "",
        "entries": found.n_entries,
        "kinds": dict(Counter(e.draft.kind for e in entries.values())),
        "sum_of_all_postings": sum(sums.values()),
        "differs_from_amounts": sums != Counter(found.balances),
        "external_beyond_deposits": sums["external"] - outside,
        "accounts_below_zero": sum(b < 0 for a, b in sums.items() if a != "external"),
        "query_ids_settled_twice": sum(n > 1 for n in paid.values()),
        "fees_ended_twice": sum(n > 1 for n in ended.values()),
        "acknowledged": len(done),
        "acknowledged_and_lost": len(lost),
    }


def race(url: str, folder: Path, n_jobs: int, seed: int) -> dict[str, object]:
    """Let children settle the same jobs at once, some by release and some by refund."""
    ledger = Ledger(url, clock=lambda: NOW)
    ledger.migrate()
    ledger.deposit("clinic", n_jobs * FEE, key="first")
    jobs = [f"race{number}" for number in range(n_jobs)]
    load = Load(url, random.Random(seed), "")  # noqa: S311
    for job in jobs:
        load.open(job, "")
    start = time.monotonic() + 0.2
    pids = []
    for child in range(N_RACERS):
        pid = os.fork()
        if pid == 0:
            code = 3
            try:
                log = os.open(folder / f"done{child}", os.O_WRONLY | os.O_CREAT, 0o600)
                racer = Load(url, random.Random(seed + child), "")  # noqa: S311
                time.sleep(max(0.0, start - time.monotonic()))
                for job in jobs:
                    act = racer.refund if (racer.rng.random() < 0.5) else racer.release
                    try:
                        entry = act(job, "")
                    except LedgerError as exc:
                        if "already" not in str(exc):
                            raise
                        continue
                    os.write(log, f"{entry.draft.key} {entry.hash}\n".encode())
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    for pid in pids:
        if os.waitpid(pid, 0)[1] != 0:
            raise SystemExit("a racer failed by itself")
    lines = [(folder / f"done{child}").read_text().split("\n")[:-1] for child in range(N_RACERS)]
    state = [load.escrow.state(job).status for job in jobs]
    return {
        "released": state.count(Status.RELEASED),
        "refunded": state.count(Status.REFUNDED),
        "acknowledged_by_child": [len(mine) for mine in lines],
        **outcome_of(ledger, [line for mine in lines for line in mine]),
    }


# -- tests -------------------------------------------------------------------------------

_CLUSTER = Path(__file__).parents[1] / "incentives" / "ledger" / "cluster.py"


def _cluster_module():
    spec = importlib.util.spec_from_file_location("ledger_cluster", _CLUSTER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def database(dialect: str, folder: Path, *, durable: bool = False) -> Iterator[str]:
    """Yield the URL of an empty database."""
    if dialect == "sqlite":
        yield f"sqlite:///{folder}/ledger.db"
        return
    module = _cluster_module()
    with module.cluster(durable=durable) as socket:
        yield module.new_schema(socket, "ledger")


def run_load(mode: str, url: str, folder: Path, size: int, seed: int = 1) -> dict:
    """Run this file as a script, in a process without threads that can fork."""
    done = subprocess.run(
        [sys.executable, __file__, mode, url, str(folder), str(size), str(seed)],
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def assert_sound(found: dict) -> None:
    assert found["verifies"], found["what"]
    assert found["sum_of_all_postings"] == 0
    assert not found["differs_from_amounts"]
    assert found["external_beyond_deposits"] == 0
    assert found["accounts_below_zero"] == 0
    assert found["query_ids_settled_twice"] == 0
    assert found["fees_ended_twice"] == 0
    assert found["acknowledged_and_lost"] == 0


def require(dialect: str) -> None:
    if dialect == "postgresql" and (reason := _cluster_module().why_not()):
        pytest.skip(reason)


@contextmanager
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a folder: kill -9 does not ask for a disk's sync."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.exists() else tmp_path) as name:
        yield Path(name)


@pytest.mark.parametrize(("dialect", "n_steps"), [("sqlite", 1_000), ("postgresql", 300)])
def test_no_kill_makes_money_or_pays_twice(dialect: str, n_steps: int, tmp_path: Path) -> None:
    require(dialect)
    with quick_folder(tmp_path) as folder, database(dialect, folder) as url:
        found = run_load("crash", url, folder, n_steps)
    assert_sound(found)
    # The load was one that could have failed.
    assert found["steps"] >= n_steps
    assert found["kills"] >= 2 * MIN_PAIRS
    assert found["acknowledged"] > n_steps // 20
    kinds = found["kinds"]
    assert {"open-escrow", "release", "refund", "dispute", "lock-stake"} <= set(kinds)


@pytest.mark.parametrize(("dialect", "n_jobs"), [("sqlite", 30), ("postgresql", 30)])
def test_processes_that_settle_at_once_pay_once(dialect: str, n_jobs: int, tmp_path: Path) -> None:
    require(dialect)
    with quick_folder(tmp_path) as folder, database(dialect, folder) as url:
        found = run_load("race", url, folder, n_jobs)
    assert_sound(found)
    assert found["released"] + found["refunded"] == n_jobs
    assert found["released"] > 0
    assert found["refunded"] > 0
    # More than one child was at it, and more acts were tried than could be done.
    assert sum(n > 0 for n in found["acknowledged_by_child"]) > 1


if __name__ == "__main__":
    mode_, url_, folder_, size_, seed_ = sys.argv[1:]
    work = {"crash": crash, "race": race}[mode_]
    sys.stdout.write(json.dumps(work(url_, Path(folder_), int(size_), int(seed_))))
