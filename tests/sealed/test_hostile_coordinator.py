"""A coordinator that alters, replays, swaps and makes up: what is noticed, by whom."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import Message

from fedinfer_flower import Querier
from fedinfer_flower.errors import (
    BindingError,
    FedInferError,
    ProtocolError,
    QuorumNotMetError,
    SealError,
    UntrustedKeyError,
)
from fedinfer_flower.privacy.site_budget import BudgetPolicy
from fedinfer_flower.strategies.onboarding import read_arrival
from fedinfer_flower.strategies.pull_loop import stream_replies
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.actions import PREDICT, message_type
from fedinfer_flower.wire.directory import Directory, SiteCard
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS, Envelope, Kind, decode
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.pins import Pins
from fedinfer_flower.wire.records import pack
from fedinfer_flower.wire.relayed import pack_relayed, read_relayed
from fedinfer_flower.wire.roster import Roster
from fedinfer_flower.wire.sealed_query import (
    open_question,
    seal_question,
    sealed_query_envelope,
)
from fedinfer_flower.wire.sealing import open_sealed, seal_to

from .conftest import CLASSES, ROWS, refusal, replaced

POLICY = BudgetPolicy(epsilon_per_querier=400.0, epsilon_global=800.0)


def deliver(federation, envelope: Envelope, node_id: int = 1000) -> Envelope:
    """Send one envelope to one site, as a coordinator may at any time."""
    message = Message(pack(envelope), node_id, message_type(PREDICT), ttl=60.0)
    (arrival,) = stream_replies(federation.grid, [message], timeout_s=20.0)
    return read_arrival(arrival, run_id=federation.grid.run_id, limits=DEFAULT_LIMITS)


def sealed_queries(federation) -> list[Envelope]:
    found = [decode(data) for data in federation.grid.sent]
    return [envelope for envelope in found if envelope.kind is Kind.SEALED_QUERY]


def state_of(home) -> dict[str, bytes]:
    """Return the content of every file of the sites."""
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in sorted(home.rglob("*"))
        if path.is_file()
    }


# -- what it cannot read -------------------------------------------------------------------


def test_question_opens_with_none_of_the_keys_that_a_coordinator_can_make(make_federation):
    federation = make_federation()
    federation.ask(federation.strategy("plain"))
    envelope = sealed_queries(federation)[0]
    assert refusal(lambda: open_question(envelope, identity=Identity.generate())).code == "FI312"


# -- what it cannot alter: noticed at the site ---------------------------------------------


@pytest.mark.parametrize("section", ["body", "wraps"])
def test_altered_seal_is_refused_by_every_site(make_federation, section):
    federation = make_federation()

    def tamper(envelope):
        if envelope.kind is not Kind.SEALED_QUERY:
            return envelope
        data = bytearray(envelope.section(section))
        # In the wraps one byte of each record, so that no site is spared.
        for place in range(40, len(data), 112):
            data[place] ^= 1
        return replaced(envelope, sections={section: bytes(data)})

    federation.grid.on_push = tamper
    with pytest.raises(QuorumNotMetError, match="FI312"):
        federation.ask(federation.strategy("plain"))
    assert federation.grid.errors() == ["FI312"] * 5
    assert federation.seen_inputs == []


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_question_of_its_own_under_a_site_s_seal_is_not_the_querier_s(make_federation, protection):
    """The coordinator can seal to sites as well: only as itself."""
    coordinator = Identity.generate()
    querier = Identity.generate()
    federation = make_federation(querier_key_ids=[querier.key_id])
    strategy = federation.strategy(protection)
    federation.ask(strategy, identity=querier)
    honest = open_honest(federation, protection)

    asked = dataclasses.replace(honest, querier=coordinator.public, query_id="mine-0")
    run_id = federation.grid.run_id
    body = seal_question(asked, identity=coordinator, run_id=run_id)
    envelope = sealed_query_envelope(body, query_id="mine-0", run_id=run_id)
    assert refusal(lambda: deliver(federation, envelope)).code == UntrustedKeyError.code


def open_honest(federation, protection):
    """Return a question such as the querier asks; everything but its rows is public."""
    directory = federation.strategy(protection).directory(federation.grid)
    keys = X25519PrivateKey.generate().public_key().public_bytes_raw()
    from fedinfer_flower.privacy.base import key_id_of

    with_key = protection == "secagg"
    return messages.Question(
        query_id="q",
        inputs=ROWS,
        classes=CLASSES,
        n_sites=5,
        rule="mean-probability",
        protection=protection,
        roster=directory.roster,
        querier=Identity.generate().public,
        public_key=keys if with_key else b"",
        key_id=key_id_of(keys) if with_key else "",
        relay=not with_key,
    )


def test_clear_question_that_names_a_querier_is_refused(make_federation):
    querier = Identity.generate()
    federation = make_federation(querier_key_ids=[querier.key_id])
    asked = dataclasses.replace(open_honest(federation, "plain"), querier=querier.public)
    envelope = messages.question(asked, run_id=federation.grid.run_id)
    error = refusal(lambda: deliver(federation, envelope))
    assert error.code == "FI301"
    assert "cannot show that its querier asked it" in error.message


def test_clear_question_that_wants_sealed_answers_is_refused(make_federation):
    federation = make_federation()
    asked = dataclasses.replace(open_honest(federation, "plain"), querier=None)
    envelope = messages.question(asked, run_id=federation.grid.run_id)
    assert refusal(lambda: deliver(federation, envelope)).code == "FI308"


# -- what it cannot alter: noticed by the coordinator's honest code or at the querier -------


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ("c", "b", "a")},
        {"classes": (*CLASSES, "d")},
        {"rule": "majority-vote"},
        {"rule": "median"},
        {"expires_at": 1.0},
        {"run_id": 1},
        {"relay": False},
        {"protection": "dp"},
        {"key_id": "0" * 64},
    ],
    ids=lambda changes: str(*changes),
)
@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_job_altered_outside_the_seal_changes_no_answer(make_federation, protection, changes):
    """Sites go by what is inside; the querier compares what comes back."""
    federation = make_federation()
    strategy = federation.strategy(protection)

    def answered():
        querier, _, result = federation.ask(
            strategy, tamper=lambda job: dataclasses.replace(job, **changes)
        )
        return querier.totals(result.combined)

    if set(changes) & {"expires_at"} or (protection, *changes) == ("secagg", "relay"):
        # Said again inside the seal, and read nowhere else; or as it was.
        expected = federation.probabilities().sum(axis=0)
        np.testing.assert_allclose(answered(), expected, atol=1e-3)
    else:
        with pytest.raises(FedInferError):
            answered()


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_querier_named_outside_the_seal_gets_nothing(make_federation, protection):
    federation, spy = make_federation(), Identity.generate()
    try:
        querier, _, result = federation.ask(
            federation.strategy(protection),
            tamper=lambda job: dataclasses.replace(job, querier=spy.public),
        )
    except QuorumNotMetError:
        return  # what the sites state is for another querier than the job's
    (batch,) = result.combined.batches
    assert len(querier.open(result.combined)) == len(ROWS)
    for key_id, sealed in read_relayed(batch.total) if protection == "plain" else ():
        info = f"answer|{key_id}|{batch.query_id}".encode()
        with pytest.raises(SealError):
            open_sealed(spy, sealed, info=info)


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_job_with_a_smaller_roster_is_noticed(make_federation, protection):
    federation = make_federation()
    error = refusal(
        lambda: federation.labels(
            *first_and_last(
                federation.ask(
                    federation.strategy(protection),
                    tamper=lambda job: dataclasses.replace(
                        job, roster=Roster(job.roster.seats[:4])
                    ),
                )
            )
        )
    )
    assert error.code in {"FI303", "FI402"}


def first_and_last(asked):
    return asked[0], asked[2]


def test_job_with_other_row_numbers_is_noticed(make_federation):
    federation = make_federation()

    def fewer(job):
        (batch,) = job.batches
        return dataclasses.replace(job, batches=(dataclasses.replace(batch, n_queries=5),))

    error = refusal(lambda: federation.ask(federation.strategy("secagg"), tamper=fewer))
    assert error.code == "FI402"


def test_batches_swapped_in_a_job_do_not_open(make_federation):
    federation = make_federation()

    def swap(job):
        one, two = job.batches
        return dataclasses.replace(
            job,
            batches=(
                dataclasses.replace(one, sealed=two.sealed),
                dataclasses.replace(two, sealed=one.sealed),
            ),
        )

    with pytest.raises(QuorumNotMetError, match="FI312"):
        federation.ask(federation.strategy("plain"), tamper=swap, batch_size=3)


COMBINED = {
    "rule": lambda c: {"rule": "majority-vote"},
    "rule options": lambda c: {"rule_options": {"x": 1}},
    "class order": lambda c: {"classes": c.classes[::-1]},
    "class names": lambda c: {"classes": ("x", "y", "z")},
    "number of sites": lambda c: {"n_sites_asked": 4},
    "roster": lambda c: {"roster": Roster(c.roster.seats[1:])},
    "no roster": lambda c: {"roster": Roster(())},
    "relayed": lambda c: {"relayed": not c.relayed},
    "protection": lambda c: {"protection": "dp"},
    "protection options": lambda c: {"protection_options": {"dropout_share": 0.4}},
    "key": lambda c: {"key_id": "1" * 64},
    "job": lambda c: {"job_id": "other"},
    "no batches": lambda c: {"batches": ()},
    "batch order": lambda c: {"batches": c.batches[::-1]},
    "batch twice": lambda c: {"batches": (c.batches[0], c.batches[0])},
    "rows": lambda c: {"batches": (dataclasses.replace(c.batches[0], n_queries=2), c.batches[1])},
    "batch under another id": lambda c: {
        "batches": (dataclasses.replace(c.batches[0], query_id="x-0"), c.batches[1])
    },
    "too few sites": lambda c: {
        "batches": (dataclasses.replace(c.batches[0], n_sites=0), c.batches[1])
    },
    "too many sites": lambda c: {
        "batches": (dataclasses.replace(c.batches[0], n_sites=6), c.batches[1])
    },
}


@pytest.mark.parametrize("change", COMBINED.values(), ids=COMBINED)
@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_combined_answer_on_other_terms_is_refused_by_the_querier(
    make_federation, protection, change
):
    federation = make_federation()
    querier, _, result = federation.ask(federation.strategy(protection), batch_size=3)
    combined = dataclasses.replace(result.combined, **change(result.combined))
    with pytest.raises(ProtocolError):
        querier.open(combined)


@pytest.mark.parametrize("protection", ["plain", "secagg"])
def test_totals_of_two_batches_swapped_do_not_open(make_federation, protection):
    federation = make_federation()
    querier, _, result = federation.ask(federation.strategy(protection), batch_size=3)
    one, two = result.combined.batches
    swapped = dataclasses.replace(
        result.combined,
        batches=(
            dataclasses.replace(one, total=two.total),
            dataclasses.replace(two, total=one.total),
        ),
    )
    with pytest.raises(FedInferError):
        querier.open(swapped)


def test_relayed_answer_under_another_site_s_name_is_left_out(make_federation):
    federation = make_federation()
    querier, _, result = federation.ask(federation.strategy("plain"))
    (batch,) = result.combined.batches
    answers = read_relayed(batch.total)
    renamed = [(answers[(i + 1) % 5][0], data) for i, (_, data) in enumerate(answers[:3])]
    honest = [a for a in answers if a[0] not in {key for key, _ in renamed}]
    mixed = dataclasses.replace(batch, total=pack_relayed(sorted(renamed + honest)))
    combined = dataclasses.replace(result.combined, batches=(mixed,))
    # Two sites are left, and only what they said is in the answer.
    assert len(honest) == 2
    assert querier.totals(combined).sum() == pytest.approx(2 * len(ROWS), rel=1e-5)


def test_relayed_answer_that_the_coordinator_made_up_is_left_out(make_federation):
    federation = make_federation()
    querier, job, result = federation.ask(federation.strategy("plain"))
    (batch,) = result.combined.batches
    lie = np.tile(np.array([0.0, 0.0, 1.0], dtype="<f4"), (len(ROWS), 1)).tobytes()
    forged = [
        (k, seal_to(job.querier, lie, info=f"answer|{k}|{batch.query_id}".encode()))
        for k, _ in read_relayed(batch.total)
    ]
    combined = dataclasses.replace(
        result.combined, batches=(dataclasses.replace(batch, total=pack_relayed(forged)),)
    )
    with pytest.raises(FedInferError):
        querier.open(combined)


# -- replays -------------------------------------------------------------------------------


@pytest.mark.parametrize("with_home", [False, True])
@pytest.mark.parametrize("protection", ["plain", "dp", "secagg", "secagg+dp"])
def test_replay_in_the_same_run_is_refused_and_spends_nothing(
    make_federation, home, protection, with_home
):
    options = {"home": home} if with_home else {}
    if with_home and "dp" in protection:
        options["budget"] = POLICY
    federation = make_federation(**options)
    federation.ask(federation.strategy(protection))
    before, asked = state_of(home), len(federation.seen_inputs)
    federation.restart()
    for node in range(1000, 1005):
        error = refusal(lambda n=node: deliver(federation, sealed_queries(federation)[0], n))
        assert error.code == "FI313"
    assert state_of(home) == before
    assert len(federation.seen_inputs) == asked


def test_replay_in_another_run_is_refused_and_spends_nothing(make_federation, home):
    options = {"home": home, "budget": POLICY}
    federation = make_federation(**options)
    federation.ask(federation.strategy("secagg+dp"))
    (old, *_) = sealed_queries(federation)
    federation.grid.close()
    before = state_of(home)

    later = make_federation(**options)
    assert later.grid.run_id != old.run_id
    assert refusal(lambda: deliver(later, old)).code == "FI303"
    # Under the new run's number it does not open: the run is part of the seal.
    relabelled = dataclasses.replace(old, run_id=later.grid.run_id)
    assert refusal(lambda: deliver(later, relabelled)).code == "FI312"
    assert state_of(home) == before
    assert later.seen_inputs == []


@pytest.mark.parametrize("protection", ["plain", "secagg+dp"])
def test_query_after_its_time_is_refused_and_spends_nothing(
    make_federation, home, protection, monkeypatch
):
    options = {"home": home, "budget": POLICY, "protections": [protection]}
    federation = make_federation(**options)
    strategy = federation.strategy(protection)
    directory = strategy.directory(federation.grid)
    querier = Querier(protection=strategy.protection)
    job = querier.ask(ROWS, directory=directory, ttl_s=60.0, rule="mean-probability")
    before = state_of(home)

    import fedinfer_flower.clients.mod as mod

    now = mod.time.time()
    monkeypatch.setattr(mod.time, "time", lambda: now + 61.0)
    # Nobody outside the seal can give it more time.
    later = dataclasses.replace(job, expires_at=now + 1e6)
    with pytest.raises(QuorumNotMetError, match="FI314"):
        strategy.start(federation.grid, later)
    monkeypatch.undo()
    assert state_of(home) == before
    assert federation.seen_inputs == []


@pytest.mark.parametrize("protection", ["plain", "secagg", "secagg+dp"])
def test_query_for_the_model_that_a_site_no_longer_has_is_refused_and_spends_nothing(
    make_federation, home, protection
):
    options = {"home": home, "budget": POLICY, "protections": [protection]}
    federation = make_federation(**options)
    strategy = federation.strategy(protection)
    directory = strategy.directory(federation.grid)
    querier = Querier(protection=strategy.protection)
    job = querier.ask(ROWS, directory=directory, rule="mean-probability")
    before = state_of(home)

    federation.versions = dict.fromkeys(range(5), 1)
    federation.restart()
    with pytest.raises(QuorumNotMetError, match="FI303"):
        strategy.start(federation.grid, job)
    assert state_of(home) == before
    assert federation.seen_inputs == []
    assert set(federation.grid.errors()) == {"FI303"}


def test_model_that_is_a_function_without_a_digest_can_change_unnoticed(make_federation):
    """What a site does not name cannot be compared: `LocalModel(digest=...)` names it."""
    from fedinfer_flower.clients.model_digest import model_digest

    assert model_digest(lambda rows: rows) == model_digest(lambda rows: -rows) == ""


# -- keys ----------------------------------------------------------------------------------


def swapped(directory: Directory, place: int, identity: Identity) -> Directory:
    cards = list(directory.cards)
    cards[place] = SiteCard.signed(cards[place].profile, identity=identity, run_id=directory.run_id)
    return Directory(run_id=directory.run_id, cards=tuple(cards))


def test_key_swapped_in_the_directory_is_named_when_keys_are_pinned(make_federation):
    federation = make_federation()
    directory = federation.strategy("plain").directory(federation.grid)
    pins = Pins(sites={card.profile.name: card.key_id for card in directory.cards})
    querier = Querier(protection="plain", pins=pins)
    querier.ask(ROWS, directory=directory)
    for place in range(5):
        with pytest.raises(UntrustedKeyError, match=directory.cards[place].profile.name):
            querier.ask(ROWS, directory=swapped(directory, place, Identity.generate()))


def test_without_pins_a_coordinator_that_swaps_one_key_reads_the_query(make_federation):
    """Why pins are needed: a signed card proves nothing about whose key it is."""
    federation = make_federation()
    directory = federation.strategy("plain").directory(federation.grid)
    spy = Identity.generate()
    querier = Querier(protection="plain")
    job = querier.ask(ROWS, directory=swapped(directory, 0, spy))
    envelope = sealed_query_envelope(
        job.batches[0].sealed, query_id=job.batches[0].query_id, run_id=job.run_id
    )
    np.testing.assert_array_equal(open_question(envelope, identity=spy).inputs, ROWS)


def test_site_left_out_of_the_directory_is_not_noticed_by_pins(make_federation):
    """A coordinator chooses who is asked; the querier sees how many, and their names."""
    federation = make_federation()
    strategy = federation.strategy("secagg")
    directory = strategy.directory(federation.grid)
    pins = Pins(sites={card.profile.name: card.key_id for card in directory.cards})
    fewer = directory.only([card.profile.name for card in directory.cards[:3]])
    job = Querier(protection="secagg", pins=pins).ask(ROWS, directory=fewer)
    assert len(job.roster) == 3


def test_combined_answer_of_another_querier_s_job_is_refused(make_federation):
    federation = make_federation()
    strategy = federation.strategy("plain")
    _, _, result = federation.ask(strategy)
    with pytest.raises(BindingError, match="another querier"):
        Querier(protection="plain").open(result.combined)


def test_two_questions_under_one_query_id_have_masks_of_their_own(make_federation):
    """Asked twice at once, a site's memory may not see it; the masks do."""
    from fedinfer_flower.privacy.base import ScorePlan
    from fedinfer_flower.privacy.cohort import Cohort
    from fedinfer_flower.privacy.secagg import SecAgg
    from fedinfer_flower.wire.identity import Identity
    from fedinfer_flower.wire.roster import Roster, Seat

    sites = [Identity.generate() for _ in range(3)]
    roster = Roster(tuple(Seat(identity=s.public, commitment="0" * 64) for s in sites))
    secagg = SecAgg()
    keys = secagg.make_keys()
    plan = ScorePlan(width=4, bound=1.0, sensitivity_l2=1.0, n_sites_max=3, n_classes=4)
    scores = np.zeros((5, 4)), np.full((5, 4), 0.25)

    def difference(contents):
        payloads = []
        for content, one in zip(contents, scores, strict=True):
            cohort = Cohort(
                query_id="q", roster=roster, public_key=keys.public_key, content=content
            )
            side = secagg.site_side(
                plan, public_key=keys.public_key, cohort=cohort, identity=sites[0]
            )
            payloads.append(np.frombuffer(side.protect(one)[36:], "<u4"))
        return payloads[1] - payloads[0]

    step = np.uint32(0.25 * 2 ** secagg.codec(plan).frac_bits)
    # Under the same masks the difference of two answers would be in the open.
    assert (difference([b"a", b"a"]) == step).all()
    assert not (difference([b"a", b"b"]) == step).any()
