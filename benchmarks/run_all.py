"""Run every benchmark of docs/benchmarks.md, one after another, each in its own process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

SCRIPTS = (
    "protections.py",
    "secagg.py",
    "overhead.py",
    "he_scale.py",
    "kv_bytes.py",
    "kv_attacks.py",
    "kv_pairs.py",
    "kv_gate.py",
    "kv_rounds.py",
    "kv_latency.py",
    "kv_roundtrip.py",
    "decode.py",
    "accuracy.py",
    "dp_accuracy.py",
    "budget.py",
    "selection.py",
    "stacking.py",
    "uncertainty.py",
    "incentives.py",
    "settlement.py",
    "ledger.py",
    "gateway_core.py",
    "warm_path.py",
    "serving.py",
    "attacks.py",
    "dp_training.py",
    "gnmax.py",
    "split.py",
    "encrypted_query.py",
    "mpc.py",
)
# Packages of extras that not every machine can have.
NEEDS = {"mpc.py": "spu"}


def main() -> None:
    failed = []
    for script in SCRIPTS:
        package = NEEDS.get(script)
        if package and importlib.util.find_spec(package) is None:
            print(f"\n== {script}: left out, {package} is not installed", flush=True)
            continue
        print(f"\n== {script}", flush=True)
        done = subprocess.run([sys.executable, str(Path(__file__).parent / script)], check=False)
        if done.returncode:
            failed.append(script)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
