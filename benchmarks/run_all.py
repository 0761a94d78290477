"""Run every benchmark of docs/benchmarks.md, one after another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

for script in ("accuracy.py", "he_scale.py", "overhead.py"):
    print(f"\n== {script}", flush=True)
    subprocess.run([sys.executable, str(Path(__file__).parent / script)], check=True)
