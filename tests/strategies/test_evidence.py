"""From a sealed query with audits in it to one number a site, over real messages."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from fedinfer_flower import FedEnsemble, InferenceMod, LocalModel, Querier
from fedinfer_flower.errors import ConfigError, IncompatibleProtection, QuorumNotMetError
from fedinfer_flower.incentives import AuditedAnswers, make_scheme
from fedinfer_flower.privacy.site_budget import BudgetPolicy
from fedinfer_flower.settlement import (
    EvidenceForm,
    QuerierDesk,
    SettlementDesk,
    SettlementKeys,
    mix_audits,
    settle,
)
from fedinfer_flower.simulation.local_grid import LocalGrid

N_SITES, CLASSES, N_AUDITS = 5, ("a", "b", "c"), 60
RNG = np.random.default_rng(8)
AUDIT_ROWS = RNG.standard_normal((N_AUDITS, 4))
AUDIT_LABELS = (AUDIT_ROWS[:, :3]).argmax(axis=1)
ROWS = RNG.standard_normal((90, 4))
# Fixed point of the codec, over all audits: far below what tells two sites apart.
CODEC = 1e-4


def weights_of(partition: int) -> np.ndarray:
    """Site 0 sees best, site 4 nothing but noise."""
    noise = np.random.default_rng(partition).standard_normal((4, 3))
    return 3.0 * np.eye(4)[:, :3] + partition * noise


def load_model(context) -> LocalModel:
    weights = weights_of(context.node_config["partition-id"])
    return LocalModel(
        model=lambda rows: np.asarray(rows, dtype=float) @ weights,
        classes=CLASSES,
        outputs="logits",
    )


def app(agrees_to=("settlement", "settlement-ckks"), **options) -> ClientApp:
    return InferenceMod(load_model, agrees_to=agrees_to, **options).attach(ClientApp())


@pytest.fixture
def grid() -> Iterator[LocalGrid]:
    with LocalGrid(app(), num_supernodes=N_SITES) as grid:
        yield grid


def in_clear() -> np.ndarray:
    """Return each site's score, worked out with every answer at hand."""
    logits = np.stack([AUDIT_ROWS @ weights_of(k) for k in range(N_SITES)])
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    answers = AuditedAnswers(
        probabilities_ktc=p / p.sum(axis=-1, keepdims=True), labels=AUDIT_LABELS
    )
    return make_scheme("audited-blend").contributions(answers)


def by_name(values, directory) -> np.ndarray:
    names = {card.key_id: int(card.profile.name.removeprefix("site-")) for card in directory.cards}
    scores = np.zeros(N_SITES)
    for key_id, value in values.items():
        scores[names[key_id]] = value
    return scores


def asked_under(grid, protection, *, evidence=True, evidence_key=b""):
    strategy = FedEnsemble(
        protection=protection,
        evidence=evidence,
        min_available_nodes=N_SITES,
        # Both roles are in this one process here, and only here.
        allow_coordinator_key=True,
    )
    directory = strategy.directory(grid)
    querier = Querier(protection=protection)
    mix = mix_audits(ROWS, AUDIT_ROWS, AUDIT_LABELS)
    job = querier.ask(
        mix.inputs,
        directory=directory,
        rule="mean-probability",
        evidence=evidence,
        evidence_key=evidence_key,
        batch_size=40,
    )
    result = strategy.start(grid, job)
    asked = {batch.query_id: batch.n_queries for batch in job.batches}
    audits = mix.located(job.job_id, 40)
    return directory, querier, mix, result, asked, audits


@pytest.mark.parametrize("protection", ["secagg", "he", "plain"])
def test_rewards_in_shares_equal_those_in_clear(grid, protection):
    directory, querier, mix, result, asked, audits = asked_under(grid, protection)
    scheme = make_scheme("audited-blend")
    desk = SettlementDesk(result.evidence, scheme=scheme, querier=querier.identity.public)

    reply = settle(
        desk.request(),
        audits,
        scheme=scheme,
        asked=asked,
        form=EvidenceForm.SHARES,
        sites=[card.identity for card in directory.cards],
        identity=querier.identity,
        min_sites=N_SITES,
        noise_std=0.0,
    )
    settled = desk.finish(reply)

    np.testing.assert_allclose(by_name(settled.values, directory), in_clear(), atol=CODEC)
    assert settled.n_audits == N_AUDITS
    assert len(mix.without(querier.open(result.combined).labels)) == len(ROWS)


def test_rewards_under_encryption_equal_those_in_clear(grid):
    pytest.importorskip("tenseal")
    keys = SettlementKeys.make()
    directory, querier, _, result, asked, audits = asked_under(
        grid, "he", evidence="ckks", evidence_key=keys.public_key
    )
    scheme = make_scheme("audited-blend")
    desk = SettlementDesk(
        result.evidence,
        scheme=scheme,
        querier=querier.identity.public,
        evidence_key=keys.public_key,
    )
    theirs = QuerierDesk(
        desk.request(),
        scheme=scheme,
        asked=asked,
        form=EvidenceForm.CKKS,
        sites=[card.identity for card in directory.cards],
        identity=querier.identity,
        keys=keys,
        noise_std=0.0,
    )
    settled = desk.finish_blinded(theirs.open_sums(desk.blind(theirs.settle(audits))))

    # The querier floods what it decrypts: eight deviations of that noise.
    slack = 8 * settled.noise_scale + CODEC
    np.testing.assert_allclose(by_name(settled.values, directory), in_clear(), atol=slack)


def test_evidence_adds_up_to_the_answer(grid):
    directory, querier, _, result, asked, _ = asked_under(grid, "secagg")
    scheme = make_scheme("audited-blend")
    desk = SettlementDesk(result.evidence, scheme=scheme, querier=querier.identity.public)
    theirs = QuerierDesk(
        desk.request(),
        scheme=scheme,
        asked=asked,
        sites=[card.identity for card in directory.cards],
        identity=querier.identity,
    )
    totals = querier.totals(result.combined)
    ends = np.cumsum(list(asked.values()))[:-1]
    theirs.check_against_answer(dict(zip(asked, np.split(totals, ends), strict=True)))


def test_receipt_says_that_second_copies_left_the_sites(grid):
    result = asked_under(grid, "secagg")[3]
    assert {s.statement.evidence for s in result.receipt.statements} == {"shares"}
    pooled = [x for x in result.receipt.who_can_learn_what if "pooling" in x.party]
    assert any("from the second copies" in line.learns for line in pooled)


def test_coordinator_that_sees_every_answer_settles_alone(grid):
    strategy = FedEnsemble(
        rule="mean-probability", protection="plain", evidence=True, min_available_nodes=N_SITES
    )
    result = strategy.start(grid, AUDIT_ROWS)
    assert result.evidence.form is EvidenceForm.CLEAR
    assert len(result.evidence.sites(result.evidence.query_ids[0])) == N_SITES


def test_site_that_has_not_agreed_refuses(grid):
    with (
        LocalGrid(app(agrees_to=()), num_supernodes=N_SITES) as grid,
        pytest.raises(QuorumNotMetError, match="FI308"),
    ):
        asked_under(grid, "secagg")


def test_ckks_needs_a_consent_of_its_own():
    with (
        LocalGrid(app(agrees_to=("settlement",)), num_supernodes=N_SITES) as grid,
        pytest.raises(QuorumNotMetError, match="FI308"),
    ):
        asked_under(grid, "he", evidence="ckks", evidence_key=b"any")


@pytest.mark.parametrize("protection", ["dp", "secagg+dp", "he+dp"])
def test_noise_is_not_undone_by_a_copy_without_it(grid, protection):
    with pytest.raises(IncompatibleProtection, match="noise"):
        asked_under(grid, protection)


def test_masks_are_not_undone_where_the_coordinator_is_the_querier(grid):
    strategy = FedEnsemble(rule="mean-probability", protection="secagg", evidence=True)
    with pytest.raises(IncompatibleProtection, match="both"):
        strategy.start(grid, AUDIT_ROWS)


def test_site_with_a_budget_takes_part_in_no_settlement():
    with pytest.raises(ConfigError, match="settlement"):
        InferenceMod(
            load_model,
            agrees_to=("settlement",),
            budget=BudgetPolicy(epsilon_per_querier=1.0, epsilon_global=2.0),
            home="unused",
        )


def test_without_evidence_asked_for_nothing_is_collected(grid):
    result = FedEnsemble(protection="plain").start(grid, ROWS[:3])
    assert result.evidence is None
