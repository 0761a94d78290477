"""The sites' language models: small, of three families, each with facts of its own."""

import torch

from fedinfer_flower.simulation.facts.checkpoints import load

torch.set_num_threads(1)
MODELS = {"north": "qwen3", "south": "llama", "west": "qwen2"}


def model(context):
    """Return the model of the site that the node config names."""
    return load(MODELS[context.node_config["name"]])
