"""A plain Flower FedAvg server. The last two statements are the ones that are new."""

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from existing_project.task import queries
from fedinfer_flower import FedEnsemble

app = ServerApp()


@app.main()
def main(grid, context):
    strategy = FedAvg()
    trained = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros((65, 10))]),
        num_rounds=int(context.run_config["num-server-rounds"]),
    )
    print("trained rounds:", len(trained.evaluate_metrics_clientapp), flush=True)  # noqa: T201

    x, y = queries()
    answer = FedEnsemble().start(grid, x)
    print(f"joint accuracy: {answer.prediction.accuracy(y):.4f}", flush=True)  # noqa: T201
