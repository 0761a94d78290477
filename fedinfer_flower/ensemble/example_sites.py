"""Made-up sites and hard logits for checking rules; no rule of its own.

Axes: K sites, B queries, C classes.
"""

from __future__ import annotations

import numpy as np

from fedinfer_flower.ensemble.base import Array, SiteContext

__all__ = ["ABSENT_LOGIT", "HARD_ROWS", "example_sites"]

ABSENT_LOGIT = -1e30
"""A logit of a class that a site does not know."""

HARD_ROWS = np.array(
    [
        [0.0, 0.0, 0.0],
        [-0.0, 0.0, -0.0],
        [1e308, -1e308, 0.0],
        [-1e308, -1e308, -1e308],
        [1e308, 1e308, ABSENT_LOGIT],
        [5e-324, 0.0, -5e-324],
        [40.0, ABSENT_LOGIT, ABSENT_LOGIT],
        [1.0, np.nextafter(1.0, 2.0), 1.0],
    ]
)
"""Logits that break careless arithmetic: equal, huge, denormal, a last digit apart."""


def example_sites(
    rng: np.random.Generator, logits_kbc: Array, *, known_kc: Array | None = None
) -> list[SiteContext]:
    """Return one context a site, with all evidence that any rule may ask for.

    Parameters
    ----------
    rng : Generator
    logits_kbc : float array of shape (n_sites, n_queries, n_classes)
        Two augmented copies are made near these.
    known_kc : array of shape (n_sites, n_classes), optional
        Not zero where a site knows a class; by default everywhere.

    Examples
    --------
    >>> site, = example_sites(np.random.default_rng(0), np.zeros((1, 4, 3)))
    >>> site.present
    array([ True,  True,  True])
    """
    n_sites, n_queries, n_classes = logits_kbc.shape
    shape = (n_sites, n_classes)
    known = np.ones(shape, np.bool_) if known_kc is None else np.not_equal(known_kc, 0)
    counts = rng.integers(1, 100, shape).astype(np.float64) * known
    sites = []
    for k in range(n_sites):
        confusion = np.eye(n_classes) * 4.0 * n_classes + rng.random((n_classes, n_classes))
        confusion[~known[k]] = 1.0
        copies = logits_kbc[k] + rng.normal(0.0, 0.1, (2, n_queries, n_classes))
        sites.append(
            SiteContext(
                present=known[k],
                class_counts=counts[k],
                class_totals=counts.sum(axis=0),
                confusion=confusion / confusion.sum(axis=1, keepdims=True),
                augmented_tbc=copies,
                familiarity=rng.uniform(0.1, 1.0, (n_queries,)),
            )
        )
    return sites
