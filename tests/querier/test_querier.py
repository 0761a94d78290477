"""The querier believes no combined answer but its own job's, and keeps its secret."""

from __future__ import annotations

import dataclasses
import json
import os
import stat

import numpy as np
import pytest

from fedinfer_flower import Querier
from fedinfer_flower.ensemble.base import RULES
from fedinfer_flower.errors import (
    BindingError,
    EnvelopeError,
    FedInferError,
    InvalidValueError,
    ProtocolError,
    UnknownNameError,
)
from fedinfer_flower.privacy.base import KeyPair, ScorePlan
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.wire.documents import CombinedAnswer, CombinedBatch, QueryJob

QUERIES = np.arange(20.0).reshape(5, 4)
SCORES = np.random.default_rng(9).dirichlet(np.ones(3), size=(4, 5))  # 4 sites, 5 queries
CLASSES = ("a", "b", "c")


def combine(querier: Querier, job: QueryJob) -> CombinedAnswer:
    """Answer a job as four sites and a coordinator do."""
    rule = RULES.get("mean-probability")()
    plan = ScorePlan.for_rule(rule, n_classes=3, n_sites_max=4)
    site = querier.protection.site_side(plan, public_key=job.public_key)
    batches, start = [], 0
    for query_id, rows in job.batches():
        side = querier.protection.coordinator_side(
            plan, n_queries=len(rows), rule=rule, public_key=job.public_key
        )
        for scores in SCORES[:, start : start + len(rows)]:
            side.add(site.protect(scores))
        start += len(rows)
        batches.append(
            CombinedBatch(query_id=query_id, n_queries=len(rows), n_sites=4, total=side.total())
        )
    return CombinedAnswer(
        job_id=job.job_id,
        rule="mean-probability",
        protection=querier.protection.name,
        rule_options={},
        protection_options=querier.protection.options(),
        classes=CLASSES,
        n_sites_asked=4,
        key_id=job.key_id,
        batches=tuple(batches),
    )


@pytest.fixture(params=["plain", "he"])
def asked(request) -> tuple[Querier, CombinedAnswer]:
    querier = Querier(protection=request.param)
    job = QueryJob.from_bytes(querier.ask(QUERIES, batch_size=2, clear=True).to_bytes())
    return querier, CombinedAnswer.from_bytes(combine(querier, job).to_bytes())


def changed_batch(combined: CombinedAnswer, number: int, **changes: object) -> CombinedAnswer:
    batches = list(combined.batches)
    batches[number] = dataclasses.replace(batches[number], **changes)
    return dataclasses.replace(combined, batches=tuple(batches))


def test_open_gives_the_clear_answer(asked):
    querier, combined = asked

    prediction = querier.open(combined)

    # Four sites round by half a step of 2**-16, or to float32.
    np.testing.assert_allclose(
        querier.totals(combined), SCORES.sum(axis=0), rtol=0.0, atol=4 * 2.0**-17
    )
    assert prediction.classes == CLASSES
    assert prediction.labels.tolist() == SCORES.sum(axis=0).argmax(axis=1).tolist()
    assert len(prediction) == len(QUERIES)


@pytest.mark.parametrize(
    "changes",
    [
        {"job_id": "0a" * 16},
        {"job_id": ""},
        {"key_id": "0f" * 32},
        {"protection": "dp"},
        {"protection": "no-such"},
        {"protection_options": {"scheme": "ckks"}},
        {"protection_options": {"epsilon": 1.0}},
        {"batches": ()},
    ],
    ids=str,
)
def test_open_of_an_answer_bound_elsewhere_is_refused(asked, changes):
    querier, combined = asked
    bad = dataclasses.replace(combined, **changes)
    for method in (querier.open, querier.totals):
        with pytest.raises(BindingError):
            method(bad)


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": ()},
        {"classes": ("a", "a", "b")},
        {"classes": ("a", "b")},
        {"classes": ("a", "b", "c", "d")},
        {"rule": "no-such-rule"},
        {"rule_options": {"x": 1}},
        {"n_sites_asked": 3},
    ],
    ids=str,
)
def test_open_of_an_answer_that_does_not_fit_raises_typed_error(asked, changes):
    querier, combined = asked
    with pytest.raises(FedInferError):
        querier.open(dataclasses.replace(combined, **changes))


def test_open_of_batches_dropped_swapped_or_repeated_is_refused(asked):
    querier, combined = asked
    first, second, third = combined.batches
    for batches in ((first, second), (second, first, third), (first, first, third), (first,) * 4):
        with pytest.raises(BindingError, match="does not cover"):
            querier.open(dataclasses.replace(combined, batches=batches))


def test_open_of_a_batch_of_other_rows_is_refused(asked):
    querier, combined = asked
    with pytest.raises(BindingError):
        querier.open(changed_batch(combined, 0, n_queries=1))


@pytest.mark.parametrize("n_sites", [-1, 0, 5, 10**6])
def test_open_of_an_impossible_number_of_sites_is_refused(asked, n_sites):
    querier, combined = asked
    with pytest.raises(BindingError, match="sites"):
        querier.open(changed_batch(combined, 1, n_sites=n_sites))


@pytest.mark.parametrize("n_sites", [1, 2])
def test_open_of_too_few_sites_under_he_is_refused(n_sites):
    querier = Querier(protection="he")
    combined = combine(querier, querier.ask(QUERIES, clear=True))
    with pytest.raises(BindingError, match="3 are needed"):
        querier.open(changed_batch(combined, 0, n_sites=n_sites))


def test_open_of_a_damaged_total_raises_typed_error(asked):
    querier, combined = asked
    total = bytes(combined.batches[0].total)
    for bad in (b"", total[:-1], total + b"\0", b"\xff" * len(total), bytes(len(total))[:-8]):
        with pytest.raises(ProtocolError):
            querier.open(changed_batch(combined, 0, total=bad))


def test_open_of_a_sum_larger_than_the_sites_could_send_is_refused():
    querier = Querier(protection="plain")
    combined = combine(querier, querier.ask(QUERIES, clear=True))
    total = np.full((5, 3), 4.01)
    with pytest.raises(ProtocolError):
        querier.open(changed_batch(combined, 0, total=total.tobytes()))


def test_open_of_another_queriers_answer_is_refused():
    first, second = Querier(protection="he"), Querier(protection="he")
    combined = combine(first, first.ask(QUERIES, clear=True))
    with pytest.raises(BindingError, match="another querier"):
        second.open(combined)


def test_open_of_answers_to_two_jobs_works_in_any_order():
    querier = Querier(protection="plain")
    one, two = querier.ask(QUERIES, clear=True), querier.ask(QUERIES, batch_size=1, clear=True)
    assert one.job_id != two.job_id
    for job in (two, one, two):
        assert len(querier.open(combine(querier, job))) == 5


def test_open_of_an_answer_under_another_epsilon_is_refused():
    querier = Querier(protection=DP(epsilon=2.0))
    combined = combine(querier, querier.ask(QUERIES, clear=True))
    assert len(querier.open(combined)) == 5
    bad = dataclasses.replace(
        combined, protection_options=dict(combined.protection_options) | {"epsilon": 64.0}
    )
    with pytest.raises(BindingError):
        querier.open(bad)


def test_job_has_no_secret_in_it():
    querier = Querier(protection="he")
    data = querier.ask(QUERIES, clear=True).to_bytes()
    secret = querier._keys.secret_key
    assert querier._keys.public_key in data
    assert not any(
        secret[at : at + 32] in data
        for at in range(0, len(secret) - 32, 32)
        if secret[at : at + 32] not in querier._keys.public_key
    )


def test_keys_are_fresh_for_every_querier():
    assert Querier(protection="he").key_id != Querier(protection="he").key_id


@pytest.mark.parametrize(
    "inputs", [np.zeros(3), np.zeros((0, 3)), [["x"]], [[np.nan]], [[None]], 5], ids=repr
)
def test_ask_with_inputs_that_cannot_travel_is_refused(inputs):
    with pytest.raises(InvalidValueError):
        Querier(protection="plain").ask(inputs, clear=True).to_bytes()


def test_unknown_protection_is_refused_with_a_hint():
    with pytest.raises(UnknownNameError, match="did you mean"):
        Querier(protection="plaim")


# -- the secret file ---------------------------------------------------------------------


def test_secret_file_is_for_its_owner_alone_under_any_umask(tmp_path):
    before = os.umask(0)
    try:
        Querier(protection="he").save_secret(tmp_path / "s")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610, 0o601])
def test_secret_file_that_others_may_read_is_refused(tmp_path, mode):
    path = tmp_path / "s"
    Querier(protection="he").save_secret(path)
    path.chmod(mode)
    with pytest.raises(InvalidValueError) as caught:
        Querier.load_secret(path)
    assert "chmod 600" in caught.value.hint
    path.chmod(0o600)
    Querier.load_secret(path)


def test_secret_file_is_not_overwritten(tmp_path):
    path = tmp_path / "s"
    querier = Querier(protection="he")
    querier.save_secret(path)
    content = path.read_bytes()
    for other in (querier, Querier(protection="he")):
        with pytest.raises(InvalidValueError, match="may hold the only key"):
            other.save_secret(path)
    assert path.read_bytes() == content


def test_secret_file_is_not_written_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(InvalidValueError):
        Querier(protection="he").save_secret(tmp_path / "link")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("protection", ["plain", "he", DP(epsilon=3.0)], ids=str)
def test_loaded_querier_opens_and_breaks_ties_as_the_one_that_was_saved(tmp_path, protection):
    querier = Querier(protection=protection, tie_seed=5)
    combined = combine(querier, querier.ask(QUERIES, batch_size=2, clear=True))
    querier.save_secret(tmp_path / "s")

    loaded = Querier.load_secret(tmp_path / "s")

    assert (loaded.key_id, loaded.protection) == (querier.key_id, querier.protection)
    assert loaded._tie_seed == 5
    np.testing.assert_array_equal(loaded.totals(combined), querier.totals(combined))
    np.testing.assert_array_equal(loaded.open(combined).labels, querier.open(combined).labels)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("secret"),
        lambda state: state.pop("asked"),
        lambda state: state.update(version=1),
        lambda state: state.update(version=3),
        lambda state: state.pop("identity"),
        lambda state: state.update(identity={"signing": "00"}),
        lambda state: state.update({"secret": "not base64!"}),
        lambda state: state.update(secret=None),
        lambda state: state.update(asked=[1]),
        lambda state: state.update(asked={"j": {"batches": [["q", "x"]], "sealed": None}}),
        lambda state: state.update(asked={"j": {"batches": [["q"]], "sealed": None}}),
        lambda state: state.update(asked={"j": {"batches": []}}),
        lambda state: state.update(asked={"j": {"batches": [], "sealed": {"run": 1}}}),
        lambda state: state.update(asked={"j": {"batches": [], "sealed": []}}),
        lambda state: state.update(options={"scheme": "x"}),
        lambda state: state.update(options=[1]),
        lambda state: state.update({"tie-seed": "x"}),
    ],
)
def test_secret_file_that_is_damaged_raises_typed_error_and_shows_no_key(tmp_path, damage):
    path = tmp_path / "s"
    Querier(protection="he").save_secret(path)
    state = json.loads(path.read_text())
    secret = state["secret"]
    damage(state)
    path.write_text(json.dumps(state))
    with pytest.raises(EnvelopeError) as caught:
        Querier.load_secret(path)
    assert secret[:40] not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"null", b"{}", b"[" * 100_000])
def test_secret_file_of_other_content_raises_typed_error(tmp_path, content):
    path = tmp_path / "s"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(EnvelopeError):
        Querier.load_secret(path)


def test_secret_of_another_key_pair_opens_nothing(tmp_path):
    querier, other = Querier(protection="he"), Querier(protection="he")
    combined = combine(querier, querier.ask(QUERIES, clear=True))
    mixed = Querier(
        protection="he",
        keys=KeyPair(public_key=querier._keys.public_key, secret_key=other._keys.secret_key),
    )
    mixed._asked = querier._asked
    with pytest.raises(BindingError, match="no pair"):
        mixed.open(combined)


def test_repr_shows_no_secret_key():
    querier = Querier(protection="he")
    secret = querier._keys.secret_key
    job = querier.ask(QUERIES, clear=True)
    for item in (querier, querier._keys, job, combine(querier, job)):
        # 16 bytes from the middle: the beginning is a header that says what it is.
        assert secret[1000:1016].hex() not in repr(item)
        assert repr(secret[1000:1016])[2:-1] not in repr(item)


def test_repr_shows_no_query_and_no_total():
    querier = Querier(protection="plain")
    job = querier.ask(QUERIES, clear=True)
    combined = combine(querier, job)
    for item in (querier, job, combined, combined.batches[0]):
        assert "19." not in repr(item)  # the last query
        assert "array" not in repr(item)
        assert "\\x" not in repr(item)
