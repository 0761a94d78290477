"""A site: one decorator on a function that returns its model."""

from collections import Counter

from flwr.clientapp import ClientApp
from sklearn.ensemble import RandomForestClassifier

from fedinfer_flower import LocalModel, inference
from quickstart.task import site_rows

app = ClientApp()


@inference(app, share_counts="counts")
def load_model(context):
    node, seed = context.node_config, context.run_config["seed"]
    x, y = site_rows(node["partition-id"], node["num-partitions"], seed)
    forest = RandomForestClassifier(50, random_state=seed).fit(x[20:], y[20:])
    counts = Counter(y[20:].tolist())
    holdout = (x[:20], y[:20])
    return LocalModel(model=forest, class_counts=counts, holdout=holdout, reference_inputs=x[20:])
