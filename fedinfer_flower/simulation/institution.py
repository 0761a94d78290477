"""A simulated institution: its rows on its own disk, and a kind of model of its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from flwr.app import Context

from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.simulation.data import Dataset
from fedinfer_flower.simulation.networks import NETWORKS, fit_network

__all__ = ["KINDS", "Institution", "InstitutionRows", "fit_kind", "write_institutions"]

KINDS: Final = (
    "logistic regression",
    "torch MLP",
    "random forest",
    "gradient boosting",
    "k-NN",
)

_HOLDOUT_SHARE: Final = 0.15


@dataclass(frozen=True, kw_only=True, eq=False)
class InstitutionRows:
    """What one institution holds.

    Parameters
    ----------
    inputs, holdout_inputs : float array of shape (n_examples, n_features)
    labels, holdout_labels : int array of shape (n_examples,)
    kind : str
        Of `KINDS` or `NETWORKS`.
    seed : int
    n_classes : int
        Agreed classes "0", "1", ...: those of a network.
    """

    inputs: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    holdout_inputs: npt.NDArray[np.float64]
    holdout_labels: npt.NDArray[np.int64]
    kind: str
    seed: int
    n_classes: int

    def fit(self) -> LocalModel:
        """Train the institution's model on its own rows."""
        if self.kind in NETWORKS:
            model, classes = self.fit_network(), [str(c) for c in range(self.n_classes)]
        else:
            model, classes = fit_kind(self.kind, self.inputs, self.labels, seed=self.seed)
        counts = {str(c): float(n) for c, n in Counter(self.labels.tolist()).items()}
        side = round(self.inputs.shape[1] ** 0.5)
        is_image = self.inputs.shape[1] == 64
        return LocalModel(
            model=model,
            classes=classes,
            class_counts=counts,
            holdout=(self.holdout_inputs, self.holdout_labels.tolist()),
            reference_inputs=self.inputs,
            augment=(lambda x: _rotated(x, side)) if is_image else _jittered,
            model_card={"kind": self.kind},
        )

    def fit_network(self) -> Any:
        """Train the institution's network, where it holds one."""
        return fit_network(
            self.kind, self.inputs, self.labels, n_classes=self.n_classes, seed=self.seed
        )


class Institution:
    """`load_model` of a simulated site: reads its own file and nothing else.

    Parameters
    ----------
    folder : Path
        Holds ``site-<partition>.npz``, written by `write_institutions`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, context: Context) -> LocalModel:
        """Train the model of the partition in the node's config."""
        return read_institution(self.folder, int(context.node_config["partition-id"])).fit()


def write_institutions(
    folder: Path,
    dataset: Dataset,
    rows: list[npt.NDArray[np.int64]],
    *,
    seed: int,
    kinds: tuple[str, ...] = KINDS,
) -> None:
    """Give each institution its rows, 15 % of them held out for calibration.

    Kinds of model go round: site k gets ``kinds[k % len(kinds)]``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for site, numbers in enumerate(rows):
        mixed = np.random.default_rng([seed, site]).permutation(numbers)
        n_holdout = max(1, int(_HOLDOUT_SHARE * len(mixed)))
        held, kept = mixed[:n_holdout], mixed[n_holdout:]
        np.savez(
            folder / f"site-{site}.npz",
            inputs=dataset.train_inputs[kept],
            labels=dataset.train_labels[kept],
            holdout_inputs=dataset.train_inputs[held],
            holdout_labels=dataset.train_labels[held],
            kind=np.array(kinds[site % len(kinds)]),
            seed=np.array(seed),
            n_classes=np.array(len(dataset.classes)),
        )


def read_institution(folder: Path, site: int) -> InstitutionRows:
    """Read what `write_institutions` gave to one site."""
    with np.load(folder / f"site-{site}.npz", allow_pickle=False) as file:
        return InstitutionRows(
            inputs=file["inputs"],
            labels=file["labels"],
            holdout_inputs=file["holdout_inputs"],
            holdout_labels=file["holdout_labels"],
            kind=str(file["kind"]),
            seed=int(file["seed"]),
            n_classes=int(file["n_classes"]),
        )


def fit_kind(
    kind: str, inputs: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], *, seed: int
) -> tuple[Any, list[str]]:
    """Return (fitted model, names of its classes) of one of `KINDS`.

    A site with a single class gets the constant model that its data support.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes = [str(c) for c in np.unique(labels)]
    if kind == "torch MLP":
        return _fit_mlp(inputs, labels, seed=seed), classes
    # Pixels share a scale; features of measured quantities do not.
    scale = [] if inputs.shape[1] == 64 else [StandardScaler()]
    estimators = {
        "logistic regression": lambda: LogisticRegression(C=10.0, max_iter=2000),
        "random forest": lambda: RandomForestClassifier(100, random_state=seed),
        "gradient boosting": lambda: GradientBoostingClassifier(
            n_estimators=50, max_features="sqrt", random_state=seed
        ),
        "k-NN": lambda: KNeighborsClassifier(min(5, len(labels))),
    }
    estimator = estimators[kind]() if len(classes) > 1 else DummyClassifier(strategy="prior")
    return make_pipeline(*scale, estimator).fit(inputs, labels), classes


def _fit_mlp(inputs: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], *, seed: int) -> Any:
    import torch

    torch.set_num_threads(1)  # tiny layers: threads cost more than they give
    generator = torch.Generator().manual_seed(seed)
    mean = torch.tensor(inputs.mean(0), dtype=torch.float32)
    spread = torch.tensor(np.maximum(inputs.std(0), 1e-3), dtype=torch.float32)
    if inputs.shape[1] == 64:
        mean, spread = torch.zeros_like(mean), torch.ones_like(spread)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = torch.nn.Sequential(
            _scaling(mean, spread),
            torch.nn.Linear(inputs.shape[1], 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, len(np.unique(labels))),
        )
    x = torch.tensor(inputs, dtype=torch.float32)
    y = torch.tensor(np.unique(labels, return_inverse=True)[1])
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3, weight_decay=1e-4)
    # Smoothed labels keep a small net on few classes from certainty about everything.
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    for _ in range(50):
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x), 32):
            batch = order[start : start + 32]
            optimiser.zero_grad()
            loss(net(x[batch]), y[batch]).backward()
            optimiser.step()
    return net


def _scaling(mean: Any, spread: Any) -> Any:
    import torch

    layer = torch.nn.Linear(len(mean), len(mean))
    with torch.no_grad():
        layer.weight.copy_(torch.diag(1.0 / spread))
        layer.bias.copy_(-mean / spread)
    return layer.requires_grad_(False)


def _rotated(inputs: npt.NDArray[Any], side: int) -> list[npt.NDArray[Any]]:
    from scipy.ndimage import rotate

    images = np.asarray(inputs).reshape(-1, side, side)
    turned = [
        rotate(images, degrees, axes=(1, 2), reshape=False, order=1, mode="nearest")
        for degrees in (-5.0, -2.5, 2.5, 5.0)
    ]
    return [image.reshape(len(inputs), -1) for image in turned]


def _jittered(inputs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    return [np.asarray(inputs) * factor for factor in (0.97, 0.99, 1.01, 1.03)]
