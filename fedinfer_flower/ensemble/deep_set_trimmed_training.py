"""Train `deep-set-trimmed` against hostile sites: NumPy, with its own gradients.

In every step some sites of each row are replaced by colluders that all claim one wrong class;
which class is chosen row by row so that the loss is largest under the present parameters. How
they claim it is drawn by lot: with all mass on it, by blending it into the honest sites' mean, or
by swapping it with the top of their own honest answer. With the first way alone the network
learns to tell colluders by their certainty, and falls to those that are less blunt.

Axes: K sites, T held-out rows, C classes, H hidden units, D entries of an embedding, S = C + D.

References
----------
.. [1] arXiv 2510.00310, Robust federated inference: DeepSet-TM, adversarial training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import PROBABILITY_FLOOR, Array, log_softmax
from fedinfer_flower.ensemble.deep_set_trimmed import KIND, trainer_name
from fedinfer_flower.ensemble.fitted import MAX_VALUE, FittedAggregator
from fedinfer_flower.ensemble.stack_rule import log_features
from fedinfer_flower.ensemble.stack_shapes import start_arrays
from fedinfer_flower.errors import InvalidValueError, ShapeError

__all__ = ["loss_and_gradient", "train_deep_set_trimmed", "worst_answers"]

Labels = npt.NDArray[np.int64]
Weights = dict[str, Array]

_SKIP_START: Final = 8.0
"""Of the mean probability: logits that far apart start as a sensible softmax."""


def _forward(w: Weights, p_tkc: Array, trim: int) -> dict[str, Array]:
    n_sites = p_tkc.shape[1]
    cut = min(trim, (n_sites - 1) // 2)
    features = log_features(p_tkc)
    inner = features @ w["rho_in"] + w["rho_in_bias"]
    hidden = np.maximum(inner, 0.0)
    embedded = np.tanh(hidden @ w["rho_out"] + w["rho_out_bias"])
    phi = np.concatenate([p_tkc, embedded], axis=2)
    ranks = phi.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    kept = (ranks >= cut) & (ranks < n_sites - cut)
    share = kept / (n_sites - 2 * cut)
    total = (share * phi).sum(axis=1)
    decoded = total @ w["mu_in"] + w["mu_in_bias"]
    n_classes = p_tkc.shape[2]
    logits = w["skip"] * total[:, :n_classes]
    logits = logits + np.maximum(decoded, 0.0) @ w["mu_out"] + w["mu_out_bias"]
    return {
        "features": features,
        "inner": inner,
        "hidden": hidden,
        "embedded": embedded,
        "share": share,
        "total": total,
        "decoded": decoded,
        "logits": logits,
    }


def loss_and_gradient(
    weights: Weights, p_tkc: Array, labels: Labels, *, trim: int
) -> tuple[float, Weights]:
    """Return (mean cross-entropy in nats, its gradient).

    Parameters
    ----------
    weights : mapping of str to array
        As `stack_shapes` says for a deep set.
    p_tkc : float array of shape (n_rows, n_sites, n_classes)
    labels : int array of shape (n_rows,)
    trim : int
    """
    seen = _forward(weights, p_tkc, trim)
    rows, n_classes = np.arange(len(labels)), p_tkc.shape[2]
    logs = log_softmax(seen["logits"])
    d_logits = np.exp(logs)
    d_logits[rows, labels] -= 1.0
    d_logits /= len(labels)
    active = np.maximum(seen["decoded"], 0.0)
    d_decoded = (d_logits @ weights["mu_out"].T) * (seen["decoded"] > 0.0)
    d_total = d_decoded @ weights["mu_in"].T
    # Only the embedding's part goes on: the answers themselves are given.
    d_phi = seen["share"][:, :, n_classes:] * d_total[:, np.newaxis, n_classes:]
    d_outer = d_phi * (1.0 - seen["embedded"] ** 2)
    d_inner = (d_outer @ weights["rho_out"].T) * (seen["inner"] > 0.0)
    gradient = {
        "skip": np.array([(d_logits * seen["total"][:, :n_classes]).sum()]),
        "mu_out": active.T @ d_logits,
        "mu_out_bias": d_logits.sum(axis=0),
        "mu_in": seen["total"].T @ d_decoded,
        "mu_in_bias": d_decoded.sum(axis=0),
        "rho_out": np.einsum("tkh,tkd->hd", seen["hidden"], d_outer),
        "rho_out_bias": d_outer.sum(axis=(0, 1)),
        "rho_in": np.einsum("tkf,tkh->fh", seen["features"], d_inner),
        "rho_in_bias": d_inner.sum(axis=(0, 1)),
    }
    return float(-logs[rows, labels].mean()), gradient


def worst_answers(
    weights: Weights,
    p_tkc: Array,
    labels: Labels,
    hostile_tk: npt.NDArray[np.bool_],
    *,
    trim: int,
    seed: int | np.random.Generator = 0,
) -> Array:
    """Let the hostile sites claim the wrong class that costs most, row by row.

    Parameters
    ----------
    hostile_tk : bool array of shape (n_rows, n_sites)
        Not all sites of a row.
    seed : int or Generator
        Of how each row's colluders claim it; see the module.

    Returns
    -------
    p_tkc : float array of the shape given
    """
    if not hostile_tk.any():
        return p_tkc
    n_rows, _, n_classes = p_tkc.shape
    rng, rows = np.random.default_rng(seed), np.arange(n_rows)
    honest = ~hostile_tk[:, :, np.newaxis]
    middle = (p_tkc * honest).sum(axis=1) / np.maximum(honest.sum(axis=1), 1)
    way = rng.integers(0, 3, n_rows)
    mass = np.where(way == 0, 1.0, rng.uniform(0.2, 1.0, n_rows))
    tried, costs = [], []
    for claimed in range(n_classes):
        onto = np.eye(n_classes)[claimed]
        blend = mass[:, np.newaxis] * onto + (1.0 - mass[:, np.newaxis]) * middle
        claim = np.where(
            (way == 2)[:, np.newaxis, np.newaxis], _swapped(p_tkc, claimed), blend[:, np.newaxis]
        )
        claim = np.maximum(claim, PROBABILITY_FLOOR)
        claim /= claim.sum(axis=2, keepdims=True)
        tried.append(np.where(honest, p_tkc, claim))
        costs.append(-log_softmax(_forward(weights, tried[-1], trim)["logits"])[rows, labels])
    cost_ct = np.stack(costs)
    cost_ct[labels, rows] = -np.inf  # the right class is no attack
    return np.asarray(np.stack(tried)[cost_ct.argmax(axis=0), rows])


def _swapped(p_tkc: Array, claimed: int) -> Array:
    """Return the answers with the probabilities of their top class and of `claimed` swapped."""
    out, top = p_tkc.copy(), p_tkc.argmax(axis=2)[:, :, np.newaxis]
    np.put_along_axis(out, top, p_tkc[:, :, claimed : claimed + 1], axis=2)
    out[:, :, claimed] = p_tkc.max(axis=2)
    return out


def train_deep_set_trimmed(
    answers_ktc: Array,
    labels: npt.ArrayLike,
    *,
    classes: Sequence[str],
    sites: Sequence[str],
    n_hostile: int = 1,
    trim: int | None = None,
    hidden: int = 32,
    steps: int = 600,
    batch_rows: int = 64,
    learning_rate: float = 0.01,
    decay: float = 1e-4,
    seed: int = 0,
) -> FittedAggregator:
    """Train a deep set with a trimmed mean against up to `n_hostile` colluding sites.

    Parameters
    ----------
    answers_ktc : float array of shape (n_sites, n_rows, n_classes)
        All sites' calibrated probabilities of shared held-out rows; honest.
    labels : int array of shape (n_rows,)
    classes : sequence of str
        The label space, in the order of the columns.
    sites : sequence of str
        Key ids, in the order of the first axis.
    n_hostile : int
        Each row has 0 to so many hostile sites, drawn anew in each step.
    trim : int, optional
        Default `n_hostile`.
    hidden : int
        H; units of both hidden layers.
    steps, batch_rows, learning_rate, decay
        Of Adam; decay pulls the layers' weights to zero.
    seed : int
        Of weights and batches, which protect nothing.

    Returns
    -------
    FittedAggregator
        `remember` it, and ask with ``DeepSetTrimmed(stack=fitted.digest, trim=trim)``.

    Raises
    ------
    ShapeError
        If answers, labels, classes and sites do not fit each other.
    InvalidValueError
        If an option is out of range, or half of the sites or more would be hostile.

    Privacy
    -------
    Whoever trains sees every site's answer to every held-out row, and the labels. A site
    that lies already while training teaches the network that its lies are honest.
    """
    p = np.asarray(answers_ktc, dtype=np.float64)
    y = np.asarray(labels)
    if p.ndim != 3 or 0 in p.shape or y.shape != p.shape[1:2] or y.dtype.kind not in "iu":
        raise ShapeError("answers are (n_sites, n_rows, n_classes), labels (n_rows,) whole numbers")
    if len(classes) != p.shape[2] or len(sites) != len(p):
        raise ShapeError("there is one class a column and one key id a site")
    if not ((p >= 0.0).all() and (np.abs(p.sum(axis=2) - 1.0) <= 1e-4).all()):
        raise InvalidValueError("answers are probabilities: not negative, rows sum to 1")
    if y.min() < 0 or y.max() >= p.shape[2]:
        raise InvalidValueError("a label is a column of the answers")
    if not 0 <= n_hostile < len(p) / 2:
        raise InvalidValueError("fewer than half of the sites are hostile", hint="more sites")
    trim = n_hostile if trim is None else trim
    if trim < 0 or min(hidden, steps, batch_rows) < 1 or not 0.0 < learning_rate <= 1.0:
        raise InvalidValueError("trim, hidden, steps, batch_rows or learning_rate out of range")
    p_tkc = np.maximum(p.transpose(1, 0, 2), PROBABILITY_FLOOR)
    weights = start_arrays(KIND, n_sites=len(p), n_classes=p.shape[2], hidden=hidden, seed=seed)
    weights["skip"] = np.full(1, _SKIP_START)
    rng = np.random.default_rng(seed)
    moments = {
        name: (np.zeros_like(array), np.zeros_like(array)) for name, array in weights.items()
    }
    for step in range(1, steps + 1):
        rows = rng.integers(0, len(y), size=min(batch_rows, len(y)))
        lots = rng.random((len(rows), len(p))).argsort(axis=1).argsort(axis=1)
        hostile = lots < rng.integers(0, n_hostile + 1, size=(len(rows), 1))
        batch = worst_answers(weights, p_tkc[rows], y[rows], hostile, trim=trim, seed=rng)
        _, gradient = loss_and_gradient(weights, batch, y[rows], trim=trim)
        _adam(weights, gradient, moments, step, learning_rate, decay)
    return FittedAggregator(
        kind=KIND,
        arrays=weights,
        card={
            "classes": list(classes),
            "sites": list(sites),
            "trainer": trainer_name(trim),
            "rounds": steps,
            "rows": len(y),
        },
    )


def _adam(
    weights: Weights,
    gradient: Weights,
    moments: dict[str, tuple[Array, Array]],
    step: int,
    rate: float,
    decay: float,
) -> None:
    """Make one step of Adam in place (Kingma and Ba, 2015, algorithm 1)."""
    for name, array in weights.items():
        slope = gradient[name] + (decay * array if array.ndim == 2 else 0.0)
        first, second = moments[name]
        first *= 0.9
        first += 0.1 * slope
        second *= 0.999
        second += 0.001 * slope**2
        change = first / (1.0 - 0.9**step) / (np.sqrt(second / (1.0 - 0.999**step)) + 1e-8)
        np.clip(array - rate * change, -MAX_VALUE, MAX_VALUE, out=array)
