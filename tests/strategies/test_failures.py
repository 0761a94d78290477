"""Whatever sites do, a query ends: an answer, a degraded answer or a typed error."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedinfer_flower import Deadline, FedEnsemble, InferenceMod
from fedinfer_flower.errors import (
    CapacityError,
    NotEnoughNodesError,
    QuorumNotMetError,
    RecoveryError,
)
from fedinfer_flower.privacy.secagg import SecAgg
from fedinfer_flower.query import SiteStatus
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.strategies.pull_loop import PULL_BYTES, Arrival, stream_replies
from fedinfer_flower.wire.actions import PING, message_type
from fedinfer_flower.wire.envelope import Envelope, Kind
from fedinfer_flower.wire.records import pack, unpack

BAD = 2  # the partition that misbehaves
BAD_NODE = 1000 + BAD


def strategy(**options) -> FedEnsemble:
    return FedEnsemble(
        **{"rule": "mean-probability", "min_available_nodes": 5, "patience_s": 5.0} | options
    )


def only_bad_fails(result, code: str, status: SiteStatus = SiteStatus.FAILED) -> None:
    """Require that one site failed with this code, and that the others' answers stand."""
    for report in result.reports:
        outcomes = {site.site_id: site for site in report.sites}
        assert outcomes[BAD_NODE].status is status
        assert outcomes[BAD_NODE].error_code == code
        assert len(report.answered) == 4
        assert report.degraded
    assert result.degraded
    assert "degraded: yes" in result.summary()


def without_bad(federation) -> np.ndarray:
    """Return the clear sum of the four honest sites."""
    from fedinfer_flower.ensemble.base import RULES

    scores = federation.scores(RULES.get("mean-probability")())
    return np.delete(scores, BAD, axis=0).sum(axis=0)


# -- late sites --------------------------------------------------------------------------


def test_site_beyond_the_deadline_is_late_and_the_result_degraded(federation, app_with):
    def slow(action, partition, message, context, handle):
        if action == "fi_predict" and partition == BAD:
            time.sleep(1.5)
        return handle(message, context)

    with federation.grid(app_with(slow), workers=5) as grid:
        start = time.monotonic()
        totals, _, result = federation.ask(strategy(deadline=Deadline(timeout_s=0.8)), grid)
        seconds = time.monotonic() - start

    only_bad_fails(result, "", SiteStatus.LATE)
    assert seconds < 1.45  # before the slow site could have answered
    # 1e-6: four float32 roundings of numbers up to 1.
    np.testing.assert_allclose(totals, without_bad(federation), rtol=0.0, atol=1e-6)


def test_site_late_at_onboarding_is_left_out_and_reported(federation):
    with federation.grid(
        workers=5, latency_s=lambda node_id: 1.5 if node_id == BAD_NODE else 0.0
    ) as grid:
        _, _, result = federation.ask(strategy(deadline=Deadline(timeout_s=0.8)), grid)

    only_bad_fails(result, "FI401")
    assert BAD_NODE not in result.profiles


def test_quorum_not_met_raises_naming_the_sites(federation, app_with):
    def slow(action, partition, message, context, handle):
        if action == "fi_predict" and partition >= 3:
            time.sleep(1.2)
        return handle(message, context)

    with (
        federation.grid(app_with(slow), workers=5) as grid,
        pytest.raises(QuorumNotMetError) as caught,
    ):
        strategy(deadline=Deadline(timeout_s=0.6, quorum=4)).start(grid, federation.queries)

    assert "3 of 5 sites" in caught.value.message
    assert "site-3: late" in caught.value.message
    assert "site-4: late" in caught.value.message
    assert "site-0" not in caught.value.message


def test_too_few_nodes_raise_after_patience(federation):
    start = time.monotonic()
    with federation.grid() as grid, pytest.raises(NotEnoughNodesError, match="5 nodes online"):
        strategy(min_available_nodes=6, patience_s=0.2).start(grid, federation.queries)
    assert time.monotonic() - start < 2.0


def test_he_with_two_sites_is_refused(make_federation):
    federation = make_federation(n_sites=2)
    options = {"protection": "he", "allow_coordinator_key": True, "patience_s": 0.1}
    with federation.grid() as grid:
        with pytest.raises(NotEnoughNodesError, match="3 are needed"):
            strategy(min_available_nodes=0, **options).start(grid, federation.queries)
        with pytest.raises(QuorumNotMetError, match="3 are needed"):
            strategy(min_available_nodes=2, **options).start(grid, federation.queries)


def test_he_with_two_answers_of_five_is_not_released(federation, app_with):
    def three_fail(action, partition, message, context, handle):
        if action == "fi_predict" and partition < 3:
            raise RuntimeError
        return handle(message, context)

    with (
        federation.grid(app_with(three_fail)) as grid,
        pytest.raises(QuorumNotMetError, match="2 of 5 sites answered"),
    ):
        strategy(protection="he", allow_coordinator_key=True).start(grid, federation.queries)


def test_cohort_beyond_the_capacity_of_the_protection_raises_typed_error(federation, grid):
    from fedinfer_flower.privacy.dp import DP

    with pytest.raises(CapacityError):
        strategy(rule="product-of-experts", protection=DP(epsilon=1e-9)).start(
            grid, federation.queries
        )


# -- failing sites -----------------------------------------------------------------------


def raises(message, context, handle):
    raise ValueError("CANARY")


def returns_none(message, context, handle):
    return None


def without_reply_to(message, context, handle):
    return Message(RecordDict(), dst_node_id=1, message_type="query")


def empty_content(message, context, handle):
    return Message(RecordDict(), reply_to=message)


def other_content(message, context, handle):
    return Message(RecordDict({"x": ConfigRecord({"y": "CANARY"})}), reply_to=message)


def changed(**changes):
    """Make a site that answers, with changes to its envelope."""

    def handle_changed(message, context, handle):
        envelope = unpack(handle(message, context).content)
        return Message(pack(dataclasses.replace(envelope, **changes)), reply_to=message)

    return handle_changed


def nan_scores(message, context, handle):
    envelope = unpack(handle(message, context).content)
    payload = np.full(envelope.shape, np.nan, dtype="<f4").tobytes()
    sections = (("scores", payload), ("statement", b""), ("evidence", b""))
    return Message(pack(dataclasses.replace(envelope, sections=sections)), reply_to=message)


def scores_other_than_stated(message, context, handle):
    envelope = unpack(handle(message, context).content)
    payload = np.zeros(envelope.shape, dtype="<f4").tobytes()
    sections = (
        ("scores", payload),
        ("statement", envelope.section("statement")),
        ("evidence", b""),
    )
    return Message(pack(dataclasses.replace(envelope, sections=sections)), reply_to=message)


def answered(scores, statement=b""):
    """Return the sections of an answer."""
    return (("scores", scores), ("statement", statement), ("evidence", b""))


FAULTS = {
    "raises": (raises, "FI401"),
    "returns None": (returns_none, "FI401"),
    "reply without reply_to": (without_reply_to, "FI401"),
    "empty content": (empty_content, "FI301"),
    "other content": (other_content, "FI301"),
    "spoofed sender": (changed(sender=1000), "FI303"),
    "other run": (changed(run_id=1), "FI303"),
    "other query": (changed(query_id="0a-0"), "FI303"),
    "other key": (changed(key_id="0f" * 32), "FI303"),
    "other protection": (changed(codec="dp"), "FI303"),
    "changed profile": (changed(meta={"commitment": "c" * 64}), "FI303"),
    "other shape": (changed(shape=(12, 5)), "FI304"),
    "too few bytes": (changed(sections=answered(b"abc")), "FI304"),
    "not finite": (nan_scores, "FI306"),
    "no statement section": (changed(sections=(("scores", b"abc"),)), "FI301"),
    "statement that is none": (changed(sections=answered(b"", b"x")), "FI301"),
    "scores other than stated": (scores_other_than_stated, "FI303"),
    "kind of another verb": (changed(kind=Kind.PING, meta={}), "FI301"),
}


MASKED_FAULTS = {
    label: FAULTS[label]
    for label in ("raises", "returns None", "spoofed sender", "other query", "other shape")
}
MASKED_FAULTS["scores other than stated"] = (scores_other_than_stated, "FI303")
MASKED_FAULTS["masked vector cut"] = (
    changed(sections=answered(b"FMA1" + bytes(32))),
    "FI301",
)


@pytest.mark.parametrize(("fault", "code"), FAULTS.values(), ids=FAULTS)
def test_failing_site_is_reported_and_the_others_stand(federation, app_with, caplog, fault, code):
    def one_fails(action, partition, message, context, handle):
        if action == "fi_predict" and partition == BAD:
            return fault(message, context, handle)
        return handle(message, context)

    with federation.grid(app_with(one_fails)) as grid:
        totals, _, result = federation.ask(strategy(), grid)

    only_bad_fails(result, code)
    assert any(f"[site site-{BAD}]" in record.getMessage() for record in caplog.records)
    assert "CANARY" not in caplog.text
    assert "CANARY" not in str(result.to_dict())
    # 1e-6: four float32 roundings of numbers up to 1.
    np.testing.assert_allclose(totals, without_bad(federation), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("self_mask", [False, True], ids=["pairs", "self"])
@pytest.mark.parametrize(("fault", "code"), MASKED_FAULTS.values(), ids=MASKED_FAULTS)
def test_failing_site_under_masks_is_made_good_by_the_others(
    federation, app_with, caplog, fault, code, self_mask
):
    def one_fails(action, partition, message, context, handle):
        if action == "fi_predict" and partition == BAD:
            return fault(message, context, handle)
        return handle(message, context)

    with federation.grid(app_with(one_fails)) as grid:
        masked = strategy(protection=SecAgg(self_mask=self_mask))
        totals, _, result = federation.ask(masked, grid)

    only_bad_fails(result, code)
    assert "CANARY" not in caplog.text
    # Four sites, each rounds to 16 fraction bits: half a step.
    np.testing.assert_allclose(totals, without_bad(federation), rtol=0.0, atol=4 * 2.0**-17)


@pytest.mark.parametrize("fault", [raises, returns_none, empty_content, changed(run_id=1)])
def test_survivor_that_does_not_help_ends_the_query_with_a_typed_error(federation, app_with, fault):
    def two_fail(action, partition, message, context, handle):
        if action == "fi_predict" and partition == BAD:
            return raises(message, context, handle)
        if action == "fi_recover" and partition == 0:
            return fault(message, context, handle)
        return handle(message, context)

    with (
        federation.grid(app_with(two_fail)) as grid,
        pytest.raises(RecoveryError, match="answered and then left"),
    ):
        strategy(protection="secagg").start(grid, federation.queries)


def test_too_few_answers_under_masks_are_not_opened(federation, app_with):
    def two_fail(action, partition, message, context, handle):
        assert action != "fi_recover"
        if action == "fi_predict" and partition >= 3:
            raise RuntimeError
        return handle(message, context)

    with (
        federation.grid(app_with(two_fail)) as grid,
        pytest.raises(QuorumNotMetError, match="3 of 5 sites answered"),
    ):
        strategy(protection="secagg").start(grid, federation.queries)


@pytest.mark.parametrize("fault", [raises, returns_none, empty_content, changed(sender=1)])
def test_site_that_fails_at_onboarding_is_left_out_and_reported(federation, app_with, fault):
    def one_fails(action, partition, message, context, handle):
        if action == "fi_hello" and partition == BAD:
            return fault(message, context, handle)
        return handle(message, context)

    with federation.grid(app_with(one_fails)) as grid:
        totals, _, result = federation.ask(strategy(), grid)

    assert result.degraded
    assert BAD_NODE not in result.profiles
    assert result.combined.n_sites_asked == 4
    np.testing.assert_allclose(totals, without_bad(federation), rtol=0.0, atol=1e-6)


def test_all_sites_failing_raises_quorum_error_with_the_reasons(federation, app_with):
    def all_fail(action, partition, message, context, handle):
        raise ValueError("CANARY")

    with federation.grid(app_with(all_fail)) as grid, pytest.raises(QuorumNotMetError) as caught:
        strategy().start(grid, federation.queries)
    assert "FI401" in str(caught.value)
    assert "CANARY" not in str(caught.value)


def test_reply_of_an_earlier_query_is_refused(federation, app_with):
    earlier = []

    def replays(action, partition, message, context, handle):
        reply = handle(message, context)
        if action == "fi_predict" and partition == BAD:
            earlier.append(unpack(reply.content))
            return Message(pack(earlier[0]), reply_to=message)
        return reply

    with federation.grid(app_with(replays)) as grid:
        _, _, result = federation.ask(strategy(), grid, batch_size=6)

    first, second = result.reports
    assert not first.degraded
    outcome = {s.site_id: s for s in second.sites}[BAD_NODE]
    assert (outcome.status, outcome.error_code) == (SiteStatus.FAILED, "FI303")


def test_site_that_reloads_another_model_is_refused_until_onboarded_again(federation):
    """The model cache is emptied between onboarding and answer, as after a restart."""
    from fedinfer_flower.clients import model_cache
    from fedinfer_flower.clients.local_model import LocalModel

    loads = {}

    def load_model(context):
        partition = context.node_config["partition-id"]
        loads[partition] = loads.get(partition, 0) + 1
        names = ("a", "b", "c") if loads[partition] == 1 or partition != BAD else ("a", "b", "z")
        return LocalModel(model=lambda rows: np.zeros((len(rows), 3)), classes=names)

    mod = InferenceMod(load_model)
    app = ClientApp()

    @app.query("fi_hello")
    def hello(message, context):
        reply = mod.handle(message, context)
        if context.node_config["partition-id"] == BAD:
            model_cache.clear()
        return reply

    app.query("fi_predict")(mod.handle)
    with LocalGrid(app, num_supernodes=5, workers=1) as grid:
        _, _, result = federation.ask(strategy(), grid)

    only_bad_fails(result, "FI303")


# -- arrivals, one at a time -------------------------------------------------------------


def opened(federation, grid, **options):
    """Return (strategy with an open batch, its arrivals in order of node id)."""
    ours = strategy(**options)
    ours.start(grid, federation.queries)
    messages = ours.configure_query("again-0", federation.queries)
    arrivals = sorted(stream_replies(grid, messages, timeout_s=5.0), key=lambda a: a.node_id)
    return ours, arrivals


def test_second_reply_of_a_site_is_not_counted(federation, grid):
    ours, arrivals = opened(federation, grid)
    for arrival in [arrivals[0], arrivals[0], *arrivals, arrivals[0]]:
        ours.accumulate(arrival)

    batch, report = ours.aggregate_query(0.1)

    assert batch.n_sites == len(report.sites) == 5
    total = np.frombuffer(batch.total).reshape(len(federation.queries), 4)
    # Probabilities of five sites: rows sum to 5, to five float32 roundings each.
    np.testing.assert_allclose(total.sum(axis=1), 5.0, rtol=0.0, atol=1e-5)


def test_good_reply_after_a_bad_one_of_the_same_site_is_not_counted(federation, grid):
    ours, arrivals = opened(federation, grid)
    ours.accumulate(Arrival(node_id=arrivals[0].node_id, reply=None, seconds=0.1))
    for arrival in arrivals:
        ours.accumulate(arrival)

    batch, report = ours.aggregate_query(0.1)

    assert batch.n_sites == 4
    assert report.sites[0].error_code == "FI401"


def test_reply_of_a_node_that_was_not_asked_is_ignored(federation, grid):
    ours, arrivals = opened(federation, grid)
    for arrival in arrivals:
        ours.accumulate(dataclasses.replace(arrival, node_id=4711))
        ours.accumulate(arrival)

    batch, report = ours.aggregate_query(0.1)

    assert batch.n_sites == 5
    assert [site.site_id for site in report.sites] == [1000, 1001, 1002, 1003, 1004]


def test_reply_of_one_site_handed_in_for_another_is_refused(federation, grid):
    ours, arrivals = opened(federation, grid)
    for arrival in arrivals[1:]:
        ours.accumulate(arrival)
    ours.accumulate(dataclasses.replace(arrivals[1], node_id=arrivals[0].node_id))

    batch, report = ours.aggregate_query(0.1)

    assert batch.n_sites == 4
    assert report.sites[0].error_code == "FI303"


def test_verbs_before_start_raise_typed_errors(federation):
    from fedinfer_flower.errors import ConfigError

    ours = strategy()
    with pytest.raises(ConfigError):
        ours.configure_query("q", federation.queries)
    with pytest.raises(ConfigError):
        ours.aggregate_query(0.0)


# -- the pull loop -----------------------------------------------------------------------


def pings(grid, node_ids):
    return [
        Message(
            pack(Envelope(kind=Kind.PING, run_id=grid.run_id)), node, message_type(PING), ttl=60.0
        )
        for node in node_ids
    ]


def test_message_for_an_unknown_node_is_yielded_at_once_without_reply(grid):
    arrivals = list(stream_replies(grid, pings(grid, [4711, 1000]), timeout_s=5.0))

    assert [a.node_id for a in arrivals] == [4711, 1000]
    assert arrivals[0].reply is None
    assert unpack(arrivals[1].reply.content).kind is Kind.PING


class Poisoned:
    """A grid one of whose replies cannot be rebuilt: every pull that asks for it raises."""

    def __init__(self, grid: LocalGrid, poisoned: int) -> None:
        self._grid, self._poisoned, self._id = grid, poisoned, ""

    def push_messages(self, messages):
        ids = list(self._grid.push_messages(messages))
        self._id = next(
            m.metadata.message_id for m in messages if m.metadata.dst_node_id == self._poisoned
        )
        return ids

    def pull_messages(self, ids):
        if self._id in ids:
            raise ValueError("CANARY")
        return self._grid.pull_messages(ids)

    def __getattr__(self, name):
        return getattr(self._grid, name)


def test_pull_that_raises_loses_that_reply_only(grid, caplog):
    arrivals = list(
        stream_replies(
            Poisoned(grid, 1001), pings(grid, range(1000, 1005)), timeout_s=0.5, poll_s=0.01
        )
    )
    assert sorted(a.node_id for a in arrivals) == [1000, 1002, 1003, 1004]
    assert "CANARY" not in caplog.text


def test_pull_that_always_raises_ends_at_the_deadline(grid):
    class Broken(Poisoned):
        def pull_messages(self, ids):
            raise ConnectionError

    start = time.monotonic()
    arrivals = list(
        stream_replies(Broken(grid, 1000), pings(grid, range(1000, 1005)), timeout_s=0.3)
    )
    assert arrivals == []
    assert 0.3 <= time.monotonic() - start < 2.0


def test_few_large_replies_are_pulled_at_a_time(grid):
    windows = []

    class Watched(Poisoned):
        def pull_messages(self, ids):
            windows.append(len(ids))
            return self._grid.pull_messages(ids)

    arrivals = list(
        stream_replies(
            Watched(grid, 1000),
            pings(grid, range(1000, 1005)),
            timeout_s=5.0,
            reply_bytes=PULL_BYTES // 2,
        )
    )
    assert len(arrivals) == 5
    assert max(windows) == 2  # two fill what may lie in memory together


def test_nothing_is_yielded_after_the_deadline(grid):
    # A clock that stands still while messages are pushed and runs out after the first reply.
    times = iter([0.0, 0.0, 0.0, 0.0])
    arrivals = stream_replies(
        grid,
        pings(grid, range(1000, 1005)),
        timeout_s=1.0,
        clock=lambda: next(times, 2.0),
    )
    assert len(list(arrivals)) <= 1
