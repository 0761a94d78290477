"""A site that lies: in errors, names, prices, keys, scores."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
from flwr.app import Message

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.incentives.ledger import Ledger
from fedinfer_flower.serving.jobs import JobState
from fedinfer_flower.wire import messages
from fedinfer_flower.wire.directory import SiteCard, _statement, site_card
from fedinfer_flower.wire.envelope import DEFAULT_LIMITS
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.records import pack, unpack

CANARY = "canary-4242.4242"
CREDIT = 1_000_000


def quoting(action, partition, message, context, handle, *, words=CANARY):
    """Refuse a query with a typed error that quotes a row, as a site could that wants to tell."""
    if action != "fi_predict":
        return None
    asked = unpack(message.content, limits=DEFAULT_LIMITS)
    error = InvalidValueError(f"row 0 is {words}", hint=f"not {words}")
    envelope = messages.error(
        error, run_id=asked.run_id, sender=context.node_id, query_id=asked.query_id
    )
    return Message(pack(envelope), reply_to=message)


def test_what_a_site_says_of_a_query_reaches_no_other_caller(bed, rows):
    """The words of a site are for whoever has the status; callers are told its code."""
    sites = bed.sites(2)
    core = bed.core(sites, batching={"window-s": 0.3}, models={"m": {"quorum": 2}})
    sites.instead = quoting
    alice = core.submit(bed.request(rows, timeout_s=5.0))
    bob = core.submit(bed.request(rows + 1.0, owner="bob", timeout_s=5.0))
    for job in (alice, bob):
        ended = bed.ended(core, job)
        assert ended.state is JobState.FAILED
        assert CANARY not in json.dumps(dict(ended.error))
        assert CANARY not in json.dumps(dict(ended.provenance))


def test_words_of_a_site_in_the_status_are_short_and_one_line(bed, rows):
    sites = bed.sites(2)
    core = bed.core(sites, models={"m": {"quorum": 2}})
    sites.instead = partial(quoting, words="\x1b[2J<script>\n" * 1000)
    bed.ended(core, core.submit(bed.request(rows, timeout_s=5.0)))
    told = [error["message"] for error in core.status()["errors"]]
    assert told
    assert all(len(text) < 2500 and text.isprintable() for text in told)


def test_site_cannot_have_the_price_of_the_operator_by_asking_for_a_million(bed, rows, tmp_path):
    url = f"sqlite:///{tmp_path}/ledger.db"
    ledger = Ledger(url)
    ledger.migrate()
    ledger.deposit("key:alice", 100 * CREDIT, key="invoice")
    core = bed.core(
        bed.sites(prices=(1.0, 1.0, 1e6)), gateway={"ledger": url}, models={"m": {"price": 3.0}}
    )
    ended = bed.ended(core, core.submit(bed.request(rows)))
    assert ended.provenance["credits"] == 3.0 * len(rows)
    bed.until(lambda: len(core.status()["rewards"]) == 3)
    paid = {r["site"]: r["credits"] for r in core.status()["rewards"]}
    assert max(paid.values()) <= 2 * min(paid.values()), paid


def test_reply_that_is_nonsense_is_left_out_of_the_answer(bed, rows):
    sites = bed.sites(3)
    core = bed.core(sites, models={"m": {"quorum": 2, "protection": "plain"}})

    def nonsense(action, partition, message, context, handle):
        if action != "fi_predict" or partition != 1:
            return None
        reply = handle(message, context)
        envelope = unpack(reply.content, limits=DEFAULT_LIMITS)
        spoilt = tuple((name, b"\xff" * len(data)) for name, data in envelope.sections)
        return Message(pack(dataclasses.replace(envelope, sections=spoilt)), reply_to=message)

    sites.instead = nonsense
    ended = bed.ended(core, core.submit(bed.request(rows)))
    assert ended.state is JobState.DONE
    assert ended.provenance["sites_answered"] == 2
    assert np.isfinite(json.loads(ended.answer)["probabilities"]).all()


def test_epsilon_is_counted_however_many_queriers_ask(bed):
    """Sealed queries come from a fresh identity each: the count must not stop at some number."""
    from fedinfer_flower.query import QueryReport, SiteOutcome, SiteStatus

    core = bed.core(bed.sites(1), start=False)
    chronicle = core._chronicle
    site = SiteOutcome(site_id="1", name="site-0", status=SiteStatus.ANSWERED)
    report = QueryReport(
        query_id="q",
        protection="dp",
        rule="mean-probability",
        n_queries=1,
        sites=(site,),
        epsilon_per_query=1.0,
        delta_per_query=1e-6,
        rule_reason="",
        request_bytes=0,
        seconds=0.0,
    )
    for n in range(5000):
        chronicle.note_round("m", [report], {}, querier=f"{n:064x}", metrics=core._metrics)
    spent = sum(entry["spent"] for entry in core.status()["epsilon"])
    assert spent == pytest.approx(5000.0)
    assert len(core.status()["epsilon"]) <= 4200


@pytest.mark.parametrize("how", ["key", "card"])
def test_site_cannot_shut_another_out_by_showing_what_is_public_of_it(bed, how):
    sites = bed.sites(3)
    core = bed.core(sites, models={"m": {"min-sites": 1}})
    bed.until(lambda: len(core._members.cards()) == 3)
    cards = core._members.cards()
    victim = cards[min(cards)]
    own = Identity.generate()

    def thief(action, partition, message, context, handle):
        if action != "fi_hello" or context.node_id != max(cards):
            return None
        copied = PublicIdentity(
            signing_key=own.public.signing_key, agreement_key=victim.identity.agreement_key
        )
        profile, run_id = cards[context.node_id].profile, core._run_id
        card = SiteCard(
            run_id=run_id,
            profile=profile,
            identity=copied,
            signature=own.sign("site card", _statement(profile, copied, run_id)),
        )
        card = victim if how == "card" else card
        return Message(pack(site_card(card, sender=context.node_id)), reply_to=message)

    before = sites.asked["fi_hello", 2]
    sites.instead = thief
    core._members.refresh([max(cards)])
    bed.until(lambda: sites.asked["fi_hello", 2] > before)
    bed.until(lambda: max(cards) not in core._members.cards())
    assert min(cards) in core._members.cards()
    assert core._members.members()[-1].error is not None
