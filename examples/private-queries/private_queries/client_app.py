"""A clinic: answers sealed queries with noise, until its budget for the querier is spent."""

from flwr.clientapp import ClientApp
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fedinfer_flower import BudgetPolicy, InferenceMod, LocalModel
from private_queries.task import site_rows


def load_model(context):
    x, y = site_rows(context.node_config["partition-id"])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1)).fit(x, y)
    return LocalModel(model=model)


app = InferenceMod(
    load_model,
    # A real site writes a fixed path here: the run config is the coordinator's.
    home=lambda context: context.run_config["homes"],
    require_seal=True,
    budget=BudgetPolicy(epsilon_per_querier=30.0, epsilon_global=60.0, delta=1e-5),
).attach(ClientApp())
