"""The example that pays by audits, on Flower's simulation engine."""

from __future__ import annotations

import importlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedinfer_flower.errors import LedgerError
from fedinfer_flower.incentives.ledger import Escrow, Ledger
from fedinfer_flower.selection import SiteHistory
from fedinfer_flower.wire.pins import read_pins

EXAMPLE = Path(__file__).parents[2] / "examples" / "hospital-consortium"
BIN = Path(sys.executable).parent
HONEST = [f"site-{n}" for n in range(5)]
FREE_RIDER = "site-5"

pytestmark = pytest.mark.timeout(900)


def environment(home: Path) -> dict[str, str]:
    return os.environ | {
        "FLWR_HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(home),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None, "the process ended before it listened"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nothing listens on {port}")


@contextmanager
def superlink(home: Path) -> Iterator[None]:
    """Run a simulating SuperLink on loopback and write the connection 'here' for `flwr run`."""
    port = free_port()
    command = [str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1", "--simulation"]
    command += ["--port", str(port), "--disable-runtime-dependency-installation"]
    # Ray's sockets need a short TMPDIR: it keeps the one of this process.
    settings = environment(home) | {"TMPDIR": os.environ.get("TMPDIR", "/tmp")}  # noqa: S108
    with (home / "superlink.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=settings)
        try:
            wait_until_listening(port, process)
            (home / "config.toml").write_text(
                f'[superlink]\ndefault = "here"\n[superlink.here]\n'
                f'address = "127.0.0.1:{port}"\ninsecure = true\n'
            )
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("hospital-consortium")
    with superlink(folder):
        yield folder


def output_of(home: Path, *command: str) -> str:
    done = subprocess.run(
        command, cwd=EXAMPLE, env=environment(home), capture_output=True, text=True, timeout=500
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    return output


def commands_of_readme(heading: str) -> str:
    """Return the shell block after a heading or bold words of the example's README."""
    after = (EXAMPLE / "README.md").read_text().split(heading, 1)[1]
    found = re.search(r"^```bash\n(.*?)^```", after, flags=re.M | re.S)
    assert found is not None
    return found.group(1)


@pytest.mark.slow
def test_free_rider_earns_nothing_and_is_left_out_of_second_round(home: Path) -> None:
    assert "python run.py\n" in commands_of_readme("## Run it")

    output = output_of(home, sys.executable, "run.py", "here")

    lines = re.findall(
        r"^(site-\d) +([\d.]+) +([+-][\d.]+) +([+-][\d.]+|not asked) +([\d.]+) +([\d.]+)",
        output,
        flags=re.M,
    )
    table = {name: cells for name, *cells in lines}
    # 180 rows in each round: six prices of 0.05 credits a row, then five.
    assert "registry: 54.00 credits in escrow for 6 hospitals" in output
    assert "registry: 45.00 credits in escrow for 5 hospitals" in output
    # Data, models and guesses have fixed seeds; the noise of a score has none and a standard
    # deviation of 0.043 or less. Without it the free rider has -0.167, honest sites 0.258 to
    # 0.508: every bound is at least 3.7 deviations away.
    accuracy, first, second, credits, reputation = table[FREE_RIDER]
    assert 0.4 < float(accuracy) < 0.6
    assert float(first) < 0.0
    assert second == "not asked"
    assert float(credits) == 0.0  # it takes 3.9 deviations to earn anything
    assert float(reputation) < 0.4
    assert "site-5: reputation: reputation 0.333, at least 0.4 is asked for" in output
    for name in HONEST:
        accuracy, first, second, credits, reputation = table[name]
        assert float(accuracy) > 0.85
        assert min(float(first), float(second)) > 0.1
        assert float(credits) > 5.0
        assert float(reputation) > 0.5
    # Who has 70 records gets more than who has 18, and the rest of 99 credits goes back.
    assert float(table["site-0"][3]) > float(table["site-4"][3])
    said = re.findall(r"paid ([\d.]+) credits, ([\d.]+) came back", output)
    paid, back = sum(float(p) for p, _ in said), sum(float(b) for _, b in said)
    assert paid + back == pytest.approx(99.0, abs=0.02)  # printed to a hundredth of a credit
    assert back > 0.0
    assert "the ledger verifies: 7 entries" in output


@pytest.mark.slow
def test_fee_comes_back_after_the_deadline_when_the_office_crashes(home: Path) -> None:
    assert "python run.py --crash\n" in commands_of_readme("**The office fails**")

    output = output_of(home, sys.executable, "run.py", "here", "--crash")

    assert "office: RuntimeError: the office crashes" in output
    assert "registry: refunded: the account holds 54.00 credits" in output
    # Genesis, deposit, escrow, refund: nobody was paid.
    assert "the ledger verifies: 4 entries" in output


@pytest.mark.slow
def test_commands_by_hand_of_readme(home: Path) -> None:
    commands = commands_of_readme("**By hand**")

    output = output_of(home, "bash", "-ec", f"{commands}\necho state: $STATE")

    state = Path(re.findall(r"^state: (\S+)$", output, flags=re.M)[0])
    assert re.search(r"registry: paid [\d.]+ credits", output)
    assert "settled, paid and remembered" in output
    assert "the ledger verifies: 4 entries" in output
    keys = read_pins(state / "office" / "pins.toml").sites
    history = SiteHistory.load(state / "office" / "history.json")
    assert {name for name, key in keys.items() if history[key].merits[0][1] < 0.0} == {FREE_RIDER}
    # What passes between the parties is there for everybody to read; keys and pins are not.
    assert sorted(path.name for path in (state / "shared" / "round-1").iterdir()) == [
        "answer.fi",
        "directory.fi",
        "job.fi",
        "receipt.json",
        "settlement-reply.fi",
        "settlement-request.fi",
        "settlement.fi",
    ]


def test_office_asks_nobody_before_the_fee_is_in_escrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    office = importlib.import_module("hospital_consortium.server_app")
    key_id, other = "ab" * 32, "cd" * 32
    job = SimpleNamespace(job_id="job", n_queries=10, querier=SimpleNamespace(key_id=key_id))
    card = SimpleNamespace(profile=SimpleNamespace(price_per_query=0.05))
    directory = SimpleNamespace(cards=[card] * 6)
    price = 3_000_000  # micro-credits: ten rows, six hospitals

    def fee(number: int, *, amount: int, deadline: float, by: str) -> int:
        ledger = Ledger(f"sqlite:///{tmp_path}/ledger-{number}.db")
        ledger.migrate()
        ledger.deposit("registry", amount, key="transfer")
        escrow = Escrow(ledger, coordinator_key_id=other)
        escrow.open(
            "job",
            "registry",
            fee=amount,
            deadline=int(deadline),
            query_ids=["job-0"],
            querier_key_id=by,
        )
        return int(office.fee_in_escrow(escrow, job, directory))

    later = time.time() + 60
    assert fee(0, amount=price, deadline=later, by=key_id) == price
    with pytest.raises(LedgerError, match="less than the price"):
        fee(1, amount=price - 1, deadline=later, by=key_id)
    with pytest.raises(LedgerError, match="another querier"):
        fee(2, amount=price, deadline=later, by=other)
    with pytest.raises(LedgerError, match="refunded at any time"):
        fee(3, amount=price, deadline=time.time() - 1, by=key_id)
    empty = Ledger(f"sqlite:///{tmp_path}/empty.db")
    empty.migrate()
    with pytest.raises(LedgerError, match="no fee in escrow"):
        office.fee_in_escrow(Escrow(empty, coordinator_key_id=other), job, directory)
