"""A hospital: answers the registry's sealed questions, and agreed to be paid by audits."""

from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod, LocalModel
from hospital_consortium.places import Places
from hospital_consortium.task import site_model
from hospital_consortium.terms import PRICE


def load_model(context):
    partition = context.node_config["partition-id"]
    model, classes = site_model(partition)
    # A free rider has no weights to take a digest of, and may call itself what it likes.
    digest = "" if classes is None else f"model of hospital {partition}"
    return LocalModel(model=model, classes=classes, price_per_query=PRICE, digest=digest)


app = InferenceMod(
    load_model,
    # A real hospital writes a fixed path here: the run config is the coordinator's.
    home=lambda context: str(Places(context.run_config["state"]).hospitals),
    protections=("secagg",),
    require_seal=True,
    agrees_to=("settlement",),
).attach(ClientApp())
