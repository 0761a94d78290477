"""The deployment example, as its reader runs it: every process, with TLS and registered nodes."""

import re
import subprocess
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "deploy-loopback"


@pytest.mark.deployment
@pytest.mark.slow
def test_script_deploys_asks_three_ways_and_ends_what_it_started(tmp_path, environment, free_ports):
    superlink, gateway = free_ports(2)
    out = tmp_path / "run"

    done = subprocess.run(
        [str(EXAMPLE / "run.sh"), str(out)],
        env=environment(tmp_path)
        | {"SUPERLINK_PORT": str(superlink), "GATEWAY_PORT": str(gateway)},
        capture_output=True,
        text=True,
        timeout=280,
    )

    logs = "\n".join(f"== {p.name}\n{p.read_text()[-2000:]}" for p in sorted(out.glob("*.log")))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + logs
    said = dict(re.findall(r"^(truth|curl|sealed|chat|responses): +(.*)$", done.stdout, re.M))
    assert said["sealed"] == said["truth"]
    assert said["curl"] == said["truth"].split()[0]
    # What only one of the three sites was taught, told by another.
    assert said["chat"] == said["responses"] == "tukem"
    assert "the receipt verifies" in done.stdout
    assert "the audit log verifies" in done.stdout
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(out) not in running.stdout
    # The application's key is in its own file, and in the gateway's answer to nobody.
    secret = (out / "app.key").read_text().strip()
    others = [p for p in out.rglob("*") if p.is_file() and p.name not in ("app.key", "curl.conf")]
    assert not [p.name for p in others if secret.encode() in p.read_bytes()]
