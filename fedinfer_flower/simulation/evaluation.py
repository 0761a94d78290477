"""Measures that only a simulation can take: every model and every label in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedinfer_flower.clients.site_model import SiteModel, prepare
from fedinfer_flower.ensemble.skew_check import regardless
from fedinfer_flower.privacy.base import Protection
from fedinfer_flower.query import CountsKind
from fedinfer_flower.simulation.data import Dataset
from fedinfer_flower.simulation.institution import KINDS, fit_kind, read_institution
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies import FedEnsemble

__all__ = [
    "SoloAnswers",
    "central_bound",
    "protections_on_local_grid",
    "reliability",
    "rules_in_clear",
    "solo_answers",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class SoloAnswers:
    """What every site says when it is asked alone.

    Parameters
    ----------
    names, kinds : tuple of str
    n_train : tuple of int
    class_counts : int array of shape (n_sites, n_classes)
    probabilities : float array of shape (n_sites, n_queries, n_classes)
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    n_train: tuple[int, ...]
    class_counts: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.float64]

    def hits(self, truth: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number of right answers of each site."""
        return np.asarray((self.probabilities.argmax(axis=-1) == truth).sum(axis=1))


def solo_answers(folder: Path, dataset: Dataset, n_sites: int) -> SoloAnswers:
    """Train each institution's model here, as its site does, and ask it alone."""
    models: list[SiteModel] = []
    kinds, sizes, counts = [], [], []
    for site in range(n_sites):
        rows = read_institution(folder, site)
        models.append(prepare(rows.fit(), name=f"site-{site}", share_counts=CountsKind.COUNTS))
        kinds.append(rows.kind)
        sizes.append(len(rows.labels))
        counts.append(np.bincount(rows.labels, minlength=len(dataset.classes)))
    logits = [m.calibrated_logits(dataset.test_inputs, dataset.classes) for m in models]
    return SoloAnswers(
        names=tuple(m.profile.name for m in models),
        kinds=tuple(kinds),
        n_train=tuple(sizes),
        class_counts=np.stack(counts),
        probabilities=np.exp(np.stack(logits)),
    )


def central_bound(dataset: Dataset, *, seed: int) -> tuple[str, int]:
    """Return (kind, right answers) of the best kind of model trained on all rows together.

    The kind is chosen on 15 % of the training rows, not on the queries.
    """
    mixed = np.random.default_rng(seed).permutation(len(dataset.train_labels))
    n_held = int(0.15 * len(mixed))
    held, kept = mixed[:n_held], mixed[n_held:]
    best = ("", -1.0, 0)
    for kind in KINDS:
        model, names = fit_kind(
            kind, dataset.train_inputs[kept], dataset.train_labels[kept], seed=seed
        )
        site = prepare(_as_local(model, names), name="central", share_counts=CountsKind.WITHHELD)

        def hits(
            inputs: npt.NDArray[np.float64],
            labels: npt.NDArray[np.int64],
            site: SiteModel = site,
        ) -> int:
            logits = site.calibrated_logits(inputs, dataset.classes)
            return int((logits.argmax(axis=1) == labels).sum())

        score = hits(dataset.train_inputs[held], dataset.train_labels[held]) / max(n_held, 1)
        if score > best[1]:
            best = (kind, score, hits(dataset.test_inputs, dataset.test_labels))
    return best[0], best[2]


def rules_in_clear(
    folder: Path, dataset: Dataset, n_sites: int, rules: tuple[str, ...]
) -> dict[str, int]:
    """Return the right answers of each rule under `plain`, on an in-process grid."""
    from fedinfer_flower.simulation.federation import client_app

    hits: dict[str, int] = {}
    app = client_app(folder.parent, share_counts="counts")
    with LocalGrid(app, num_supernodes=n_sites) as grid:
        for rule in rules:
            strategy = FedEnsemble(
                rule=rule if rule == "auto" else regardless(rule), min_available_nodes=n_sites
            )
            strategy.classes = dataset.classes
            prediction = strategy.start(grid, dataset.test_inputs).prediction
            if prediction is not None:
                hits[rule] = round(prediction.accuracy(dataset.test_labels) * len(prediction))
    return hits


def protections_on_local_grid(
    folder: Path,
    dataset: Dataset,
    n_sites: int,
    rule: str,
    protections: Sequence[Protection],
) -> list[int]:
    """Return the right answers of a rule under each protection, on an in-process grid."""
    from fedinfer_flower.simulation.federation import client_app

    hits = []
    app = client_app(folder, share_counts="counts")
    with LocalGrid(app, num_supernodes=n_sites) as grid:
        for protection in protections:
            strategy = FedEnsemble(
                rule=rule,
                protection=protection,
                min_available_nodes=n_sites,
                classes=list(dataset.classes),
                allow_coordinator_key=True,
            )
            prediction = strategy.start(grid, dataset.test_inputs).prediction
            right = 0.0 if prediction is None else prediction.accuracy(dataset.test_labels)
            hits.append(round(right * len(dataset.test_labels)))
    return hits


def reliability(
    confidence: npt.NDArray[np.float64], right: npt.NDArray[np.bool_], *, n_bins: int = 10
) -> tuple[list[dict[str, float]], float]:
    """Return (bins, expected calibration error).

    Each bin has mean confidence, accuracy and count; empty bins are left out.

    Examples
    --------
    >>> reliability(np.array([0.95, 0.95]), np.array([True, False]))[1].__round__(2)
    0.45
    """
    bins: list[dict[str, float]] = []
    error = 0.0
    place = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    for number in range(n_bins):
        inside = place == number
        if not inside.any():
            continue
        mean, accuracy = float(confidence[inside].mean()), float(right[inside].mean())
        bins.append({"confidence": mean, "accuracy": accuracy, "count": int(inside.sum())})
        error += float(inside.mean()) * abs(mean - accuracy)
    return bins, error


def _as_local(model: object, names: list[str]) -> object:
    from fedinfer_flower.clients.local_model import LocalModel

    return LocalModel(model=model, classes=names)
