"""Settling an epoch: every form gives the scores that are worked out in clear."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedinfer_flower.errors import (
    BindingError,
    ConfigError,
    ProtocolError,
    ReplayError,
    SealError,
    SettlementError,
    SignatureError,
    UntrustedKeyError,
)
from fedinfer_flower.incentives import SCHEMES, LinearScheme, PublicFacts, make_scheme
from fedinfer_flower.settlement import (
    AuditRow,
    BlindedRows,
    EvidenceBook,
    EvidenceForm,
    Settlement,
    SettlementReply,
    SettlementRequest,
    SlotSums,
    settle,
)
from fedinfer_flower.settlement.epoch import FLOOD, Epoch
from fedinfer_flower.settlement.reading import signed
from fedinfer_flower.settlement.ring import ONE
from fedinfer_flower.settlement.row_sums import MIN_AUDITS, RowWeights
from fedinfer_flower.settlement.shares import SEALED_HALF_BYTES
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.sealing import seal_to

LINEAR = [name for name in SCHEMES.names() if issubclass(SCHEMES.get(name), LinearScheme)]
EXACT = (EvidenceForm.CLEAR, EvidenceForm.SHARES)


def weights_of(world, scheme):
    return RowWeights.of(scheme, world.audited().public())


# -- equality ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("name", LINEAR)
def test_settlement_equals_scheme_in_clear_to_the_codec(name, form, make_world):
    scheme, world = make_scheme(name), make_world(form)

    values = world.in_order(world.run(scheme))

    # The weights come from totals on the grid, which are off by at most half a step a site:
    # compared with the scheme on those totals, only the codec's error is left.
    weights = weights_of(world, scheme)
    clear = scheme.contributions(world.audited())
    assert np.ptp(clear) > 100 * weights.error
    half = 0.5 / ONE
    jitter = PublicFacts(
        total_tc=world.audited().public().total_tc + 4 * half,
        n_sites=4,
        labels=world.audited().labels,
    )
    drift = np.abs(scheme.weights(jitter) - weights.weights_tc).sum()
    assert np.abs(values - clear).max() <= weights.error + 2 * drift


@pytest.mark.parametrize("name", LINEAR)
def test_settlement_under_ckks_equals_scheme_in_clear(name, make_world, settlement_keys):
    scheme = make_scheme(name)
    world = make_world(EvidenceForm.CKKS, keys=settlement_keys)

    settled = world.run(scheme)

    # Noise of 16 times the decryption's error, at 8 deviations; the weights move with the
    # noise on the totals, by less than as much again.
    clear = scheme.contributions(world.audited())
    bound = 8.0 * settled.noise_scale
    assert settled.noise_scale > 0.0
    assert np.abs(world.in_order(settled) - clear).max() <= 2.0 * bound
    assert bound < np.ptp(clear)


def test_scores_keep_their_order_in_every_form(make_world, settlement_keys):
    for form in EvidenceForm:
        world = make_world(form, keys=settlement_keys if form is EvidenceForm.CKKS else None)
        values = world.in_order(world.run())
        assert list(np.argsort(values)) == [0, 1, 2, 3]


def test_settlement_survives_its_bytes(make_world):
    settled = make_world(EvidenceForm.SHARES).run()

    again = Settlement.from_bytes(settled.to_bytes())

    assert again == settled
    assert again.digest == settled.digest


def test_querier_may_settle_in_one_call(make_world):
    world = make_world(EvidenceForm.SHARES)
    desk = world.desk()

    reply = settle(
        desk.request(),
        world.audits,
        scheme=make_scheme("brier-shapley"),
        asked=world.asked,
        sites=[site.public for site in world.sites],
        identity=world.querier,
    )

    assert desk.finish(reply).n_audits == len(world.audits)


def test_evidence_that_equals_the_answer_passes_and_another_does_not(make_world):
    world = make_world(EvidenceForm.SHARES)
    querier = world.querier_desk(world.desk().request())
    answers = {q: world.probabilities_ktc[:, rows].sum(axis=0) for q, rows in world.queries.items()}
    querier.check_against_answer(answers)

    # One site of four answers with another row than the one that it settles.
    changed = {q: a.copy() for q, a in answers.items()}
    changed["job-1"][0] += np.array([0.01, -0.01, 0.0])

    with pytest.raises(SettlementError, match="does not add up to the answer"):
        querier.check_against_answer(changed)


# -- noise ---------------------------------------------------------------------------------


def test_noise_of_both_roles_is_added_and_reported(make_world):
    world = make_world(EvidenceForm.SHARES, n_sites=3)
    clear = make_scheme("brier-shapley").contributions(world.audited())
    weights = weights_of(world, make_scheme("brier-shapley"))
    std = weights.largest / 20.0
    errors = []
    for _ in range(60):
        desk = world.desk(noise_std=std)
        reply = world.querier_desk(desk.request(), noise_std=std).settle(world.audits)
        settled = desk.finish(reply)
        errors.append(world.in_order(settled) - clear)
        assert settled.noise_scale == pytest.approx(std * np.sqrt(2.0))

    # 180 draws of deviation sqrt(2) * std: chi-square quantiles at 1e-6 give 0.74 to 1.29.
    ratio = np.std(errors) / (std * np.sqrt(2.0))
    assert 0.74 < ratio < 1.29


def test_epsilon_of_a_row_sum_follows_its_sensitivity(make_world):
    weights = weights_of(make_world(EvidenceForm.CLEAR), make_scheme("brier-shapley"))

    # sd of the largest single answer's influence: mu = 1, epsilon 4.377 at 1e-5.
    assert weights.epsilon(weights.sensitivity, 1e-5) == pytest.approx(4.3772, abs=1e-3)
    assert weights.epsilon(0.0, 1e-5) == np.inf


# -- guards --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", EXACT)
def test_too_few_audits_are_refused_by_both_roles(form, make_world):
    world = make_world(form)
    desk = world.desk()

    with pytest.raises(SettlementError, match=f"at least {MIN_AUDITS}"):
        world.querier_desk(desk.request()).settle(world.audits[: MIN_AUDITS - 1])

    reply = world.querier_desk(desk.request()).settle(world.audits)
    short = SettlementReply(
        epoch_id=reply.epoch_id,
        answers_to=reply.answers_to,
        audits_t3=reply.audits_t3[:3],
        totals_tc=reply.totals_tc[:3],
        weights_tc=reply.weights_tc[:3],
        halves_k=reply.halves_k,
    )
    with pytest.raises(SettlementError, match=f"at least {MIN_AUDITS}"):
        desk.finish(resigned(world, short))


def test_two_sites_are_no_epoch(make_world):
    with pytest.raises(SettlementError, match="at least 3 sites"):
        make_world(EvidenceForm.SHARES, n_sites=2).desk()


class OneRow(LinearScheme):
    """Puts nearly all weight on one audit: what the guard is for."""

    name = "brier-shapley"
    share = 0.5

    def weights(self, facts):
        weights = np.full(facts.total_tc.shape, 0.0)
        weights[:, 0] = (1.0 - self.share) / facts.n_queries
        weights[0, 0] = self.share
        return weights


def test_weights_on_one_row_would_open_it_and_are_refused(make_world):
    world = make_world(EvidenceForm.CLEAR)
    answers, scheme = world.audited(), OneRow()
    # The attack on an unguarded row sum: half of it is one answer, the rest averages out.
    own = scheme.contributions(answers)
    single = answers.probabilities_ktc[:, 0, 0]
    assert np.corrcoef(own, single)[0, 1] > 0.9

    with pytest.raises(SettlementError, match="be opened by it"):
        RowWeights.of(scheme, answers.public())


def test_weights_of_every_scheme_pass_with_balanced_audits(make_world):
    world = make_world(EvidenceForm.CLEAR)
    for name in LINEAR:
        weights = weights_of(world, make_scheme(name))
        spread = np.ptp(weights.weights_tc, axis=1)
        assert spread.max() / spread.sum() <= 0.1


def test_epoch_takes_the_queries_of_one_set_of_sites(make_world):
    world = make_world(EvidenceForm.SHARES)
    book = EvidenceBook(EvidenceForm.SHARES)
    for (query_id, site), payload in world.payloads.items():
        # The last site gave no evidence of the second, smaller query.
        if (query_id, site) != ("job-1", world.sites[-1].key_id):
            book.add(query_id, site, payload, n_queries=world.asked[query_id], n_classes=3)

    desk = world.desk(book=book)

    assert desk.query_ids == ("job-0",)
    assert desk.left_out == ("job-1",)
    assert desk.sites == tuple(site.key_id for site in world.sites)


@pytest.mark.parametrize("form", EXACT)
def test_a_query_is_settled_once(form, make_world):
    world = make_world(form)
    desk = world.desk()
    querier = world.querier_desk(desk.request())
    reply = querier.settle(world.audits)
    desk.finish(reply)

    with pytest.raises(ReplayError, match="one release"):
        desk.finish(reply)
    with pytest.raises(ReplayError, match="revealed before"):
        querier.settle(world.audits)
    with pytest.raises(SettlementError, match="no query with evidence"):
        world.desk(settled_query_ids=desk.query_ids)
    # A coordinator that forgets is stopped by the querier.
    with pytest.raises(ReplayError, match="settled before"):
        world.querier_desk(world.desk().request(), settled_query_ids=desk.query_ids)


def test_blinded_rows_are_made_and_opened_once(make_world, settlement_keys):
    world = make_world(EvidenceForm.CKKS, keys=settlement_keys)
    desk = world.desk()
    querier = world.querier_desk(desk.request())
    with pytest.raises(SettlementError, match="no blinded rows"):
        desk.finish_blinded(None)
    reply = querier.settle(world.audits)
    blinded = desk.blind(reply)
    sums = querier.open_sums(blinded)
    desk.finish_blinded(sums)

    with pytest.raises(ReplayError):
        desk.blind(reply)
    with pytest.raises(ReplayError):
        querier.open_sums(blinded)
    with pytest.raises(ReplayError):
        desk.finish_blinded(sums)
    with pytest.raises(SettlementError, match="one more exchange"):
        desk.finish(reply)


# -- lies ----------------------------------------------------------------------------------


def resigned(world, reply, **changes):
    """Return a reply with changes, signed by the querier all the same."""
    return signed(replace(reply, **changes), world.querier)


def replied(world, **options):
    desk = world.desk()
    return desk, world.querier_desk(desk.request(), **options).settle(world.audits)


def test_reply_by_somebody_else_is_refused(make_world):
    world = make_world(EvidenceForm.SHARES)
    desk, reply = replied(world, identity=world.querier)
    forged = reply.with_signature(Identity.generate().sign("settlement", b"anything"))

    with pytest.raises(SignatureError):
        desk.finish(forged)
    with pytest.raises(SignatureError):
        desk.finish(reply.with_signature(b""))


def test_reply_to_another_epoch_is_refused(make_world):
    world = make_world(EvidenceForm.SHARES)
    _, reply = replied(world)

    with pytest.raises(BindingError, match="replayed"):
        world.desk().finish(reply)


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        (0, 2, "query that is not in this epoch"),
        (0, -1, "query that is not in this epoch"),
        (1, 1000, "row that was not asked"),
        (1, -1, "row that was not asked"),
        (2, 3, "label that is no class"),
        (2, -1, "label that is no class"),
    ],
)
def test_reveal_of_what_was_not_asked_is_refused(column, value, text, make_world):
    world = make_world(EvidenceForm.SHARES)
    desk, reply = replied(world)
    audits = reply.audits_t3.copy()
    audits[5, column] = value

    with pytest.raises(SettlementError, match=text):
        desk.finish(resigned(world, reply, audits_t3=audits))


def test_reveal_that_names_a_row_twice_is_refused(make_world):
    world = make_world(EvidenceForm.SHARES)
    desk, reply = replied(world)
    audits = reply.audits_t3.copy()
    audits[1] = audits[0]

    with pytest.raises(SettlementError, match="twice"):
        desk.finish(resigned(world, reply, audits_t3=audits))


@pytest.mark.parametrize("change", [-5 * ONE, 4 * ONE + 100, 5 * ONE])
def test_totals_that_are_no_sums_of_distributions_are_refused(change, make_world):
    world = make_world(EvidenceForm.SHARES)
    desk, reply = replied(world)
    totals = reply.totals_tc.copy()
    totals[0] += np.array([change, -change, 0])  # rows still sum to the number of sites

    with pytest.raises(SettlementError, match="no sums of distributions"):
        desk.finish(resigned(world, reply, totals_tc=totals))


def test_totals_other_than_the_halves_say_are_refused(make_world):
    world = make_world(EvidenceForm.SHARES)
    desk, reply = replied(world)
    totals = reply.totals_tc.copy()
    totals[:, 0], totals[:, 1] = reply.totals_tc[:, 1], reply.totals_tc[:, 0]

    with pytest.raises(SettlementError):
        desk.finish(resigned(world, reply, totals_tc=totals))


def test_halves_that_pay_one_site_more_are_noticed(make_world):
    world = make_world(EvidenceForm.SHARES)
    desk, reply = replied(world)
    unit = weights_of(world, make_scheme("brier-shapley")).unit
    halves = reply.halves_k.copy()
    halves[0] += np.uint64(round(0.01 / unit))

    with pytest.raises(SettlementError, match="do not add up"):
        desk.finish(resigned(world, reply, halves_k=halves))


def test_noise_that_could_hide_anything_is_refused(make_world):
    world = make_world(EvidenceForm.SHARES)
    desk, reply = replied(world)

    with pytest.raises(SettlementError, match="noise is larger"):
        desk.finish(resigned(world, reply, noise_std=1e9))


def test_altered_share_is_noticed(make_world):
    world = make_world(EvidenceForm.SHARES)
    book = EvidenceBook(EvidenceForm.SHARES)
    for (query_id, site), payload in world.payloads.items():
        sent = payload[:-8] + bytes(8) if site == world.sites[0].key_id else payload
        book.add(query_id, site, sent, n_queries=world.asked[query_id], n_classes=3)
    desk = world.desk(book=book)
    everything = tuple(
        AuditRow(query_id=q, row=row, label=int(world.labels[rows.start + row]))
        for q, rows in world.queries.items()
        for row in range(rows.stop - rows.start)
    )

    with pytest.raises(SettlementError, match="no sums of distributions"):
        world.querier_desk(desk.request()).settle(everything)


def test_querier_settles_only_what_it_asked_with_sites_it_knows(make_world):
    world = make_world(EvidenceForm.SHARES)
    request = world.desk().request()

    with pytest.raises(SettlementError, match="did not ask"):
        world.querier_desk(request, asked={"job-0": world.asked["job-0"]})
    with pytest.raises(SettlementError, match="did not ask"):
        world.querier_desk(request, asked={**world.asked, "job-1": 7})
    with pytest.raises(UntrustedKeyError):
        world.querier_desk(request, sites=[s.public for s in world.sites[1:]])
    with pytest.raises(SettlementError, match="fewer than 5 sites"):
        world.querier_desk(request, min_sites=5)
    with pytest.raises(SettlementError, match="another form"):
        world.querier_desk(request, form=EvidenceForm.CKKS)
    assert world.querier_desk(request, form=EvidenceForm.SHARES).request is request
    with pytest.raises(SettlementError, match="another scheme"):
        world.querier_desk(request, make_scheme("linear-ca"))


def test_sealed_settlement_without_keys_fails_when_built(make_world):
    world = make_world(EvidenceForm.SHARES)
    request = world.desk().request()

    with pytest.raises(ConfigError):
        world.desk(querier=None)
    with pytest.raises(ConfigError):
        world.querier_desk(request, identity=None)
    with pytest.raises(ConfigError):
        world.querier_desk(request, sites=None)


def test_noise_under_ckks_is_never_below_the_flooding(make_world, settlement_keys):
    world = make_world(EvidenceForm.CKKS, keys=settlement_keys)
    desk = world.desk()
    querier = world.querier_desk(desk.request(), noise_std=1e-12)
    reply = querier.settle(world.audits)
    epoch = Epoch.of(
        desk.request(),
        audits_t3=reply.audits_t3,
        totals_tc=reply.totals_tc,
        scheme=make_scheme("brier-shapley"),
    )

    sums = querier.open_sums(desk.blind(reply))

    assert sums.noise_std == pytest.approx(FLOOD * epoch.cipher_error_std)
    # What is asked for beyond it counts.
    more = 4.0 * sums.noise_std
    again = world.desk()
    louder = world.querier_desk(again.request(), noise_std=more)
    assert louder.open_sums(again.blind(louder.settle(world.audits))).noise_std == more


# -- documents -----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [SettlementRequest, SettlementReply])
def test_truncated_documents_are_refused(cls, make_world):
    world = make_world(EvidenceForm.SHARES, n_audits=45, n_others=0, n_sites=3)
    desk, reply = replied(world)
    document = desk.request() if cls is SettlementRequest else reply
    raw = document.to_bytes()
    assert cls.from_bytes(raw).digest == document.digest

    for length in range(0, len(raw), 211):
        with pytest.raises(ProtocolError):
            cls.from_bytes(raw[:length])
    with pytest.raises(ProtocolError):
        cls.from_bytes(raw + b"x")


def test_reply_with_any_altered_byte_settles_nothing(make_world):
    world = make_world(EvidenceForm.SHARES, n_audits=45, n_others=0, n_sites=3)
    desk, reply = replied(world)
    raw = reply.to_bytes()

    for place in np.random.default_rng(1).integers(0, len(raw), size=60):
        altered = bytearray(raw)
        altered[place] ^= 0x41
        with pytest.raises(ProtocolError):
            desk.finish(SettlementReply.from_bytes(bytes(altered)))

    # Nothing of it spoilt the epoch.
    assert desk.finish(reply).n_audits == 45


def test_request_with_an_altered_half_is_refused(make_world):
    world = make_world(EvidenceForm.SHARES)
    request = world.desk().request()
    halves = bytearray(request.halves)
    halves[100] ^= 1

    with pytest.raises(SealError):
        world.querier_desk(replace(request, halves=bytes(halves)))


def test_half_of_another_site_or_query_does_not_open(make_world):
    world = make_world(EvidenceForm.SHARES)
    request = world.desk().request()
    halves = bytes(request.halves)
    size = SEALED_HALF_BYTES
    of_another_query = halves[size : 2 * size] + halves[:size] + halves[2 * size :]
    of_another_site = halves[2 * size : 4 * size] + halves[: 2 * size] + halves[4 * size :]

    for swapped in (of_another_query, of_another_site):
        with pytest.raises(SealError):
            world.querier_desk(replace(request, halves=swapped))


def test_half_that_the_coordinator_made_up_is_refused(make_world):
    # Otherwise it could make up all sites but one, and read that one from the totals.
    world = make_world(EvidenceForm.SHARES)
    request, site = world.desk().request(), world.sites[0]
    info = b"evidence|" + site.key_id.encode() + b"|job-0"
    made_up = seal_to(world.querier.public, bytes(64) + bytes(32), info=info)

    with pytest.raises(SignatureError):
        world.querier_desk(
            replace(request, halves=made_up + bytes(request.halves)[SEALED_HALF_BYTES:])
        )


def test_request_with_any_altered_byte_settles_nothing(make_world):
    world = make_world(EvidenceForm.SHARES, n_audits=45, n_others=0, n_sites=3)
    desk = world.desk()
    raw = desk.request().to_bytes()

    def settle_altered(place):
        altered = bytearray(raw)
        altered[place] ^= 0x21
        request = SettlementRequest.from_bytes(bytes(altered))
        return desk.finish(world.querier_desk(request).settle(world.audits))

    for place in np.random.default_rng(2).integers(0, len(raw) - len(desk.request().halves), 80):
        with pytest.raises(ProtocolError):
            settle_altered(int(place))


@pytest.mark.parametrize("cls", [BlindedRows, SlotSums])
def test_altered_documents_of_the_second_exchange_settle_nothing(cls, make_world, settlement_keys):
    world = make_world(EvidenceForm.CKKS, keys=settlement_keys)
    desk = world.desk()
    querier = world.querier_desk(desk.request())
    blinded = desk.blind(querier.settle(world.audits))
    raw = (blinded if cls is BlindedRows else querier.open_sums(blinded)).to_bytes()

    def settle_altered(altered):
        document = cls.from_bytes(altered)
        sums = querier.open_sums(document) if cls is BlindedRows else document
        desk.finish_blinded(sums)

    for place in np.random.default_rng(3).integers(0, len(raw), 40):
        altered = bytearray(raw)
        altered[place] ^= 0x21
        with pytest.raises(ProtocolError):
            settle_altered(bytes(altered))
    for length in range(0, len(raw), max(1, len(raw) // 40)):
        with pytest.raises(ProtocolError):
            settle_altered(raw[:length])


def test_altered_settlement_is_refused_or_another_one(make_world):
    settled = make_world(EvidenceForm.SHARES).run()
    raw = settled.to_bytes()

    for place in range(0, len(raw), 3):
        altered = bytearray(raw)
        altered[place] ^= 0x11
        try:
            other = Settlement.from_bytes(bytes(altered))
        except ProtocolError:
            continue
        assert other.digest != settled.digest


def test_by_default_row_sums_carry_the_noise_of_one_answer(make_world):
    world = make_world(EvidenceForm.SHARES)
    desk = world.desk()
    querier = world.querier_desk(desk.request(), noise_std=None)
    settled = desk.finish(querier.settle(world.audits))
    exact = world.desk()
    plain = exact.finish(world.querier_desk(exact.request()).settle(world.audits))

    assert settled.noise_scale > 0.0
    off = np.array([settled.values[k] - plain.values[k] for k in plain.values])
    assert np.abs(off).max() > 0.0
    # Eight deviations: once in 10^15.
    assert np.abs(off).max() < 8 * settled.noise_scale


def test_in_clear_there_is_no_noise_by_default(make_world):
    world = make_world(EvidenceForm.CLEAR)
    desk = world.desk()
    reply = world.querier_desk(desk.request(), noise_std=None).settle(world.audits)
    assert desk.finish(reply).noise_scale == 0.0
