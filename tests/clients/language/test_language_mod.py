"""`LanguageMod` and the sharer's side: what a site gives, to whom, and what it refuses."""

from __future__ import annotations

import dataclasses
import logging
import os
import time

import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp

from fedinfer_flower import InferenceMod
from fedinfer_flower.clients.language_mod import LanguageMod, LanguagePolicy, LanguageSite
from fedinfer_flower.errors import (
    BindingError,
    CacheError,
    ConfigError,
    EnvelopeError,
    ExpiredError,
    HandleError,
    InvalidValueError,
    MediumRefusedError,
    ModelAnswerError,
    ModelError,
    ModelLoadError,
    PromptTooLongError,
    ReplayError,
    SealError,
    SignatureError,
    SizeLimitError,
    UnknownConfigKeyError,
    UntrustedKeyError,
)
from fedinfer_flower.simulation.local_grid import LocalGrid
from fedinfer_flower.wire.actions import (
    ACTIONS,
    CANDIDATES,
    GENERATE,
    LANGUAGE_ACTIONS,
    SHARE_CACHE,
    message_type,
)
from fedinfer_flower.wire.envelope import Envelope, Kind
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.records import pack, unpack
from fedinfer_flower.wire.refine_ask import ShareAsk, open_body, pack_ask
from fedinfer_flower.wire.refine_asked import Asked, QuerierConsent
from fedinfer_flower.wire.refine_documents import ShareOffer, ShareReply, ShareRequest
from fedinfer_flower.wire.refine_request import CandidatesRequest

CANARY = "CANARY-1f9b"


class Stranger:
    """A party outside the federation that packs asks of its own."""

    def __init__(self, sharer, run_id, questions) -> None:
        self.identity, self.site, self.run_id = Identity.generate(), sharer, run_id
        self.questions = questions

    def ask(
        self, *, query_id="x-0", allow=("cache", "full-cache", "text"), querier=None, **changes
    ):
        consent = QuerierConsent(
            run_id=self.run_id,
            query_id=query_id,
            allow=allow,
            receiver=self.identity.key_id,
            sharers=(self.site.card.key_id,),
        )
        if querier is not None:
            consent = consent.signed(querier)
        options = {
            "questions": self.questions,
            "consent": consent,
            "round_number": 1,
            "medium": "text",
            "sharer": self.site.card.key_id,
            "reply_to": self.identity.public,
        }
        return ShareAsk(**options | changes)

    def send(self, ask: ShareAsk, *, seal: bool = True, body: bytes | None = None):
        packed = pack_ask(ask, identity=self.identity, sharer=self.site.card.identity, seal=seal)
        request = ShareRequest(
            query_id=ask.consent.query_id, medium=ask.medium, body=body or packed, sealed=seal
        )
        action = GENERATE if ask.medium == "text" else SHARE_CACHE
        return self.site.answer(request.to_envelope(run_id=self.run_id), action)


CACHE = {"medium": "cache", "share": {"last": 1, "decode": 1, "hidden": False}, "codec": "int8"}
FULL = CACHE | {"share": {"last": 0, "decode": 0, "hidden": False}}
LONG = CACHE | {"share": {"last": 4096, "decode": 0, "hidden": False}}


@pytest.fixture
def stranger(pair, questions):
    return Stranger(pair[1], pair[1].context.run_id, questions)


@pytest.fixture
def closed(federation, models, questions):
    site = federation.site(models["llama"], policy=LanguagePolicy(share_speeds=False))
    return Stranger(site, federation.run_id, questions)


# -- the mod -----------------------------------------------------------------------------


def test_mods_side_by_side_serve_their_own_actions():
    app = ClientApp()
    assert LanguageMod(lambda context: None).attach(InferenceMod(lambda c: None).attach(app)) is app
    with LocalGrid(app, num_supernodes=1) as grid:
        for action in (*ACTIONS, *LANGUAGE_ACTIONS):
            hello = pack(Envelope(kind=Kind.HELLO, run_id=grid.run_id))
            (reply,) = grid.send_and_receive([Message(hello, 1000, message_type(action))])
            assert not reply.has_error()


def test_mod_hands_other_messages_on(pair):
    receiver, _ = pair
    envelope = pack(Envelope(kind=Kind.PING, run_id=receiver.context.run_id))
    for kind, handed in (("train", True), ("query.fi_predict", True), ("query.fi_refine", False)):
        message = Message(envelope, receiver.context.node_id, kind, ttl=60.0)
        seen = []

        def call_next(message, context, seen=seen):
            seen.append(message)
            return message

        receiver.mod(message, receiver.context, call_next)
        assert bool(seen) == handed


def test_attach_to_a_legacy_app_is_refused_with_the_other_way():
    with pytest.raises(ConfigError) as caught:
        LanguageMod(lambda c: None).attach(ClientApp(lambda context: None))
    assert "mods=[LanguageMod(load_model)]" in caught.value.hint


@pytest.mark.parametrize("option", [{"policy": {"text": True}}, {"max_models": 0}])
def test_mod_with_a_wrong_option_fails_when_built(option):
    with pytest.raises(InvalidValueError):
        LanguageMod(lambda context: None, **option)


def test_policy_refuses_what_nothing_reads_and_says_what_was_meant():
    with pytest.raises(UnknownConfigKeyError) as caught:
        LanguagePolicy.from_mapping({"cahce": True})
    assert "'cache'" in caught.value.hint
    for wrong in ({"text": 1}, {"max_questions": 0}, {"codecs": ("zip",)}, {"handle_ttl_s": 0.0}):
        with pytest.raises(InvalidValueError):
            LanguagePolicy(**wrong)


def test_card_says_what_the_site_shares_and_verifies(pair, models):
    receiver, sharer = pair
    assert receiver.card.model_digest == models["qwen3"].layout.model_digest
    assert {n.sharer_digest for n in receiver.card.fusers} == {
        models[name].layout.model_digest for name in ("llama", "qwen2")
    }
    assert sharer.card.media == ("cache", "full-cache", "text")
    assert sharer.card.fusers == ()
    assert sharer.card.speeds is None


def test_speeds_are_measured_unless_withheld(federation, models):
    policy = LanguagePolicy()
    speeds = federation.site(models["qwen2"], policy=policy).card.speeds
    assert speeds is not None
    assert speeds.decode_s > 0.0
    assert speeds.prefill_s_per_token >= 0.0


def test_home_serves_both_mods_with_one_identity(federation, models, tmp_path):
    site = federation.site(models["qwen3"], home=tmp_path)
    key_id = site.card.key_id
    (folder,) = tmp_path.iterdir()
    assert Identity.load_or_create(folder / "identity.json").key_id == key_id
    assert (
        InferenceMod(lambda c: None, home=tmp_path)._memory(site.context).identity.key_id == key_id
    )


@pytest.mark.parametrize("loaded", [None, "a model", LanguageSite(model=3)])
def test_site_without_a_language_model_says_so(federation, loaded):
    site = federation.site(loaded)
    with pytest.raises(ModelError):
        _ = site.card


# -- off until turned on -----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, CACHE, FULL, LONG], ids=["text", "cache", "full", "long"])
def test_site_shares_nothing_by_default_and_says_why(closed, options):
    with pytest.raises(MediumRefusedError) as caught:
        closed.send(closed.ask(**options))
    assert "LanguagePolicy(" in caught.value.hint
    if options:
        assert "invert" in caught.value.message or "every token" in caught.value.message
    assert closed.site.card.media == ()


def test_cache_consent_is_none_for_full_caches(federation, models, questions):
    site = federation.site(models["llama"], policy=LanguagePolicy(cache=True, share_speeds=False))
    stranger = Stranger(site, federation.run_id, questions)
    assert stranger.send(stranger.ask(query_id="x-1", **CACHE)).meta["verb"] == "shared"
    for number, options in enumerate((FULL, LONG)):
        with pytest.raises(MediumRefusedError):
            stranger.send(stranger.ask(query_id=f"x-2{number}", **options))


def test_candidates_are_not_scored_by_default(pair, models, questions, federation, open_policy):
    receiver, _ = pair
    consent = QuerierConsent(run_id=federation.run_id, query_id="c-0")
    asked = Asked(questions=questions, consent=consent, candidates=("unk", "tukem"))
    request = CandidatesRequest(query_id="c-0", asked=asked.to_bytes())
    envelope = request.to_envelope(run_id=federation.run_id)
    with pytest.raises(MediumRefusedError):
        receiver.answer(envelope, CANDIDATES)
    policy = dataclasses.replace(open_policy, candidates=True)
    willing = federation.site(models["qwen3"], policy=policy)
    assert willing.answer(envelope, CANDIDATES).meta["verb"] == "refined"


@pytest.mark.parametrize(
    ("allow", "options"), [(("cache", "full-cache"), {}), (("text",), CACHE), (("cache",), FULL)]
)
def test_site_shares_nothing_that_the_querier_does_not_allow(stranger, allow, options):
    with pytest.raises(MediumRefusedError) as caught:
        stranger.send(stranger.ask(allow=allow, **options))
    assert "querier" in caught.value.message


def test_ask_in_clear_is_for_sites_that_let_a_coordinator_read(stranger):
    with pytest.raises(MediumRefusedError):
        stranger.send(stranger.ask(), seal=False)


# -- who asks ----------------------------------------------------------------------------


def test_unpinned_peer_is_refused(federation, models, questions):
    site = federation.site(models["llama"], peer_key_ids=("0" * 64,))
    stranger = Stranger(site, federation.run_id, questions)
    with pytest.raises(UntrustedKeyError):
        stranger.send(stranger.ask())
    site.mod._keys = dataclasses.replace(
        site.mod._keys, peer_key_ids=frozenset({stranger.identity.key_id})
    )
    assert stranger.send(stranger.ask()).kind is Kind.ANSWER


def test_unpinned_querier_is_refused_and_a_forged_one_does_not_verify(
    federation, models, questions
):
    querier = Identity.generate()
    site = federation.site(models["llama"], querier_key_ids=(querier.key_id,))
    stranger = Stranger(site, federation.run_id, questions)
    for other in (None, Identity.generate()):
        with pytest.raises(UntrustedKeyError):
            stranger.send(stranger.ask(querier=other))
    good = stranger.ask(querier=querier)
    wider = dataclasses.replace(good.consent, max_rounds=9)
    with pytest.raises(SignatureError):
        stranger.send(dataclasses.replace(good, consent=wider))
    assert stranger.send(good).kind is Kind.ANSWER


def test_pin_file_in_the_home_names_queriers_and_sites(federation, models, questions, tmp_path):
    site = federation.site(models["llama"], home=tmp_path)
    stranger = Stranger(site, federation.run_id, questions)
    querier = Identity.generate()
    ask = stranger.ask(querier=querier)
    (tmp_path / "pins.toml").write_text(f'[sites]\na = "{"0" * 64}"\n')
    with pytest.raises(UntrustedKeyError):
        stranger.send(ask)
    (tmp_path / "pins.toml").write_text(
        f'[sites]\na = "{stranger.identity.key_id}"\n[queriers]\nb = "{"0" * 64}"\n'
    )
    with pytest.raises(UntrustedKeyError):
        stranger.send(ask)
    (tmp_path / "pins.toml").write_text(f'[queriers]\nb = "{querier.key_id}"\n')
    assert stranger.send(ask).kind is Kind.ANSWER


def test_consent_for_another_receiver_or_sharer_is_refused(stranger):
    querier = Identity.generate()
    ask = stranger.ask()
    elsewhere = dataclasses.replace(ask.consent, receiver="1" * 64).signed(querier)
    with pytest.raises(BindingError):
        stranger.send(dataclasses.replace(ask, consent=elsewhere))
    unnamed = dataclasses.replace(ask.consent, sharers=("1" * 64,)).signed(querier)
    with pytest.raises(UntrustedKeyError):
        stranger.send(dataclasses.replace(ask, consent=unnamed))


def test_replayed_ask_is_refused_in_every_process(federation, models, questions, tmp_path):
    site = federation.site(models["llama"], home=tmp_path)
    stranger = Stranger(site, federation.run_id, questions)
    ask = stranger.ask()
    stranger.send(ask)
    again = federation.site(models["llama"], home=tmp_path)
    again.context = site.context  # the same site, restarted
    for target in (site, again):
        stranger.site = target
        with pytest.raises(ReplayError):
            stranger.send(ask)


def test_expired_ask_is_refused(stranger):
    ask = stranger.ask()
    late = dataclasses.replace(ask.consent, expires_at=time.time() - 1.0)
    with pytest.raises(ExpiredError):
        stranger.send(dataclasses.replace(ask, consent=late))


def test_tampered_seal_is_refused(stranger):
    ask = stranger.ask()
    packed = pack_ask(ask, identity=stranger.identity, sharer=stranger.site.card.identity)
    for at in (0, len(packed) // 2, len(packed) - 1):
        broken = packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :]
        with pytest.raises(SealError):
            stranger.send(ask, body=broken)


def test_ask_sealed_for_one_query_does_not_open_for_another(stranger):
    packed = pack_ask(
        stranger.ask(), identity=stranger.identity, sharer=stranger.site.card.identity
    )
    with pytest.raises(SealError):
        stranger.send(stranger.ask(query_id="x-9"), body=packed)


def test_ask_for_another_medium_than_its_envelope_says_is_refused(stranger):
    ask = stranger.ask(**CACHE)
    packed = pack_ask(ask, identity=stranger.identity, sharer=stranger.site.card.identity)
    request = ShareRequest(query_id="x-0", medium="text", body=packed)
    with pytest.raises(BindingError):
        stranger.site.answer(request.to_envelope(run_id=stranger.run_id), GENERATE)
    with pytest.raises(EnvelopeError):
        stranger.site.answer(request.to_envelope(run_id=stranger.run_id), SHARE_CACHE)


# -- limits ------------------------------------------------------------------------------


def test_too_many_or_too_long_questions_are_refused(federation, models, questions):
    policy = LanguagePolicy(text=True, max_questions=2, max_question_chars=40, share_speeds=False)
    site = federation.site(models["llama"], policy=policy)
    for number, asked in enumerate((questions, ("x" * 41,))):
        stranger = Stranger(site, federation.run_id, asked)
        with pytest.raises(SizeLimitError):
            stranger.send(stranger.ask(query_id=f"l-{number}"))


@pytest.mark.parametrize("options", [{}, CACHE])
def test_prompt_that_is_too_long_is_a_typed_error(stranger, options, models):
    window = models["llama"].layout.window
    stranger.questions = ("Q city of " + "tukem " * window,)
    site = stranger.site
    site.mod._policy = dataclasses.replace(site.mod._policy, max_question_chars=65_536)
    with pytest.raises(PromptTooLongError) as caught:
        stranger.send(stranger.ask(**options))
    assert "tukem" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"codec": "zip"}, MediumRefusedError),
        ({"codec": "static4"}, EnvelopeError),
        ({"share": {"last": 1, "decode": 200, "hidden": False}}, SizeLimitError),
        ({"share": {"last": 1, "decode": 1}}, EnvelopeError),
        ({"scales": b"nonsense", "codec": "static4"}, CacheError),
    ],
)
def test_ask_that_cannot_be_met_is_refused(stranger, change, error):
    with pytest.raises(error):
        stranger.send(stranger.ask(**CACHE | change))


# -- offers and handles ------------------------------------------------------------------


@pytest.fixture
def offering(federation, models, bank, open_policy):
    policy = dataclasses.replace(open_policy, one_phase_bytes=100)
    return federation.site(models["qwen3"], fusers=bank), federation.site(
        models["llama"], policy=policy
    )


def test_large_body_is_offered_and_fetched_once(offering, make_ask, questions):
    receiver, sharer = offering
    ask = make_ask(receiver, [sharer], questions)
    offer = ask.shared(ask.rephrased())
    assert isinstance(offer, ShareOffer)
    assert offer.evidence is None
    reply = ask.fetched(offer.handle)
    assert len(reply.body) == offer.body_bytes > 100
    with pytest.raises(HandleError):
        ask.fetched(offer.handle)


def test_notes_are_never_offered(offering, make_ask, questions):
    receiver, sharer = offering
    ask = make_ask(receiver, [sharer], questions, medium="text")
    assert isinstance(ask.shared(ask.rephrased()), ShareReply)


def test_handle_of_another_query_is_foreign_and_not_spent(offering, make_ask, questions):
    receiver, sharer = offering
    first, second = (make_ask(receiver, [sharer], questions) for _ in range(2))
    offer = first.shared(first.rephrased())
    for handle in (offer.handle, "", "x" * 128):
        with pytest.raises(HandleError):
            second.fetched(handle)
    assert first.fetched(offer.handle).body


def test_handle_expires(federation, models, bank, make_ask, questions, open_policy):
    policy = dataclasses.replace(open_policy, one_phase_bytes=0, handle_ttl_s=1e-9)
    sharer = federation.site(models["llama"], policy=policy)
    ask = make_ask(federation.site(models["qwen3"], fusers=bank), [sharer], questions)
    offer = ask.shared(ask.rephrased())
    with pytest.raises(HandleError):
        ask.fetched(offer.handle)


def test_lost_offer_is_made_anew_once_if_the_ask_comes_along(offering, make_ask, questions):
    receiver, sharer = offering
    ask = make_ask(receiver, [sharer], questions)
    reply = ask.rephrased()
    offer = ask.shared(reply)
    first = ask.fetched(offer.handle)
    again = ask.fetched(offer.handle, ask=reply.asks[0].body)
    about = {"run_id": ask.run_id, "query_id": ask.query_id, "round_number": 1, "sealed": True}
    me = receiver.mod._memory(receiver.context).identity
    bodies = [
        open_body(r.body, sharer=sharer.card.identity, identity=me, **about) for r in (first, again)
    ]
    assert bodies[0].payload == bodies[1].payload
    assert first.body != again.body
    with pytest.raises(ReplayError):
        ask.fetched(offer.handle, ask=reply.asks[0].body)


# -- what leaks --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, CACHE])
def test_nothing_of_a_question_is_in_an_error_or_a_log(
    federation, models, caplog, options, monkeypatch
):
    def documents(question):
        raise MediumRefusedError(f"no document for {question}")

    caplog.set_level(logging.DEBUG)
    monkeypatch.delenv("FEDINFER_SITE_TRACEBACKS", raising=False)
    assert "FEDINFER_SITE_TRACEBACKS" not in os.environ
    site = federation.site(LanguageSite(model=models["llama"], documents=documents))
    stranger = Stranger(site, federation.run_id, (f"Q city of {CANARY} ?",))
    with pytest.raises(ModelAnswerError) as caught:
        stranger.send(stranger.ask(**options))
    assert CANARY not in str(caught.value)
    assert CANARY not in caplog.text
    assert caplog.records  # it was logged, without its text


def test_load_model_that_fails_says_nothing_of_why(federation, caplog):
    def loaded():
        raise RuntimeError(CANARY)

    with pytest.raises(ModelLoadError) as caught:
        _ = federation.site(loaded).card
    assert CANARY not in str(caught.value)
    assert CANARY not in caplog.text


def test_ask_and_share_travel_sealed(pair, make_ask, questions):
    receiver, sharer = pair
    for medium in ("cache", "text"):
        ask = make_ask(receiver, [sharer], questions, medium=medium, rephrase="none")
        reply = ask.rephrased()
        assert questions[0].encode() not in reply.asks[0].body
        assert b"share-ask" not in reply.asks[0].body
        assert b"share-body" not in ask.shared(reply).body


@pytest.mark.parametrize("action", LANGUAGE_ACTIONS)
@pytest.mark.parametrize(
    "broken",
    [
        {"meta": {}},
        {"meta": {"verb": "share"}},
        {"meta": {"verb": []}},
        {"meta": {"verb": {}, "medium": {}}},
        {"meta": {"verb": "refine", "medium": ["cache"]}},
        {"kind": Kind.PING},
        {"sections": (("ask", b"\x00"),)},
    ],
)
def test_malformed_message_gets_a_typed_reply(pair, action, broken):
    options = {"kind": Kind.QUERY, "run_id": pair[0].context.run_id, "query_id": "q"} | broken
    reply = pair[0].send(Envelope(**options), action)
    assert reply.kind is Kind.ERROR
    assert reply.meta["code"].startswith("FI3")


def test_message_of_another_run_or_without_content_gets_a_typed_reply(pair):
    site = pair[0]
    reply = site.send(Envelope(kind=Kind.QUERY, run_id=site.context.run_id + 1), SHARE_CACHE)
    assert reply.meta["code"] == BindingError.code
    empty = Message(
        pack(Envelope(kind=Kind.PING)), site.context.node_id, message_type(SHARE_CACHE), ttl=60.0
    )
    del empty.content["fedinfer"]
    assert unpack(site.mod.handle(empty, site.context).content).kind is Kind.ERROR
