"""How far a protection's codec may move a sum of honest sites."""

from __future__ import annotations

from fedinfer_flower.ensemble.base import EnsembleRule
from fedinfer_flower.errors import ConfigError
from fedinfer_flower.privacy.base import Protection, ScorePlan
from fedinfer_flower.selection.base import Selector

__all__ = ["require_exact", "require_sets", "rounding"]


def rounding(protection: Protection, rule: EnsembleRule, n_classes: int, n_sites: int) -> float:
    """Return the largest error of a combined score's entry, in units of the score.

    Covers the width of ties (1e-9) too. Protections without a bound of their own send
    float32, which rounds each entry by at most 2^-24 of its size.
    """
    plan = ScorePlan.for_rule(rule, n_classes=n_classes, n_sites_max=n_sites)
    own = getattr(protection, "sum_slack", None)
    error = n_sites * plan.bound * 2.0**-24 if own is None else float(own(plan, n_sites))
    return max(1e-6, error)


def require_exact(selector: Selector, protection: Protection) -> None:
    """Refuse to stop losslessly on sums that carry noise.

    Raises
    ------
    ConfigError
    """
    noisy = protection.name == "dp" or protection.name.endswith("+dp")
    if noisy and selector.options().get("stop") == "lossless":
        raise ConfigError(
            f"stop='lossless' under {protection.name!r}: the noise of further sites is not bounded",
            hint="use stop='margin'",
        )


def require_sets(selector: Selector, *, given: bool) -> None:
    """Refuse to stop by prediction sets without any.

    Raises
    ------
    ConfigError
    """
    if selector.options().get("stop") == "set" and not given:
        raise ConfigError(
            "stop='set' without prediction sets to stop by",
            hint="sets=ConformalPredictor.from_audits(...).sets, or stop='margin'",
        )
