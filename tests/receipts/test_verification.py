"""A receipt that passes is what its signers signed; every change of it is noticed."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest

from fedinfer_flower.errors import (
    EnvelopeError,
    ProtocolError,
    ReceiptError,
    SignatureError,
    SizeLimitError,
    UnsupportedVersionError,
    UntrustedKeyError,
)
from fedinfer_flower.privacy import gaussian_dp
from fedinfer_flower.privacy.charge import Charge
from fedinfer_flower.receipts import rules
from fedinfer_flower.receipts.batches import BatchRecord, CohortMember, Dropout
from fedinfer_flower.receipts.receipt import Receipt
from fedinfer_flower.receipts.verification import Outcome, verify
from fedinfer_flower.wire.identity import Identity

from .conftest import DELTA, NOW, make_job, make_statement, receipt_of


def check(job, receipt, **options):
    """Verify with everything that can be compared with."""
    data = receipt if isinstance(receipt, bytes) else receipt.to_bytes()
    values = {
        "pins": job.pins,
        "queriers": job.queriers,
        "coordinator_key_id": job.coordinator.key_id,
        "now": NOW,
    }
    return verify(data, **(values | options))


def failures(found):
    return {check.name for check in found.failed}


def detected(job, data, **options):
    """Whether a receipt is refused, one way or the other."""
    try:
        return not check(job, data, **options).ok
    except ProtocolError:
        return True


def test_honest_receipt_passes_every_check(job):
    found = check(job, receipt_of(job))
    assert [c for c in found.checks if c.outcome is not Outcome.OK] == []
    found.require_ok()


def test_receipt_after_a_round_trip_is_the_same(job):
    for signed in (True, False):
        receipt = receipt_of(job, signed=signed)
        assert Receipt.from_bytes(receipt.to_bytes()) == receipt


def test_total_epsilon_is_of_the_summed_noise_and_not_the_sum_of_epsilons(job):
    receipt = receipt_of(job)
    east = next(total for total in receipt.totals if total.site == "east")
    one = job.statements[0].statement.epsilon
    # Two batches of four rows at mu = 0.2 are one Gaussian mechanism of mu = 0.2 * sqrt(8).
    exact = gaussian_dp.epsilon_of(0.2 * math.sqrt(8), DELTA)
    assert east.epsilon == pytest.approx(exact, rel=1e-9)
    assert one < east.epsilon < 1.6 * one
    assert (east.n_batches, east.n_rows, east.n_fresh_rows) == (2, 8, 8)
    west = next(total for total in receipt.totals if total.site == "west")
    assert west.epsilon == pytest.approx(one, rel=1e-9)


def test_rows_from_the_cache_add_nothing_to_the_total(job):
    keys = list(job.pins.values())
    again = make_statement(
        job.sites["east"], site="east", keys=keys, number=1, charge=Charge(), epsilon=0.0
    ).sign(job.sites["east"])
    first = job.statements[3].statement
    assert (first.site, first.query_id) == ("east", "job-1")
    kept = [s for s in job.statements if s.statement != first]
    receipt = receipt_of(job, statements=[*kept, again])
    assert receipt.totals[0].epsilon == pytest.approx(job.statements[0].statement.epsilon)
    assert receipt.totals[0].n_fresh_rows == 4
    check(job, receipt).require_ok()


def test_pure_mechanism_adds_up_without_delta():
    job = make_job(charge=Charge.pure(0.5, 4), epsilon=2.0, delta=0.0)
    receipt = receipt_of(job)
    assert (receipt.totals[0].epsilon, receipt.totals[0].delta) == (4.0, 0.0)
    check(job, receipt).require_ok()


def test_protection_without_noise_has_no_epsilon():
    plain = {"protection": "plain", "protection_options": {}}
    job = make_job(charge=Charge(), n_fresh_rows=4, epsilon=None, delta=None, **plain)
    receipt = receipt_of(job)
    assert receipt.totals[0].epsilon is None
    check(job, receipt).require_ok()
    claims = make_job(**plain)
    assert failures(check(claims, receipt_of(claims))) == {"charges"}
    silent = make_job(charge=Charge(), n_fresh_rows=4, epsilon=None, delta=None)
    assert failures(check(silent, receipt_of(silent))) == {"charges"}


# -- every change is noticed ---------------------------------------------------------------


def leaves(value, path=()):
    """Yield the path of each value in a JSON document."""
    if isinstance(value, dict) and value:
        for key in value:
            yield from leaves(value[key], (*path, key))
    elif isinstance(value, list) and value:
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    else:
        yield path


def other(value):
    """Return another value that could stand in its place."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.5 + 0.25
    if isinstance(value, str) and value:
        return value[:-1] + ("0" if value[-1] != "0" else "1")
    return {"": "FI401", (): ["x"]}.get(value if isinstance(value, str) else (), 0.5)


def changed(document, path, edit):
    """Return a copy of the document with the value at the path edited in its container."""
    document = copy.deepcopy(document)
    inside = document
    for step in path[:-1]:
        inside = inside[step]
    edit(inside, path[-1])
    return json.dumps(document).encode()


def set_other(inside, key):
    inside[key] = other(inside[key])


JOB = make_job()
DOCUMENT = json.loads(receipt_of(JOB).to_bytes())
PATHS = list(leaves(DOCUMENT))


def test_unchanged_document_passes_so_that_the_changes_below_mean_something():
    assert check(JOB, json.dumps(DOCUMENT).encode()).ok


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_change_of_any_single_value_is_noticed(path):
    assert detected(JOB, changed(DOCUMENT, path, set_other))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_missing_field_is_noticed_wherever_it_is(path):
    assert detected(JOB, changed(DOCUMENT, path, lambda inside, key: inside.pop(key)))


def objects(value, path=()):
    if isinstance(value, dict):
        yield path
    for key in value if isinstance(value, dict) else range(len(value)):
        if isinstance(value[key], dict | list):
            yield from objects(value[key], (*path, key))


@pytest.mark.parametrize("path", list(objects(DOCUMENT)), ids=lambda path: ".".join(map(str, path)))
def test_unknown_field_is_noticed_wherever_it_is(path):
    data = changed(DOCUMENT, (*path, "x"), lambda inside, key: inside.update(x=1))
    assert detected(JOB, data)


LISTS = ("cohort", "batches", "statements", "totals", "who_can_learn_what")


@pytest.mark.parametrize("name", LISTS)
def test_item_left_out_doubled_or_moved_is_noticed(name):
    for number in range(len(DOCUMENT[name])):
        data = changed(DOCUMENT, (name, number), lambda inside, key: inside.pop(key))
        assert detected(JOB, data)
        doubled = changed(DOCUMENT, (name, number), lambda i, key: i.append(i[key]))
        assert detected(JOB, doubled)
    assert detected(JOB, changed(DOCUMENT, (name,), lambda i, key: i[key].reverse()))


def test_without_a_coordinators_signature_only_its_own_words_can_be_changed():
    document = json.loads(receipt_of(JOB, signed=False).to_bytes())
    unnoticed = {
        str(path[-1])
        for path in leaves(document)
        if not detected(JOB, changed(document, path, set_other), coordinator_key_id=None)
    }
    # `key_at_coordinator` says nothing under `dp`, which has no key. A status is one of two
    # words: the change made here is none of them, "late" for "failed" would pass.
    assert unnoticed == {"issued_at", "key_at_coordinator", "error_code"}


def test_key_at_coordinator_changes_what_can_be_learnt_under_he():
    changes = {"protection": "he", "protection_options": {}, "epsilon": None, "delta": None}
    job = make_job(charge=Charge(), n_fresh_rows=4, **changes)
    document = json.loads(receipt_of(job, signed=False).to_bytes())
    data = changed(document, ("key_at_coordinator",), set_other)
    assert failures(check(job, data, coordinator_key_id=None)) == {"who can learn what"}


# -- who signed ----------------------------------------------------------------------------


def test_whole_receipt_by_made_up_sites_fails_the_pins_only(job):
    forged = make_job()
    found = check(job, receipt_of(forged), coordinator_key_id=forged.coordinator.key_id)
    assert failures(found) == {"site pins"}
    with pytest.raises(UntrustedKeyError, match="'east' has key"):
        found.require_ok()
    # Without pins nobody could tell, and the result says that it did not look.
    blind = verify(receipt_of(forged).to_bytes(), now=NOW)
    assert blind.ok
    assert {c.name for c in blind.not_checked} == {"coordinator", "site pins", "querier pin"}


def test_site_that_is_not_pinned_is_named(job):
    pins = {name: key for name, key in job.pins.items() if name != "west"}
    found = check(job, receipt_of(job), pins=pins)
    assert failures(found) == {"site pins"}
    assert "'west' is not pinned" in found.failed[0].words
    assert found.failed[0].code == "FI311"


def test_pin_of_a_site_that_was_asked_but_did_not_answer_counts_too(job):
    strangers = (*job.cohort, CohortMember(name="ghost", key_id=Identity.generate().key_id))
    keys = [member.key_id for member in strangers]
    statements = [
        make_statement(job.sites[n], site=n, keys=keys).sign(job.sites[n]) for n in job.sites
    ]
    batch = BatchRecord(
        query_id="job-0",
        n_rows=4,
        answered=tuple(job.sites),
        dropped=(Dropout(site="ghost", status="late"),),
    )
    receipt = receipt_of(job, statements=statements, cohort=strangers, batches=[batch])
    assert failures(check(job, receipt)) == {"site pins"}


def test_querier_and_coordinator_are_compared_with_their_pins(job):
    assert failures(check(job, receipt_of(job), queriers={"other": "0" * 64})) == {"querier pin"}
    assert failures(check(job, receipt_of(job), coordinator_key_id="0" * 64)) == {"coordinator"}
    assert failures(check(job, receipt_of(job, signed=False))) == {"coordinator"}


def test_forged_signature_of_a_site_is_refused(job):
    victim, *rest = job.statements
    lie = dataclasses.replace(victim.statement, n_rows=3, n_fresh_rows=3, charge=Charge.pure(1, 3))
    forged = dataclasses.replace(victim, statement=lie)
    found = check(job, receipt_of(job, statements=[forged, *rest]))
    assert "site signatures" in failures(found)
    with pytest.raises(SignatureError):
        found.require_ok()


def test_statement_signed_with_the_coordinators_key_is_refused(job):
    victim, *rest = job.statements
    as_coordinator = dataclasses.replace(victim.statement, site_key_id=job.coordinator.key_id).sign(
        job.coordinator
    )
    found = check(job, receipt_of(job, statements=[as_coordinator, *rest]))
    assert failures(found) == {"cohort"}


# -- who answered --------------------------------------------------------------------------


def test_statement_of_another_job_by_the_same_site_is_refused(job):
    keys = list(job.pins.values())
    stranger = make_statement(job.sites["east"], site="east", keys=keys, job="elsewhere")
    swapped = [*job.statements[1:], stranger.sign(job.sites["east"])]
    found = check(job, receipt_of(job, statements=sorted(swapped, key=lambda s: s.statement.site)))
    assert failures(found) & {"same job", "who answered"}


def test_statement_of_another_batch_does_not_stand_in(job):
    doubled = [*job.statements[:-1], job.statements[0]]
    assert "who answered" in failures(check(job, receipt_of(job, statements=doubled)))


def test_omitted_statement_of_a_site_that_answered_is_noticed(job):
    found = check(job, receipt_of(job, statements=job.statements[1:]))
    assert failures(found) == {"who answered"}
    assert "no statement by 'east'" in found.failed[0].words


def test_site_that_answered_can_be_called_dropped_and_nobody_can_tell(job):
    # What a receipt does not prove: silence. The site's own copy of its statement does.
    hidden = [s for s in job.statements if s.statement.query_id == "job-0"]
    east_hidden = [s for s in hidden if s.statement.site != "east"]
    batch = BatchRecord(
        query_id="job-0",
        n_rows=4,
        answered=("north", "west"),
        dropped=(Dropout(site="east", status="late"),),
    )
    assert check(job, receipt_of(job, statements=east_hidden, batches=[batch])).ok


def test_statement_of_a_site_that_was_refused_still_counts_in_its_total(job):
    first = [s for s in job.statements if s.statement.query_id == "job-0"]
    batch = BatchRecord(
        query_id="job-0",
        n_rows=4,
        answered=("north", "west"),
        dropped=(Dropout(site="east", status="failed", error_code="FI304"),),
    )
    receipt = receipt_of(job, statements=first, batches=[batch])
    check(job, receipt).require_ok()
    assert [total.site for total in receipt.totals] == ["east", "north", "west"]


def test_result_of_fewer_sites_than_agreed_is_noticed():
    job = make_job(min_cohort=3)
    found = check(job, receipt_of(job))
    assert failures(found) == {"smallest cohort"}
    assert "2 sites in the result, the sites agreed to 3 or more" in found.failed[0].words


def test_larger_cohort_than_the_sites_were_told_of_is_noticed(job):
    ghost = CohortMember(name="ghost", key_id=Identity.generate().key_id)
    assert "cohort" in failures(check(job, receipt_of(job, cohort=(*job.cohort, ghost))))


def test_sites_that_were_told_of_different_cohorts_are_noticed(job):
    keys = [job.pins["east"], Identity.generate().key_id, Identity.generate().key_id]
    lied_to = make_statement(job.sites["east"], site="east", keys=keys).sign(job.sites["east"])
    found = check(job, receipt_of(job, statements=[lied_to, *job.statements[1:]]))
    assert failures(found) == {"cohort"}


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": 8},
        {"querier_key_id": ""},
        {"session_key_id": "34" * 32},
        {"query_sealed": False},
        {"protection_options": {}},
        {"rule": "majority-vote"},
        {"rule_options": {}},
        {"min_cohort": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_sites_that_were_told_different_things_are_noticed(job, change):
    keys = list(job.pins.values())
    site = job.sites["west"]
    odd = make_statement(site, site="west", keys=keys, **change).sign(site)
    statements = [*(s for s in job.statements if s.statement.site != "west"), odd]
    assert failures(check(job, receipt_of(job, statements=statements))) == {"same job"}


# -- sums and times ------------------------------------------------------------------------


def test_epsilon_below_what_the_charge_comes_to_is_noticed():
    job = make_job(epsilon=0.1)
    assert failures(check(job, receipt_of(job))) == {"charges"}
    pure = make_job(charge=Charge.pure(0.5, 4), epsilon=1.9, delta=0.0)
    assert failures(check(pure, receipt_of(pure))) == {"charges"}
    zero_delta = make_job(delta=0.0, charge=Charge.pure(0.5, 4), epsilon=2.0)
    assert check(zero_delta, receipt_of(zero_delta)).ok


@pytest.mark.parametrize(
    ("offset", "ok"), [(0, True), (500, True), (700, False), (-(8 * 86_400), False)]
)
def test_time_of_a_statement_is_near_the_receipts(offset, ok):
    job = make_job(issued_at=NOW + offset)
    assert check(job, receipt_of(job)).ok == ok


def test_receipt_from_the_future_or_from_before_receipts_is_noticed(job):
    assert failures(check(job, receipt_of(job), now=NOW - 1000)) == {"times"}
    old = make_job(issued_at=1000)
    assert failures(check(old, receipt_of(old, issued_at=1000))) == {"times"}


def test_disclosures_of_another_protection_are_noticed(job):
    receipt = receipt_of(job, signed=False)
    weaker = dataclasses.replace(receipt, protection="secagg")
    lie = dataclasses.replace(receipt, who_can_learn_what=weaker.disclosures_now())
    found = check(job, lie.signed_by(job.coordinator))
    assert failures(found) == {"who can learn what"}


def test_protection_nobody_wrote_about_fails_and_does_not_pass_as_safe():
    job = make_job()
    receipt = receipt_of(job, signed=False)
    unknown = dataclasses.replace(receipt, protection="magic").signed_by(job.coordinator)
    assert {"charges", "who can learn what", "same job"} <= failures(check(job, unknown))


def test_missing_extra_is_said_and_not_taken_for_a_pass(job, monkeypatch):
    from fedinfer_flower.errors import MissingExtraError

    def missing(*_):
        raise MissingExtraError("scipy is not installed", hint="install the extra")

    receipt = receipt_of(job)
    monkeypatch.setattr(rules, "totals_of", missing)
    found = check(job, receipt)
    assert [c.name for c in found.not_checked] == ["totals"]


# -- reading -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"version": 1}', b"NaN"]
)
def test_bytes_that_are_no_receipt_are_refused(data):
    with pytest.raises(EnvelopeError) if b"version" in data else pytest.raises(ProtocolError):
        verify(data)


def test_huge_receipt_is_refused_before_it_is_parsed():
    with pytest.raises(SizeLimitError):
        verify(b"[" * 2000, max_bytes=1000)


def test_receipt_of_another_version_is_refused():
    for version in (2, True, "1", 1.0):
        with pytest.raises(UnsupportedVersionError):
            verify(json.dumps(DOCUMENT | {"version": version}).encode())


def test_receipt_holds_nothing_but_what_it_says(job):
    text = receipt_of(job).to_bytes().decode()
    for identity in (*job.sites.values(), job.coordinator):
        for secret in identity.to_secret().values():
            assert secret not in text


def test_receipt_without_statements_is_not_made_and_not_accepted(job):
    with pytest.raises(ValueError, match="at least one statement"):
        receipt_of(job, statements=[])
    empty = dataclasses.replace(
        receipt_of(job, signed=False), statements=(), totals=(), batches=()
    ).signed_by(job.coordinator)
    assert "who answered" in failures(check(job, empty))


def test_failure_without_a_signature_is_a_receipt_error(job):
    with pytest.raises(ReceiptError, match="who answered"):
        check(job, receipt_of(job, statements=job.statements[1:])).require_ok()
