"""Checks that every ensemble rule passes; run them on a rule of your own.

``check_rule(MyRule)`` runs all of `CHECKS` and raises AssertionError with a sentence at
the first that fails. Each check takes a rule and a seed. They need nothing but NumPy.

Axes: K sites, B queries, C classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedinfer_flower.ensemble.base import (
    PROBABILITY_FLOOR,
    RULES,
    Array,
    EnsembleRule,
    ScoreKind,
    SiteContext,
    make_rule,
)
from fedinfer_flower.ensemble.example_sites import ABSENT_LOGIT, HARD_ROWS, example_sites
from fedinfer_flower.errors import InvalidValueError

__all__ = ["CHECKS", "check_rule", "check_score", "check_sensitivity"]

TOLERANCE = 1e-9
"""Room for the order of sums: float64 has 16 digits, and no check adds more than some
hundred numbers of the size of the score's bound."""


def _require(condition: object, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _near(left: Array, right: Array, scale: float = 1.0) -> bool:
    return left.shape == right.shape and bool(np.all(np.abs(left - right) <= TOLERANCE * scale))


def _cases(
    seed: int, shapes: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[np.random.Generator, Array, list[SiteContext]]]:
    for n_sites, n_queries, n_classes in shapes:
        rng = np.random.default_rng(seed)
        logits = rng.normal(0.0, 3.0, (n_sites, n_queries, n_classes))
        yield rng, logits, example_sites(rng, logits)


def _scores(rule: EnsembleRule, logits_kbc: Array, sites: Sequence[SiteContext]) -> Array:
    return np.stack([rule.score(z, site) for z, site in zip(logits_kbc, sites, strict=True)])


def _classes(n_classes: int) -> tuple[str, ...]:
    return tuple(f"class-{c}" for c in range(n_classes))


def check_declaration(rule: EnsembleRule, seed: int) -> None:  # noqa: ARG001
    """Require a registered name, and bounds that noise and codecs can work with."""
    _require(rule.name in RULES.names(), f"{type(rule).__name__} lacks @RULES.register('its-name')")
    for n_classes in (1, 2, 3, 10, 1000):
        width, bound = rule.score_width(n_classes), rule.score_bound(n_classes)
        _require(width >= 1, f"score_width({n_classes}) is {width}")
        _require(0.0 < bound < math.inf, f"score_bound({n_classes}) is {bound}")
        sensitivity = rule.sensitivity_l2(n_classes)
        _require(0.0 < sensitivity < math.inf, f"sensitivity_l2({n_classes}) is {sensitivity}")
        # More than the diameter of the box of all bounded scores is noise for nothing.
        diameter = 2.0 * bound * math.sqrt(width)
        _require(
            sensitivity <= diameter * (1.0 + TOLERANCE),
            f"sensitivity_l2({n_classes}) is {sensitivity}, the whole box measures {diameter}",
        )


def check_docstring(rule: EnsembleRule, seed: int) -> None:  # noqa: ARG001
    """Require Privacy and Examples sections, and examples that run."""
    import doctest
    import sys

    cls = type(rule)
    for section in ("Privacy", "Examples"):
        underlined = f"{section}\n    {'-' * len(section)}"
        _require(underlined in (cls.__doc__ or ""), f"no {section} section in {cls.__name__}")
    names = dict(vars(sys.modules[cls.__module__])) | {"np": np}
    runner = doctest.DocTestRunner(verbose=False)
    report: list[str] = []
    for test in doctest.DocTestFinder(recurse=False).find(cls, globs=names):
        runner.run(test, out=report.append)
    _require(runner.summarize(verbose=False).failed == 0, "".join(report))


def check_options(rule: EnsembleRule, seed: int) -> None:  # noqa: ARG001
    """Require that options travel as JSON and make the same rule again."""
    import json

    options = rule.options()
    again = make_rule(rule.name, json.loads(json.dumps(options)))
    _require(again == rule, f"{again} was made from the options of {rule}")
    try:
        make_rule(rule.name, options | {"no_such_option": 1})
    except InvalidValueError:
        pass
    else:
        raise AssertionError("an unknown option was accepted")
    try:
        dataclasses.replace(rule).name = "other"  # type: ignore[misc]
    except AttributeError:
        return
    raise AssertionError(f"{type(rule).__name__} is not a frozen dataclass")


def check_score(rule: EnsembleRule, logits: Array, site: SiteContext) -> None:
    """Require a finite score of the declared shape, kind and bound for these logits."""
    score = rule.score(logits, site)
    n_queries, n_classes = logits.shape
    expected = (n_queries, rule.score_width(n_classes))
    _require(score.shape == expected, f"score has shape {score.shape}, expected {expected}")
    _require(score.dtype == np.float64, f"score has dtype {score.dtype}, expected float64")
    _require(np.isfinite(score).all(), f"score {score} of {logits} is not finite")
    bound = rule.score_bound(n_classes)
    # No tolerance: codecs refuse what lies outside.
    _require(
        np.abs(score).max() <= bound, f"score {score} of {logits} is outside the bound {bound}"
    )
    if rule.score_kind is ScoreKind.VOTE:
        whole = np.abs(score.sum(axis=1) - 1.0) <= TOLERANCE
        _require((score >= 0.0).all() and whole.all(), f"votes {score} do not sum to one")


def check_hard_logits(rule: EnsembleRule, seed: int) -> None:
    """Require good scores of logits that are huge, equal, denormal or absent."""
    rng = np.random.default_rng(seed)
    for scale in (0.0, 1e-3, 1.0, 50.0, 1e4):
        for n_classes in (1, 2, 3, 40):
            logits = scale * rng.normal(size=(8, n_classes))
            check_score(rule, logits, example_sites(rng, logits[np.newaxis])[0])
    for columns in ([0], [0, 1], [0, 1, 2]):
        logits = HARD_ROWS[:, columns]
        site = example_sites(rng, logits[np.newaxis])[0]
        reversed_site = dataclasses.replace(site, augmented_tbc=logits[np.newaxis, ::-1])
        check_score(rule, logits, site)
        check_score(rule, logits, reversed_site)


def check_sensitivity(
    rule: EnsembleRule, pair_of_logits: tuple[Array, Array], sites: Sequence[SiteContext]
) -> None:
    """Require that no row moves by more than `sensitivity_l2` from one answer to another."""
    first, second = (rule.score(z, s) for z, s in zip(pair_of_logits, sites, strict=True))
    moved = float(np.linalg.norm(first - second, axis=1).max())
    limit = rule.sensitivity_l2(pair_of_logits[0].shape[1])
    _require(
        moved <= limit * (1.0 + TOLERANCE),
        f"{pair_of_logits} are {moved} apart, sensitivity_l2 says {limit}",
    )


def check_random_sensitivity(rule: EnsembleRule, seed: int) -> None:
    """Require the stated sensitivity on random pairs, from unsure to certain answers."""
    rng = np.random.default_rng(seed)
    for scale in (1e-2, 1.0, 10.0, 1e3):
        for n_classes in (1, 2, 3, 10):
            logits = scale * rng.normal(size=(2, 50, n_classes))
            # Neighbours in sensitivity share nothing: other data, other classes known.
            sites = [example_sites(rng, z[np.newaxis])[0] for z in logits]
            check_sensitivity(rule, (logits[0], logits[1]), sites)
            opposite = -logits[0]
            sites[1] = example_sites(rng, opposite[np.newaxis])[0]
            check_sensitivity(rule, (logits[0], opposite), sites)


def check_site_order(rule: EnsembleRule, seed: int) -> None:
    """Require that the combined score does not depend on the order of sites."""
    for rng, logits, sites in _cases(seed, [(2, 5, 3), (5, 12, 4), (9, 1, 10)]):
        scores = _scores(rule, logits, sites)
        # Sites that say the same leave the most room for a choice between them.
        for case in (scores, scores[np.arange(len(scores)) // 2]):
            shuffled = case[rng.permutation(len(case))]
            scale = len(case) * rule.score_bound(logits.shape[2])
            _require(
                _near(rule.combine(case), rule.combine(shuffled), scale),
                f"{rule.name} gives another total for another order of sites",
            )


def _permuted(site: SiteContext, order: npt.NDArray[np.int64]) -> SiteContext:
    given = [site.class_counts, site.class_totals, site.confusion, site.augmented_tbc]
    counts, totals, confusion, augmented = (np.asarray(a, np.float64) for a in given)
    return dataclasses.replace(
        site,
        present=site.present[order],
        class_counts=counts[order],
        class_totals=totals[order],
        confusion=confusion[order][:, order],
        augmented_tbc=augmented[:, :, order],
    )


def check_class_order(rule: EnsembleRule, seed: int) -> None:
    """Require that renaming classes renames the probabilities and changes nothing else."""
    for rng, logits, sites in _cases(seed, [(1, 6, 2), (4, 9, 3), (3, 5, 8)]):
        n_sites, _, n_classes = logits.shape
        order = rng.permutation(n_classes)
        # Rounded logits tie often: that is where a rule may favour the first class.
        for tried in (logits, logits.round()):
            total = rule.combine(_scores(rule, tried, sites))
            renamed_sites = [_permuted(site, order) for site in sites]
            renamed = rule.combine(_scores(rule, tried[:, :, order], renamed_sites))
            _require(
                _near(
                    rule.probabilities(total, n_sites)[:, order],
                    rule.probabilities(renamed, n_sites),
                ),
                f"{rule.name} treats a class by its place in the list",
            )


def check_prediction(rule: EnsembleRule, seed: int) -> None:
    """Require valid predictions of one site and many, of one query, of one and two classes."""
    shapes = [(1, 1, 1), (1, 1, 2), (1, 6, 3), (2, 1, 10), (5, 7, 2), (30, 3, 4)]
    for _, logits, sites in _cases(seed, shapes):
        n_sites, n_queries, n_classes = logits.shape
        total = rule.combine(_scores(rule, logits, sites))
        _require(
            total.shape == (n_queries, rule.score_width(n_classes)),
            f"combine gives shape {total.shape} for {logits.shape}",
        )
        prediction = rule.decide(total, n_sites, _classes(n_classes))
        rows = prediction.probabilities
        _require(np.isfinite(rows).all() and (rows >= 0.0).all(), f"probabilities {rows}")
        _require(_near(rows.sum(axis=1), np.ones(n_queries)), "probabilities do not sum to one")
        labels = prediction.labels
        _require(((labels >= 0) & (labels < n_classes)).all(), f"labels {labels}")
        _require((prediction.margin >= 0.0).all(), f"margins {prediction.margin}")


def check_agreement(rule: EnsembleRule, seed: int) -> None:
    """Require that sites which are all sure of a class get that class."""
    rng = np.random.default_rng(seed)
    for n_sites in (1, 2, 5):
        for n_classes in (2, 3, 10):
            for truth in (np.arange(n_classes), np.array([n_classes - 1])):
                logits = np.tile(10.0 * np.eye(n_classes)[truth], (n_sites, 1, 1))
                sites = example_sites(rng, logits)
                total = rule.combine(_scores(rule, logits, sites))
                prediction = rule.decide(total, n_sites, _classes(n_classes))
                _require(
                    (prediction.labels == truth).all() and not prediction.abstained.any(),
                    f"{n_sites} sites are sure of {truth}, the rule says {prediction.labels}",
                )


def check_absent_classes(rule: EnsembleRule, seed: int) -> None:
    """Require good scores of sites that miss classes, and an answer that they know."""
    rng = np.random.default_rng(seed)
    known = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
    for absent in (ABSENT_LOGIT, math.log(PROBABILITY_FLOOR)):
        # Sites lean towards one class: where they contradict each other outright, a rule
        # may have reason to answer what none of them knows.
        leaning = rng.normal(size=(3, 6, 4)) + np.array([5.0, 0.0, 0.0, 0.0])
        logits = np.where(known[:, np.newaxis, :] == 1, leaning, absent)
        sites = example_sites(rng, logits, known_kc=known)
        for site_logits, site in zip(logits, sites, strict=True):
            check_score(rule, site_logits, site)
        total = rule.combine(_scores(rule, logits, sites))
        labels = rule.decide(total, len(sites), _classes(4)).labels
        _require((labels != 3).all(), "the answer is a class that no site knows")


def check_inputs_unchanged(rule: EnsembleRule, seed: int) -> None:
    """Require that a rule writes to none of the arrays that it is given."""
    for _, logits, sites in _cases(seed, [(3, 4, 5)]):
        logits.flags.writeable = False
        for site in sites:
            for array in vars(site).values():
                if isinstance(array, np.ndarray):
                    array.flags.writeable = False
        scores = _scores(rule, logits, sites)
        scores.flags.writeable = False
        total = rule.combine(scores).copy()
        total.flags.writeable = False
        rule.decide(total, 3, _classes(5))


def check_noisy_scores(rule: EnsembleRule, seed: int) -> None:
    """Require finite results of scores under privacy noise, which may lie anywhere."""
    for rng, logits, sites in _cases(seed, [(1, 4, 2), (4, 9, 3)]):
        n_sites, _, n_classes = logits.shape
        scores = _scores(rule, logits, sites)
        for size in (0.1, 10.0):
            noise = rng.normal(0.0, size * rule.sensitivity_l2(n_classes), scores.shape)
            total = rule.combine(scores + noise)
            prediction = rule.decide(total, n_sites, _classes(n_classes))
            finite = np.isfinite(total).all() and np.isfinite(prediction.probabilities).all()
            _require(finite, f"{rule.name} makes {total} of noisy scores")


Check = Callable[[EnsembleRule, int], None]

CHECKS: tuple[Check, ...] = (
    check_declaration,
    check_docstring,
    check_options,
    check_hard_logits,
    check_random_sensitivity,
    check_site_order,
    check_class_order,
    check_prediction,
    check_agreement,
    check_absent_classes,
    check_inputs_unchanged,
    check_noisy_scores,
)


def check_rule(
    cls: type[EnsembleRule], options: Mapping[str, object] | None = None, *, seed: int = 0
) -> None:
    """Run all checks on a rule class; raise AssertionError at the first that fails.

    Parameters
    ----------
    cls : subclass of EnsembleRule
        Registered, since its name is what travels.
    options : mapping of str to JSON scalar, optional
        Options to check it with; the defaults if left out.
    seed : int
        Seed of the random inputs; the checks are deterministic.

    Examples
    --------
    >>> check_rule(RULES.get("majority-vote"))
    """
    rule = cls(**dict(options or {}))
    for check in CHECKS:
        try:
            check(rule, seed)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error
