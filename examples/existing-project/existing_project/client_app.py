"""A plain Flower FedAvg client. The last line is the one that is new."""

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from existing_project.task import fit, load, probabilities
from fedinfer_flower import InferenceMod, LocalModel

app = ClientApp()


@app.train()
def train(message, context):
    x, y = load(context.node_config["partition-id"], context.node_config["num-partitions"])
    weights = fit(message.content["arrays"].to_numpy_ndarrays()[0], x, y)
    content = {
        "arrays": ArrayRecord([weights]),
        "metrics": MetricRecord({"num-examples": len(y)}),
    }
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate(message, context):
    x, y = load(context.node_config["partition-id"], context.node_config["num-partitions"])
    weights = message.content["arrays"].to_numpy_ndarrays()[0]
    accuracy = float((probabilities(weights, x).argmax(axis=1) == y).mean())
    metrics = MetricRecord({"accuracy": accuracy, "num-examples": len(y)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def load_model(context):
    """Return this site's own model, trained on its own rows from scratch."""
    x, y = load(context.node_config["partition-id"], context.node_config["num-partitions"])
    weights = fit(np.zeros((65, 10)), x, y, steps=300)
    return LocalModel(model=lambda rows: probabilities(weights, rows), classes=range(10))


InferenceMod(load_model).attach(app)
