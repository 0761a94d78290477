"""The coordinator: shows the sites' cards, relays a job that it cannot read, hands back answers."""

import time
from pathlib import Path

from flwr.serverapp import ServerApp

from fedinfer_flower.query import Deadline
from fedinfer_flower.strategies.fed_refine import FedRefine
from fedinfer_flower.strategies.handover import write_whole
from private_documents.task import NAMES

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    exchange = Path(config["exchange"])
    medium = config["medium"]
    strategy = FedRefine(
        medium=medium,
        allow=() if medium == "own" else (medium,),
        deadline=Deadline(timeout_s=120.0),
        min_available_nodes=len(NAMES),
    )
    for number, card in enumerate(strategy.collect(grid)):
        (exchange / f"card-{number}.fi").write_bytes(card)
    write_whole(exchange / "cards.ready", b"")
    end = time.monotonic() + 120.0
    while not (exchange / "job.fi").exists() and time.monotonic() < end:
        time.sleep(0.1)
    result = strategy.start(grid, (exchange / "job.fi").read_bytes())
    print(result.summary(), flush=True)  # noqa: T201
    write_whole(exchange / "answer.fi", result.answer.to_bytes())
