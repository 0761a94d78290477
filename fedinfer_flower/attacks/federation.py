"""Whom to attack: sites with models, records to ask about, and nothing of Flower.

So that users can attack models of their own, a site is any function from inputs to logits.

Axes: K sites, B queries, C classes, S width of a score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedinfer_flower.attacks.shadow_models import Mlps, train_mlps
from fedinfer_flower.ensemble.base import Array, EnsembleRule, SiteContext, make_rule
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.base import optional_module

__all__ = ["SiteModel", "TargetFederation", "digits"]

SiteModel = Callable[[Array], Array]
"""From inputs of shape (B, d) to logits of shape (B, C)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetFederation:
    """Sites with models, queries to ask, and rows to attack.

    Parameters
    ----------
    sites : tuple of callables
        From inputs (B, d) to logits (B, C), one each.
    inputs : float array of shape (n_records, d)
        Records that the attacker can ask about and train on. Not the sites' own training
        rows, except where an attack says so.
    labels : int array of shape (n_records,)
        In [0, n_classes).
    n_classes : int
    rule : EnsembleRule
        One that needs no evidence beyond logits.
    site_inputs : tuple of float arrays, optional
        The sites' own training inputs, for the attack on familiarity.

    Raises
    ------
    InvalidValueError
        If there are fewer than 3 sites, shapes do not fit, or the rule needs more.
    """

    sites: tuple[SiteModel, ...]
    inputs: Array
    labels: npt.NDArray[np.int64]
    n_classes: int
    rule: EnsembleRule = field(default_factory=lambda: make_rule("mean-probability"))
    site_inputs: tuple[Array, ...] = ()

    def __post_init__(self) -> None:
        if len(self.sites) < 3:
            raise InvalidValueError("an attack bench needs at least 3 sites")
        if self.inputs.ndim != 2 or self.labels.shape != (len(self.inputs),):
            raise InvalidValueError("inputs have shape (n_records, d), labels (n_records,)")
        if self.rule.needs:
            raise InvalidValueError(
                f"rule {self.rule.name!r} needs evidence that the bench does not have",
                hint="use 'mean-probability', 'majority-vote' or another rule of logits alone",
            )

    def scores(self, inputs: Array) -> Array:
        """Return the sites' scores, shape (K, B, S)."""
        context = SiteContext(present=np.ones(self.n_classes, dtype=bool))
        return np.stack(
            [self.rule.score(np.asarray(site(inputs), dtype=float), context) for site in self.sites]
        )

    def with_rule(self, rule: EnsembleRule) -> TargetFederation:
        """Return the same federation under another rule."""
        return TargetFederation(
            sites=self.sites,
            inputs=self.inputs,
            labels=self.labels,
            n_classes=self.n_classes,
            rule=rule,
            site_inputs=self.site_inputs,
        )

    @classmethod
    def digits(cls, *, n_sites: int = 5, rows_a_site: int = 100, seed: int = 0) -> TargetFederation:
        """Return sites with overfit networks on digits that come with scikit-learn.

        Raises
        ------
        MissingExtraError
            Without scikit-learn.
        """
        inputs, labels = digits()
        order = np.random.default_rng(seed).permutation(len(inputs))
        own = order[: n_sites * rows_a_site].reshape(n_sites, rows_a_site)
        rest = order[n_sites * rows_a_site :]
        nets = train_mlps(inputs[own], labels[own], n_classes=10, seed=seed)
        return cls(
            sites=tuple(_logits_of(nets, site) for site in range(n_sites)),
            inputs=inputs[rest],
            labels=labels[rest],
            n_classes=10,
            site_inputs=tuple(inputs[rows] for rows in own),
        )


def digits() -> tuple[Array, npt.NDArray[np.int64]]:
    """Return the 1797 digits of scikit-learn: inputs of shape (1797, 64) in [0, 1], labels."""
    datasets = optional_module("sklearn.datasets", extra="simulation")
    inputs, labels = datasets.load_digits(return_X_y=True)
    return np.asarray(inputs / 16.0, dtype=float), np.asarray(labels, dtype=np.int64)


def _logits_of(nets: Mlps, site: int) -> SiteModel:
    return lambda inputs: nets.logits(inputs, which=slice(site, site + 1))[0].astype(float)
