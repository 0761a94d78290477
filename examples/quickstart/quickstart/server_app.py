"""The coordinator: asks held-out digits, or the job file of a querier elsewhere."""

from pathlib import Path

from flwr.serverapp import ServerApp

from fedinfer_flower import FedEnsemble
from fedinfer_flower.wire.documents import QueryJob
from quickstart.task import split

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    strategy = FedEnsemble.from_run_config(config)
    if config["job"]:
        result = strategy.start(grid, QueryJob.from_bytes(Path(config["job"]).read_bytes()))
        Path(config["answer"]).write_bytes(result.combined.to_bytes())
        return
    _, queries, _, truth = split(config["seed"])
    prediction = strategy.start(grid, queries).prediction
    print(f"accuracy: {prediction.accuracy(truth):.4f}", flush=True)  # noqa: T201
    if config["answer"]:
        Path(config["answer"]).write_text("\n".join(prediction.names))
