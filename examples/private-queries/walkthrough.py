"""Plays a registry that queries ten clinics: keys, pins, two sealed jobs, receipt, refusal.

Run where `flwr run` works:  python walkthrough.py [CONNECTION]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from private_queries.task import N_SITES, split

from fedinfer_flower import BudgetPolicy, Directory, Identity, Querier, read_pins
from fedinfer_flower.errors import FedInferError
from fedinfer_flower.privacy.base import make_protection
from fedinfer_flower.privacy.site_budget import SiteBudget
from fedinfer_flower.receipts.verification import verify
from fedinfer_flower.strategies.handover import write_whole
from fedinfer_flower.wire.documents import CombinedAnswer

_, QUERIES, _, TRUTH = split()


def say(text):
    print(text, flush=True)  # noqa: T201


def exchange_keys(folder):
    """Out of band: each clinic reads its key id to the registry, and learns the registry's."""
    homes, me = folder / "homes", Identity.load_or_create(folder / "registry.id")
    lines = ["[sites]"]
    for site in range(N_SITES):
        clinic = Identity.load_or_create(homes / f"partition-{site}" / "identity.json")
        lines.append(f'site-{site} = "{clinic.key_id}"')
    (folder / "pins.toml").write_text("\n".join(lines))
    (homes / "pins.toml").write_text(f'[queriers]\nregistry = "{me.key_id}"\n')
    return me


def ask(folder, me, rows, connection):
    """Start the coordinator's run, seal rows to its sites, and return what comes back."""
    exchange = folder / "exchange"
    (exchange / "directory.fi").unlink(missing_ok=True)
    config = f'exchange="{exchange}" homes="{folder / "homes"}"'
    run = subprocess.Popen(
        [
            *("flwr", "run", ".", *connection, "--stream", "--run-config", config),
            *("--federation-config", f"num-supernodes={N_SITES}"),
        ],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    querier = Querier(
        protection=make_protection("secagg+dp", {"epsilon": 4.0}),
        identity=me,
        pins=read_pins(folder / "pins.toml"),
    )
    while not (exchange / "directory.fi").exists():
        if run.poll() is not None:
            sys.exit(run.stdout.read())
        try:
            run.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
    directory = Directory.from_bytes((exchange / "directory.fi").read_bytes())
    job = querier.ask(rows, directory=directory, rule="mean-probability")
    write_whole(exchange / "job.fi", job.to_bytes())
    log = run.communicate()[0]
    answer = exchange / "answer.fi"
    if not answer.exists():
        return None, log
    return querier.open(CombinedAnswer.from_bytes(answer.read_bytes())), log


def main(folder, connection):
    me = exchange_keys(folder)
    say(f"1. keys compared; the registry is {me.key_id[:16]}")

    prediction, log = ask(folder, me, QUERIES[:20], connection)
    if prediction is None:
        sys.exit(log)
    right = prediction.accuracy(TRUTH[:20])
    say(f"2. 20 sealed queries under secagg+dp at epsilon 4 a row: {right:.0%} right")

    found = verify(
        (folder / "exchange" / "receipt.json").read_bytes(),
        pins=dict(read_pins(folder / "pins.toml").sites),
    )
    say(f"3. receipt of {N_SITES} clinics: {'verified' if found.ok else 'NOT verified'}")

    again, _ = ask(folder, me, QUERIES[:20], connection)
    same = again is not None and np.array_equal(again.probabilities, prediction.probabilities)
    say(f"4. the same queries again: {'the same noise, ' if same else ''}nothing charged")

    refused, log = ask(folder, me, QUERIES[20:60], connection)
    say(f"5. 40 new queries: {'refused, FI315' if refused is None and 'FI315' in log else log}")

    policy = BudgetPolicy(epsilon_per_querier=30.0, epsilon_global=60.0, delta=1e-5)
    budget = SiteBudget(folder / "homes" / "partition-0" / "budget.sqlite", policy)
    epsilon, _ = budget.spent(me.key_id)
    say(f"6. clinic 0 has spent epsilon {epsilon:.1f} of 30 on the registry")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        try:
            main(Path(name), sys.argv[1:2])
        except FedInferError as exc:
            sys.exit(str(exc))
