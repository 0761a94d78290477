"""Five small sites with linear models; what they answer can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from fedinfer_flower import FedEnsemble, InferenceMod, LocalModel, Querier
from fedinfer_flower.clients.site_model import SiteModel, prepare
from fedinfer_flower.ensemble.base import EnsembleRule
from fedinfer_flower.planning.label_space import class_totals, shared_classes
from fedinfer_flower.query import CountsKind
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire.messages import Question

N_SITES, N_FEATURES, N_QUERIES = 5, 4, 12
# Different sets in different orders; every class is known by three sites or four.
LOCAL_CLASSES = (
    ("a", "b", "c"),
    ("d", "c", "b"),
    ("b", "a", "d", "c"),
    ("c", "d", "a"),
    ("d", "a", "b"),
)


def local_model(partition: int) -> LocalModel:
    rng = np.random.default_rng(100 + partition)
    classes = LOCAL_CLASSES[partition]
    weights = 2.0 * rng.standard_normal((N_FEATURES, len(classes)))
    inputs = rng.standard_normal((30, N_FEATURES))
    # One label in five is wrong, so that temperature and confusion are not trivial.
    best = (inputs @ weights).argmax(axis=1)
    labels = np.where(rng.random(30) < 0.2, rng.integers(0, len(classes), 30), best)
    return LocalModel(
        model=lambda rows: np.asarray(rows, dtype=float) @ weights,
        classes=classes,
        outputs="logits",
        class_counts={name: 10.0 * (i + 1) + partition for i, name in enumerate(classes)},
        holdout=(inputs, [classes[i] for i in labels]),
        reference_inputs=inputs,
        augment=lambda rows: [0.9 * rows, 1.1 * rows],
    )


def load_model(context) -> LocalModel:
    return local_model(context.node_config["partition-id"])


@dataclass
class Federation:
    """What a test needs to run a strategy and to check its answer."""

    shares: tuple[str, ...] = ("counts",) * N_SITES
    n_sites: int = N_SITES
    queries: np.ndarray = field(
        default_factory=lambda: np.random.default_rng(5).standard_normal((N_QUERIES, N_FEATURES))
    )

    def app(self) -> ClientApp:
        mods = {share: InferenceMod(load_model, share_counts=share) for share in set(self.shares)}
        app = ClientApp()
        for action in ("fi_hello", "fi_predict", "fi_recover", "fi_ping"):

            @app.query(action)
            def handle(message, context):
                return mods[self.shares[context.node_config["partition-id"]]].handle(
                    message, context
                )

        return app

    def grid(self, app: ClientApp | None = None, **options) -> LocalGrid:
        return LocalGrid(app or self.app(), num_supernodes=self.n_sites, **options)

    def sites(self) -> list[SiteModel]:
        return [
            prepare(local_model(k), name=f"site-{k}", share_counts=CountsKind(self.shares[k]))
            for k in range(self.n_sites)
        ]

    def scores(self, rule: EnsembleRule) -> np.ndarray:
        """Return what each site sends before protection, shape (n_sites, n_queries, width)."""
        sites = self.sites()
        profiles = {k: site.profile for k, site in enumerate(sites)}
        classes = shared_classes(profiles)
        totals, kind = class_totals(profiles, classes)
        asked = Question(
            query_id="q",
            inputs=self.queries,
            classes=classes,
            n_sites=self.n_sites,
            rule=rule.name,
            protection="plain",
            class_totals=totals,
            counts_kind=kind,
        )
        return np.stack(
            [
                rule.score(site.calibrated_logits(self.queries, classes), site.context(asked, rule))
                for site in sites
            ]
        )

    def ask(self, strategy: FedEnsemble, grid: LocalGrid, *, batch_size: int = 1024):
        """Run a job of a querier in this process; return (totals, prediction, result)."""
        querier = Querier(protection=strategy.protection)
        result = strategy.start(grid, querier.ask(self.queries, batch_size=batch_size, clear=True))
        return querier.totals(result.combined), querier.open(result.combined), result


@pytest.fixture(scope="session")
def federation() -> Federation:
    return Federation()


@pytest.fixture(scope="session")
def make_federation() -> Callable[..., Federation]:
    return Federation


@pytest.fixture
def grid(federation) -> Iterator[LocalGrid]:
    with federation.grid() as grid:
        yield grid


@pytest.fixture
def app_with() -> Callable[..., ClientApp]:
    """Return a function that wraps the handler of the five sites: ``wrap(partition, handle)``."""

    def build(wrap, **options) -> ClientApp:
        mod = InferenceMod(load_model, **{"share_counts": "counts"} | options)
        app = ClientApp()
        for action in ("fi_hello", "fi_predict", "fi_recover", "fi_ping"):

            @app.query(action)
            def handle(message, context, action=action):
                partition = context.node_config["partition-id"]
                return wrap(action, partition, message, context, mod.handle)

        return app

    return build
