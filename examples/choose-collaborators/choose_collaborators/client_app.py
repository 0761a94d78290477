"""A site: a logistic regression, its class counts, its card and its price."""

from collections import Counter

from flwr.clientapp import ClientApp
from sklearn.linear_model import LogisticRegression

from choose_collaborators.task import card, price, site_rows
from fedinfer_flower import InferenceMod, LocalModel


def load_model(context):
    partition = context.node_config["partition-id"]
    x, y = site_rows(partition, context.run_config["seed"])
    return LocalModel(
        model=LogisticRegression(max_iter=500).fit(x, y),
        class_counts=Counter(y.tolist()),
        model_card=card(partition),
        price_per_query=price(partition),
    )


def home(context):
    # A real site writes a fixed path here: the run config is the coordinator's. Without a
    # home a site has a new key in every run, and nobody could remember it.
    state = context.run_config["state"]
    return f"{state}/homes" if state else ""


app = InferenceMod(load_model, share_counts="counts", home=home).attach(ClientApp())
