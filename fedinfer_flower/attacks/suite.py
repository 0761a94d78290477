"""Run attacks against protections, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fedinfer_flower.attacks.base import ATTACKS, Attack, AttackResult
from fedinfer_flower.attacks.federation import TargetFederation
from fedinfer_flower.attacks.rounds import label_of
from fedinfer_flower.ensemble.base import make_rule
from fedinfer_flower.errors import InvalidValueError, MissingExtraError
from fedinfer_flower.privacy.base import PROTECTIONS, Protection
from fedinfer_flower.privacy.legality import refusal

__all__ = ["default_protections", "markdown_table", "run_suite"]

Progress = Callable[[str, str], None]
"""Called with the attack's name and the protection's label before each of them."""


def default_protections() -> tuple[Protection, ...]:
    """Return the protections to attack: all registered ones with default options.

    Beside those that can have self-masks there are the same ones with them: an attack tells
    them apart. Left out are those whose extra is not installed.

    Examples
    --------
    >>> [p.name for p in default_protections()][:1]
    ['plain']
    """
    found: list[Protection] = []
    for name in sorted(PROTECTIONS.names(), key=lambda name: (name != "plain", name)):
        cls = PROTECTIONS.get(name)
        try:
            cls().make_keys()
        except MissingExtraError:
            continue
        found.append(cls())
        if "self_mask" in found[-1].options():
            found.append(cls(self_mask=True))  # type: ignore[call-arg]
    return tuple(found)


def run_suite(
    federation: TargetFederation | None = None,
    *,
    attacks: Sequence[Attack[Any]] | None = None,
    protections: Sequence[Protection] | None = None,
    seed: int = 0,
    progress: Progress = lambda attack, mode: None,  # noqa: ARG005
) -> list[AttackResult]:
    """Run attacks against protections in this process.

    Parameters
    ----------
    federation : TargetFederation, optional
        Whom to attack; five sites on digits by default, which need scikit-learn.
    attacks : sequence of Attack, optional
        All registered ones with default options by default.
    protections : sequence of Protection, optional
        `default_protections` by default. Where the federation's rule cannot work under one
        of them, majority vote stands in for it.
    seed : int
        Of everything but the protections' own randomness, which has none.
    progress : callable, optional

    Returns
    -------
    results : list of AttackResult
        In the order of attacks and protections. An attack that has nothing to work on
        under a protection has no result there.

    Raises
    ------
    InvalidValueError
        If nothing is left to do.
    MissingExtraError
        If the default federation or an attack needs a package that is not installed.

    Privacy
    -------
    Works on the scores of real models, in this process only; results hold rates, and no
    input or score. An attack that fails proves nothing about others.
    """
    target = TargetFederation.digits(seed=seed) if federation is None else federation
    chosen = [ATTACKS.get(name)() for name in ATTACKS.names()] if attacks is None else attacks
    modes = default_protections() if protections is None else protections
    if not chosen or not modes:
        raise InvalidValueError("a suite needs an attack and a protection")
    results: list[AttackResult] = []
    for attack in chosen:
        for protection in modes:
            fitting = _fitting(target, protection)
            if fitting is None:
                continue
            progress(attack.name, label_of(protection))
            for mode, evidence in attack.evidence(fitting, protection, seed=seed).items():
                results.append(attack.run(evidence, mode=mode, seed=seed))
    return results


def _fitting(target: TargetFederation, protection: Protection) -> TargetFederation | None:
    """Return the federation under a rule that is legal with the protection, if it can be run."""
    for rule in (target.rule, make_rule("majority-vote")):
        if refusal(rule, protection):
            continue
        if len(target.sites) < protection.min_cohort:
            return None
        return target if rule == target.rule else target.with_rule(rule)
    return None


def markdown_table(results: Sequence[AttackResult]) -> str:
    """Return results as a Markdown table.

    Examples
    --------
    >>> result = AttackResult(attack="stealing", mode="plain", statistic="fidelity", value=0.9,
    ...     baseline=0.1, threshold=0.5, threshold_reason="half way")
    >>> markdown_table([result]).splitlines()[-1]
    '| stealing | plain | fidelity | 0.9 | 0.1 | succeeds | none |'
    """
    lines = [
        "| attack | mode | statistic | value | chance | verdict | promise |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        value = f"{r.value:.3g}"
        if r.interval is not None:
            value += f" ({r.interval[0]:.3g} to {r.interval[1]:.3g})"
        cells = [r.attack, r.mode, r.statistic, value, f"{r.baseline:.3g}", r.verdict, r.claim]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
