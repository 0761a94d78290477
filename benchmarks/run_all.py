"""Run every benchmark of docs/benchmarks.md, one after another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

for script in ("protections.py", "overhead.py", "he_scale.py", "accuracy.py"):
    print(f"\n== {script}", flush=True)
    subprocess.run([sys.executable, str(Path(__file__).parent / script)], check=True)
