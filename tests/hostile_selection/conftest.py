"""Small federations, some of whose sites are broken, dear or hostile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod, LocalModel
from fedinfer_flower.simulation.local_grid import LocalGrid

CLASSES = ("a", "b", "c")


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((8, 4))


def build_app(
    *,
    broken: frozenset[int] = frozenset(),
    owners: Mapping[int, str] | None = None,
    extra_class: Mapping[int, str] | None = None,
    prices: Mapping[int, float] | None = None,
    home: Callable | None = None,
) -> ClientApp:
    """Return an app whose sites are told apart by their partition."""

    def load(context) -> LocalModel:
        place = context.node_config["partition-id"]
        classes = CLASSES + ((extra_class[place],) if place in (extra_class or {}) else ())
        weights = np.random.default_rng(place).standard_normal((4, len(classes)))

        def model(inputs):
            if place in broken:
                raise RuntimeError("no answer today")
            return np.asarray(inputs, dtype=float) @ weights

        return LocalModel(
            model=model,
            classes=classes,
            outputs="logits",
            class_counts=dict.fromkeys(classes, 10.0),
            model_card={"owner": owners[place]} if place in (owners or {}) else {},
            price_per_query=(prices or {}).get(place, 0.0),
        )

    return InferenceMod(load, share_counts="counts", home=home).attach(ClientApp())


@pytest.fixture
def federation() -> Iterator[Callable[..., LocalGrid]]:
    """Return a function that opens a grid; all are closed at the end."""
    grids: list[LocalGrid] = []

    def open_grid(n_sites: int, **options) -> LocalGrid:
        grids.append(LocalGrid(build_app(**options), num_supernodes=n_sites))
        return grids[-1]

    yield open_grid
    for grid in grids:
        grid.close()


@pytest.fixture
def one_hostile_mask(monkeypatch) -> set[str]:
    """Let the first site that masks an answer add far more than its rule allows."""
    from fedinfer_flower.privacy import secagg

    hostile: set[str] = set()
    honest = secagg._SecAggSite.draw

    def draw(self, scores):
        if not hostile:
            hostile.add(self._identity.key_id)
        entries = honest(self, scores)
        return entries + 2**30 if self._identity.key_id in hostile else entries

    monkeypatch.setattr(secagg._SecAggSite, "draw", draw)
    return hostile
