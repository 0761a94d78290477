"""The privacy budget: its epsilon against opacus, its milliseconds, and what crashes do to it.

python benchmarks/budget.py [--json FILE] [--steps 10000]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from fedinfer_flower.privacy.accountant import Accountant
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.privacy.site_budget import BudgetPolicy, SiteBudget

CASES = tuple(
    itertools.product((1.0, 2.0, 5.0, 10.0, 50.0), (1, 10, 100, 1000), (1e-5, 1e-6))
)  # noise over sensitivity, rows, delta
N_WARM, N_TIMED = 50, 1000
CRASHES = Path(__file__).parents[1] / "tests" / "chaos" / "test_budget_crashes.py"


def against_opacus() -> dict[str, float]:
    """Compare with both ends of the interval that opacus' PRV accountant works out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant

    ours, above, below = [], [], []
    for noise, n_rows, delta in CASES:
        prv = PRVAccountant()
        prv.history = [(noise, 1.0, n_rows)]
        found = prv._get_dprv(eps_error=0.01, delta_error=delta / 1000)
        lower, _, upper = found.compute_epsilon(delta, delta / 1000, 0.01)
        charge = Charge.gaussian(1.0 / noise, n_rows)
        start = time.perf_counter()
        epsilon = Accountant(composition="gaussian").epsilon(charge, delta)
        ours.append(1e3 * (time.perf_counter() - start))
        above.append(float(upper) - epsilon)
        below.append(epsilon - float(lower))
    return {
        "cases": len(CASES),
        "max_abs_difference": max(map(abs, above)),
        "min_reported_minus_ours": min(above),
        "max_reported_minus_ours": max(above),
        "min_ours_minus_lower_end": min(below),
        "median_ms": statistics.median(ours),
    }


def reserve_and_commit(folder: Path, n_before: int) -> dict[str, float]:
    """Time one answer's reserve and commit on this disk, after `n_before` others."""
    policy = BudgetPolicy(epsilon_per_querier=100.0, epsilon_global=100.0)
    budget = SiteBudget(folder / f"{n_before}.db", policy)
    cost, times = Charge.gaussian(0.01, 1), []
    for number in range(n_before + N_WARM + N_TIMED):
        start = time.perf_counter()
        taken = budget.reserve(
            querier="ab" * 32, query_id=f"{number:032x}", charge_querier=cost, charge_global=cost
        )
        budget.commit(taken)
        times.append(1e3 * (time.perf_counter() - start))
    timed = sorted(times[-N_TIMED:])
    return {"median_ms": statistics.median(timed), "p99_ms": timed[int(0.99 * N_TIMED)]}


def crashes(n_steps: int) -> dict[str, float]:
    """Kill processes over budgets on this disk."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, str(CRASHES), folder, str(n_steps), "1"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=10_000)
    options = parser.parse_args()
    found = {"opacus": against_opacus()}
    with tempfile.TemporaryDirectory() as folder:
        found["first answers"] = reserve_and_commit(Path(folder), 0)
        found["after 3000 answers"] = reserve_and_commit(Path(folder), 3_000)
    found["crashes"] = crashes(options.steps)
    print("| part | figure | value |\n|---|---|---|")
    for part, figures in found.items():
        for name, value in figures.items():
            print(f"| {part} | {name.replace('_', ' ')} | {value:.4g} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
