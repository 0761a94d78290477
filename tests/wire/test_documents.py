"""The job and the combined answer: what a querier writes and reads outside the federation."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedinfer_flower.errors import EnvelopeError, InvalidValueError, ProtocolError, SizeLimitError
from fedinfer_flower.wire.documents import CombinedAnswer, CombinedBatch, QueryJob
from fedinfer_flower.wire.envelope import Envelope, Kind, WireLimits, decode, encode
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.roster import Roster, Seat

ROSTER = Roster(
    tuple(Seat(identity=Identity.generate().public, commitment=digit * 64) for digit in "0af")
)
JOB = QueryJob(
    job_id="0a" * 16,
    inputs=np.arange(15, dtype=np.float32).reshape(5, 3),
    batch_size=2,
    protection="he",
    protection_options={"scheme": "bfv"},
    public_key=b"public",
    key_id="0f" * 32,
    classes=("cat", "dog"),
)
COMBINED = CombinedAnswer(
    job_id="0a" * 16,
    rule="mean-probability",
    protection="he",
    rule_options={},
    protection_options={"scheme": "bfv"},
    classes=("cat", "dog"),
    n_sites_asked=3,
    key_id="0f" * 32,
    batches=(
        CombinedBatch(query_id="0a-0", n_queries=2, n_sites=3, total=b"first"),
        CombinedBatch(query_id="0a-1", n_queries=1, n_sites=3, total=b""),
    ),
    roster=ROSTER,
    relayed=True,
)
SCALARS = st.text(max_size=9) | st.integers(-(2**40), 2**40) | st.booleans()
OPTIONS = st.dictionaries(st.text(max_size=9), SCALARS | st.floats(-1e9, 1e9), max_size=4)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    inputs=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=4, max_side=5),
        elements=st.floats(-8, 8, width=32),
    ),
    batch_size=st.integers(1, 1000),
    options=OPTIONS,
    public_key=st.binary(max_size=40),
    classes=st.none()
    | st.lists(st.text(max_size=9), min_size=1, max_size=4, unique=True).map(tuple),
)
def test_job_after_a_round_trip_is_the_same(inputs, batch_size, options, public_key, classes):
    job = dataclasses.replace(
        JOB,
        inputs=inputs,
        batch_size=batch_size,
        protection_options=options,
        public_key=public_key,
        classes=classes,
    )

    back = QueryJob.from_bytes(job.to_bytes())

    np.testing.assert_array_equal(back.inputs, job.inputs)
    for field in dataclasses.fields(QueryJob):
        if field.name != "inputs":
            assert getattr(back, field.name) == getattr(job, field.name)
    assert back.to_bytes() == job.to_bytes()


def test_job_batches_cover_all_rows_in_order():
    batches = list(JOB.batches())
    assert [query_id for query_id, _ in batches] == [f"{JOB.job_id}-{i}" for i in range(3)]
    assert [len(rows) for _, rows in batches] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in batches]), JOB.inputs)


def test_job_repr_shows_no_inputs_and_no_key():
    assert "array" not in repr(JOB)
    assert "public'" not in repr(JOB)


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": np.zeros(3)},
        {"inputs": np.zeros((0, 3))},
        {"batch_size": 0},
        {"batch_size": 10**7},
        {"inputs": np.zeros((2000, 1)), "batch_size": 1},
        {"job_id": ""},
        {"job_id": "a" * 57},  # its batches' ids would be longer than a query id may be
    ],
    ids=lambda changes: str({k: getattr(v, "shape", v) for k, v in changes.items()})[:40],
)
def test_job_that_cannot_be_asked_is_refused(changes):
    with pytest.raises(InvalidValueError):
        dataclasses.replace(JOB, **changes)


def test_job_with_longest_id_gives_query_ids_that_travel():
    job = dataclasses.replace(JOB, job_id="a" * 56, inputs=np.zeros((1023, 1)), batch_size=1)
    *_, (query_id, _) = job.batches()
    assert decode(encode(Envelope(kind=Kind.QUERY, query_id=query_id))).query_id == query_id


WRONG = (None, True, 0, -1, 2.5, 10**400, "\ud800", "x" * 300, [], [None], [1], {"a": None})


def wrong_fields(*names: str) -> list[tuple[str, object]]:
    """Pair fields with values; no classes, or none of them, is right in a document."""
    pairs = [(name, value) for name in names for value in WRONG]
    return [(name, value) for name, value in pairs if name != "classes" or value not in (None, [])]


@pytest.mark.parametrize(
    ("field", "value"),
    wrong_fields("batch-size", "protection", "protection-options", "classes"),
    ids=lambda v: repr(v)[:20],
)
def test_job_with_a_field_of_wrong_type_raises_typed_error(field, value):
    envelope = decode(JOB.to_bytes())
    bad = dataclasses.replace(envelope, meta=dict(envelope.meta) | {field: value})
    with pytest.raises(ProtocolError):
        QueryJob.from_bytes(encode(bad))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": Kind.QUERY},
        {"query_id": ""},
        {"query_id": "a" * 64},
        {"shape": (15,)},
        {"shape": (5, 4)},
        {"shape": (0, 3)},
        {"shape": (2**63, 0)},
        {"shape": ()},
        {"codec": "object"},
        {"sections": (("inputs", bytes(60)),)},
        {"sections": (("inputs", bytes(60)), ("public-key", b""), ("secret-key", b"x"))},
        {"shape": (2**63, 0), "sections": (("inputs", b""), ("public-key", b""))},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_job_with_wrong_outer_field_raises_typed_error(changes):
    with pytest.raises(ProtocolError):
        QueryJob.from_bytes(encode(dataclasses.replace(decode(JOB.to_bytes()), **changes)))


def test_job_larger_than_the_reader_accepts_raises_size_limit():
    with pytest.raises(SizeLimitError):
        QueryJob.from_bytes(JOB.to_bytes(), limits=WireLimits(max_payload_bytes=10))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    options=OPTIONS,
    classes=st.lists(st.text(max_size=9), max_size=4).map(tuple),
    totals=st.lists(st.binary(max_size=30), max_size=5),
    roster=st.sampled_from([Roster(()), ROSTER]),
    relayed=st.booleans(),
)
def test_combined_answer_after_a_round_trip_is_the_same(options, classes, totals, roster, relayed):
    combined = dataclasses.replace(
        COMBINED,
        roster=roster,
        relayed=relayed,
        rule_options=options,
        classes=classes,
        batches=tuple(
            CombinedBatch(query_id=f"q-{i}", n_queries=i + 1, n_sites=3, total=total)
            for i, total in enumerate(totals)
        ),
    )

    back = CombinedAnswer.from_bytes(combined.to_bytes())

    assert back == combined
    assert back.to_bytes() == combined.to_bytes()


@pytest.mark.parametrize(
    ("field", "value"),
    wrong_fields("rule", "rule-options", "protection-options", "classes", "sites", "batches"),
    ids=lambda v: repr(v)[:20],
)
def test_combined_answer_with_a_field_of_wrong_type_raises_typed_error(field, value):
    envelope = decode(COMBINED.to_bytes())
    bad = dataclasses.replace(envelope, meta=dict(envelope.meta) | {field: value})
    with pytest.raises(ProtocolError):
        CombinedAnswer.from_bytes(encode(bad))


@pytest.mark.parametrize(
    "batches",
    [
        [["q", 2, 3]],
        [["q", 2, 3]] * 3,
        [["q", 2, 3], ["q", 1]],
        [["q", 2, 3], ["q", 0, 3]],
        [["q", 2, 3], ["q", 1, 0]],
        [["q", 2, 3], ["q", 1, -3]],
        [["q", 2, 3], ["q", True, 3]],
        [["q", 2, 3], ["q" * 65, 1, 3]],
        [["q", 2, 3], [1, 1, 3]],
        [["q", 2, 3], "abc"],
        [["q", 2, 3], ["q", 10**12, 3]],
    ],
    ids=str,
)
def test_combined_answer_with_bad_batches_raises_typed_error(batches):
    envelope = decode(COMBINED.to_bytes())
    bad = dataclasses.replace(envelope, meta=dict(envelope.meta) | {"batches": batches})
    with pytest.raises(EnvelopeError):
        CombinedAnswer.from_bytes(encode(bad))


@pytest.mark.parametrize("value", [v for v in WRONG if v is not True], ids=lambda v: repr(v)[:20])
def test_combined_answer_whose_relayed_is_no_flag_raises_typed_error(value):
    envelope = decode(COMBINED.to_bytes())
    bad = dataclasses.replace(envelope, meta=dict(envelope.meta) | {"relayed": value})
    with pytest.raises(EnvelopeError):
        CombinedAnswer.from_bytes(encode(bad))


@pytest.mark.parametrize(
    "roster",
    [
        b"x",
        ROSTER.to_bytes()[:-1],
        ROSTER.to_bytes()[96:] + ROSTER.to_bytes()[:96],
        ROSTER.to_bytes()[:96] * 2,
    ],
    ids=["one byte", "cut", "out of order", "twice"],
)
def test_combined_answer_with_a_bad_roster_raises_typed_error(roster):
    envelope = decode(COMBINED.to_bytes())
    sections = tuple((n, roster if n == "roster" else d) for n, d in envelope.sections)
    with pytest.raises(EnvelopeError):
        CombinedAnswer.from_bytes(encode(dataclasses.replace(envelope, sections=sections)))


def test_combined_answer_without_its_roster_raises_typed_error():
    envelope = decode(COMBINED.to_bytes())
    sections = tuple((n, d) for n, d in envelope.sections if n != "roster")
    with pytest.raises(EnvelopeError):
        CombinedAnswer.from_bytes(encode(dataclasses.replace(envelope, sections=sections)))


@pytest.mark.parametrize("document", [JOB, COMBINED], ids=["job", "combined"])
def test_document_of_the_other_kind_raises_typed_error(document):
    other = CombinedAnswer if document is JOB else QueryJob
    with pytest.raises(EnvelopeError):
        other.from_bytes(document.to_bytes())


@pytest.mark.parametrize("document", [JOB, COMBINED], ids=["job", "combined"])
def test_document_with_random_damage_raises_only_typed_errors(document):
    rng = random.Random(7)  # noqa: S311 - reproducible, not secret
    good = document.to_bytes()
    header_end = 20 + int.from_bytes(good[8:12], "big")
    n_refused = 0
    for _ in range(2000):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            bad[rng.randrange(header_end)] = rng.randrange(256)
        try:
            type(document).from_bytes(bytes(bad))
        except ProtocolError:
            n_refused += 1
    # Damage to free text (options, class names, ids) gives another valid document.
    assert n_refused > 1000
