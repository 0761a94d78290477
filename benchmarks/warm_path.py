"""What a query takes on a SuperLink: Flower's stock path beside the warm one, in one run.

python benchmarks/warm_path.py [--json FILE] [--paths stock,warm] [--sites 1,3] [--tls off,on]
                               [--queries 40] [--stock-queries 5]

Each site has a torch MLP of 5 MB behind `InferenceMod`. On the stock path Flower starts a process
for every message; on the warm one `clients.warm_supernode` and `clients.worker` serve it. A
ServerApp onboards the sites once and then asks `FedEnsemble.ask_cohort` in a loop: batches of one
row under `plain` (and under `secagg` with three sites, which it needs), then batches of 1000.
Everything runs on this machine, on loopback, each role in a process of its own; the stock path
is measured without TLS.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fedinfer_flower.simulation.engine import QUIET_ENVIRONMENT

BIN = Path(sys.executable).parent
ROWS = 1000
TARGETS_S = {1: (0.15, 0.30), 3: (0.50, None)}
"""Sites to (p50, p95) of a batch of one row on the warm path."""
TIMES_FASTER = 25
TIMES_BATCH = 2.0
Row = dict[str, Any]

# -- the app that every site and the coordinator run --------------------------------------

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "warm-app"
version = "1.0.0"
description = "Queries in a loop."
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "benchmarks"

[tool.flwr.app.components]
serverapp = "warm_app.server_app:app"
clientapp = "warm_app.client_app:app"

[tool.flwr.app.config]
answer = ""
sites = 1
queries = 1
batches = 1
warm = false
"""

CLIENT_APP = '''\
"""A site: a torch MLP of 5 MB."""

from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod, LocalModel


def load_model(context):
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(int(context.node_config.get("partition-id", 0)))
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 1100), torch.nn.ReLU(),
        torch.nn.Linear(1100, 1100), torch.nn.ReLU(), torch.nn.Linear(1100, 10),
    )
    return LocalModel(model=model.eval(), classes=list(range(10)), outputs="logits")


app = InferenceMod(load_model).attach(ClientApp())
'''

WORKER = '''\
"""The site's own app in a resident worker."""

import sys
from pathlib import Path

from fedinfer_flower.clients import model_cache
from fedinfer_flower.clients.app_source import OwnApp
from fedinfer_flower.clients.worker import run_worker


def source():
    import torch  # noqa: F401  (before the first task, as `[code] preload` does)

    sys.path.insert(0, str(Path(__file__).parent))
    from warm_app.client_app import app

    model_cache.keep_across_runs()
    return OwnApp(app)


if __name__ == "__main__":
    address, status, key = sys.argv[1:]
    sys.exit(
        run_worker(source, address=address, status_file=Path(status), key_file=Path(key))
    )
'''

SERVER_APP = '''\
"""Ask in a loop and write down how long each answer took."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.serverapp import ServerApp

from fedinfer_flower import Deadline, FedEnsemble
from fedinfer_flower.strategies.opening import job_for

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    if config["warm"]:
        from fedinfer_flower.flower_internals import shorten_pull_backoff

        shorten_pull_backoff()
    sites, n = int(config["sites"]), int(config["queries"])
    cases = [("plain", 1, n), ("plain", 1000, int(config["batches"]))]
    if sites >= 3:
        cases.insert(1, ("secagg", 1, n))
    rng = np.random.default_rng(7)
    found = []
    for protection, rows, times in cases:
        strategy = FedEnsemble(
            rule="mean-probability",
            protection=protection,
            min_available_nodes=sites,
            deadline=Deadline(timeout_s=120, quorum=sites),
            batch_size=1000,
        )
        began = time.monotonic()
        strategy.directory(grid)
        onboarding_s = time.monotonic() - began
        cards = strategy.cohort
        seconds = []
        for _ in range(times + 1):
            inputs = rng.normal(size=(rows, 64)).astype(np.float32)
            began = time.monotonic()
            job, querier = job_for(inputs, strategy)
            result = strategy.ask_cohort(grid, job, querier, cards=cards, all_cards=cards)
            assert result.prediction is not None
            seconds.append(time.monotonic() - began)
        # The first has what only a first has: connections, and on the warm path the model.
        found.append(
            {"protection": protection, "rows": rows, "onboarding_s": onboarding_s,
             "first_s": seconds[0], "seconds": seconds[1:]}
        )
    Path(str(config["answer"])).write_text(json.dumps(found))
'''


def write_app(folder: Path) -> Path:
    """Write the Flower project of the benchmark and return its folder."""
    app = folder / "app"
    package = app / "warm_app"
    package.mkdir(parents=True)
    (app / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").touch()
    (package / "client_app.py").write_text(CLIENT_APP)
    (package / "server_app.py").write_text(SERVER_APP)
    # Beside the project and not in it: no part of the bundle.
    (folder / "worker_main.py").write_text(WORKER)
    (folder / "warm_app").symlink_to(package)
    return app


def write_certificates(folder: Path) -> dict[str, Path]:
    """Write a CA and a server certificate for this machine; return their files."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name_of(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def builder(text: str, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name_of(text))
            .issuer_name(name_of("benchmark CA"))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    ca = (
        builder("benchmark CA", ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    here = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    server = (
        builder("localhost", key.public_key())
        .add_extension(x509.SubjectAlternativeName(here), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    files = {name: folder / f"{name}.pem" for name in ("ca", "server", "key")}
    files["ca"].write_bytes(ca.public_bytes(pem))
    files["server"].write_bytes(server.public_bytes(pem))
    files["key"].write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


# -- processes ----------------------------------------------------------------------------


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running(
    command: list[str], *, log: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process until the block ends."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until(ready: Any, process: subprocess.Popen[bytes], what: str, log: Path) -> None:
    for _ in range(600):
        if ready():
            return
        if process.poll() is not None:
            sys.exit(f"{what} ended: {log.read_text()[-2000:]}")
        time.sleep(0.1)
    sys.exit(f"{what} is not ready: {log.read_text()[-2000:]}")


def supernode_of(
    index: int, *, sites: int, warm: bool, tls: dict[str, Path], link: int, port: int, folder: Path
) -> list[str]:
    """Return the command of one SuperNode."""
    flags = ["--root-certificates", str(tls["ca"])] if tls else ["--insecure"]
    flags += ["--superlink", f"localhost:{link}", "--port", str(port)]
    flags += ["--node-config", f"partition-id={index} num-partitions={sites}"]
    if not warm:
        return [str(BIN / "flower-supernode"), *flags]
    own = ["--status", str(folder / f"node-{index}.json")]
    own += ["--worker-key", str(folder / f"key-{index}")]
    module = "fedinfer_flower.clients.warm_supernode"
    return [sys.executable, "-m", module, *own, "--", *flags, "--isolation", "process"]


@contextmanager
def federation(
    folder: Path, *, sites: int, warm: bool, tls: dict[str, Path], environment: dict[str, str]
) -> Iterator[dict[str, float]]:
    """Run a SuperLink and sites; give a dictionary that holds their CPU shares at the end."""
    link, *ports = free_ports(1 + sites)
    server = [str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(link)]
    server += ["--disable-runtime-dependency-installation"]
    how = "insecure = true"
    if tls:
        server += ["--ssl-ca-certfile", str(tls["ca"]), "--ssl-certfile", str(tls["server"])]
        server += ["--ssl-keyfile", str(tls["key"])]
        how = f'root-certificates = "{tls["ca"]}"'
    else:
        server += ["--insecure"]
    home = Path(environment["FLWR_HOME"])
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "localhost:{link}"\n{how}\n'
    )
    idle: dict[str, float] = {}
    with ExitStack() as stack:
        log = folder / "superlink.log"
        process = stack.enter_context(running(server, log=log, environment=environment))
        wait_until(lambda: listens(link), process, "the SuperLink", log)
        nodes = []
        for index, port in enumerate(ports):
            log = folder / f"node-{index}.log"
            command = supernode_of(
                index, sites=sites, warm=warm, tls=tls, link=link, port=port, folder=folder
            )
            node = stack.enter_context(running(command, log=log, environment=environment))
            nodes.append((node, port, log))
            if warm:
                command = [sys.executable, str(folder / "worker_main.py"), f"127.0.0.1:{port}"]
                command += [str(folder / f"worker-{index}.json"), str(folder / f"key-{index}")]
                log = folder / f"worker-{index}.log"
                worker = stack.enter_context(running(command, log=log, environment=environment))
                nodes.append((worker, 0, log))
        for node, port, log in nodes:
            if port:
                wait_until(lambda port=port: listens(port), node, "a SuperNode", log)
        yield idle
        if warm:
            # Far enough from the last query that nobody looks often any more.
            time.sleep(31)
            watched = [process, *(node for node, _, _ in nodes)]
            before = [cpu_seconds(one.pid) for one in watched]
            time.sleep(5)
            used = [cpu_seconds(p.pid) - b for p, b in zip(watched, before, strict=True)]
            idle["superlink"] = used[0] / 5
            idle["site"] = sum(used[1:]) / 5 / sites


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process so far; 0.0 where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- one configuration --------------------------------------------------------------------


def measure(*, path: str, sites: int, tls: bool, queries: int, batches: int) -> list[Row]:
    """Return one row for each case of a configuration."""
    warm = path == "warm"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        app = write_app(folder)
        answer = folder / "answer.json"
        environment = os.environ | QUIET_ENVIRONMENT | {"FLWR_HOME": str(folder / "home")}
        environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
        certificates = write_certificates(folder) if tls else {}
        load = os.getloadavg()[0]
        with federation(
            folder, sites=sites, warm=warm, tls=certificates, environment=environment
        ) as idle:
            config = f'answer="{answer}" sites={sites} queries={queries} batches={batches}'
            config += f" warm={str(warm).lower()}"
            command = [str(BIN / "flwr"), "run", ".", "here", "--stream", "--run-config", config]
            done = subprocess.run(
                command,
                cwd=app,
                env=environment,
                capture_output=True,
                text=True,
                timeout=550,
                check=False,
            )
            if not answer.exists():
                logs = "".join(log.read_text()[-1500:] for log in folder.glob("*.log"))
                sys.exit((done.stdout + done.stderr)[-3000:] + logs)
            found = json.loads(answer.read_text())
        return [
            {"path": path, "sites": sites, "tls": tls, "load": load, "idle_cpu": dict(idle)} | row
            for row in found
        ]


# -- the tables ---------------------------------------------------------------------------


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def summary(row: Row) -> tuple[float, float]:
    return statistics.median(row["seconds"]), quantile(row["seconds"], 0.95)


def print_tables(rows: list[Row]) -> None:
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, load", end=" ")
    print(", ".join(f"{load:.1f}" for load in dict.fromkeys(row["load"] for row in rows)))
    print("\n| sites | TLS | protection | rows | path | n | p50, s | p95, s | stock / warm |")
    print("|---|---|---|---|---|---|---|---|---|")
    stock = {
        (row["sites"], row["protection"], row["rows"]): summary(row)[0]
        for row in rows
        if row["path"] == "stock"
    }
    for row in rows:
        p50, p95 = summary(row)
        base = stock.get((row["sites"], row["protection"], row["rows"]))
        ratio = f"{base / p50:.1f}" if base and row["path"] == "warm" else ""
        print(
            f"| {row['sites']} | {'on' if row['tls'] else 'off'} | {row['protection']}"
            f" | {row['rows']} | {row['path']} | {len(row['seconds'])} | {p50:.3f} | {p95:.3f}"
            f" | {ratio} |"
        )
    print_targets(rows, stock)


def print_targets(rows: list[Row], stock: dict[tuple[int, str, int], float]) -> None:
    print()
    for row in rows:
        if row["path"] != "warm" or row["protection"] != "plain":
            continue
        sites, where = row["sites"], f"{row['sites']} site(s), TLS {'on' if row['tls'] else 'off'}"
        p50, p95 = summary(row)
        if row["rows"] == 1:
            most50, most95 = TARGETS_S.get(sites, (None, None))
            judge(f"{where}: p50 {p50:.3f} s", most50, p50)
            judge(f"{where}: p95 {p95:.3f} s", most95, p95)
            base = stock.get((sites, "plain", 1))
            if base and sites == 1:
                judge(f"{where}: {base / p50:.0f} times faster", 1 / TIMES_FASTER, p50 / base)
            one, one_where = p50, (sites, row["tls"])
            if row["idle_cpu"]:
                shares = ", ".join(f"{k} {v:.1%}" for k, v in row["idle_cpu"].items())
                print(f"- {where}: processor at rest, of one core: {shares}")
        elif one_where == (sites, row["tls"]):
            judge(f"{where}: {ROWS} rows take {p50 / one:.2f} of one", TIMES_BATCH, p50 / one)


def judge(what: str, most: float | None, value: float) -> None:
    if most is not None:
        print(f"- {what}: {'met' if value <= most else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--paths", default="stock,warm")
    parser.add_argument("--sites", default="1,3")
    parser.add_argument("--tls", default="off,on")
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--stock-queries", type=int, default=5)
    options = parser.parse_args()
    rows: list[Row] = []
    for sites in map(int, options.sites.split(",")):
        for path in options.paths.split(","):
            for tls in options.tls.split(","):
                if path == "stock" and tls == "on":
                    continue  # a connection more or less is lost in its seconds
                stock = path == "stock"
                rows += measure(
                    path=path,
                    sites=sites,
                    tls=tls == "on",
                    queries=options.stock_queries if stock else options.queries,
                    batches=1 if stock else max(1, options.queries // 4),
                )
    print_tables(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
