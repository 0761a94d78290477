"""The combined answer is that of the clear rule, under every protection that fits."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower import FedEnsemble
from fedinfer_flower.ensemble.base import RULES, Disclosure
from fedinfer_flower.errors import IncompatibleProtection
from fedinfer_flower.privacy import legality_matrix
from fedinfer_flower.privacy.base import ScorePlan
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.privacy.fixed_point import FixedPoint
from fedinfer_flower.privacy.he_schemes import BFV
from fedinfer_flower.privacy.secagg_dp import SecAggDP

MATRIX = legality_matrix()
LEGAL = [(r, p) for r, row in MATRIX.items() for p, reason in row.items() if not reason]
ILLEGAL = [(r, p) for r, row in MATRIX.items() for p, reason in row.items() if reason]
CLASSES = ("a", "b", "c", "d")
N_SITES = 5


def strategy(rule: str, protection: str, **options) -> FedEnsemble:
    return FedEnsemble(
        rule=rule,
        protection=protection,
        min_available_nodes=N_SITES,
        allow_coordinator_key=protection.startswith("he"),
        **options,
    )


def reference(federation, name: str) -> np.ndarray:
    """Return the combined scores of the clear rule, in float64."""
    rule = RULES.get(name)()
    scores = federation.scores(rule)
    return scores.sum(axis=0) if rule.discloses is Disclosure.SUM else rule.combine(scores)


def tolerance(rule_name: str, protection: str) -> float:
    rule = RULES.get(rule_name)()
    plan = ScorePlan.for_rule(rule, n_classes=len(CLASSES), n_sites_max=N_SITES)
    if protection == "secagg":
        codec = FixedPoint.fitted(clip=plan.bound, n_sites_max=N_SITES, modulus=2**32)
        return N_SITES * codec.step / 2
    if protection == "he":  # each site rounds to the nearest step
        codec = FixedPoint.fitted(clip=plan.bound, n_sites_max=N_SITES, modulus=BFV.plain_modulus)
        return N_SITES * codec.step / 2
    if rule.discloses is Disclosure.SUM:  # each site rounds to float32, half a unit in the last
        return N_SITES * plan.bound * 2.0**-24
    # What a rule makes of rounded scores may amplify the rounding (observed: up to 7e-8).
    return 1e-6


@pytest.mark.parametrize(("rule", "protection"), LEGAL)
def test_legal_pair_gives_the_answer_of_the_clear_rule(federation, grid, rule, protection):
    totals, prediction, result = federation.ask(strategy(rule, protection), grid)

    assert not result.degraded
    assert prediction.classes == CLASSES
    assert result.reports[0].rule == rule
    assert np.isfinite(totals).all()
    np.testing.assert_allclose(prediction.probabilities.sum(axis=1), 1.0, rtol=0.0, atol=1e-9)
    if protection.endswith("dp"):  # noisy: its statistics are tested with the protection
        assert totals.shape == (len(federation.queries), RULES.get(rule)().score_width(4))
        return
    expected = reference(federation, rule)
    limit = tolerance(rule, protection)
    np.testing.assert_allclose(totals, expected, rtol=0.0, atol=limit)
    clear = RULES.get(rule)().decide(expected, N_SITES, CLASSES)
    sure = clear.margin > 2 * limit  # where rounding cannot change who wins
    assert sure.sum() >= 3
    np.testing.assert_array_equal(prediction.labels[sure], clear.labels[sure])


@pytest.mark.parametrize(("rule", "protection"), ILLEGAL)
def test_illegal_pair_is_refused_when_built(rule, protection):
    with pytest.raises(IncompatibleProtection) as caught:
        FedEnsemble(rule=rule, protection=protection)
    assert caught.value.hint.startswith("use ")


@pytest.mark.parametrize(("rule", "protection"), [p for p in LEGAL if p[1] == "plain"])
def test_answer_does_not_depend_on_the_order_of_sites(federation, rule, protection):
    answers = []
    for order in (1, -1):
        # Nodes are 1000 to 1004; the first, or the last, comes in 10 ms before the others.
        with federation.grid(
            workers=N_SITES,
            latency_s=lambda n, order=order: 0.01 * (n % 5 if order > 0 else -n % 5),
        ) as grid:
            answers.append(federation.ask(strategy(rule, protection), grid)[:2])

    # float64 sums of five float32 numbers in two orders; iterative rules amplify it.
    np.testing.assert_allclose(answers[0][0], answers[1][0], rtol=1e-9, atol=1e-9)
    sure = answers[0][1].margin > 1e-6
    np.testing.assert_array_equal(answers[0][1].labels[sure], answers[1][1].labels[sure])


@pytest.mark.parametrize(
    ("rule", "protection"),
    [
        ("class-share", "plain"),
        ("class-share", "he"),
        ("class-share", "secagg"),
        ("median", "plain"),
        ("majority-vote", "he"),
        ("majority-vote", "secagg"),
    ],
)
def test_several_batches_give_the_answer_of_one(federation, rule, protection):
    answers = {}
    for batch_size in (1024, 5, 1):
        with federation.grid() as grid:
            answers[batch_size] = federation.ask(
                strategy(rule, protection), grid, batch_size=batch_size
            )

    assert [len(answers[b][2].reports) for b in (1024, 5, 1)] == [1, 3, 12]
    for batch_size in (5, 1):
        # Sites differ in the last bits of matrix products of other shapes, at most one step
        # of the codec then.
        limit = tolerance(rule, protection)
        np.testing.assert_allclose(
            answers[batch_size][0], answers[1024][0], rtol=0.0, atol=2 * limit
        )
        sure = answers[1024][1].margin > 4 * limit
        assert sure.any()
        np.testing.assert_array_equal(
            answers[batch_size][1].labels[sure], answers[1024][1].labels[sure]
        )


@pytest.mark.parametrize(
    ("shares", "rule", "kind"),
    [
        (("counts",) * 5, "open-set-class-share", "counts"),
        (("counts", "presence") * 2 + ("presence",), "open-set-class-share", "presence"),
        (("counts",) * 4 + ("withheld",), "open-set", "withheld"),
    ],
)
def test_auto_picks_by_what_sites_share_and_says_why(make_federation, shares, rule, kind):
    federation = make_federation(shares=shares)
    with federation.grid() as grid:
        totals, _, result = federation.ask(strategy("auto", "plain"), grid)

    report = result.reports[0]
    assert report.rule == result.combined.rule == rule
    assert len(report.rule_reason) > 20
    assert {p.counts_kind for p in result.profiles.values()} >= {kind}
    np.testing.assert_allclose(
        totals, reference(federation, rule), rtol=0.0, atol=tolerance(rule, "plain")
    )


@pytest.mark.parametrize(
    ("protection", "rule"),
    [
        # The sites know different classes and can tell what they cannot know ...
        (DP(), "open-set"),
        (SecAggDP(), "open-set"),
        # ... but randomised response leaves no way to stay silent.
        (DP(mechanism="randomised-response"), "majority-vote"),
    ],
    ids=["dp", "secagg+dp", "randomised response"],
)
def test_auto_under_noise_picks_what_loses_least_by_it(federation, grid, protection, rule):
    ours = FedEnsemble(rule="auto", protection=protection, min_available_nodes=N_SITES)
    _, _, result = federation.ask(ours, grid)
    assert result.reports[0].rule == rule
    assert result.reports[0].epsilon_per_query == 1.0


def test_mixed_counts_and_presence_are_read_as_presence(make_federation):
    mixed = make_federation(shares=("counts", "presence", "counts", "presence", "presence"))
    all_presence = make_federation(shares=("presence",) * 5)
    with mixed.grid() as grid:
        totals, _, _ = mixed.ask(strategy("class-share", "plain"), grid)

    np.testing.assert_allclose(
        totals,
        reference(all_presence, "class-share"),
        rtol=0.0,
        atol=tolerance("class-share", "plain"),
    )


def test_class_share_where_a_site_withholds_is_refused_naming_it(make_federation):
    federation = make_federation(shares=("counts",) * 4 + ("withheld",))
    with (
        federation.grid() as grid,
        pytest.raises(IncompatibleProtection, match="withheld by site-4"),
    ):
        federation.ask(strategy("class-share", "plain"), grid)


def test_classes_of_the_strategy_are_the_columns_of_the_answer(federation, grid):
    ours = strategy("mean-probability", "plain", classes=("d", "a"))
    result = ours.start(grid, federation.queries)

    assert result.prediction is not None
    assert result.prediction.classes == ("d", "a")
    assert result.prediction.probabilities.shape == (len(federation.queries), 2)


def test_progress_counts_queries_up_to_all(federation, grid):
    seen = []
    strategy("mean-probability", "plain", batch_size=5).start(
        grid, federation.queries, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(5, 12), (10, 12), (12, 12)]


def test_fraction_of_sites_is_asked_once_a_run(federation, grid):
    result = strategy("mean-probability", "plain", fraction_query=0.5, batch_size=4).start(
        grid, federation.queries
    )
    cohorts = {tuple(s.site_id for s in report.sites) for report in result.reports}
    assert len(result.reports) == 3
    assert len(cohorts) == 1
    assert len(next(iter(cohorts))) == 3
    assert result.combined.n_sites_asked == 3
