"""A coordinator's memory of sites: what it keeps, its file, and files that are not one."""

import dataclasses
import json
import os
import stat
from types import MappingProxyType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import ConfigError, InvalidValueError
from fedinfer_flower.profile import SiteProfile
from fedinfer_flower.selection import AuditTally, SiteHistory, SiteRecord
from fedinfer_flower.selection import history as history_module
from fedinfer_flower.wire.directory import SiteCard
from fedinfer_flower.wire.identity import Identity

KEY, OTHER = "ab" * 32, "cd" * 32


def full_history():
    history = SiteHistory()
    history.register(KEY, owner="ward 3", jurisdiction="eu")
    history.record_answer(KEY, 0.25, 1_000.0)
    history.record_audit(KEY, 1, right={"a": 3.0}, asked={"a": 4.0, "b": 1.0})
    history.record_merit(KEY, 1, 0.125)
    history.record_reputation(KEY, 3.0, 2.0)
    history.record_epsilon(KEY, 1.5)
    history.record_cluster(KEY, "c1")
    return history


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sites.json"


# -- what is recorded --------------------------------------------------------------------


def test_history_remembers_everything_under_the_key():
    assert full_history()[KEY] == SiteRecord(
        owner="ward 3",
        jurisdiction="eu",
        tallies=(AuditTally(epoch=1, right={"a": 3.0}, asked={"a": 4.0, "b": 1.0}),),
        merits=((1, 0.125),),
        latencies_s=(0.25,),
        last_seen_at=1_000.0,
        epsilon_left=1.5,
        reputation=(3.0, 2.0),
        cluster="c1",
    )
    assert full_history()[OTHER] == SiteRecord()
    assert OTHER not in full_history()


def test_history_adds_audits_of_one_epoch_and_sorts_epochs():
    history = SiteHistory()
    history.record_audit(KEY, 5, right={"a": 1.0}, asked={"a": 2.0})
    history.record_audit(KEY, 3, right={"a": 1.0}, asked={"a": 1.0})
    history.record_audit(KEY, 5, right={"b": 2.0}, asked={"a": 1.0, "b": 2.0})
    assert [t.epoch for t in history[KEY].tallies] == [3, 5]
    assert history[KEY].tallies[1].right == {"a": 1.0, "b": 2.0}
    assert history[KEY].tallies[1].asked == {"a": 3.0, "b": 2.0}


def test_history_settles_an_epoch_once():
    history = full_history()
    history.record_merit(KEY, 1, 0.125)
    with pytest.raises(InvalidValueError, match="settled"):
        history.record_merit(KEY, 1, 0.5)
    assert history[KEY].merits == ((1, 0.125),)


def test_history_keeps_the_latest_and_no_more():
    history = SiteHistory()
    for number in range(130):
        history.record_answer(KEY, float(number), 1_000.0 + number)
        history.record_audit(KEY, number, right={"a": 1.0}, asked={"a": 1.0})
        history.record_merit(KEY, number, float(number))
    record = history[KEY]
    assert record.latencies_s == tuple(float(n) for n in range(30, 130))
    assert [t.epoch for t in record.tallies] == list(range(80, 130))
    assert [epoch for epoch, _ in record.merits] == list(range(80, 130))


def test_full_history_drops_the_stranger_seen_longest_ago(monkeypatch):
    monkeypatch.setattr(history_module, "MAX_SITES", 3)
    history = SiteHistory()
    history.register("registered", owner="ward 3")
    history.record_answer("old", 0.1, 100.0)
    history.record_answer("new", 0.1, 200.0)
    history.record_answer("newest", 0.1, 300.0)
    assert set(history.records) == {"registered", "new", "newest"}
    for key_id in ("new", "newest"):
        history.register(key_id, owner="ward 4")
    with pytest.raises(InvalidValueError, match="full"):
        history.record_answer("another", 0.1, 400.0)
    history.forget("new")
    history.record_answer("another", 0.1, 400.0)
    assert "another" in history


@pytest.mark.parametrize(
    "record",
    [
        lambda h: h.record_answer(KEY, float("nan"), 0.0),
        lambda h: h.record_answer(KEY, -1.0, 0.0),
        lambda h: h.record_answer(KEY, 1.0, float("inf")),
        lambda h: h.record_answer("", 1.0, 0.0),
        lambda h: h.record_answer("k" * 129, 1.0, 0.0),
        lambda h: h.record_answer("ключ", 1.0, 0.0),
        lambda h: h.record_audit(KEY, -1, {}, {}),
        lambda h: h.record_audit(KEY, True, {}, {}),
        lambda h: h.record_audit(KEY, 2**60, {}, {}),
        lambda h: h.record_audit(KEY, 1, {"a": 2.0}, {"a": 1.0}),
        lambda h: h.record_audit(KEY, 1, {"a": 2.0}, {}),
        lambda h: h.record_audit(KEY, 1, {}, {"a": float("nan")}),
        lambda h: h.record_audit(KEY, 1, {}, {"a\n": 1.0}),
        lambda h: h.record_merit(KEY, 7, float("nan")),
        lambda h: h.record_reputation(KEY, 0.0, 1.0),
        lambda h: h.record_epsilon(KEY, -0.5),
        lambda h: h.record_cluster(KEY, "c" * 129),
        lambda h: h.register(KEY, owner="line\nbreak"),
        lambda h: h.register(KEY, jurisdiction="x" * 129),
    ],
)
def test_history_refuses_what_it_could_not_keep_and_stays_as_it_was(record):
    history = full_history()
    with pytest.raises(InvalidValueError):
        record(history)
    assert history.records == full_history().records


def test_history_refuses_records_that_its_file_could_not_hold():
    with pytest.raises(InvalidValueError, match="larger"):
        SiteHistory({KEY: SiteRecord(latencies_s=(1.0,) * 101)})
    with pytest.raises(InvalidValueError):
        SiteHistory({KEY: SiteRecord(last_seen_at=float("nan"))})
    with pytest.raises(InvalidValueError):
        SiteHistory({KEY: SiteRecord(merits=((2, 0.0), (1, 0.0)))})


# -- candidates --------------------------------------------------------------------------


def test_candidates_get_the_record_of_the_key_that_signed_their_card():
    site = Identity.generate()
    profile = SiteProfile(name="north", classes=("a",))
    card = SiteCard.signed(profile, identity=site, run_id=7)
    history = SiteHistory()
    history.register(site.key_id, owner="ward 3")
    found = history.candidates({9: card, 4: profile})
    assert [c.site_id for c in found] == [4, 9]
    assert [c.record.owner for c in found] == ["", "ward 3"]
    assert [c.key_id for c in found] == ["", site.key_id]


def test_candidates_under_another_key_inherit_nothing():
    profile = SiteProfile(name="north", classes=("a",))
    history = SiteHistory()
    history.record_reputation(Identity.generate().key_id, 90.0, 1.0)
    thief = SiteCard.signed(profile, identity=Identity.generate(), run_id=7)
    assert history.candidates({1: thief})[0].record == SiteRecord()


# -- the file ----------------------------------------------------------------------------

names = st.text(
    st.characters(exclude_categories=["Cc", "Cs", "Cf", "Co", "Cn", "Zl", "Zp", "Zs"]),
    min_size=1,
    max_size=8,
)
amounts = st.floats(0.0, 1.7e308)
tallies = st.dictionaries(names, st.tuples(amounts, st.floats(0.0, 1.0)), max_size=3)
records = st.builds(
    lambda audits, **rest: SiteRecord(
        tallies=tuple(
            AuditTally(
                epoch=epoch,
                asked={name: n for name, (n, _) in tally.items()},
                right={name: n * share for name, (n, share) in tally.items()},
            )
            for epoch, tally in sorted(audits.items())
        ),
        **rest,
    ),
    audits=st.dictionaries(st.integers(0, 2**53), tallies, max_size=3),
    owner=st.one_of(st.just(""), names),
    jurisdiction=st.one_of(st.just(""), names),
    cluster=st.one_of(st.just(""), names),
    merits=st.dictionaries(
        st.integers(0, 2**53), st.floats(allow_nan=False, allow_infinity=False), max_size=3
    ).map(lambda merits: tuple(sorted(merits.items()))),
    latencies_s=st.lists(amounts, max_size=5).map(tuple),
    last_seen_at=st.one_of(st.none(), amounts),
    epsilon_left=st.one_of(st.none(), amounts),
    reputation=st.tuples(*[st.floats(0.0, 1.7e308, exclude_min=True)] * 2),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kept=st.dictionaries(
        st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=5),
        records,
        max_size=3,
    )
)
def test_file_brings_back_every_record_bit_for_bit(kept, path):
    history = SiteHistory(kept)
    history.save(path)
    assert SiteHistory.load(path).records == history.records == kept


def test_file_takes_mappings_of_any_kind(path):
    tally = AuditTally(
        epoch=1, right=MappingProxyType({"a": 1.0}), asked=MappingProxyType({"a": 2.0})
    )
    history = SiteHistory({KEY: SiteRecord(tallies=(tally,))})
    history.save(path)
    assert SiteHistory.load(path)[KEY].tallies[0].asked == {"a": 2.0}


def test_file_is_readable_for_its_user_alone_and_leaves_no_draft(path):
    full_history().save(path)
    full_history().save(path)
    assert os.listdir(path.parent) == ["sites.json"]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_save_that_fails_keeps_the_old_file_and_leaves_no_draft(path, monkeypatch):
    full_history().save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            with pytest.raises(ConfigError, match="cannot be written"):
                SiteHistory().save(path)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == ["sites.json"]


def test_save_into_no_folder_raises(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        full_history().save(tmp_path / "none" / "sites.json")


def test_save_that_could_not_be_read_again_is_refused(path, monkeypatch):
    monkeypatch.setattr("fedinfer_flower.selection.history_file._MAX_FILE_BYTES", 100)
    with pytest.raises(ConfigError, match="bytes"):
        full_history().save(path)
    assert not path.exists()


def test_missing_file_is_an_error_unless_it_may_be_missing(path):
    with pytest.raises(ConfigError, match="cannot be read"):
        SiteHistory.load(path)
    assert len(SiteHistory.load(path, missing_ok=True)) == 0


def test_file_that_is_too_large_is_not_parsed(path, monkeypatch):
    full_history().save(path)
    monkeypatch.setattr("fedinfer_flower.selection.history_file._MAX_FILE_BYTES", 100)
    with pytest.raises(ConfigError, match="larger than 100"):
        SiteHistory.load(path)


def changed(change):
    """Return the text of a good file after a change to its document."""
    tally = {"epoch": 1, "right": {"a": 3.0}, "asked": {"a": 4.0, "b": 1.0}}
    record = dataclasses.asdict(full_history()[KEY]) | {"tallies": [tally]}
    document = {"format": "fedinfer site history", "version": 1, "sites": {KEY: record}}
    change(document, record, tally)
    return json.dumps(document)


def test_changed_file_without_a_change_is_good(path):
    path.write_text(changed(lambda d, r, t: None))
    assert SiteHistory.load(path).records == full_history().records


CHANGES = {
    "other format": lambda d, r, t: d.update(format="x"),
    "newer version": lambda d, r, t: d.update(version=2),
    "version true": lambda d, r, t: d.update(version=True),
    "extra field": lambda d, r, t: d.update(more=1),
    "no sites": lambda d, r, t: d.pop("sites"),
    "sites a list": lambda d, r, t: d.update(sites=[]),
    "empty key": lambda d, r, t: d["sites"].update({"": r}),
    "long key": lambda d, r, t: d["sites"].update({"k" * 129: r}),
    "record null": lambda d, r, t: d["sites"].update({KEY: None}),
    "field missing": lambda d, r, t: r.pop("owner"),
    "field unknown": lambda d, r, t: r.update(price=1),
    "owner a number": lambda d, r, t: r.update(owner=0),
    "owner null": lambda d, r, t: r.update(owner=None),
    "owner with escape": lambda d, r, t: r.update(owner="\x1b[2J"),
    "owner a surrogate": lambda d, r, t: r.update(owner="\ud800"),
    "one reputation": lambda d, r, t: r.update(reputation=[1.0]),
    "three reputations": lambda d, r, t: r.update(reputation=[1.0, 1.0, 1.0]),
    "reputation zero": lambda d, r, t: r.update(reputation=[0.0, 1.0]),
    "reputation text": lambda d, r, t: r.update(reputation=["1", "1"]),
    "latency negative": lambda d, r, t: r.update(latencies_s=[-1.0]),
    "latency true": lambda d, r, t: r.update(latencies_s=[True]),
    "latency huge": lambda d, r, t: r.update(latencies_s=[10**400]),
    "latency nan": lambda d, r, t: r.update(latencies_s=[float("nan")]),
    "latency infinite": lambda d, r, t: r.update(latencies_s=[float("inf")]),
    "latencies too many": lambda d, r, t: r.update(latencies_s=[1.0] * 101),
    "latencies a text": lambda d, r, t: r.update(latencies_s="1"),
    "seen never, as text": lambda d, r, t: r.update(last_seen_at="never"),
    "epsilon negative": lambda d, r, t: r.update(epsilon_left=-1.0),
    "tallies too many": lambda d, r, t: r.update(tallies=[t | {"epoch": e} for e in range(51)]),
    "tallies twice": lambda d, r, t: r.update(tallies=[t, t]),
    "tally an array": lambda d, r, t: r.update(tallies=[[1]]),
    "tally extra": lambda d, r, t: t.update(more=1),
    "epoch negative": lambda d, r, t: t.update(epoch=-1),
    "epoch a float": lambda d, r, t: t.update(epoch=1.0),
    "epoch huge": lambda d, r, t: t.update(epoch=2**53 + 1),
    "more right than asked": lambda d, r, t: t.update(right={"a": 9.0}),
    "right of none asked": lambda d, r, t: t.update(right={"z": 1.0}),
    "class empty": lambda d, r, t: t.update(asked={"": 1.0, "a": 4.0}),
    "merit alone": lambda d, r, t: r.update(merits=[1]),
    "merit of three": lambda d, r, t: r.update(merits=[[1, 1.0, 1.0]]),
    "merits out of order": lambda d, r, t: r.update(merits=[[2, 1.0], [1, 1.0]]),
    "merit nan": lambda d, r, t: r.update(merits=[[1, float("nan")]]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_file_that_is_not_exactly_a_history_is_refused(change, path):
    path.write_text(changed(change))
    with pytest.raises(ConfigError, match="damaged"):
        SiteHistory.load(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"format": "fedinfer site history", "version": 1, "version": 1, "sites": {}}',
        b'{"format": "fedinfer site history", "version": 1, "sites": {"k": 1e999}}',
        b'{"format": "fedinfer site history", "version": ' + b"9" * 5_000 + b', "sites": {}}',
        b'{"format": "fedinfer site history", "version": 1, "sites": {}} trailing',
    ],
    ids=lambda data: repr(data[:12]),
)
def test_bytes_that_are_no_history_are_refused(data, path):
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged"):
        SiteHistory.load(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_file_with_a_changed_byte_is_read_or_refused_and_never_crashes(at, byte, path):
    data = bytearray(changed(lambda d, r, t: None).encode())
    data[at % len(data)] = byte
    path.write_bytes(bytes(data))
    try:
        history = SiteHistory.load(path)
    except ConfigError as error:
        assert KEY not in str(error)  # noqa: PT017
        return
    history.save(path)
    assert SiteHistory.load(path).records == history.records
