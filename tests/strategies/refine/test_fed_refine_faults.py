"""Whatever sites do, an exchange ends in time: with less help, an own answer, or a typed error."""

from __future__ import annotations

import struct
import time
from dataclasses import replace

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from fedinfer_flower.clients.language_mod import LanguagePolicy
from fedinfer_flower.clients.site_memory import ContextMemory
from fedinfer_flower.errors import QueryError, QuorumNotMetError
from fedinfer_flower.kv.payload import encode_entries
from fedinfer_flower.kv.share import ShareSpec
from fedinfer_flower.query import Deadline, SiteStatus
from fedinfer_flower.refine.sharer import Sharer
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire.envelope import Kind, WireLimits
from fedinfer_flower.wire.records import pack, unpack
from fedinfer_flower.wire.refine_ask import ShareBody, open_ask, pack_body
from fedinfer_flower.wire.refine_documents import ShareReply

from .conftest import NAMES, Federation, strategy

CANARY = "CANARY"


def raises(message, context, handle):
    raise ValueError(CANARY)


def returns_none(message, context, handle):
    return None


def empty_content(message, context, handle):
    return Message(RecordDict(), reply_to=message)


def garbage(message, context, handle):
    return Message(RecordDict({"x": ConfigRecord({"y": CANARY})}), reply_to=message)


def changed(**changes):
    def handle_changed(message, context, handle):
        envelope = unpack(handle(message, context).content)
        return Message(pack(replace(envelope, **changes)), reply_to=message)

    return handle_changed


def altered_seal(message, context, handle):
    reply = handle(message, context)
    envelope = unpack(reply.content)
    if envelope.kind is Kind.ERROR:
        return reply
    body = bytearray(envelope.section("body"))
    body[-1] ^= 1
    return Message(pack(replace(envelope, sections=(("body", bytes(body)),))), reply_to=message)


def oversize(message, context, handle):
    envelope = unpack(handle(message, context).content)
    return Message(pack(replace(envelope, sections=(("body", bytes(200_000)),))), reply_to=message)


def oversize_offer(message, context, handle):
    envelope = unpack(handle(message, context).content)
    meta = {"verb": "offered", "handle": "h", "body-bytes": 1 << 39}
    return Message(
        pack(replace(envelope, meta=meta, sections=(("evidence", b""),))), reply_to=message
    )


def lying(make_payload):
    """Make a sharer that signs and seals as it should, and lies about its cache."""

    def handle_lying(message, context, handle):
        envelope = unpack(message.content)
        identity = ContextMemory(context).identity
        where = {"run_id": envelope.run_id, "query_id": envelope.query_id}
        ask = open_ask(envelope.section("ask"), identity=identity, sealed=True, **where)
        body = pack_body(
            ShareBody(payload=make_payload(ask)),
            identity=identity,
            reply_to=ask.reply_to,
            round_number=ask.round_number,
            **where,
        )
        reply = ShareReply(query_id=envelope.query_id, body=body)
        envelope = reply.to_envelope(run_id=envelope.run_id, sender=context.node_id)
        return Message(pack(envelope), reply_to=message)

    return handle_lying


SHARERS_MODEL = {}


@pytest.fixture(autouse=True)
def _liar(untrained):
    SHARERS_MODEL["south"], SHARERS_MODEL["west"] = untrained[1], untrained[2]


def entries(ask, name="south"):
    shared = Sharer(SHARERS_MODEL[name]).share(list(ask.questions), ShareSpec())
    return shared.entries


def honest(ask):
    return encode_entries(entries(ask), codec="fp32", squeeze=False)


def not_finite(ask):
    return honest(ask)[:-4] + struct.pack("<f", float("nan"))


def huge(ask):
    return honest(ask)[:-4] + struct.pack("<f", 1e30)


def with_layout(**changes):
    def payload(ask):
        real = entries(ask)
        return encode_entries(
            replace(real, layout=replace(real.layout, **changes)), codec="fp32", squeeze=False
        )

    return payload


def of_another_model(ask):
    return encode_entries(entries(ask, "west"), codec="int8")


def one_question_short(ask):
    real = entries(ask)
    return encode_entries(real.select(torch.arange(real.rows - 1)), codec="int8")


FAULTS = {
    "killed while it shares": (raises, "FI401"),
    "returns None": (returns_none, "FI401"),
    "empty reply": (empty_content, "FI301"),
    "garbage": (garbage, "FI301"),
    "other run": (changed(run_id=1), "FI303"),
    "spoofed sender": (changed(sender=1000), "FI303"),
    "other query": (changed(query_id="0a"), "FI303"),
    "altered seal": (altered_seal, "FI312"),
    "oversize reply": (oversize, "FI305"),
    "oversize offer": (oversize_offer, "FI305"),
    "numbers that are not finite": (lying(not_finite), "FI318"),
    "numbers of no model": (lying(huge), "FI318"),
    "truncated payload": (lying(lambda ask: honest(ask)[:-7]), "FI318"),
    "no payload": (lying(lambda ask: b""), "FI318"),
    "wrong model digest": (lying(with_layout(model_digest="f" * 64)), "FI318"),
    "foreign tokenizer": (lying(with_layout(tokenizer_digest="f" * 64)), "FI318"),
    "another model's cache": (lying(of_another_model), "FI318"),
    "a question short": (lying(one_question_short), "FI304"),
}


@pytest.mark.parametrize(("fault", "code"), FAULTS.values(), ids=FAULTS)
def test_bad_sharer_is_reported_by_code_and_the_other_helps(
    untrained, questions, caplog, fault, code
):
    def south_fails(action, name, message, context, handle):
        if action == "fi_share_cache" and name == "south":
            return fault(message, context, handle)
        return handle(message, context)

    result = Federation(untrained, intercept=south_fails).ask(
        questions, limits=WireLimits(max_payload_bytes=100_000)
    )
    honest_only = Federation(untrained).ask(questions, sharers=["west"])

    assert [(o.sharer, o.status, o.error_code) for o in result.failures] == [
        ("south", SiteStatus.FAILED, code)
    ]
    assert all(set(row) == {"west"} for row in result.receivers[0].used)
    assert result.answers == honest_only.answers
    assert result.degraded
    assert CANARY not in caplog.text + str(result.to_dict()) + result.summary()


def test_honest_cache_by_the_same_road_is_used(untrained, questions):
    """The liars above fail for their lies, not for how the test tells them."""

    def by_hand(action, name, message, context, handle):
        if action == "fi_share_cache" and name == "south":
            return lying(honest)(message, context, handle)
        return handle(message, context)

    result = Federation(untrained, intercept=by_hand).ask(questions)

    assert not result.degraded
    assert set(result.receivers[0].used[0]) == {"south", "west"}


def test_slow_sharer_is_left_behind(untrained, questions):
    def slow(action, name, message, context, handle):
        if action == "fi_share_cache" and name == "south":
            time.sleep(6.0)
        return handle(message, context)

    federation = Federation(untrained, intercept=slow)
    with federation.grid(workers=3) as grid:
        start = time.monotonic()
        result = strategy(deadline=Deadline(timeout_s=4.0)).start(grid, questions)
        seconds = time.monotonic() - start

    assert [(o.sharer, o.status) for o in result.failures] == [("south", SiteStatus.LATE)]
    assert set(result.receivers[0].used[0]) == {"west"}
    assert seconds < 6.0  # before the slow one could have answered


def test_slow_receiver_does_not_keep_the_others_waiting(untrained, questions):
    def slow(action, name, message, context, handle):
        if action == "fi_rephrase" and name == "west":
            time.sleep(4.0)
        return handle(message, context)

    federation = Federation(untrained, intercept=slow)
    with federation.grid(workers=3) as grid:
        result = strategy(
            receiver="all", sharers=["north", "south"], deadline=Deadline(timeout_s=3.0)
        ).start(grid, questions)

    by_name = {each.name: each for each in result.receivers}
    assert all(by_name["north"].refined)
    assert all(by_name["south"].refined)
    assert not any(by_name["west"].answered)
    assert by_name["west"].error_codes[0] == "FI401"
    assert result.degraded


@pytest.mark.parametrize(
    ("action", "fault"),
    [
        *(("fi_rephrase", fault) for fault in (raises, returns_none, changed(query_id="0a"))),
        ("fi_refine", raises),
        ("fi_refine", returns_none),
    ],
)
def test_receiver_that_fails_once_answers_alone(untrained, questions, fault, action):
    failed = []

    def fails_once(this, name, message, context, handle):
        if this == action and name == "north" and not failed:
            failed.append(this)
            return fault(message, context, handle)
        return handle(message, context)

    result = Federation(untrained, intercept=fails_once).ask(questions)
    alone = Federation(untrained).ask(questions, medium="own")

    assert failed == [action]
    assert result.answers == alone.answers
    assert not any(result.receivers[0].refined)
    assert [(o.sharer, o.medium) for o in result.failures] == [("north", "own")]
    assert result.degraded


def test_later_round_that_fails_leaves_the_answers_of_the_one_before(untrained, questions):
    def fails_in_round_2(action, name, message, context, handle):
        if action == "fi_refine" and unpack(message.content).meta["round"] == 2:
            raise ValueError(CANARY)
        return handle(message, context)

    result = Federation(untrained, intercept=fails_in_round_2).ask(questions, rounds=3)
    once = Federation(untrained).ask(questions)

    assert result.answers == once.answers
    assert result.rounds == (2,)
    assert [(o.round, o.error_code) for o in result.failures] == [(2, "FI401")]


def test_all_sharers_failing_leaves_the_own_answer(untrained, questions):
    def nobody_shares(action, name, message, context, handle):
        if action == "fi_share_cache":
            raise ValueError(CANARY)
        return handle(message, context)

    result = Federation(untrained, intercept=nobody_shares).ask(questions)
    alone = Federation(untrained).ask(questions, medium="own")

    assert result.answers == alone.answers
    assert [o.error_code for o in result.failures] == ["FI401", "FI401"]


@pytest.mark.parametrize(("fault", "code"), [(raises, "FI401"), (changed(run_id=1), "FI303")])
def test_receiver_that_always_fails_is_a_typed_error_with_its_code(
    untrained, questions, fault, code
):
    def never(action, name, message, context, handle):
        if action in ("fi_rephrase", "fi_refine"):
            return fault(message, context, handle)
        return handle(message, context)

    federation = Federation(untrained, intercept=never)
    with pytest.raises(QuorumNotMetError, match=f"north: {code}") as caught:
        federation.ask(questions)
    assert CANARY not in str(caught.value)


def test_answers_altered_on_their_way_are_refused(untrained, questions):
    def altered(action, name, message, context, handle):
        if action == "fi_refine":
            return altered_seal(message, context, handle)
        return handle(message, context)

    # In clear, so it is the receiver's signature that does not hold.
    with pytest.raises(QuorumNotMetError, match="north: FI310"):
        Federation(untrained, intercept=altered).ask(questions)


def test_receiver_that_hangs_ends_at_the_deadline(untrained, questions):
    def hangs(action, name, message, context, handle):
        if action != "fi_introduce":
            time.sleep(3.0)
        return handle(message, context)

    federation = Federation(untrained, intercept=hangs)
    with federation.grid(workers=3) as grid:
        start = time.monotonic()
        with pytest.raises(QuorumNotMetError, match="no answer within 1 s"):
            strategy(deadline=Deadline(timeout_s=1.0)).start(grid, questions)
        assert time.monotonic() - start < 2.5


def test_one_of_three_receivers_failing_is_degraded_unless_the_quorum_says_more(
    untrained, questions
):
    def west_never(action, name, message, context, handle):
        if name == "west" and action in ("fi_rephrase", "fi_refine"):
            raise ValueError(CANARY)
        return handle(message, context)

    federation = Federation(untrained, intercept=west_never)
    result = federation.ask(questions, receiver="all")

    assert {r.name: all(r.answered) for r in result.receivers} == {
        "north": True,
        "south": True,
        "west": False,
    }
    with pytest.raises(QuorumNotMetError, match="2 of 3 receivers"):
        federation.ask(questions, receiver="all", deadline=Deadline(timeout_s=30.0, quorum=3))


def test_question_longer_than_the_window_is_a_typed_error(federation, questions):
    # More tokens than any of the small models' 512 positions, fewer characters than 4000.
    long = "Q " + "city " * 700 + "?"

    with pytest.raises(QuorumNotMetError, match="FI410"):
        federation.ask([long], medium="own")


def test_question_longer_than_the_sharers_window_costs_the_sharers_help_only(
    untrained, world, questions
):
    # Whole words at the receiver, pieces of three letters at the sharer.
    long = "Q " + " ".join(world.first_names * 5) + " ?"

    result = Federation(untrained).ask([long], sharers=["south"])

    assert [(o.sharer, o.error_code) for o in result.failures] == [("south", "FI410")]
    assert result.receivers[0].answered == (True,)


def test_receiver_that_names_a_sharer_it_was_not_given_answers_alone(untrained, questions):
    def names_another(action, name, message, context, handle):
        reply = handle(message, context)
        if action != "fi_rephrase":
            return reply
        envelope = unpack(reply.content)
        meta = dict(envelope.meta)
        meta["refused"] = {"f" * 64: "FI320"}
        return Message(pack(replace(envelope, meta=meta)), reply_to=message)

    result = Federation(untrained, intercept=names_another).ask(questions)

    assert [(o.sharer, o.error_code) for o in result.failures] == [("north", "FI303")]
    assert not any(result.receivers[0].refined)


def test_site_that_fails_to_introduce_itself_is_left_out(untrained, questions):
    def west_is_mute(action, name, message, context, handle):
        if action == "fi_introduce" and name == "west":
            raise ValueError(CANARY)
        return handle(message, context)

    result = Federation(untrained, intercept=west_is_mute).ask(questions)

    assert set(result.receivers[0].used[0]) == {"south"}


def test_site_that_shows_anothers_card_does_not_displace_it(untrained, questions):
    stolen = []

    def copies(action, name, message, context, handle):
        if action == "fi_introduce" and name in ("south", "west"):
            stolen.append(unpack(handle(message, context).content))
            return Message(pack(replace(stolen[0], sender=context.node_id)), reply_to=message)
        return handle(message, context)

    result = Federation(untrained, intercept=copies).ask(questions, min_available_nodes=3)

    # The card is the first one's, who helps; the other is out.
    assert len(result.plans) == 1
    assert all(result.receivers[0].refined)
    assert set(result.receivers[0].used[0]) == {result.plans[0].sharer}


def test_two_nodes_with_one_key_are_both_left_out(untrained, questions, tmp_path):
    # Two sites that were given one home: each signs a card of its own with the same key.
    places = [NAMES.index(name) for name in ("south", "west")]
    (tmp_path / f"partition-{places[0]}").mkdir(mode=0o700)
    (tmp_path / f"partition-{places[1]}").symlink_to(tmp_path / f"partition-{places[0]}")
    options = {name: {"home": tmp_path} for name in ("south", "west")}
    result = Federation(untrained, options=options).ask(questions, min_available_nodes=3)

    assert not any(result.receivers[0].refined)
    assert result.plans == ()


def test_superlink_that_takes_no_message_is_a_typed_error(federation, questions, monkeypatch):
    with federation.grid() as grid:

        def refuse(messages):
            raise ConnectionError(CANARY)

        monkeypatch.setattr(grid, "push_messages", refuse)
        with pytest.raises(QueryError, match="did not take the messages") as caught:
            strategy().start(grid, questions)
    assert CANARY not in str(caught.value)


def test_reply_that_cannot_be_rebuilt_hides_itself_only(untrained, questions, monkeypatch, caplog):
    federation = Federation(untrained)
    original = LocalGrid.pull_messages
    poisoned: set[str] = set()

    def poison(self, ids):
        wanted = list(ids)
        if poisoned & set(wanted):
            raise ValueError(CANARY)
        return original(self, wanted)

    def note(self, messages):
        ids = list(push(self, messages))
        poisoned.update(
            i
            for i, m in zip(ids, messages, strict=True)
            if m.metadata.message_type == "query.fi_share_cache" and m.metadata.dst_node_id == 1001
        )
        return ids

    push = LocalGrid.push_messages
    monkeypatch.setattr(LocalGrid, "pull_messages", poison)
    monkeypatch.setattr(LocalGrid, "push_messages", note)
    result = federation.ask(questions, deadline=Deadline(timeout_s=4.0))

    assert [(o.sharer, o.status) for o in result.failures] == [("south", SiteStatus.LATE)]
    assert set(result.receivers[0].used[0]) == {"west"}
    assert CANARY not in caplog.text


def test_site_without_a_language_handler_is_left_out(untrained, questions):
    from flwr.clientapp import ClientApp

    federation = Federation(untrained)
    app = federation.app

    class Mute(ClientApp):
        def __call__(self, message, context):
            if context.node_config["partition-id"] == 2:
                return ClientApp()(message, context)
            return app(message, context)

    with LocalGrid(Mute(), num_supernodes=3, workers=3) as grid:
        result = strategy().start(grid, questions)

    assert set(result.receivers[0].used[0]) == {"south"}


def test_site_that_shares_but_was_told_of_no_consent_refuses(untrained, questions):
    """A coordinator that asks a sharer for more than the querier allowed gets nothing."""
    federation = Federation(untrained, options={"south": {"policy": LanguagePolicy(text=True)}})

    def claims_caches(action, name, message, context, handle):
        return handle(message, context)

    federation.intercept = claims_caches
    result = federation.ask(questions, sharers=["south"], allow=("cache",))

    assert not any(result.receivers[0].refined)
    assert "shared" not in federation.verbs("south")
