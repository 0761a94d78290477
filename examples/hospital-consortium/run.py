"""Plays everybody: keys, two rounds of registry and office, and a table of what came of it.

Run where `flwr run` works:  python run.py [CONNECTION] [--crash]
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keys
from hospital_consortium.places import Places
from hospital_consortium.task import FREE_RIDER, N_SITES, ROUNDS, accuracy

from fedinfer_flower import read_pins
from fedinfer_flower.incentives.payments import MICRO
from fedinfer_flower.incentives.reputation import mean
from fedinfer_flower.selection import SiteHistory

HERE = Path(__file__).parent
TOLD = re.compile(r"at least .* is asked for|in escrow|settled, paid|office crashes$")


def play(state, number, connection, *, crash=False):
    """Run registry and office side by side; return whether both ended well, and their words."""
    registry = [sys.executable, "registry.py", str(state), "--round", str(number)]
    registry += ["--deadline-s", "10"] if crash else []
    config = f'state="{state}" round={number} crash={str(crash).lower()}'
    office = [*("flwr", "run", ".", *connection, "--stream", "--run-config", config)]
    office += ["--federation-config", f"num-supernodes={N_SITES}"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = subprocess.Popen(office, cwd=HERE, **streams)
    asking = subprocess.Popen(registry, cwd=HERE, **streams)
    try:
        while asking.poll() is None:
            if running.poll() and not crash:
                asking.terminate()  # nobody is going to answer it
            time.sleep(0.2)
        log = running.communicate(timeout=120)[0]
    finally:
        for process in (running, asking):
            process.terminate()
    say(asking.communicate()[0].rstrip())
    end = "the office crashes" if crash else "settled, paid and remembered"
    return asking.returncode == 0 and end in log, log


def table(places):
    """Return a line a hospital; accuracy is what the example knows, and nobody else."""
    history = SiteHistory.load(places.office / "history.json")
    ledger = places.ledger()
    epochs = sorted({n for record in history.records.values() for n, _ in record.merits})
    lines = ["site     accuracy  score of rounds 1, 2  credits  reputation"]
    for name, key_id in read_pins(places.office / "pins.toml").sites.items():
        site = int(name.removeprefix("site-"))
        scores = dict(history[key_id].merits)
        shown = [f"{scores[n]:+.3f}" if n in scores else "not asked" for n in epochs]
        lines.append(
            f"{name}   {accuracy(site):8.3f}  {shown[0]:>9} {shown[1]:>10}"
            f"  {ledger.balance(name) / MICRO:7.3f}  {mean(history[key_id].reputation):10.3f}"
            f"{'  guesses' if site == FREE_RIDER else ''}"
        )
    return "\n".join(lines)


def verify_ledger(places):
    """Run the auditor's command: with a head that was seen before, nobody can cut the book."""
    head = (places.registry / "ledger-head.txt").read_text()
    command = ["fedinfer", "ledger", "verify", "--file", str(places.ledger_file), "--head", head]
    say("$ fedinfer ledger verify")
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    say((done.stdout + done.stderr).rstrip())
    return done.returncode == 0


def main(state, connection, *, crash):
    keys.main(state)
    places = Places(state)
    for number in (1,) if crash else ROUNDS:
        say(f"round {number}")
        ok, log = play(state, number, connection, crash=crash)
        if not ok:
            sys.exit(log)
        say("\n".join(f"office: {line}" for line in log.splitlines() if TOLD.search(line)))
    if not crash:
        say(table(places))
    if not verify_ledger(places):
        sys.exit(1)


def say(text):
    if text:
        print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("connection", nargs="*")
    parser.add_argument("--crash", action="store_true", help="the office dies after the deposit")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        main(Path(name), args.connection, crash=args.crash)
