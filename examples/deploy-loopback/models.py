"""The models of three hospitals: what a policy names under `loader`."""

from collections import Counter

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from fedinfer_flower import LocalModel
from fedinfer_flower.simulation.facts.checkpoints import load

DIGITS = {"north": [0, 1, 2, 3, 4], "south": [3, 4, 5, 6, 7], "west": [6, 7, 8, 9, 0]}
LANGUAGE = {"north": "qwen3", "south": "llama", "west": "qwen2"}


def classifier(context):
    """A regression on five of ten digits: each hospital has seen others."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[:1400]
    x, y = x[order] / 16.0, y[order]
    mine = np.isin(y, DIGITS[context.node_config["name"]])
    x, y = x[mine], y[mine]
    counts = Counter(y[40:].tolist())
    fitted = LogisticRegression(max_iter=500).fit(x[40:], y[40:])
    return LocalModel(
        model=fitted,
        class_counts=counts,
        holdout=(x[:40], y[:40].tolist()),
        reference_inputs=x[40:],
    )


def assistant(context):
    """A language model of half a million parameters, another family at each hospital."""
    return load(LANGUAGE[context.node_config["name"]])
