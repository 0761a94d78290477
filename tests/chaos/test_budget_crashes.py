"""Kill -9 at any moment: a budget may lose by it, and never gains.

As a script it is the load of the test and of the benchmark: ``SCRIPT FOLDER STEPS SEED``.
It forks children that reserve, commit, cancel and release in an endless loop over one
budget, kills each without warning, and compares the file with what was released.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from fedinfer_flower.errors import BudgetExceededError
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.privacy.site_budget import BudgetPolicy, SiteBudget

POLICY = BudgetPolicy(epsilon_per_querier=4.0, epsilon_global=6.0)
QUERIERS = ("ann", "bob", "eve")
STEPS_A_BUDGET = 1000
LIFE_S = 0.12
"""Longest life of a child: a few dozen steps on a disk, hundreds in memory."""


def steps_of(budget: SiteBudget, child: int, rng: random.Random, log: int) -> Iterator[None]:
    """Answer queries for ever; one yield a step. `log` takes what was released."""
    number = 0
    while True:
        number += 1
        querier, mu = rng.choice(QUERIERS), rng.uniform(0.01, 0.12)
        charge = Charge.gaussian(mu, rng.randint(1, 3))
        try:
            taken = budget.reserve(
                querier=querier,
                query_id=f"{child}-{number}",
                charge_querier=charge,
                charge_global=charge,
            )
        except BudgetExceededError:
            yield
            continue
        yield
        if rng.random() < 0.4:
            budget.cancel(taken)
        else:
            budget.commit(taken)
            # The answer leaves: one write, so a line is there whole or not at all.
            os.write(log, f"{querier} {charge.mu_squared.hex()}\n".encode())
        yield


def live_and_be_killed(path: Path, child: int, seed: int, released: Path, steps: Path) -> None:
    """Fork a child that works on the budget, and kill it at a random moment."""
    rng = random.Random(seed)  # noqa: S311
    life_s = rng.uniform(0.0, LIFE_S)
    pid = os.fork()
    if pid == 0:
        try:
            append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            log, count = (os.open(file, append, 0o600) for file in (released, steps))
            for _ in steps_of(SiteBudget(path, POLICY), child, rng, log):
                os.write(count, b".")
        finally:
            os._exit(3)  # only an error leads here
    time.sleep(life_s)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        raise SystemExit("a child failed by itself")


def worst_of(path: Path, released: Path) -> tuple[float, float, float]:
    """Return the worst of all accounts.

    Sum of mu^2 that was released beyond what the file counts, epsilon spent beyond the cap
    (both negative if all is well), and the share of the cap that is spent.
    """
    truth: dict[str | None, Fraction] = dict.fromkeys((*QUERIERS, None), Fraction(0))
    if released.exists():
        for line in released.read_text().splitlines():
            querier, mu_squared = line.split()
            for account in (querier, None):
                truth[account] += Fraction(float.fromhex(mu_squared))
    budget = SiteBudget(path, POLICY)
    budget.verify()
    worst = [-math.inf] * 3
    for account, mu_squared in truth.items():
        cap = POLICY.epsilon_global if account is None else POLICY.epsilon_per_querier
        spent, _ = budget.spent(account)
        forgotten = float(mu_squared - Fraction(budget.total(account).mu_squared))
        worst = [
            max(pair) for pair in zip(worst, (forgotten, spent - cap, spent / cap), strict=True)
        ]
    return worst[0], worst[1], worst[2]


def crash_for(folder: Path, n_steps: int, seed: int) -> dict[str, float]:
    """Crash until so many steps are done, with a fresh budget every now and then."""
    done = crashes = left_open = inside_a_write = 0
    worst = [-math.inf] * 3
    steps = folder / "steps"
    while done < n_steps:
        generation = done // STEPS_A_BUDGET
        path, released = folder / f"{generation}.db", folder / f"{generation}.released"
        live_and_be_killed(path, crashes, seed + crashes, released, steps)
        crashes += 1
        # The journal of a write that was cut short; whoever opens the file next undoes it.
        inside_a_write += Path(f"{path}-journal").exists()
        done = steps.stat().st_size if steps.exists() else 0
        worst = [max(pair) for pair in zip(worst, worst_of(path, released), strict=True)]
        if done // STEPS_A_BUDGET > generation:
            left_open += SiteBudget.inspect(path).status()[0].n_open
    return {
        "steps": done,
        "crashes": crashes,
        "inside_a_write": inside_a_write,
        "left_open": left_open,
        "max_released_beyond_counted_mu_squared": worst[0],
        "max_spent_beyond_cap_epsilon": worst[1],
        "max_share_of_cap": worst[2],
    }


def test_no_crash_wins_budget_in_ten_thousand_steps(tmp_path: Path) -> None:
    # In memory where there is such a folder: kill -9 does not ask for a disk's sync.
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.exists() else tmp_path) as folder:
        done = subprocess.run(
            [sys.executable, __file__, folder, "10000", "1"],
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)

    assert found["steps"] >= 10_000
    assert found["max_released_beyond_counted_mu_squared"] <= 0.0
    # A cap is kept to nine digits.
    assert found["max_spent_beyond_cap_epsilon"] <= 1e-8
    # The load was one that could have failed: caps were reached, crashes hit open answers.
    assert found["max_share_of_cap"] > 0.95
    assert found["crashes"] > 20
    assert found["inside_a_write"] > 0
    assert found["left_open"] > 0


if __name__ == "__main__":
    folder_, n_steps_, seed_ = sys.argv[1:]
    sys.stdout.write(json.dumps(crash_for(Path(folder_), int(n_steps_), int(seed_))))
