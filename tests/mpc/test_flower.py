"""A joint computation carried by Flower: three computing sites, one that only owns a network."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedinfer_flower.clients.mpc_answering import MPC, MpcSite, answer_mpc
from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    FedInferError,
    InvalidValueError,
    MissingExtraError,
    ModelError,
    PartyFailedError,
    ProtectionRefusedError,
    ShapeError,
    UntrustedKeyError,
)
from fedinfer_flower.mpc import Disclosed, MpcRule, party_process
from fedinfer_flower.mpc.documents import MpcAnswer, MpcJob
from fedinfer_flower.mpc.session import MpcConsent
from fedinfer_flower.querier.mpc_querier import MpcQuerier
from fedinfer_flower.query import Deadline
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.fed_mpc import FedMPC
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.envelope import Envelope, Kind
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.records import pack, unpack

from .conftest import CLASSES, NEEDS_SPU, OTHER, SMALL, free_addresses, weights_of

SPECS = (SMALL, OTHER, SMALL, OTHER)
WEIGHTS = [weights_of(spec, seed) for seed, spec in enumerate(SPECS)]
INPUTS = np.random.default_rng(3).normal(size=(5, 2, 6, 6)).astype(np.float32)
DEADLINE = Deadline(timeout_s=90.0)


@dataclass
class Federation:
    """Four nodes; the first three compute, all four own a network."""

    identities: list[Identity] = field(default_factory=lambda: [Identity.generate() for _ in SPECS])
    querier: Identity = field(default_factory=Identity.generate)
    consent: dict[str, object] = field(default_factory=dict)
    seen: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        given = {
            "parties": frozenset(self.party_ids),
            "queriers": frozenset({self.querier.key_id}),
        }
        self._consent = MpcConsent(**(given | self.consent))
        self.addresses = [*free_addresses(3), ""]
        self.sites = [self.make_site(number) for number in range(len(SPECS))]

    def make_site(self, number: int) -> MpcSite:
        return MpcSite(
            identity=self.identities[number],
            consent=self._consent,
            name=f"site-{number}",
            model=(SPECS[number], WEIGHTS[number]),
            classes=CLASSES,
            address=self.addresses[number],
            stall_s=10.0,
        )

    @property
    def party_ids(self) -> list[str]:
        return [identity.key_id for identity in self.identities[:3]]

    def asker(self, **options: object) -> MpcQuerier:
        return MpcQuerier(identity=self.querier, parties=self.party_ids, **options)

    @contextmanager
    def grid(self) -> Iterator[LocalGrid]:
        app = ClientApp()

        @app.query(MPC)
        def handle(message: Message, context: Context) -> Message:
            # Anew for every message, as stock Flower starts a process for each.
            site = self.make_site(int(context.node_config["partition-id"]))
            envelope = unpack(message.content)
            self.seen += [bytes(data) for _, data in envelope.sections]
            try:
                reply = answer_mpc(
                    envelope, site=site, run_id=context.run_id, sender=context.node_id
                )
            except FedInferError as exc:
                reply = messages.error(exc, run_id=context.run_id, sender=context.node_id)
            return Message(pack(reply), reply_to=message)

        # Parties wait for each other: each needs a worker.
        with LocalGrid(app, num_supernodes=len(SPECS), workers=4) as grid:
            yield grid


def expected(rule: MpcRule, disclosed: Disclosed) -> np.ndarray:
    from fedinfer_flower.mpc.forward import joint_function

    weights = [w for each in WEIGHTS for w in each]
    return np.asarray(joint_function(SPECS, rule, disclosed)(INPUTS, *weights))


@NEEDS_SPU
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mean_logit_of_four_owners_in_batches() -> None:
    federation = Federation()
    querier = federation.asker()
    strategy = FedMPC(deadline=DEADLINE, min_available_nodes=4)
    with federation.grid() as grid:
        job = querier.ask(INPUTS, strategy.collect(grid), batch_size=2)
        answer = strategy.start(grid, MpcJob.from_bytes(job.to_bytes()))

    answer = MpcAnswer.from_bytes(answer.to_bytes())
    # The querier orders owners by key, which a mean does not notice.
    totals = querier.totals(answer)
    np.testing.assert_allclose(totals, expected(MpcRule.MEAN_LOGIT, Disclosed.TOTALS), atol=5e-4)
    prediction = querier.open(answer)
    np.testing.assert_array_equal(prediction.labels, totals.argmax(axis=1))
    np.testing.assert_allclose(prediction.probabilities.sum(axis=1), 1.0)
    assert prediction.classes == CLASSES
    # What passed the coordinator: no row of the inputs or weights in any clear form.
    carried = b"".join(federation.seen)
    for clear in (INPUTS, INPUTS.astype(np.float64), *WEIGHTS[0]):
        assert clear.tobytes()[:16] not in carried


@NEEDS_SPU
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_label_of_a_majority_vote_discloses_the_label_alone() -> None:
    federation = Federation(consent={"disclosed": frozenset({Disclosed.LABEL})})
    querier = federation.asker(rule="majority-vote", disclosed="label")
    strategy = FedMPC(deadline=DEADLINE, min_available_nodes=4)
    with federation.grid() as grid:
        answer = strategy.start(grid, querier.ask(INPUTS, strategy.collect(grid)))

    labels = expected(MpcRule.MAJORITY_VOTE, Disclosed.LABEL)
    np.testing.assert_array_equal(querier.totals(answer), labels)
    prediction = querier.open(answer)
    np.testing.assert_array_equal(prediction.labels, labels)
    assert set(np.unique(prediction.probabilities)) == {0.0, 1.0}
    assert not prediction.margin.any()


@NEEDS_SPU
def test_killed_party_ends_the_job_at_the_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation()
    querier = federation.asker()
    strategy = FedMPC(deadline=DEADLINE, min_available_nodes=4)
    opened = threading.Barrier(3)
    original = party_process.PartyProcess.open

    def open_and_kill(self: party_process.PartyProcess, weights: bytes, *, ends_at: float) -> None:
        original(self, weights, ends_at=ends_at)
        opened.wait(60.0)
        if self._link["rank"] == 1:
            os.kill(self.pid, signal.SIGKILL)

    monkeypatch.setattr(party_process.PartyProcess, "open", open_and_kill)
    with federation.grid() as grid:
        job = querier.ask(INPUTS, strategy.collect(grid))
        started = time.monotonic()
        with pytest.raises(PartyFailedError):
            strategy.start(grid, job)
        assert time.monotonic() - started < DEADLINE.timeout_s


# -- without SPU -------------------------------------------------------------------------


@pytest.fixture
def federation(monkeypatch: pytest.MonkeyPatch) -> Federation:
    """Sites that state and share as always; computing is out of reach without SPU."""
    monkeypatch.setattr("fedinfer_flower.clients.mpc_answering.require_spu", lambda: None)
    return Federation()


def statements_of(federation: Federation) -> list[bytes]:
    return [site.statement.to_bytes(site.identity) for site in federation.sites]


def start_expecting(federation: Federation, error: type[FedInferError], querier: MpcQuerier) -> str:
    strategy = FedMPC(deadline=Deadline(timeout_s=20.0), min_available_nodes=4)
    with federation.grid() as grid, pytest.raises(error) as caught:
        strategy.start(grid, querier.ask(INPUTS, strategy.collect(grid)))
    return str(caught.value)


def test_owner_refuses_a_querier_that_it_does_not_know(federation: Federation) -> None:
    stranger = MpcQuerier(identity=Identity.generate(), parties=federation.party_ids)
    assert "querier" in start_expecting(federation, UntrustedKeyError, stranger)


def test_owner_refuses_more_disclosure_than_it_agreed_to(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = Federation(consent={"disclosed": frozenset({Disclosed.LABEL})})
    assert "disclose" in start_expecting(strict, ProtectionRefusedError, strict.asker())


def test_owner_refuses_a_session_with_another_network(federation: Federation) -> None:
    querier = federation.asker()
    job = querier.ask(INPUTS, statements_of(federation))
    other = Federation(identities=federation.identities, querier=federation.querier)
    site = other.sites[1]
    changed = MpcSite(
        identity=site.identity,
        consent=site.consent,
        name="site-1",
        model=(SMALL, WEIGHTS[0]),
        classes=CLASSES,
    )
    request = Envelope(
        kind=Kind.JOB, run_id=7, meta={"verb": "weights"}, sections=(("session", job.session),)
    )
    with pytest.raises(BindingError, match="another network"):
        answer_mpc(request, site=changed, run_id=7, sender=1)


def test_site_without_spu_fails_typed_when_asked_to_compute(federation: Federation) -> None:
    if not NEEDS_SPU.args[0]:
        pytest.skip("SPU is installed here")
    start_expecting(federation, MissingExtraError, federation.asker())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"run_id": 8}, BindingError),
        ({"kind": Kind.QUERY}, BindingError),
        ({"meta": {"verb": "dance"}}, EnvelopeError),
        ({"meta": {}}, EnvelopeError),
        ({"meta": {"verb": "weights"}}, EnvelopeError),
        ({"meta": {"verb": "compute"}}, EnvelopeError),
    ],
)
def test_message_that_is_none_of_ours_is_refused(
    federation: Federation, change: dict, error: type[FedInferError]
) -> None:
    given = {"kind": Kind.JOB, "run_id": 7, "meta": {"verb": "statement"}}
    with pytest.raises(error):
        answer_mpc(Envelope(**(given | change)), site=federation.sites[0], run_id=7, sender=1)


def test_querier_refuses_a_missing_party_and_wrong_queries(federation: Federation) -> None:
    querier, statements = federation.asker(), statements_of(federation)
    with pytest.raises(UntrustedKeyError, match="no statement"):
        querier.ask(INPUTS, statements[1:])
    with pytest.raises(ShapeError):
        querier.ask(INPUTS[:, :1], statements)
    with pytest.raises(InvalidValueError):
        querier.ask(np.full_like(INPUTS, np.nan), statements)
    with pytest.raises(InvalidValueError):
        querier.ask(INPUTS[:0], statements)


@pytest.mark.parametrize(
    "options",
    [
        {"parties": ["0" * 64] * 3},
        {"parties": ["0" * 64]},
        {"rule": "mean-probability"},
        {"disclosed": "everything"},
    ],
)
def test_querier_that_cannot_be_is_refused(options: dict) -> None:
    given = {"identity": Identity.generate(), "parties": [digit * 64 for digit in "012"]}
    with pytest.raises(InvalidValueError):
        MpcQuerier(**(given | options))


def test_answer_to_another_querier_is_refused(federation: Federation) -> None:
    foreign = MpcAnswer(session_id="unknown", results=((b"", b"", b""),))
    with pytest.raises(BindingError):
        federation.asker().open(foreign)


def test_job_with_another_number_of_batches_is_refused(federation: Federation) -> None:
    job = federation.asker().ask(INPUTS, statements_of(federation), batch_size=2)
    assert MpcJob.from_bytes(job.to_bytes()) == job
    short = MpcJob(session=job.session, queries=job.queries[:-1])
    with pytest.raises(EnvelopeError, match="as many batches"):
        MpcJob.from_bytes(short.to_bytes())


def test_job_for_sites_that_are_not_here_fails_typed(federation: Federation) -> None:
    job = federation.asker().ask(INPUTS, statements_of(federation))
    with federation.grid() as grid, pytest.raises(PartyFailedError, match="no node here"):
        FedMPC(min_available_nodes=4).start(grid, job)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": (OTHER, WEIGHTS[0])}, ModelError),
        ({"model": ("lenet", WEIGHTS[1])}, ModelError),
        ({"classes": ("a", "b")}, InvalidValueError),
        ({"model": (OTHER, [np.full((3, 72), np.inf)])}, InvalidValueError),
    ],
)
def test_site_that_cannot_be_is_refused(options: dict, error: type[FedInferError]) -> None:
    given = {
        "identity": Identity.generate(),
        "consent": MpcConsent(parties=frozenset(), queriers=frozenset()),
        "name": "site",
        "model": (OTHER, WEIGHTS[1]),
        "classes": CLASSES,
    }
    with pytest.raises(error):
        MpcSite(**(given | options))
