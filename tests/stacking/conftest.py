"""Fitted aggregators with random parameters, and small federations that train them."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)

from fedinfer_flower import InferenceMod, LocalModel
from fedinfer_flower.clients.stack_mod import StackingMod
from fedinfer_flower.ensemble.fitted import FittedAggregator
from fedinfer_flower.ensemble.stack_shapes import start_arrays
from fedinfer_flower.simulation.data import load_dataset
from fedinfer_flower.simulation.institution import Institution, write_institutions
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.simulation.partition import partition_rows

N_SITES = 5


def key_id(site: int) -> str:
    return f"{site + 1:064x}"


def made_up(kind: str, *, n_sites: int = 4, n_classes: int = 3, seed: int = 0, arrays=None):
    """An aggregator near its start, with every array moved at random."""
    rng = np.random.default_rng(seed)
    start = start_arrays(kind, n_sites=n_sites, n_classes=n_classes, hidden=6, seed=seed)
    moved = {name: a + 0.3 * rng.standard_normal(a.shape) for name, a in start.items()}
    return FittedAggregator(
        kind=kind,
        arrays=moved | (arrays or {}),
        card={
            "classes": [f"class-{c}" for c in range(n_classes)],
            "sites": [key_id(k) for k in range(n_sites)],
            "trainer": "FedAdam",
            "rounds": 3,
            "rows": 100,
        },
    )


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Digits at five sites with few classes each, alpha 0.1."""
    folder = tmp_path_factory.mktemp("digits") / "sites"
    dataset = load_dataset("digits", seed=0)
    rows = partition_rows(dataset.train_labels, n_sites=N_SITES, alpha=0.1, seed=0)
    write_institutions(folder, dataset, rows, seed=0)
    return dataset, folder


@pytest.fixture(scope="session")
def digits_grid(digits):
    _, folder = digits
    mod = InferenceMod(Institution(folder), share_counts="counts")
    app = StackingMod(mod).attach(mod.attach(ClientApp()))
    with LocalGrid(app, num_supernodes=N_SITES) as grid:
        yield grid


SMALL_CLASSES = ("a", "b", "c")


def small_weights(site: int) -> np.ndarray:
    return 2.0 * np.random.default_rng(100 + site).standard_normal((4, 3))


def small_holdout(site: int) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(200 + site)
    inputs = rng.standard_normal((30 + site, 4))
    truth = (inputs @ sum(small_weights(k) for k in range(4))).argmax(axis=1)
    return inputs, [SMALL_CLASSES[c] for c in truth]


def small_model(context) -> LocalModel:
    """A linear model; the truth is the sum of all sites' models, so that stacking helps."""
    site = context.node_config["partition-id"]
    weights = small_weights(site)
    return LocalModel(
        model=lambda rows: np.asarray(rows, dtype=float) @ weights,
        classes=SMALL_CLASSES,
        outputs="logits",
        holdout=small_holdout(site),
    )


def small_app(**options) -> ClientApp:
    max_rows = options.pop("max_rows", 1000)
    mod = InferenceMod(small_model, **options)
    return StackingMod(mod, max_rows=max_rows).attach(mod.attach(ClientApp()))


class RecordingGrid(LocalGrid):
    """Keeps all bytes that go over the wire, as the SuperLink sees them."""

    def __init__(self, *args, **kwargs):
        self.transcript = bytearray()
        super().__init__(*args, **kwargs)

    def _travel(self, message):
        with no_object_id_recompute():
            for part in get_all_nested_objects(message).values():
                self.transcript += part.deflate()
        return super()._travel(message)
