"""Protection `secagg`: exact sums, dropouts, and what each party and each collusion can open.

Statistical tests have a significance of 1e-6: keys have no seed. Places are those of the
roster, which sorts sites by key id.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from scipy import stats

from fedinfer_flower.clients.recovering import answer_recovery, recovery_context
from fedinfer_flower.clients.site_memory import ContextMemory
from fedinfer_flower.ensemble.base import RULES
from fedinfer_flower.errors import (
    BindingError,
    CapacityError,
    ConfigError,
    DifferencingError,
    EnvelopeError,
    InvalidScoresError,
    InvalidValueError,
    ProtectionRefusedError,
    ProtocolError,
    QuorumNotMetError,
    RecoveryError,
    SignatureError,
    SizeLimitError,
)
from fedinfer_flower.privacy.base import KeyPair, ScorePlan
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.mask_graph import neighbours
from fedinfer_flower.privacy.mask_recovery import SIGNATURE_DOMAIN, MaskedSum
from fedinfer_flower.privacy.masked_answer import MaskedAnswer, MaskedTotal
from fedinfer_flower.privacy.masks import RingArray, leaf, mask, pair_key
from fedinfer_flower.privacy.plain import Plain
from fedinfer_flower.privacy.recovery_messages import (
    Phase,
    RecoveryRequest,
    pack_records,
    read_records,
    survivors_statement,
)
from fedinfer_flower.privacy.secagg import SecAgg
from fedinfer_flower.privacy.self_mask import combine_shares, open_share, self_seed
from fedinfer_flower.wire.identity import Identity, PublicIdentity
from fedinfer_flower.wire.recovery import RecoveryCall
from fedinfer_flower.wire.roster import Roster, Seat

SIGNIFICANCE = 1e-6
SEED = 20_262
RULE = RULES.get("mean-probability")()
POOL = [Identity.generate() for _ in range(200)]
PLAIN_PAIRS, SELF = SecAgg(), SecAgg(self_mask=True)
both = pytest.mark.parametrize("protection", [PLAIN_PAIRS, SELF], ids=["pairs", "self"])


class Batch:
    """One batch: sites with keys and scores, a coordinator, a querier with its keys."""

    def __init__(
        self,
        n_sites: int,
        protection: SecAgg = PLAIN_PAIRS,
        *,
        n_queries: int = 1,
        n_classes: int = 3,
        scores: np.ndarray | None = None,
        seed: int = SEED,
        query_id: str = "q-0",
        keys: KeyPair | None = None,
        sites: list[Identity] | None = None,
    ) -> None:
        self.protection, self.n_queries = protection, n_queries
        self.sites = POOL[:n_sites] if sites is None else sites
        seats = tuple(Seat(identity=s.public, commitment="0" * 64) for s in self.sites)
        self.keys = protection.make_keys() if keys is None else keys
        self.cohort = Cohort(
            query_id=query_id, roster=Roster(seats), public_key=self.keys.public_key
        )
        self.plan = ScorePlan.for_rule(RULE, n_classes=n_classes, n_sites_max=n_sites)
        rng = np.random.default_rng(seed)
        drawn = rng.dirichlet(np.ones(n_classes), (n_sites, n_queries))
        self.scores = drawn if scores is None else scores
        self.codec = protection.codec(self.plan)

    @property
    def count(self) -> int:
        return self.n_queries * self.plan.width

    def place(self, site: int) -> int:
        return self.cohort.roster.place_of(self.sites[site].key_id)

    def payload(self, site: int) -> bytes:
        side = self.protection.site_side(
            self.plan,
            public_key=self.keys.public_key,
            cohort=self.cohort,
            identity=self.sites[site],
        )
        return side.protect(self.scores[site])

    def coordinator(self) -> MaskedSum:
        return self.protection.coordinator_side(
            self.plan,
            n_queries=self.n_queries,
            rule=RULE,
            public_key=self.keys.public_key,
            cohort=self.cohort,
        )

    def filled(self, sites: Iterable[int]) -> MaskedSum:
        side = self.coordinator()
        for site in sites:
            side.add(self.payload(site), sender=self.sites[site].key_id)
        return side

    def reply(
        self,
        site: int,
        request: bytes,
        admit: Callable[[frozenset[str]], None] = lambda dropped: None,
    ) -> bytes:
        return self.protection.recovery_reply(
            request, cohort=self.cohort, identity=self.sites[site], admit=admit
        )

    def recover(self, side: MaskedSum, *, silent: Collection[int] = ()) -> list[dict[int, bytes]]:
        """Run all rounds of recovery; return the replies of each."""
        rounds = []
        while requests := side.recovery_requests():
            replies = {
                site: self.reply(site, requests[identity.key_id])
                for site, identity in enumerate(self.sites)
                if identity.key_id in requests and site not in silent
            }
            for site, reply in replies.items():
                side.add_recovery(reply, sender=self.sites[site].key_id)
            rounds.append(replies)
        return rounds

    def open(self, total: bytes, n_sites: int) -> np.ndarray:
        side = self.protection.querier_side(self.plan, keys=self.keys, cohort=self.cohort)
        return side.open(total, n_queries=self.n_queries, n_sites=n_sites)

    def exact(self, sites: Iterable[int]) -> np.ndarray:
        """Return the sum modulo nothing but the codec."""
        return self.codec.decode(self.codec.encode(self.scores[list(sites)]).sum(axis=0))

    # What an adversary works out from keys that it has.

    def entries(self, site: int, payload: bytes) -> RingArray:
        n_shares = len(self.neighbours(site)) if self.protection.self_mask else 0
        answer = MaskedAnswer.from_bytes(
            payload, context=self.cohort.context(), count=self.count, n_shares=n_shares
        )
        return answer.entries.copy()

    def neighbours(self, site: int) -> tuple[int, ...]:
        return neighbours(self.place(site), len(self.sites), self.cohort.roster.digest())

    def querier_mask(self, site: int) -> RingArray:
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        secret = X25519PrivateKey.from_private_bytes(self.keys.secret_key)
        peer = self.sites[site].public.agreement_key
        pair = pair_key(secret, peer, self.cohort.session())
        return mask(leaf(pair, "querier", self.cohort.batch_id), self.count)

    def pair(self, site: int, other: int) -> bytes:
        peer = self.sites[other].public.agreement_key
        return pair_key(self.sites[site].agreement, peer, self.cohort.session())

    def pair_mask(self, site: int, other: int) -> RingArray:
        """Return the mask of a pair with the sign that `site` gives it."""
        stream = mask(leaf(self.pair(site, other), "pair", self.cohort.batch_id), self.count)
        return stream if self.place(site) < self.place(other) else -stream

    def decoded(self, entries: RingArray) -> np.ndarray:
        return self.codec.decode(entries).reshape(self.n_queries, self.plan.width)


def assert_uniform(entries: RingArray) -> None:
    """Require uniform high and low bits; a score of this size has constant high ones."""
    for shift in (0, 12, 24):
        counts = np.bincount((entries >> np.uint32(shift)) & 255, minlength=256)
        assert stats.chisquare(counts).pvalue > SIGNIFICANCE


def looks_uniform(entries: RingArray) -> bool:
    try:
        assert_uniform(entries)
    except AssertionError:
        return False
    return True


# -- exact sums ----------------------------------------------------------------------------


def random_schedule(rng: np.random.Generator, n_sites: int, protection: SecAgg) -> list[int]:
    """Return who answers, in which order."""
    n_dropped = int(rng.integers(0, protection.dropouts_max(n_sites) + 1))
    return rng.permutation(n_sites)[n_dropped:].tolist()


def check_schedule(batch: Batch, order: list[int]) -> None:
    side = batch.filled(order)
    batch.recover(side)
    np.testing.assert_array_equal(batch.open(side.total(), len(order)), batch.exact(order))


def test_sum_is_exact_in_a_thousand_random_schedules() -> None:
    rng = np.random.default_rng(SEED)
    for number in range(1000):
        # Secret sharing is by far the slowest part, so fewer of these, with fewer sites.
        self_mask = number % 6 == 0
        n_sites = int(rng.integers(3, 8 if self_mask else 13))
        protection = SecAgg(
            self_mask=self_mask,
            dropout_share=float(rng.choice([0.0, 1 / 3, 1 / 3 if self_mask else 0.45])),
        )
        batch = Batch(n_sites, protection, seed=number, query_id=f"q-{number}")
        check_schedule(batch, random_schedule(rng, n_sites, protection))


@pytest.mark.parametrize(("n_sites", "self_mask"), [(60, False), (200, False), (60, True)])
def test_sum_of_many_sites_is_exact(n_sites: int, self_mask: bool) -> None:
    rng = np.random.default_rng(SEED)
    protection = SecAgg(self_mask=self_mask)
    n_dropped = protection.dropouts_max(n_sites) if not self_mask else 5
    order = rng.permutation(n_sites)[n_dropped:].tolist()
    check_schedule(Batch(n_sites, protection), order)


def test_sum_of_a_thousand_sites_is_exact() -> None:
    sites = [Identity.generate() for _ in range(1000)]
    batch = Batch(1000, sites=sites)
    check_schedule(batch, list(range(2, 1000)))


@both
def test_extreme_scores_do_not_wrap(protection: SecAgg) -> None:
    batch = Batch(9, protection, scores=np.tile([[1.0, 0.0, -1.0]], (9, 1, 1)))
    side = batch.filled(range(9))
    batch.recover(side)
    np.testing.assert_array_equal(batch.open(side.total(), 9), [[9.0, 0.0, -9.0]])


# -- the cost of dropouts ------------------------------------------------------------------


def test_batch_without_dropouts_needs_no_further_round() -> None:
    side = Batch(7).filled(range(7))
    assert side.recovery_requests() == {}
    assert side.total()


@pytest.mark.parametrize("n_dropped", [1, 2])
def test_dropout_costs_one_round_and_32_bytes_a_pair(n_dropped: int) -> None:
    batch = Batch(7)
    side = batch.filled(range(n_dropped, 7))

    rounds = batch.recover(side)

    assert len(rounds) == 1
    assert len(rounds[0]) == 7 - n_dropped
    for reply in rounds[0].values():
        # A seed and the number of its site, for each pair; the two lists' lengths.
        assert len(reply) == n_dropped * (32 + 4) + 2 * 4


def test_dropout_far_from_a_site_in_a_sparse_graph_costs_it_nothing() -> None:
    batch = Batch(120)
    side = batch.filled(range(1, 120))
    asked = side.recovery_requests()
    beside = {batch.cohort.roster.key_ids[p] for p in batch.neighbours(0)}
    assert set(asked) == beside
    assert len(asked) == 50


def test_self_masks_cost_two_rounds_in_every_batch() -> None:
    for sites in (range(7), range(1, 7)):
        batch = Batch(7, SELF)
        rounds = batch.recover(batch.filled(sites))
        assert len(rounds) == 2
        assert {len(reply) for reply in rounds[0].values()} == {64}


@pytest.mark.parametrize(("n_sites", "self_mask"), [(5, False), (5, True), (1000, True)])
def test_payload_is_hardly_longer_than_float32(n_sites: int, self_mask: bool) -> None:
    plan = ScorePlan.for_rule(RULE, n_classes=1000, n_sites_max=n_sites)
    size = SecAgg(self_mask=self_mask).payload_bytes(plan, 256)
    assert size <= 1.05 * 4 * 256 * 1000
    if n_sites == 5:
        batch = Batch(5, SecAgg(self_mask=self_mask), n_queries=256, n_classes=1000)
        assert len(batch.payload(0)) == size


# -- refusals at the coordinator -----------------------------------------------------------


def wrong_payloads(batch: Batch) -> dict[str, tuple[bytes, str, type[ProtocolError]]]:
    good, own = batch.payload(3), batch.sites[3].key_id
    n_sites, protection = len(batch.sites), batch.protection
    other_batch = Batch(n_sites, protection, query_id="q-1", keys=batch.keys)
    other_querier = Batch(n_sites, protection)
    other_roster = Batch(n_sites, protection, keys=batch.keys, sites=POOL[1 : n_sites + 1])
    return {
        "a second answer": (batch.payload(0), batch.sites[0].key_id, BindingError),
        "unknown sender": (good, POOL[150].key_id, BindingError),
        "no sender": (good, "", BindingError),
        "another batch": (other_batch.payload(3), own, BindingError),
        "another querier": (other_querier.payload(3), own, BindingError),
        "another roster": (other_roster.payload(2), own, BindingError),
        "cut": (good[:-1], own, EnvelopeError),
        "too long": (good + b"\0", own, SizeLimitError),
        "random": (np.random.default_rng(1).bytes(len(good)), own, EnvelopeError),
    }


@both
def test_wrong_payload_is_a_typed_error_and_leaves_no_trace(protection: SecAgg) -> None:
    batch = Batch(5, protection)
    side = batch.filled([0, 1, 2])
    for label, (payload, sender, error) in wrong_payloads(batch).items():
        with pytest.raises(error):
            side.add(payload, sender=sender)
        assert side.n_sites == 3, label
    side.add(batch.payload(4), sender=batch.sites[4].key_id)

    batch.recover(side)

    opened = batch.open(side.total(), 4)
    np.testing.assert_array_equal(opened, batch.exact([0, 1, 2, 4]))


@both
def test_answer_after_the_survivors_were_fixed_is_refused(protection: SecAgg) -> None:
    batch = Batch(5, protection)
    side = batch.filled([0, 1, 2, 3])
    assert side.recovery_requests()
    late = batch.payload(4)
    with pytest.raises(BindingError, match="after the survivors"):
        side.add(late, sender=batch.sites[4].key_id)


def test_answer_after_the_total_is_refused() -> None:
    batch = Batch(4)
    side = batch.filled([0, 1, 2, 3])
    side.total()
    with pytest.raises(BindingError, match="after the survivors"):
        side.add(batch.payload(3), sender=batch.sites[3].key_id)


@both
def test_too_few_survivors_are_refused_by_the_coordinator(protection: SecAgg) -> None:
    side = Batch(9, protection).filled(range(5))
    with pytest.raises(QuorumNotMetError):
        side.recovery_requests()
    with pytest.raises(QuorumNotMetError):
        side.total()


@both
def test_total_before_recovery_is_refused(protection: SecAgg) -> None:
    side = Batch(6, protection).filled(range(1, 6))
    with pytest.raises(RecoveryError, match="still holds masks"):
        side.total()


@both
def test_recovery_reply_that_nobody_asked_for_is_refused(protection: SecAgg) -> None:
    batch = Batch(6, protection)
    side = batch.filled(range(1, 6))
    reply = pack_records({0: bytes(32)}, 32) + pack_records({}, 16)
    with pytest.raises(BindingError):  # before anything was asked
        side.add_recovery(reply, sender=batch.sites[1].key_id)
    side.recovery_requests()
    for stranger in (batch.sites[0], POOL[100]):  # dropped, or not in the roster
        with pytest.raises(BindingError):
            side.add_recovery(reply, sender=stranger.key_id)
    batch = Batch(6, protection)
    side = batch.filled(range(1, 6))
    batch.recover(side)
    with pytest.raises(BindingError):  # after everything was done
        side.add_recovery(reply, sender=batch.sites[1].key_id)


@both
def test_wrong_recovery_replies_are_typed_errors_and_leave_no_trace(protection: SecAgg) -> None:
    batch = Batch(6, protection)
    side = batch.filled(range(1, 6))
    while requests := side.recovery_requests():
        for site in range(1, 6):
            key_id = batch.sites[site].key_id
            good = batch.reply(site, requests[key_id])
            odd = [b"", good[:-1], good + b"\0", bytes(len(good)), good[::-1], bytes(64)]
            more = pack_records({batch.place(0): bytes(32), batch.place(2): bytes(32)}, 32)
            for bad in [*odd, more + pack_records({}, 16)]:
                with pytest.raises(ProtocolError):
                    side.add_recovery(bad, sender=key_id)
            side.add_recovery(good, sender=key_id)
            side.add_recovery(good, sender=key_id)  # twice is once
    np.testing.assert_array_equal(batch.open(side.total(), 5), batch.exact(range(1, 6)))


# -- late dropouts and damaged help ----------------------------------------------------------


def test_site_that_answers_and_leaves_ends_the_batch() -> None:
    batch = Batch(6)
    side = batch.filled(range(1, 6))
    with pytest.raises(RecoveryError, match="answered and then left"):
        batch.recover(side, silent=[4])
    with pytest.raises(RecoveryError):
        side.total()


def test_site_that_leaves_when_nobody_dropped_out_is_no_matter_under_self_masks() -> None:
    batch = Batch(6, SELF)
    side = batch.filled(range(6))
    batch.recover(side, silent=[4, 5])
    np.testing.assert_array_equal(batch.open(side.total(), 6), batch.exact(range(6)))


def test_more_leaving_than_may_ends_the_batch_under_self_masks() -> None:
    batch = Batch(6, SELF)
    with pytest.raises(RecoveryError, match="confirmed who survived"):
        batch.recover(batch.filled(range(6)), silent=[3, 4, 5])


def test_shares_that_do_not_come_end_the_batch() -> None:
    batch = Batch(6, SELF)
    side = batch.filled(range(6))
    for number in range(2):
        requests = side.recovery_requests()
        for site in range(6 if number == 0 else 3):
            key_id = batch.sites[site].key_id
            side.add_recovery(batch.reply(site, requests[key_id]), sender=key_id)
    with pytest.raises(RecoveryError, match="shares of the self-mask"):
        side.recovery_requests()
    with pytest.raises(RecoveryError):
        side.total()


def test_seed_that_is_made_up_spoils_the_sum_and_the_querier_notices() -> None:
    batch = Batch(6, n_queries=4)
    side = batch.filled(range(1, 6))
    requests = side.recovery_requests()
    for site in range(1, 6):
        key_id = batch.sites[site].key_id
        reply = batch.reply(site, requests[key_id])
        if site == 3:
            reply = pack_records({batch.place(0): bytes(32)}, 32) + pack_records({}, 16)
        side.add_recovery(reply, sender=key_id)
    assert side.recovery_requests() == {}
    # Twelve uniform entries: within the bound by chance with 1e-4 to the power of twelve.
    with pytest.raises(InvalidScoresError):
        batch.open(side.total(), 5)


def test_sealed_share_that_was_altered_costs_that_share_only() -> None:
    batch = Batch(6, SELF)
    side = batch.filled(range(6))
    for number in range(2):
        requests = side.recovery_requests()
        for site in range(6):
            key_id = batch.sites[site].key_id
            request = requests[key_id]
            if number and site == 2:
                asked = RecoveryRequest.from_bytes(request, batch.cohort)
                shares = {place: bytes(32) for place in asked.shares}
                request = dataclasses.replace(asked, shares=shares).to_bytes(6)
            reply = batch.reply(site, request)
            if number and site == 2:
                assert read_records(read_records(reply, 32, 6)[1], 16, 6)[0] == {}
            side.add_recovery(reply, sender=key_id)
    assert side.recovery_requests() == {}
    np.testing.assert_array_equal(batch.open(side.total(), 6), batch.exact(range(6)))


# -- refusals at the sites -----------------------------------------------------------------


def asked_of(
    batch: Batch, survivors: Iterable[int], phase: Phase = Phase.REVEAL, **more: object
) -> bytes:
    """Return a request that a coordinator makes up."""
    made_up = RecoveryRequest(
        phase=phase,
        context=batch.cohort.context(),
        survivors=frozenset(batch.place(site) for site in survivors),
        **more,  # type: ignore[arg-type]
    )
    return made_up.to_bytes(len(batch.sites))


def signatures(batch: Batch, signers: Iterable[int], survivors: Iterable[int]) -> dict[int, bytes]:
    places = frozenset(batch.place(site) for site in survivors)
    statement = survivors_statement(batch.cohort, places)
    return {batch.place(s): batch.sites[s].sign(SIGNATURE_DOMAIN, statement) for s in signers}


@both
@pytest.mark.parametrize("phase", Phase)
def test_site_refuses_to_open_a_sum_of_few(protection: SecAgg, phase: Phase) -> None:
    batch = Batch(9, protection)
    least = protection.least_sites(9)
    signed = signatures(batch, range(9), range(least - 1))
    with pytest.raises(ProtectionRefusedError, match=f"{least} sites or more"):
        batch.reply(0, asked_of(batch, range(least - 1), phase, signatures=signed))


def on_the_circle(batch: Batch) -> list[int]:
    """Return the sites in the order of the circle: neighbours of neighbours, step by step."""
    beside = {site: set(batch.neighbours(site)) for site in range(len(batch.sites))}
    site_at = {batch.place(site): site for site in beside}
    ring, left = [0], set(beside) - {0}
    while left:
        # The next on the circle shares 48 of its 50 neighbours with this one; so does the one
        # before, which is taken already but for the first step.
        here = beside[ring[-1]]
        near = [site_at[place] for place in here if site_at[place] in left]
        ring.append(max(near, key=lambda other: (len(beside[other] & here), other)))
        left.remove(ring[-1])
    return ring


@both
@pytest.mark.parametrize("phase", Phase)
def test_site_refuses_dropouts_that_cut_the_circle(protection: SecAgg, phase: Phase) -> None:
    """A coordinator that names the dropouts would open the sum of the few in between."""
    batch = Batch(150, protection)
    ring = on_the_circle(batch)
    between, gone = ring[25:30], {*ring[:25], *ring[30:55]}
    survivors = [site for site in range(150) if site not in gone]
    assert len(survivors) >= protection.least_sites(150)
    # It would cut: no survivor beyond the gaps shares a mask with those in between.
    places = {batch.place(site) for site in survivors if site not in between}
    assert not any(places & set(batch.neighbours(site)) for site in between)
    signed = signatures(batch, survivors, survivors)
    request = asked_of(batch, survivors, phase, signatures=signed)
    for site in (between[2], ring[60], ring[100]):
        with pytest.raises(ProtectionRefusedError, match="share too few masks"):
            batch.reply(site, request)


@pytest.mark.parametrize("seed", range(4))
def test_site_accepts_a_third_of_150_that_dropped_out_by_chance(seed: int) -> None:
    order = np.random.default_rng(seed).permutation(150).tolist()
    survivors = order[50:]
    batch = Batch(150)
    assert batch.reply(survivors[0], asked_of(batch, survivors))
    shared = Batch(150, SELF)
    assert shared.reply(survivors[0], asked_of(shared, survivors, Phase.CONFIRM))


@both
def test_site_refuses_to_open_a_sum_without_itself(protection: SecAgg) -> None:
    batch = Batch(9, protection)
    with pytest.raises(ProtectionRefusedError, match="its own answer"):
        batch.reply(0, asked_of(batch, range(1, 9)))


def test_site_refuses_to_reveal_without_enough_confirmations() -> None:
    batch = Batch(6, SELF)
    everyone = range(6)
    good = signatures(batch, range(4), everyone)
    assert batch.reply(0, asked_of(batch, everyone, signatures=good))
    other = Batch(6, SELF, query_id="q-1", keys=batch.keys)
    forged = {place: bytes(64) for place in range(6)}
    swapped = dict(zip(good, [*list(good.values())[1:], b"\0" * 64], strict=True))
    cases = {
        "too few": signatures(batch, range(3), everyone),
        "none": {},
        "forged": forged,
        "of another set": signatures(batch, everyone, range(5)),
        "of another batch": signatures(other, everyone, everyone),
        "of each other": swapped,
    }
    for signed in cases.values():
        with pytest.raises(SignatureError):
            batch.reply(0, asked_of(batch, everyone, signatures=signed))


def test_dropped_sites_do_not_count_as_confirmations() -> None:
    batch = Batch(6, SELF)
    survivors = range(2, 6)
    signed = signatures(batch, [0, 1, 2, 3, 4], survivors)  # two of them are not in the set
    with pytest.raises(SignatureError, match="3 sites confirmed"):
        batch.reply(2, asked_of(batch, survivors, signatures=signed))


def test_confirm_round_without_self_masks_is_refused() -> None:
    batch = Batch(6)
    with pytest.raises(EnvelopeError, match="confirm round"):
        batch.reply(0, asked_of(batch, range(6), Phase.CONFIRM))


@both
def test_request_of_another_batch_is_refused(protection: SecAgg) -> None:
    batch = Batch(6, protection)
    for other in (Batch(6, protection, query_id="q-1", keys=batch.keys), Batch(6, protection)):
        with pytest.raises(BindingError):
            batch.reply(0, asked_of(other, range(6)))


class Remembering:
    """A site's memory as a real one has it: it answered this batch."""

    def __init__(self, batch: Batch, site: int) -> None:
        self.batch = batch
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        self.memory = ContextMemory(context)
        self.memory.identity = batch.sites[site]
        self.memory.admit(
            batch.cohort.query_id, recovery_context(batch.cohort, batch.protection, run_id=1)
        )

    def reply(self, request: bytes, **changes: object) -> bytes:
        call = RecoveryCall(
            query_id=self.batch.cohort.query_id,
            protection=self.batch.protection.name,
            protection_options=self.batch.protection.options(),
            public_key=self.batch.keys.public_key,
            roster=self.batch.cohort.roster,
            request=request,
        )
        return answer_recovery(dataclasses.replace(call, **changes), self.memory, run_id=1)  # type: ignore[arg-type]


@both
def test_site_counts_one_set_of_sites_as_dropped_for_ever(protection: SecAgg) -> None:
    batch = Batch(9, protection)
    phase = Phase.CONFIRM if protection.self_mask else Phase.REVEAL
    site = Remembering(batch, 8)
    first = site.reply(asked_of(batch, range(1, 9), phase))
    for survivors in (range(2, 9), range(9), [0, *range(2, 9)]):
        with pytest.raises(DifferencingError):
            site.reply(asked_of(batch, survivors, phase))
    assert site.reply(asked_of(batch, range(1, 9), phase)) == first


def test_site_refuses_recovery_on_other_terms_than_it_answered() -> None:
    batch = Batch(9, SELF)
    site = Remembering(batch, 8)
    request = asked_of(batch, range(1, 9), Phase.CONFIRM)
    weaker = dict(SecAgg(self_mask=False).options())
    for changes in (
        {"protection_options": weaker},
        {"protection_options": dict(SecAgg(self_mask=True, dropout_share=0.2).options())},
        {"query_id": "q-1"},
        {"public_key": SecAgg().make_keys().public_key},
    ):
        with pytest.raises(BindingError):
            site.reply(request, **changes)
    with pytest.raises(ProtectionRefusedError):
        site.reply(request, protection="plain", protection_options={})


# -- what one party alone sees -------------------------------------------------------------

WIDE = {"n_queries": 2**14, "n_classes": 4}
ZEROS = np.zeros((5, 2**14, 4))


@both
def test_coordinator_sees_uniform_payloads_and_a_uniform_total(protection: SecAgg) -> None:
    batch = Batch(5, protection, scores=ZEROS, **WIDE)
    side = batch.coordinator()
    for site in range(5):
        payload = batch.payload(site)
        assert_uniform(batch.entries(site, payload))
        side.add(payload, sender=batch.sites[site].key_id)
    if protection.self_mask:
        batch = Batch(5, protection, scores=ZEROS, keys=batch.keys, **WIDE)
        side = batch.filled(range(5))
        batch.recover(side)
    total = side.total()
    read = MaskedTotal.from_bytes(
        total, context=batch.cohort.context(), count=batch.count, n_sites=5
    )
    assert_uniform(read.entries)
    # The test can fail: without the querier's masks all is zero.
    opened = batch.open(total, 5)
    assert not opened.any()
    assert not looks_uniform(np.zeros(batch.count, dtype=np.uint32))


@both
def test_total_after_dropouts_is_uniform_to_the_coordinator(protection: SecAgg) -> None:
    batch = Batch(6, protection, scores=np.zeros((6, 2**14, 4)), **WIDE)
    side = batch.filled(range(1, 6))
    batch.recover(side)
    read = MaskedTotal.from_bytes(
        side.total(), context=batch.cohort.context(), count=batch.count, n_sites=6
    )
    assert_uniform(read.entries)


@both
def test_equal_inputs_give_different_payloads_in_every_batch(protection: SecAgg) -> None:
    scores = np.tile([[[0.5, 0.25, 0.25]]], (4, 1, 1))
    keys = protection.make_keys()
    payloads = [
        Batch(4, protection, scores=scores, query_id=f"q-{number}", keys=keys).payload(0)[36:48]
        for number in range(50)
    ]
    payloads += [Batch(4, protection, scores=scores).payload(site)[36:48] for site in range(4)]
    assert len(set(payloads)) == len(payloads)


@both
def test_payload_does_not_depend_on_the_input(protection: SecAgg) -> None:
    batch = Batch(5, protection, **WIDE)
    inputs = batch.scores[0].ravel()
    signed = batch.entries(0, batch.payload(0)).view(np.int32)
    # Correlation of n independent pairs is normal with deviation 1 / sqrt(n): 4.9 is 1e-6.
    limit = 4.9 / np.sqrt(batch.count)
    for bits in (signed, signed & 255, signed >> 16):
        assert abs(np.corrcoef(bits, inputs)[0, 1]) < limit
    # Unprotected, the same regression finds the input.
    plain = Plain().site_side(batch.plan, public_key=b"").protect(batch.scores[0])
    assert np.corrcoef(np.frombuffer(plain, "<f4"), inputs)[0, 1] > 0.999


@both
def test_querier_alone_cannot_open_a_single_payload(protection: SecAgg) -> None:
    # The same view is that of coordinator and querier pooling what they have: all payloads
    # and all of the querier's secrets. Pair masks remain.
    batch = Batch(5, protection, scores=ZEROS, **WIDE)
    for site in range(3):
        left = batch.entries(site, batch.payload(site)) - batch.querier_mask(site)
        assert_uniform(left)


def test_only_pair_masks_are_between_the_querier_and_a_payload() -> None:
    # The control of the test above: with those as well the scores are bare.
    batch = Batch(5, n_queries=3)
    left = batch.entries(0, batch.payload(0)) - batch.querier_mask(0)
    for other in range(1, 5):
        left = left - batch.pair_mask(0, other)
    np.testing.assert_array_equal(batch.decoded(left), batch.exact([0]))


@both
def test_querier_opens_no_sum_with_masks_left_in_it(protection: SecAgg) -> None:
    batch = Batch(5, protection, n_queries=4)
    raw = MaskedTotal(
        context=batch.cohort.context(),
        survivors=frozenset(batch.place(site) for site in range(1, 5)),
        entries=sum(
            (batch.entries(s, batch.payload(s)) for s in range(1, 5)),
            start=np.zeros(batch.count, dtype=np.uint32),
        ),
    ).to_bytes(5)
    with pytest.raises(InvalidScoresError):
        batch.open(raw, 4)


@both
@pytest.mark.parametrize("n_colluding", [1, 2, 3])
def test_colluding_sites_and_querier_learn_the_sum_of_the_others_only(
    protection: SecAgg, n_colluding: int
) -> None:
    batch = Batch(5, protection, scores=ZEROS, **WIDE)
    honest = range(n_colluding, 5)
    payloads = {site: batch.payload(site) for site in honest}
    left = {}
    for site in honest:
        left[site] = batch.entries(site, payloads[site]) - batch.querier_mask(site)
        for friend in range(n_colluding):
            left[site] = left[site] - batch.pair_mask(site, friend)
        assert_uniform(left[site])
    total = sum(left.values(), start=np.zeros(batch.count, dtype=np.uint32))
    # Of all honest ones together nothing but their own masks is left: none without them.
    assert looks_uniform(total) == protection.self_mask
    if not protection.self_mask:
        assert not batch.decoded(total).any()


# -- coordinator and querier together, lying about dropouts ----------------------------------


def seeds_of(reply: bytes, n_sites: int) -> dict[int, bytes]:
    return read_records(reply, 32, n_sites)[0]


def without_pairs(batch: Batch, victim: int, seeds: dict[int, bytes]) -> RingArray:
    """Return the victim's payload without the querier's mask and these pairs' masks."""
    left = batch.entries(victim, batch.payload(victim)) - batch.querier_mask(victim)
    for site, seed in seeds.items():
        stream = mask(seed, batch.count)
        left = left - stream if batch.place(victim) < batch.place(site) else left + stream
    return left


def test_lie_about_a_dropout_opens_one_answer_where_there_are_no_self_masks() -> None:
    batch = Batch(5, n_queries=3)
    victim, others = 0, range(1, 5)
    sites = {site: Remembering(batch, site) for site in others}

    # Everybody answered; the coordinator says that the victim did not.
    replies = {s: sites[s].reply(asked_of(batch, others)) for s in others}

    seeds = {s: seeds_of(reply, 5)[batch.place(victim)] for s, reply in replies.items()}
    stolen = batch.decoded(without_pairs(batch, victim, seeds))
    np.testing.assert_array_equal(stolen, batch.exact([victim]))


@pytest.mark.parametrize("protection", [PLAIN_PAIRS, SELF], ids=["pairs", "self"])
def test_late_answer_is_open_to_coordinator_and_querier_unless_there_are_self_masks(
    protection: SecAgg,
) -> None:
    """Nobody lies: the answer arrives after the others made good for it."""
    batch = Batch(6, protection, scores=np.full((6, 2**14, 4), 0.25), **WIDE)
    victim, others = 0, range(1, 6)
    side = batch.coordinator()
    for site in others:
        side.add(batch.payload(site), sender=batch.sites[site].key_id)
    replies = batch.recover(side)[-1]

    seeds = {s: seeds_of(reply, 6)[batch.place(victim)] for s, reply in replies.items()}
    left = without_pairs(batch, victim, seeds)
    if protection.self_mask:
        assert_uniform(left)
    else:
        np.testing.assert_array_equal(batch.decoded(left), batch.exact([victim]))


def test_lie_about_a_dropout_fails_under_self_masks() -> None:
    batch = Batch(6, SELF, scores=np.zeros((6, 2**14, 4)), **WIDE)
    victim, others, everyone = 0, range(1, 6), range(6)
    payload = batch.payload(victim)
    sealed = dict(
        zip(
            batch.neighbours(victim),
            MaskedAnswer.from_bytes(
                payload, context=batch.cohort.context(), count=batch.count, n_shares=5
            ).shares,
            strict=True,
        )
    )
    sites = {site: Remembering(batch, site) for site in others}
    # First they confirm that the victim is gone, and hand over its pairs ...
    confirmed = {
        batch.place(s): sites[s].reply(asked_of(batch, others, Phase.CONFIRM)) for s in others
    }
    seeds = {}
    for s in others:
        # ... its sealed share beside, in the hope that they open it as well.
        mine = {batch.place(victim): sealed[batch.place(s)]}
        asked = asked_of(batch, others, signatures=confirmed, shares=mine)
        reply = sites[s].reply(asked)
        found, rest = read_records(reply, 32, 6)
        seeds[s] = found[batch.place(victim)]
        assert read_records(rest, 16, 6)[0] == {}
    # ... so that all that is left on its answer is its own mask: uniform.
    left = batch.entries(victim, payload) - batch.querier_mask(victim)
    for s, seed in seeds.items():
        stream = mask(seed, batch.count)
        left = left - stream if batch.place(victim) < batch.place(s) else left + stream
    assert_uniform(left)

    # Then they are to confirm that it survived, or to reveal as if they had.
    for s in others:
        for phase in Phase:
            signed = signatures(batch, others, everyone)  # as if all others had
            with pytest.raises(DifferencingError):
                sites[s].reply(asked_of(batch, everyone, phase, signatures=signed))
        # Confirmations of the one set are none of the other.
        with pytest.raises(SignatureError):
            batch.reply(s, asked_of(batch, everyone, signatures=confirmed))


def test_self_mask_that_was_removed_leaves_the_pairs() -> None:
    # The other order: shares of the victim's mask first, as for a survivor.
    batch = Batch(6, SELF, scores=np.zeros((6, 2**14, 4)), **WIDE)
    victim, others, everyone = 0, range(1, 6), range(6)
    payload = batch.payload(victim)
    answer = MaskedAnswer.from_bytes(
        payload, context=batch.cohort.context(), count=batch.count, n_shares=5
    )
    sealed = dict(zip(batch.neighbours(victim), answer.shares, strict=True))
    signed = signatures(batch, others, everyone)
    shares = {}
    sites = {site: Remembering(batch, site) for site in others}
    for s in others:
        mine = {batch.place(victim): sealed[batch.place(s)]}
        asked = asked_of(batch, everyone, signatures=signed, shares=mine)
        seeds, rest = read_records(sites[s].reply(asked), 32, 6)
        assert seeds == {}
        number = batch.neighbours(victim).index(batch.place(s))
        shares[number] = read_records(rest, 16, 6)[0][batch.place(victim)]
    needed = dict(list(shares.items())[:3])
    own = mask(self_seed(combine_shares(needed), batch.cohort.batch_id), batch.count)
    left = answer.entries - batch.querier_mask(victim) - own
    assert_uniform(left)
    # The control: with the pairs, which no site hands over any more, it is bare.
    for other in others:
        left = left - batch.pair_mask(victim, other)
    assert not left.any()
    for s in others:
        with pytest.raises(DifferencingError):
            sites[s].reply(asked_of(batch, others, Phase.CONFIRM))


def test_colluding_sites_hold_too_few_shares_of_a_self_mask() -> None:
    # Two of nine help coordinator and querier; threshold 5 of 8. With all pairs of the victim
    # and their two shares its own mask stays.
    batch = Batch(9, SELF, scores=np.zeros((9, 2**14, 4)), **WIDE)
    victim = 0
    payload = batch.payload(victim)
    answer = MaskedAnswer.from_bytes(
        payload, context=batch.cohort.context(), count=batch.count, n_shares=8
    )
    beside = batch.neighbours(victim)
    shares = {}
    for friend in (7, 8):
        number = beside.index(batch.place(friend))
        shares[number] = open_share(
            answer.shares[number],
            batch.pair(friend, victim),
            batch.cohort.batch_id,
            sender=batch.place(victim),
        )
    guess = mask(self_seed(combine_shares(shares), batch.cohort.batch_id), batch.count)
    bare = answer.entries - batch.querier_mask(victim)
    for other in range(1, 9):
        bare = bare - batch.pair_mask(victim, other)
    assert_uniform(bare)
    assert_uniform(bare - guess)


def test_twenty_neighbours_of_a_site_in_a_sparse_graph_remove_its_self_mask() -> None:
    # A limit of self-masks beyond 51 sites, not a promise: where many neighbours of one site
    # may drop out, two fifths of them must suffice, and so do two fifths of liars.
    batch = Batch(80, SELF)
    victim = 0
    answer = MaskedAnswer.from_bytes(
        batch.payload(victim), context=batch.cohort.context(), count=batch.count, n_shares=50
    )
    beside = batch.neighbours(victim)
    shares = {}
    for number in range(20):
        friend = next(s for s in range(80) if batch.place(s) == beside[number])
        pair = batch.pair(friend, victim)
        shares[number] = open_share(
            answer.shares[number], pair, batch.cohort.batch_id, sender=batch.place(victim)
        )

    def bare(chosen: dict[int, bytes]) -> np.ndarray:
        own = mask(self_seed(combine_shares(chosen), batch.cohort.batch_id), batch.count)
        left = answer.entries - batch.querier_mask(victim) - own
        for other in range(1, 80):
            if batch.place(other) in beside:
                left = left - batch.pair_mask(victim, other)
        return batch.decoded(left)

    np.testing.assert_array_equal(bare(shares), batch.exact([victim]))
    nineteen = {number: shares[number] for number in range(19)}
    assert not np.array_equal(bare(nineteen), batch.exact([victim]))


# -- keys ----------------------------------------------------------------------------------


def test_roster_refuses_two_sites_with_one_key() -> None:
    a, b = Identity.generate().public, Identity.generate().public
    twin = PublicIdentity(signing_key=b.signing_key, agreement_key=a.agreement_key)
    third = Seat(identity=Identity.generate().public, commitment="0" * 64)
    for second in (a, twin):
        seats = tuple(Seat(identity=i, commitment="0" * 64) for i in (a, second))
        with pytest.raises(EnvelopeError, match="same key twice"):
            Roster((*seats, third))


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)], ids=["zero", "one"])
def test_key_of_low_order_stops_the_site(point: bytes) -> None:
    batch = Batch(4)
    no_querier = Batch(4, keys=KeyPair(public_key=point, secret_key=b""))
    with pytest.raises(EnvelopeError):
        no_querier.payload(0)
    weak = PublicIdentity(signing_key=POOL[9].public.signing_key, agreement_key=point)
    identities = [*(s.public for s in POOL[:3]), weak]
    with pytest.raises(EnvelopeError):
        protect_beside(batch, identities)


def protect_beside(batch: Batch, identities: list[PublicIdentity]) -> bytes:
    """Let the first site of the pool answer in a roster of these."""
    roster = Roster(tuple(Seat(identity=i, commitment="0" * 64) for i in identities))
    side = batch.protection.site_side(
        batch.plan,
        public_key=batch.keys.public_key,
        cohort=dataclasses.replace(batch.cohort, roster=roster),
        identity=POOL[0],
    )
    return side.protect(batch.scores[0])


def test_sides_refuse_what_does_not_belong_to_them() -> None:
    batch = Batch(4)
    public_key = batch.keys.public_key
    with pytest.raises(ConfigError, match="roster"):
        PLAIN_PAIRS.site_side(batch.plan, public_key=public_key, identity=POOL[0])
    with pytest.raises(ConfigError, match="own keys"):
        PLAIN_PAIRS.site_side(batch.plan, public_key=public_key, cohort=batch.cohort)
    with pytest.raises(BindingError):
        PLAIN_PAIRS.site_side(
            batch.plan, public_key=public_key, cohort=batch.cohort, identity=POOL[100]
        )
    with pytest.raises(BindingError, match="another querier's key"):
        PLAIN_PAIRS.querier_side(batch.plan, keys=PLAIN_PAIRS.make_keys(), cohort=batch.cohort)
    with pytest.raises(BindingError, match="the plan 5"):
        PLAIN_PAIRS.site_side(
            dataclasses.replace(batch.plan, n_sites_max=5),
            public_key=public_key,
            cohort=batch.cohort,
            identity=POOL[0],
        )
    no_key = KeyPair(public_key=public_key, secret_key=b"short")
    with pytest.raises(ConfigError, match="no X25519 key"):
        PLAIN_PAIRS.querier_side(batch.plan, keys=no_key, cohort=batch.cohort)


def test_repr_shows_no_keys_and_no_scores() -> None:
    batch = Batch(4, SELF)
    side = PLAIN_PAIRS.site_side(
        batch.plan, public_key=batch.keys.public_key, cohort=batch.cohort, identity=POOL[0]
    )
    texts = [repr(side), repr(batch.filled(range(4)))]
    for text in texts:
        assert len(text) < 80
    for secret in (batch.keys.secret_key, POOL[0].agreement.private_bytes_raw()):
        assert not any(secret.hex() in text for text in texts)


@pytest.mark.parametrize("share", [-0.01, 0.5, 1.0, float("nan")])
def test_dropout_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(InvalidValueError):
        SecAgg(dropout_share=share)


@pytest.mark.parametrize(
    ("n_sites", "share", "dropouts"),
    [(3, 1 / 3, 0), (4, 1 / 3, 1), (5, 0.49, 2), (6, 1 / 3, 2), (9, 1 / 3, 3), (9, 0.0, 0)],
)
def test_dropouts_that_are_allowed(n_sites: int, share: float, dropouts: int) -> None:
    protection = SecAgg(dropout_share=share)
    assert protection.dropouts_max(n_sites) == dropouts
    assert protection.least_sites(n_sites) == n_sites - dropouts


def test_cohort_beyond_the_ring_is_refused() -> None:
    plan = ScorePlan.for_rule(RULE, n_classes=3, n_sites_max=2**24)
    with pytest.raises(CapacityError):
        SecAgg().codec(plan)


def test_self_masks_with_more_than_a_third_of_dropouts_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="at most a third"):
        SecAgg(self_mask=True, dropout_share=0.4)
    assert SecAgg(self_mask=True).dropout_share == pytest.approx(1 / 3)
