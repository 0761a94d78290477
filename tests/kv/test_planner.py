"""The planner: legal, monotone, steady, and able to say why."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.kv.latency import (
    UNKNOWN_SPEED,
    Speed,
    Workload,
    break_even_bandwidth,
    predicted_s,
)
from fedinfer_flower.kv.link import UNKNOWN_LINK, Link, LinkEstimate
from fedinfer_flower.kv.media import CODEC_BITS, DISCLOSURES, Medium
from fedinfer_flower.kv.media_history import MediaHistory
from fedinfer_flower.kv.planner import PARTIES, Planner, PlannerOptions, SharingPolicy, plan
from fedinfer_flower.kv.share import ShareSpec

# A model of one billion parameters asked by one of 0.6, both on two CPU cores.
SHARER = Speed(prefill_s=1.6, prefill_s_per_token=0.0031, decode_s_per_token=0.111)
RECEIVER = Speed(prefill_s=0.73, prefill_s_per_token=0.0017, decode_s_per_token=0.079)
WORK = Workload(sharer_prompt_tokens=256, receiver_prompt_tokens=256, answer_tokens=8)
FLOATS = 18_432  # of one token


def cache_of(last, decode, *, prompt_tokens=256, floats=FLOATS, codec="int4", **more):
    share = ShareSpec(last=last, decode=decode)
    return Medium.cache(share, floats=share.tokens(prompt_tokens) * floats, codec=codec, **more)


MEDIA = (
    Medium.own(),
    Medium.text(tokens=64),
    cache_of(1, 0, kept=0.84),
    cache_of(1, 1, kept=0.99),
    cache_of(0, 1, kept=0.9),
)
NAMES = [m.name for m in MEDIA]
OWN, TEXT, LAST, DECODED, FULL = NAMES
QUALITY = {OWN: 0.4, TEXT: 0.9, LAST: 0.76, DECODED: 0.89, FULL: 0.8}
FREE = dict.fromkeys(PARTIES, SharingPolicy.everything())

seconds = st.floats(0.0, 5.0)
speeds = st.builds(
    Speed,
    prefill_s=seconds,
    prefill_s_per_token=st.floats(0.0, 0.01),
    decode_s_per_token=st.floats(0.0, 0.5),
)
bandwidths = st.floats(1e2, 1e9)
workloads = st.builds(
    Workload,
    sharer_prompt_tokens=st.integers(1, 500),
    receiver_prompt_tokens=st.integers(1, 500),
    answer_tokens=st.integers(1, 100),
)
qualities = st.fixed_dictionaries({name: st.floats(0.0, 1.0) for name in NAMES})
policies = st.fixed_dictionaries(
    dict.fromkeys(
        PARTIES,
        st.builds(
            SharingPolicy,
            media=st.sets(st.sampled_from(["text", "cache", "full-cache"])),
            discloses=st.sampled_from(DISCLOSURES),
            max_bytes=st.none() | st.integers(0, 10**7),
        ),
    )
)


def link_of(bytes_per_s, rtt_s=0.02):
    return Link(up_bytes_per_s=bytes_per_s, down_bytes_per_s=bytes_per_s, rtt_s=rtt_s)


def planned(**changes):
    given = {
        "workload": WORK,
        "quality": QUALITY,
        "policies": FREE,
        "deadline_s": 60.0,
        "sharer": SHARER,
        "receiver": RECEIVER,
        "link": link_of(1e6),
    }
    return plan(MEDIA, **(given | changes))


def utility_of(made):
    return next(row.utility for row in made.table if row.medium == made.medium)


@given(workloads, speeds, speeds, qualities, bandwidths, st.floats(1.0, 100.0), st.floats(0, 60))
def test_more_bandwidth_never_makes_it_worse(work, sharer, receiver, quality, slow, more, deadline):
    given = {
        "workload": work,
        "sharer": sharer,
        "receiver": receiver,
        "quality": quality,
        "deadline_s": deadline,
    }
    before = planned(**given, link=link_of(slow))
    after = planned(**given, link=link_of(slow * more))
    for a, b in zip(before.table, after.table, strict=True):
        assert b.predicted_s <= a.predicted_s
        assert b.legal or not a.legal
    assert utility_of(after) >= utility_of(before)


@given(workloads, speeds, speeds, qualities, bandwidths, st.floats(0, 60), st.floats(0, 60))
def test_more_time_never_makes_it_worse(work, sharer, receiver, quality, speed, deadline, more):
    given = {
        "workload": work,
        "sharer": sharer,
        "receiver": receiver,
        "quality": quality,
        "link": link_of(speed),
    }
    before = planned(**given, deadline_s=deadline)
    after = planned(**given, deadline_s=deadline + more)
    assert all(b.legal or not a.legal for a, b in zip(before.table, after.table, strict=True))
    assert utility_of(after) >= utility_of(before)


@given(policies, qualities, st.floats(0.0, 60.0), bandwidths, st.sampled_from(["", *NAMES]))
def test_no_policy_and_no_deadline_is_ever_violated(given, quality, deadline, speed, previous):
    made = planned(
        policies=given,
        quality=quality,
        deadline_s=deadline,
        link=link_of(speed),
        previous=previous,
    )
    medium = made.medium
    if medium.kind == "own":
        return
    assert made.predicted_s <= deadline
    for policy in given.values():
        assert medium.kind in policy.media
        assert DISCLOSURES.index(medium.discloses) <= DISCLOSURES.index(policy.discloses)
        assert policy.max_bytes is None or medium.up_bytes <= policy.max_bytes
        assert policy.max_bytes is None or medium.down_bytes <= policy.max_bytes


def test_most_bytes_hold_in_both_directions():
    relayed = cache_of(1, 0, relayed_floats=10 * FLOATS)
    policy = SharingPolicy(media=["cache"], max_bytes=2 * relayed.up_bytes)
    assert policy.why_not(cache_of(1, 0)) == ""
    assert "bytes at most" in policy.why_not(relayed)
    assert "bytes at most" in policy.why_not(replace(relayed, up_bytes=relayed.down_bytes))


@given(policies, st.floats(-5.0, 60.0), st.sampled_from(["", *NAMES]))
def test_own_answer_is_always_legal(given, deadline, previous):
    made = planned(policies=given, deadline_s=deadline, previous=previous)
    assert made.table[0].medium.kind == "own"
    assert made.table[0].legal


def test_nobody_asked_means_nothing_allowed():
    assert planned(policies={}).medium.kind == "own"
    for party in PARTIES:
        made = planned(policies=FREE | {party: SharingPolicy()})
        assert made.medium.kind == "own"
        assert f"the {party} does not allow text" in made.reason


@given(policies, qualities, st.floats(0.0, 60.0))
def test_explanation_lists_every_medium(given, quality, deadline):
    made = planned(policies=given, quality=quality, deadline_s=deadline)
    assert [row.medium for row in made.table] == list(MEDIA)
    for row in made.table:
        assert row.medium.name in made.reason
        assert row.why_not in made.reason


@given(qualities, st.sampled_from(NAMES), st.floats(0.0, 0.3))
def test_change_of_medium_gains_more_than_the_hysteresis(quality, previous, hysteresis):
    options = PlannerOptions(hysteresis=hysteresis)
    made = planned(quality=quality, previous=previous, options=options)
    kept = next(row.utility for row in made.table if row.medium.name == previous)
    best = max(row.utility for row in made.table)
    if made.medium.name == previous:
        assert best - kept <= hysteresis
    else:
        assert utility_of(made) == best > kept + hysteresis


def test_hysteresis_holds_no_medium_that_became_illegal():
    stuck = {"previous": TEXT, "options": PlannerOptions(hysteresis=1.0)}
    assert planned(**stuck).medium.name == TEXT
    assert planned(**stuck, deadline_s=5.0).medium.name != TEXT


def test_price_gives_up_a_point_for_ten_seconds():
    # Text is one point better than the cache with a decoded token, and ten seconds slower.
    assert planned().medium.name == DECODED
    assert planned(options=PlannerOptions(price_per_s=1e-6)).medium.name == TEXT
    with pytest.raises(InvalidValueError, match="price_per_s"):
        PlannerOptions(price_per_s=0.0)


def test_slow_link_and_short_deadline_leave_the_own_answer():
    assert planned(deadline_s=2.0).medium.name == OWN
    assert planned(deadline_s=5.0, link=link_of(100.0)).medium.name == OWN
    assert planned(deadline_s=30.0, link=link_of(1_000.0)).medium.name == TEXT


@given(workloads, speeds, speeds, st.integers(1, 200), st.sampled_from(sorted(CODEC_BITS)))
def test_planner_switches_at_the_break_even_bandwidth(work, sharer, receiver, tokens, codec):
    cache = cache_of(1, 0, floats=4096, codec=codec)
    text = Medium.text(tokens=tokens)
    given = {"workload": work, "sharer": sharer, "receiver": receiver}
    at = break_even_bandwidth(cache, text, **given, rtt_s=0.02)
    assert cache.up_bytes > text.up_bytes
    if math.isinf(at):
        # Text is no slower even when bytes cost nothing; 1e15 bytes/s stand for that.
        times = [predicted_s(m, **given, link=link_of(1e15)) for m in (cache, text)]
        assert times[0] >= times[1] - 1e-9
        return
    # Wire times far beyond any deadline leave nothing of the other terms in a float.
    assume(1.0 < at < 1e12)
    same = [predicted_s(m, **given, link=link_of(at)) for m in (cache, text)]
    # Both sums have a few terms of like size: some units in the last place.
    assert math.isclose(*same, rel_tol=1e-9)
    quality = {"own": 0.0, cache.name: 1.0, text.name: 1.0}
    for factor, faster in ((0.9, text), (1.1, cache)):
        made = plan(
            [text, cache],
            **given,
            quality=quality,
            policies=FREE,
            deadline_s=1e12,
            link=link_of(factor * at),
            options=PlannerOptions(hysteresis=0.0, price_per_s=1e-9),
        )
        # The own answer is faster than both and worth nothing; it wins only if slower
        # media cost more than they bring.
        assert made.medium in (faster, Medium.own())
        times = {r.medium.name: r.predicted_s for r in made.table}
        assert times[faster.name] <= min(times[text.name], times[cache.name])


def test_break_even_where_one_medium_always_wins():
    cache = cache_of(1, 0, floats=64)
    given = {"workload": WORK, "sharer": SHARER, "receiver": RECEIVER}
    assert break_even_bandwidth(cache, Medium.text(tokens=10_000), **given) == 0.0
    slow = replace(cache, fuse_s=100.0, up_bytes=10**6, down_bytes=10**6)
    assert break_even_bandwidth(slow, Medium.text(tokens=1), **given) == math.inf
    # Small but slow to fuse: better only where bytes are dear.
    small = replace(cache, fuse_s=100.0, up_bytes=1, down_bytes=1)
    at = break_even_bandwidth(small, Medium.text(tokens=64), **given)
    times = [predicted_s(small, **given, link=link_of(at * f, 0.0)) for f in (0.5, 2.0)]
    texts = [
        predicted_s(Medium.text(tokens=64), **given, link=link_of(at * f, 0.0)) for f in (0.5, 2.0)
    ]
    assert times[0] < texts[0]
    assert times[1] > texts[1]
    with pytest.raises(InvalidValueError):
        break_even_bandwidth(Medium.text(), cache, **given)


def test_unknown_speeds_are_assumed_slow_and_noted():
    known = planned()
    unknown = planned(sharer=None, receiver=None, link=None)
    assert len(unknown.notes) == 3
    assert not known.notes
    assert all(note in unknown.reason for note in unknown.notes)
    for a, b in zip(known.table, unknown.table, strict=True):
        assert b.predicted_s > a.predicted_s
    assert UNKNOWN_SPEED.decode_s_per_token > SHARER.decode_s_per_token


def test_sizes_of_a_cache_follow_tokens_and_codec():
    size = {"prompt_tokens": 30, "floats": 512, "codec": "int8"}
    one, two, full = cache_of(1, 0, **size), cache_of(1, 1, **size), cache_of(0, 0, **size)
    assert two.up_bytes - one.up_bytes == 512
    assert full.up_bytes - one.up_bytes == 29 * 512
    assert (one.kind, full.kind) == ("cache", "full-cache")
    assert (one.discloses, full.discloses) == ("answer", "context")
    assert len({m.name for m in (one, two, full, cache_of(1, 0))}) == 4
    assert cache_of(30, 0, **size).kind == cache_of(4096, 0, **size).kind == "full-cache"
    large = cache_of(1, 0, floats=10**6)
    assert (one.round_trips, large.round_trips) == (1, 2)
    relayed = cache_of(1, 0, **size, relayed_floats=2048)
    assert relayed.down_bytes > relayed.up_bytes


@pytest.mark.parametrize(
    "broken",
    [
        lambda: Medium(name="x", kind="telepathy", discloses="text"),
        lambda: Medium(name="x", kind="own", discloses="text"),
        lambda: Medium(name="x", kind="text", discloses="none"),
        lambda: cache_of(1, 0, codec="int3"),
        lambda: cache_of(1, 0, fuse_s=math.nan),
        lambda: cache_of(1, 0, kept=1.5),
        lambda: Link(up_bytes_per_s=0.0, down_bytes_per_s=1.0),
        lambda: Speed(prefill_s=-1.0, prefill_s_per_token=0.0, decode_s_per_token=0.0),
        lambda: SharingPolicy(media=["txet"]),
        lambda: SharingPolicy(discloses="all"),
        lambda: PlannerOptions(hysteresis=-1.0),
        lambda: PlannerOptions(jitter=0.9),
        lambda: planned(quality={"own": 0.5}),
        lambda: planned(quality=QUALITY | {TEXT: math.nan}),
        lambda: planned(policies={"coordinator": SharingPolicy()}),
        lambda: planned(deadline_s=math.nan),
        lambda: plan(
            [Medium.text(), Medium.text()],
            workload=WORK,
            quality=QUALITY,
            policies={},
            deadline_s=1.0,
        ),
        lambda: MediaHistory(prior_help=1.1),
        lambda: MediaHistory(decay=0.0),
        lambda: MediaHistory().record("a", MEDIA[1]),
        lambda: MediaHistory().record("a", MEDIA[1], right=True, agree=True),
        lambda: LinkEstimate(decay=1.0),
        lambda: LinkEstimate().observe(size_bytes=0, seconds=1.0),
    ],
)
def test_wrong_values_fail_when_built(broken):
    with pytest.raises(InvalidValueError):
        broken()


# -- what is measured --------------------------------------------------------------------


@given(
    st.floats(1e3, 1e8),
    st.floats(0.0, 2.0),
    st.lists(st.integers(1, 10**7), min_size=3, unique=True),
)
def test_link_estimate_finds_the_line(bytes_per_s, rtt_s, sizes):
    assume(max(sizes) > 3 * min(sizes))
    link = LinkEstimate()
    for size in sizes:
        link.observe(size_bytes=size, seconds=rtt_s + size / bytes_per_s)
    # The newest transfers weigh most; where they hardly differ the line is badly
    # determined, so the seconds that it predicts are compared, at the mean size.
    for size in sizes[-2:]:
        assert math.isclose(
            link.rtt_s + size / link.bytes_per_s,
            rtt_s + size / bytes_per_s,
            rel_tol=0.05,
            abs_tol=0.05,
        )


def test_link_estimate_follows_a_link_that_got_slower():
    link = LinkEstimate()
    for speed in (1e6, 1e4):
        for size in (10_000, 20_000, 40_000) * 10:
            link.observe(size_bytes=size, seconds=size / speed)
    assert math.isclose(link.bytes_per_s, 1e4, rel_tol=0.05)


def test_link_estimate_of_like_transfers_does_not_rule_out_larger_ones():
    link = LinkEstimate()
    for size in (1000, 1100, 900) * 3:
        link.observe(size_bytes=size, seconds=0.5 + size / 1e4)
    # They might be slow by bandwidth or by fixed cost: a larger body is worth a try ...
    assert link.bytes_per_s == UNKNOWN_LINK.up_bytes_per_s
    assert math.isclose(link.rtt_s + 1000 / link.bytes_per_s, 0.6, rel_tol=0.05)
    # ... and settles it.
    link.observe(size_bytes=30_000, seconds=0.5 + 3.0)
    assert math.isclose(link.bytes_per_s, 1e4, rel_tol=0.05)


def test_link_estimate_of_larger_bodies_that_come_sooner_is_not_slow():
    link = LinkEstimate()
    for size, seconds in ((1000, 0.9), (20_000, 0.3)) * 3:
        link.observe(size_bytes=size, seconds=seconds)
    assert link.bytes_per_s >= UNKNOWN_LINK.up_bytes_per_s


def test_history_moves_from_the_prior_to_what_was_measured():
    history, text = MediaHistory(), Medium.text()
    prior = history.quality("north", text)
    for _ in range(300):
        history.record("north", text, right=False)
    assert history.quality("north", text) < 0.1
    assert history.quality("south", text) == prior
    for _ in range(300):
        history.record("north", text, right=True)
    # What was wrong 300 answers ago weighs 0.99**300 = 5 %.
    assert history.quality("north", text) > 0.85


def test_agreement_counts_less_than_a_label():
    text = Medium.text()
    labelled, agreed = MediaHistory(), MediaHistory()
    labelled.record("a", text, right=True)
    agreed.record("a", text, agree=True)
    assert (
        labelled.quality("a", text) > agreed.quality("a", text) > MediaHistory().quality("a", text)
    )
    assert labelled.weight("a", text) > agreed.weight("a", text)


def test_own_answer_has_one_history_whoever_could_have_been_asked():
    history = MediaHistory()
    history.record("a", Medium.own(), right=True)
    assert history.quality("b", Medium.own()) == history.quality("a", Medium.own()) > 0.5


def test_planner_learns_to_leave_a_medium_that_does_not_help():
    planner = Planner()
    planner.observe_transfer("north", size_bytes=1_000_000, seconds=1.0)

    def chosen():
        return planner.choose(
            "north",
            MEDIA[:2],
            workload=WORK,
            policies=FREE,
            deadline_s=60.0,
            sharer=SHARER,
            receiver=RECEIVER,
        ).medium

    assert chosen().name == TEXT
    for _ in range(50):
        planner.history.record("north", MEDIA[1], right=False)
    assert chosen().name == OWN


def test_evidence_of_this_question_replaces_the_history():
    made = Planner().choose(
        "north",
        MEDIA[:2],
        workload=WORK,
        policies=FREE,
        deadline_s=60.0,
        quality={"own": 1.0, TEXT: 0.0},
    )
    assert made.medium.name == OWN
    assert made.quality == 1.0


def test_planner_keeps_links_apart():
    planner = Planner()
    planner.observe_transfer("north", size_bytes=1000, seconds=1.0)
    planner.observe_transfer("north", size_bytes=100_000, seconds=100.0)
    assert planner.link("south") is None
    assert math.isclose(planner.link("north").up_bytes_per_s, 1000.0, rel_tol=1e-6)
