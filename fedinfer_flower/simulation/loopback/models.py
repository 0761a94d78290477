"""Models that sites of a loopback deployment load: named in their policies."""

from __future__ import annotations

import functools
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from flwr.app import Context

from fedinfer_flower.clients.local_model import LocalModel

if TYPE_CHECKING:
    from fedinfer_flower.language.model import LanguageModel

__all__ = ["digits_network", "digits_site", "facts_model", "held_out_digits"]

_CLASSES_OF_SITE = ((0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (6, 7, 8, 9, 0))


@functools.cache
def _digits() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return x[order] / 16.0, y[order]


def held_out_digits(n_rows: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return rows that no site has trained on, at most 397, with their labels."""
    x, y = _digits()
    return x[1400 : 1400 + n_rows], y[1400 : 1400 + n_rows]


def _share(context: Context) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the rows of a site: five of ten classes, by the number in the site's name."""
    number = int("".join(c for c in str(context.node_config["name"]) if c.isdigit()) or 0)
    x, y = _digits()
    x, y = x[:1400], y[:1400]
    mine = np.isin(y, _CLASSES_OF_SITE[number % len(_CLASSES_OF_SITE)])
    return x[mine], y[mine]


def digits_site(context: Context) -> LocalModel:
    """Return a logistic regression of five of the ten digits."""
    from sklearn.linear_model import LogisticRegression

    x, y = _share(context)
    fitted = LogisticRegression(max_iter=500).fit(x[40:], y[40:])
    counts = {str(c): float(n) for c, n in Counter(y[40:].tolist()).items()}
    return LocalModel(
        model=fitted,
        class_counts=counts,
        holdout=(x[:40], y[:40].tolist()),
        reference_inputs=x[40:],
    )


def digits_network(context: Context) -> LocalModel:
    """Return a torch network of 5 MB, untrained but for its size's sake: for timings."""
    import torch

    del context
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # 64 x 1024 + 1024 x 1140 + 1140 x 10 weights of 4 bytes are 5.0 MB.
    network = torch.nn.Sequential(
        torch.nn.Linear(64, 1024),
        torch.nn.ReLU(),
        torch.nn.Linear(1024, 1140),
        torch.nn.ReLU(),
        torch.nn.Linear(1140, 10),
    ).eval()
    return LocalModel(model=network, classes=[str(c) for c in range(10)])


def facts_model(context: Context) -> LanguageModel:
    """Return the small language model with the site's name, of those in the package."""
    import torch

    from fedinfer_flower.simulation.facts.checkpoints import NAMES, load

    torch.set_num_threads(1)
    name = str(context.node_config["name"])
    return load(next(known for known in NAMES if known in name))
