"""Row sums against a querier, a coordinator and a careless user who work at them.

Every attack here keeps to documents that honest code makes and takes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from fedinfer_flower import FedEnsemble, InferenceMod, LocalModel, Querier
from fedinfer_flower.errors import FedInferError, ReplayError, SettlementError
from fedinfer_flower.incentives import PublicFacts, make_scheme
from fedinfer_flower.settlement import (
    AuditRow,
    EvidenceBook,
    EvidenceForm,
    QuerierDesk,
    SettlementDesk,
    mix_audits,
    site_evidence,
)
from fedinfer_flower.settlement.reading import signed
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire.identity import Identity

N_SITES, CLASSES = 4, ("a", "b", "c")
SCHEME = make_scheme("brier-shapley")


def weights_of(partition: int) -> np.ndarray:
    return np.random.default_rng(partition).standard_normal((4, 3))


def load_model(context) -> LocalModel:
    weights = weights_of(context.node_config["partition-id"])
    return LocalModel(
        model=lambda rows: np.asarray(rows, dtype=float) @ weights,
        classes=CLASSES,
        outputs="logits",
    )


def softmax(logits):
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


class HostileDesk(QuerierDesk):
    """A querier's desk without the one guard that the coordinator does not keep as well."""

    def _require_noise_or_bits(self, epoch):
        pass


def settled(grid, rows, label):
    """One job of audits alone under sealed secagg; return settlement, directory, weights.

    Half of the labels are what the sites together say, so that none looks wrong.
    """
    strategy = FedEnsemble(protection="secagg", evidence=True, min_available_nodes=N_SITES)
    directory = strategy.directory(grid)
    querier = Querier(protection="secagg")
    job = querier.ask(rows, directory=directory, rule="mean-probability", evidence=True)
    result = strategy.start(grid, job)
    # As in the how-to: no noise.
    coordinator = SettlementDesk(result.evidence, scheme=SCHEME, querier=querier.identity.public)
    desk = HostileDesk(
        coordinator.request(),
        scheme=SCHEME,
        asked={batch.query_id: batch.n_queries for batch in job.batches},
        form=EvidenceForm.SHARES,
        sites=[seat.identity for seat in directory.roster.seats],
        identity=querier.identity,
        min_sites=N_SITES,
    )
    ((query_id, totals),) = desk.totals.items()
    labels = np.where(np.arange(len(rows)) % 2, int(totals[0].argmax()), label)
    audits = [AuditRow(query_id=query_id, row=t, label=int(y)) for t, y in enumerate(labels)]
    settlement = coordinator.finish(desk.settle(audits))
    facts = PublicFacts(total_tc=totals, n_sites=N_SITES, labels=labels)
    return settlement, directory, SCHEME.weights(facts).sum(axis=0)


def opened_by_querier(tmp_path, nudge):
    """Return (what the querier solves for, the truth): one row's answers at every site."""
    row = np.array([0.3, -1.0, 0.5, 0.8])
    n_audits = 60
    equations: dict[str, list[tuple[np.ndarray, float]]] = {}
    app = InferenceMod(load_model, agrees_to=("settlement",), home=tmp_path).attach(ClientApp())
    with LocalGrid(app, num_supernodes=N_SITES) as grid:
        for label in range(3):
            # `nudge` makes rows that no digest knows again and no model tells apart.
            rows = row + nudge * (1 + np.arange(n_audits)[:, None] + n_audits * label)
            settlement, directory, weights_c = settled(grid, rows, label)
            for key_id, value in settlement.values.items():
                equations.setdefault(key_id, []).append((weights_c, value))
    names = {card.key_id: card.profile.name for card in directory.cards}
    found, truth = [], []
    for key_id, lines in equations.items():
        a = np.array([w for w, _ in lines] + [10.0 * np.ones(3)])
        b = np.array([v + w.sum() / 3.0 for w, v in lines] + [10.0])
        found.append(np.linalg.lstsq(a, b, rcond=None)[0])
        truth.append(softmax(row @ weights_of(int(names[key_id].removeprefix("site-")))))
    return np.array(found), np.array(truth)


def test_querier_that_audits_one_row_sixty_times_does_not_read_single_answers(tmp_path):
    try:
        found, truth = opened_by_querier(tmp_path, 0.0)
    except FedInferError:
        return  # refused by somebody
    assert np.abs(found - truth).max() > 0.05


def test_querier_that_audits_rows_alike_reads_single_answers(tmp_path):
    """Nobody can refuse this: do not show a querier the values, or add noise at the coordinator.

    The default noise is that of one answer, and sixty copies are read through it.
    """
    found, truth = opened_by_querier(tmp_path, 1e-9)
    assert np.abs(found - truth).max() < 0.2  # the attack works: answers lie in [0, 1]


# -- a coordinator alone, and sure answers ----------------------------------------------


def one_hot_world(n_audits=60, n_classes=10, seed=3):
    """Two sites that answer sure, one that does not; the two differ in 17 rows of 60."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n_audits) % n_classes)
    votes = np.tile(labels, (2, 1))
    differ = rng.choice(n_audits, size=17, replace=False)
    who = rng.integers(0, 2, size=17)
    votes[who, differ] = (labels[differ] + rng.integers(1, n_classes, size=17)) % n_classes
    soft = softmax(2.0 * np.eye(n_classes)[labels] + rng.normal(size=(n_audits, n_classes)))
    return labels, np.concatenate([np.eye(n_classes)[votes], soft[None]])


def shares_epoch(p_ktc, labels, *, book=None):
    """Evidence in shares of one batch, and the keys of everybody."""
    sites = sorted((Identity.generate() for _ in p_ktc), key=lambda i: i.key_id)
    querier = Identity.generate()
    book = book or EvidenceBook(EvidenceForm.SHARES)
    for site, rows in zip(sites, p_ktc, strict=True):
        payload = site_evidence(
            EvidenceForm.SHARES,
            rows,
            querier=querier.public,
            evidence_key=b"",
            identity=site,
            query_id="job-0",
        )
        book.add("job-0", site.key_id, payload, n_queries=rows.shape[0], n_classes=rows.shape[1])
    audits = [AuditRow(query_id="job-0", row=t, label=int(y)) for t, y in enumerate(labels)]
    return sites, querier, book, audits


def test_coordinator_does_not_solve_an_exact_row_sum_for_sure_answers():
    labels, p = one_hot_world()
    sites, querier, book, audits = shares_epoch(p, labels)
    coordinator = SettlementDesk(book, scheme=SCHEME, querier=querier.public)
    desk = QuerierDesk(
        coordinator.request(),
        scheme=SCHEME,
        asked={"job-0": len(labels)},
        sites=[site.public for site in sites],
        identity=querier,
    )
    try:
        reply = desk.settle(audits)  # the guard is here
    except SettlementError:
        return
    values = coordinator.finish(reply).values

    # All that follows is worked out from what the coordinator has.
    totals = reply.totals_tc / 2**20
    weights = SCHEME.weights(PublicFacts(total_tc=totals, n_sites=3, labels=labels))
    target = values[sites[0].key_id] + weights.mean(axis=1).sum()
    base, choices, rows = 0.0, [], []
    for t in range(len(labels)):
        # Two sure answers and a soft one: two classes reach 1, or one that reaches 2.
        sure = np.flatnonzero(totals[t] >= 1.0 - 1e-4)
        if len(sure) == 1:
            base += weights[t, sure[0]]
        else:
            rows.append(t)
            choices.append((sure[0], sure[1]))
    gains = np.array(
        [[weights[t, a], weights[t, b]] for t, (a, b) in zip(rows, choices, strict=True)]
    )
    sums, masks = np.array([base]), np.array([0])
    for number, (first, second) in enumerate(gains):
        sums = np.concatenate([sums + first, sums + second])
        masks = np.concatenate([masks, masks | (1 << number)])
    found = int(masks[np.abs(sums - target).argmin()])
    guessed = [pair[(found >> n) & 1] for n, pair in enumerate(choices)]
    truth = [int(p[0, t].argmax()) for t in rows]
    right = np.mean(np.array(guessed) == np.array(truth))
    assert len(rows) == 17
    assert right < 0.9  # today: all of them


# -- one reply an epoch ---------------------------------------------------------------------


def test_epoch_takes_one_reply_whether_or_not_it_passes():
    rng = np.random.default_rng(1)
    labels = np.arange(80) % 3
    p = softmax(2.0 * np.eye(3)[labels] + rng.normal(size=(4, 80, 3)))
    sites, querier, book, audits = shares_epoch(p, labels)
    coordinator = SettlementDesk(book, scheme=SCHEME, querier=querier.public)

    def reply_for(some):
        # A querier that lies to its own desk about what it revealed before.
        return QuerierDesk(
            coordinator.request(),
            scheme=SCHEME,
            asked={"job-0": len(labels)},
            sites=[site.public for site in sites],
            identity=querier,
        ).settle(some)

    # Halves moved from one site to another: whether that is noticed tells how large a sum is.
    probe = reply_for(audits)
    halves = probe.halves_k.copy()
    weight = int(np.abs(probe.weights_tc).sum()) << 20
    halves[0] += np.uint64(weight)
    halves[1] -= np.uint64(weight)
    bad = signed(dataclasses.replace(probe, halves_k=halves, signature=b""), querier)
    with pytest.raises(SettlementError):
        coordinator.finish(bad)
    with pytest.raises(ReplayError):
        coordinator.finish(reply_for(audits[1:]))


# -- the careless user ---------------------------------------------------------------------


def clear_book(p_ktc, query_id):
    sites = [f"{k + 1:064x}" for k in range(len(p_ktc))]
    book = EvidenceBook(EvidenceForm.CLEAR)
    for site, rows in zip(sites, p_ktc, strict=True):
        payload = site_evidence(
            EvidenceForm.CLEAR,
            rows,
            querier=None,
            evidence_key=b"",
            identity=None,
            query_id=query_id,
        )
        book.add(query_id, site, payload, n_queries=rows.shape[0], n_classes=rows.shape[1])
    return book


def test_labels_in_another_order_than_the_classes_are_noticed():
    rng = np.random.default_rng(2)
    labels = np.arange(200) % 5
    p = softmax(4.0 * np.eye(5)[labels] + rng.normal(size=(4, 200, 5)))
    desk = SettlementDesk(clear_book(p, "job-0"), scheme=SCHEME)
    wrong = (labels + 1) % 5  # the user's own encoding of classes
    audits = [AuditRow(query_id="job-0", row=t, label=int(y)) for t, y in enumerate(wrong)]
    with pytest.raises(SettlementError):
        QuerierDesk(desk.request(), scheme=SCHEME, asked={"job-0": 200}).settle(audits)


@pytest.mark.parametrize(
    "row",
    [-1, pytest.param(-1000), 200, 10**6],
)
def test_audit_in_a_row_that_does_not_exist_is_a_typed_error(row):
    rng = np.random.default_rng(2)
    labels = np.arange(200) % 5
    p = softmax(rng.normal(size=(4, 200, 5)))
    desk = SettlementDesk(clear_book(p, "job-0"), scheme=SCHEME)
    audits = [AuditRow(query_id="job-0", row=t, label=int(y)) for t, y in enumerate(labels)]
    audits[0] = AuditRow(query_id="job-0", row=row, label=0)
    with pytest.raises(FedInferError):
        QuerierDesk(desk.request(), scheme=SCHEME, asked={"job-0": 200}).settle(audits)


@pytest.mark.parametrize(
    "given", [([[1.0]], [[2.0]], [0]), (np.zeros((2, 1)), [[1.0]], np.array([0]))]
)
def test_audits_as_lists_are_taken_or_a_typed_error(given):
    try:
        mix = mix_audits(*given)
    except FedInferError:
        return
    assert len(mix.inputs) > 1


@pytest.mark.parametrize("given", ["labels-too-high", "none", "few", "another-job"])
def test_careless_audits_are_typed_errors_with_a_text(given):
    rng = np.random.default_rng(2)
    labels = np.arange(200) % 5
    p = softmax(rng.normal(size=(4, 200, 5)))
    desk = SettlementDesk(clear_book(p, "job-0"), scheme=SCHEME)
    audits = [AuditRow(query_id="job-0", row=t, label=int(y)) for t, y in enumerate(labels)]
    wrong = {
        "labels-too-high": [*audits[:-1], AuditRow(query_id="job-0", row=199, label=5)],
        "none": [],
        "few": audits[:29],
        "another-job": [AuditRow(query_id="job-9", row=0, label=0)],
    }[given]
    with pytest.raises(SettlementError) as caught:
        QuerierDesk(desk.request(), scheme=SCHEME, asked={"job-0": 200}).settle(wrong)
    assert caught.value.message


def test_books_of_two_label_spaces_do_not_merge():
    # Two jobs of one epoch; between them a site joined, and the union of classes changed.
    book = EvidenceBook(EvidenceForm.CLEAR, classes=("a", "b", "c"))
    with pytest.raises(SettlementError, match="label spaces"):
        book.merge(EvidenceBook(EvidenceForm.CLEAR, classes=("a", "c", "d")))


def test_settling_twice_and_forgotten_evidence_are_typed_errors():
    p = softmax(np.random.default_rng(0).normal(size=(4, 40, 3)))
    book = clear_book(p, "job-0")
    with pytest.raises(SettlementError, match="no query with evidence"):
        SettlementDesk(EvidenceBook(EvidenceForm.CLEAR), scheme=SCHEME)
    with pytest.raises(SettlementError, match="no query with evidence"):
        SettlementDesk(book, scheme=SCHEME, settled_query_ids=["job-0"])
    other = clear_book(p, "job-0")
    with pytest.raises(ReplayError):
        book.merge(other)
