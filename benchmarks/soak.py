"""A whole federation under steady load: memory, open files, latency, over time.

python benchmarks/soak.py [--minutes 30] [--rate 3] [--sealed 0.25] [--json FILE] [--folder DIR]

SuperLink with TLS and node authentication, three sites, a gateway with a ledger, on this
machine (`simulation.loopback`). Clients ask one row at a time at a fixed rate, a part of them
sealed. Every ten seconds: resident memory, open files and threads of every process.

The verdict looks at the last two thirds, after warming up, and fits a line. Memory is called
flat if the line rises by less than 1 KiB a query answered. Why that: the allocator gives pages
back in steps of some 100 KiB to 1 MiB, so that over a few thousand queries nothing finer can
be told from no growth, while what a query would leave behind if anything held on to it (an
envelope, a job, a TLS connection, a span) is several KiB. 1 KiB a query is 84 MiB a day at one
query a second: a process that is called flat here is not proved to need no restart for a
year. Open files are flat if the last third's median is at most 2 above the middle third's:
connections come and go, one that leaked per minute would add 10. Results are kept for two
minutes (`result-ttl-s`), so that the outbox is full long before the verdict begins.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

import fedinfer_flower as fedinfer
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.incentives.ledger import Ledger
from fedinfer_flower.incentives.payments.base import MICRO
from fedinfer_flower.observability.audit_log import verify_audit_log
from fedinfer_flower.simulation.loopback import Deployment, SiteSpec
from fedinfer_flower.simulation.loopback.models import held_out_digits

SAMPLE_S = 10.0
MOST_BYTES_A_QUERY = 1024.0
MOST_FILES = 2.0
N_CLIENTS = 8
MODELS = """
[models.digits]
rule = "mean-probability"
protection = "plain"
timeout-s = 20.0
quorum = 2
min-sites = 2
straggler-s = 2.0
price = 0.001
"""


class Load:
    """Clients that ask one row each, together so many times a second."""

    def __init__(self, gateway: Any, identity: Any, *, rate: float, sealed: float) -> None:
        self.gateway, self.identity = gateway, identity
        self.pause_s, self.sealed = N_CLIENTS / rate, sealed
        self.rows, _ = held_out_digits(397)
        self.done: list[tuple[float, float, bool, str]] = []
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(i,)) for i in range(N_CLIENTS)]

    def run(self, number: int) -> None:
        """Ask until `ended`."""
        rng = np.random.default_rng(number)
        next_at = time.monotonic() + self.pause_s * number / N_CLIENTS
        while not self.ended.wait(max(next_at - time.monotonic(), 0.0)):
            # Late ones are not made up for: the rate drops, and is reported.
            next_at = max(next_at + self.pause_s, time.monotonic())
            self.ask(
                self.rows[rng.integers(len(self.rows))][None], bool(rng.random() < self.sealed)
            )

    def ask(self, row: np.ndarray, seal: bool) -> None:
        """Ask one row; note how that went."""
        begun, code = time.monotonic(), ""
        try:
            answer = self.gateway.ask(
                row, model="digits", seal=seal, identity=self.identity, timeout_s=25.0
            )
            code = "degraded" if answer.provenance.get("degraded") else ""
        except FedInferError as exc:
            code = exc.code
        self.done.append((begun, time.monotonic() - begun, seal, code))

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()


def processes_of(deployment: Deployment, roots: dict[str, int]) -> dict[str, int]:
    """Return pids by role: the processes that were started, and what they started."""
    parents: dict[int, list[int]] = {}
    words: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                words[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found = {}
    for root, pid in roots.items():
        todo = [pid]
        while todo:
            each = todo.pop()
            todo += parents.get(each, [])
            if text := words.get(each, ""):
                found[role_of(root, text, is_root=each == pid)] = each
    return found


def role_of(root: str, command: str, *, is_root: bool) -> str:
    for mark, name in (
        ("clients.worker ", "worker"),
        ("clients.warm_supernode", "SuperNode"),
        ("serverapp", "gateway (ServerApp)"),
        ("superexec", "SuperExec"),
    ):
        if mark in command and not is_root:
            return name if root in ("superlink", "gateway") else f"{root} {name}"
    return {"superlink": "SuperLink", "gateway": "fedinfer serve"}.get(root, f"{root} supervisor")


def measure(pid: int) -> dict[str, int] | None:
    folder = Path(f"/proc/{pid}")
    try:
        lines = (folder / "status").read_text().splitlines()
        facts = dict(line.split(":", 1) for line in lines)
        return {
            "rss_bytes": 1024 * int(facts["VmRSS"].split()[0]),
            "files": len(os.listdir(folder / "fd")),
            "threads": int(facts["Threads"]),
        }
    except (OSError, KeyError):
        return None


def disk(folder: Path) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for path in folder.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(folder))
            for end in ("-wal", "-shm", "-journal"):
                name = name.removesuffix(end)
            sizes[name.replace("site-1-", "site-0-").replace("site-2-", "site-0-")] += (
                path.stat().st_size
            )
    return {name: size for name, size in sizes.items() if size > 32768}


def sample(deployment: Deployment, began: float) -> dict[str, Any]:
    roots = {n: deployment.processes.pid(n) for n in ("superlink", "gateway")}
    roots |= {site.name: deployment.processes.pid(site.name) for site in deployment.sites}
    found = processes_of(deployment, roots)
    return {
        "at_s": round(time.monotonic() - began, 1),
        "processes": {
            role: {"pid": pid} | facts
            for role, pid in sorted(found.items())
            if (facts := measure(pid)) is not None
        },
    }


def is_wedged(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name sites that answered nothing between two looks, while another one did."""
    answers = {s["name"]: s["answers"] for s in before["sites"]}
    fresh = {s["name"]: s["answers"] - answers.get(s["name"], 0) for s in after["sites"]}
    return [name for name, n in fresh.items() if not n] if any(fresh.values()) else []


def slope(at_s: np.ndarray, values: np.ndarray) -> float:
    """Return the least-squares slope, a second."""
    return float(np.polyfit(at_s - at_s.mean(), values, 1)[0]) if len(at_s) > 1 else 0.0


def verdicts(samples: list[dict[str, Any]], queries_a_s: float) -> list[dict[str, Any]]:
    last = samples[len(samples) // 3 :]
    roles = sorted({role for one in last for role in one["processes"]})
    rows = []
    for role in roles:
        seen = [(s["at_s"], s["processes"][role]) for s in last if role in s["processes"]]
        pids = {facts["pid"] for _, facts in seen}
        at_s = np.array([at for at, _ in seen])
        rss = np.array([facts["rss_bytes"] for _, facts in seen], dtype=float)
        files = np.array([facts["files"] for _, facts in seen], dtype=float)
        half = len(files) // 2
        more_files = float(np.median(files[half:]) - np.median(files[:half])) if half else 0.0
        a_query = slope(at_s, rss) / queries_a_s
        rows.append(
            {
                "process": role,
                "starts": len(pids),
                "rss_mib": round(float(np.median(rss)) / 2**20, 1),
                "rss_mib_an_hour": round(slope(at_s, rss) * 3600 / 2**20, 2),
                "bytes_a_query": round(a_query),
                "files": int(np.median(files)),
                "more_files": more_files,
                "flat": a_query < MOST_BYTES_A_QUERY
                and more_files <= MOST_FILES
                and len(pids) == 1,
            }
        )
    return rows


def quantiles(done: list[tuple[float, float, bool, str]], seal: bool) -> dict[str, float]:
    times = sorted(took for _, took, sealed, code in done if sealed is seal and not code)
    if not times:
        return {}
    return {f"p{q}_s": round(float(np.percentile(times, q)), 3) for q in (50, 95, 99)}


def soak(folder: Path, *, minutes: float, rate: float, sealed: float) -> dict[str, Any]:
    import httpx

    url = f"sqlite:///{folder}/ledger.db"
    with ExitStack() as stack:
        deployment = stack.enter_context(
            Deployment(
                folder,
                sites=[SiteSpec(name=f"site-{i}") for i in range(3)],
                models=MODELS,
                gateway=f'ledger = "{url}"\n[limits]\nresult-ttl-s = 120.0\n',
            )
        )
        key = deployment.api_key("soak", scopes=("query", "sealed", "status"))
        ledger = Ledger(url)
        ledger.deposit(f"key:{key.split('_')[1]}", 10**6 * MICRO, key="soak")
        gateway = stack.enter_context(
            fedinfer.Gateway(deployment.gateway_url, api_key=key, ca=deployment.ca)
        )
        web = stack.enter_context(
            httpx.Client(
                base_url=deployment.gateway_url,
                verify=deployment.trust(),
                headers={"Authorization": f"Bearer {key}"},
                timeout=30.0,
            )
        )

        def status() -> dict[str, Any]:
            return dict(web.get("/v1/status").raise_for_status().json())

        gateway.ask(held_out_digits(1)[0], model="digits", seal=False)
        samples, wedged, looks = [], Counter[str](), [status()]
        disk_before = disk(folder)
        began = time.monotonic()
        load = stack.enter_context(Load(gateway, deployment.app_identity, rate=rate, sealed=sealed))
        while time.monotonic() - began < 60.0 * minutes:
            samples.append(sample(deployment, began))
            if len(samples) % 6 == 0:
                try:
                    looks = [looks[-1], status()]
                    wedged.update(is_wedged(*looks))
                except httpx.HTTPError as exc:
                    wedged[f"status: {type(exc).__name__}"] += 1
                print(f"{len(load.done)} asked, {time.monotonic() - began:.0f} s", flush=True)
            time.sleep(max(SAMPLE_S * len(samples) - (time.monotonic() - began), 0.0))
        load.__exit__()
        seconds = time.monotonic() - began
        done = load.done
        disk_after = disk(folder)
        checks = {
            "ledger": ledger.verify().ok,
            "gateway audit log": verify_audit_log(folder / "gateway-state/audit.jsonl").ok,
            **{
                f"{s.name} audit log": verify_audit_log(folder / f"{s.name}-home/audit.jsonl").ok
                for s in deployment.sites
            },
        }
        restarts = {
            site.name: {
                c["name"]: c["restarts"]
                for c in json.loads((folder / f"{site.name}-home/run/supervisor.json").read_text())[
                    "children"
                ]
            }
            for site in deployment.sites
        }
    answered = sum(code in ("", "degraded") for *_, code in done)
    third = (
        [d for d in done if d[0] - began < seconds / 3],
        [d for d in done if d[0] - began > 2 * seconds / 3],
    )
    growth = {
        n: round((size - disk_before.get(n, 0)) / max(answered, 1))
        for n, size in disk_after.items()
    }
    return {
        "minutes": round(seconds / 60, 1),
        "asked": len(done),
        "answered": answered,
        "queries_a_s": round(answered / seconds, 2),
        "errors": dict(Counter(code for *_, code in done if code)),
        "clear": quantiles(done, False),
        "sealed": quantiles(done, True),
        "clear_first_third": quantiles(third[0], False),
        "clear_last_third": quantiles(third[1], False),
        "load_average": os.getloadavg(),
        "wedged": dict(wedged),
        "restarts": restarts,
        "verified": checks,
        "disk_bytes_a_query": {n: b for n, b in sorted(growth.items()) if b > 0},
        "processes": verdicts(samples, max(answered / seconds, 1e-9)),
        "samples": samples,
    }


def table(found: dict[str, Any]) -> str:
    lines = [
        "| process | starts | RSS MiB | MiB/h | bytes a query | files | more | flat |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['process']} | {r['starts']} | {r['rss_mib']} | {r['rss_mib_an_hour']:+} |"
        f" {r['bytes_a_query']:+} | {r['files']} | {r['more_files']:+g} |"
        f" {'yes' if r['flat'] else 'NO'} |"
        for r in found["processes"]
    ]
    rest = {k: v for k, v in found.items() if k not in ("processes", "samples")}
    return "\n".join(lines + [""] + [f"- {k}: {v}" for k, v in rest.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=3.0, help="queries a second, all together")
    parser.add_argument("--sealed", type=float, default=0.25, help="share that is sealed")
    parser.add_argument("--folder", type=Path, help="kept; default a temporary one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fedinfer-soak-"))
    try:
        found = soak(folder, minutes=options.minutes, rate=options.rate, sealed=options.sealed)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(table(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
