"""The coordinator: hands out the directory, relays what it cannot read, hands back a sum."""

from pathlib import Path

from flwr.serverapp import ServerApp

from fedinfer_flower import FedEnsemble, Handover

app = ServerApp()


@app.main()
def main(grid, context):
    strategy = FedEnsemble.from_run_config(context.run_config)
    exchange = Handover(Path(context.run_config["exchange"]))
    exchange.publish(strategy.directory(grid))
    result = strategy.start(grid, exchange.wait_for_job(timeout_s=120.0))
    exchange.deliver(result)
    print(result.summary(), flush=True)  # noqa: T201
