"""Three models that know different facts, and questions to all of them."""

import torch

from fedinfer_flower.simulation.facts.checkpoints import NAMES, load
from fedinfer_flower.simulation.facts.world import FactWorld

torch.set_num_threads(1)
WORLD = FactWorld()


def load_model(context):
    # Your own: LanguageModel.from_folder("path/to/a/folder").
    return load(site_name(context))


def site_name(context):
    return NAMES[int(context.node_config["partition-id"]) % len(NAMES)]


def facts_of_everybody(each):
    """Private facts of the three models: no fuser has seen any of them."""
    return [fact for people in WORLD.private for fact in WORLD.facts(people)[:each]]
