"""What every protection promises; a new one is tested by being registered.

A noisy protection is compared statistically, at a significance of 1e-6 a test: a failure
by chance once in a million runs. A masked one is compared exactly, as it is exact modulo its
codec; what hides it is tested in `tests/privacy/test_secagg.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from fedinfer_flower.ensemble.base import RULES, Disclosure, EnsembleRule
from fedinfer_flower.errors import (
    CapacityError,
    EnvelopeError,
    InvalidScoresError,
    ProtocolError,
    QuorumNotMetError,
    ShapeError,
)
from fedinfer_flower.privacy import PROTECTIONS, KeyPair, Protection, ScorePlan, make_protection
from fedinfer_flower.privacy.cohort import Cohort
from fedinfer_flower.privacy.he import ckks_tolerance
from fedinfer_flower.privacy.mask_recovery import MaskedSum
from fedinfer_flower.wire.identity import Identity
from fedinfer_flower.wire.roster import Roster, Seat

VARIANTS: dict[str, list[dict[str, object]]] = {
    "he": [{"scheme": "bfv"}, {"scheme": "ckks"}],
    "dp": [
        {"mechanism": "gaussian", "epsilon": 8.0},
        {"mechanism": "randomised-response", "epsilon": 3.0},
    ],
    "secagg": [{"self_mask": False}, {"self_mask": True}],
    "secagg+dp": [{"epsilon": 8.0, "self_mask": False}, {"epsilon": 8.0, "self_mask": True}],
    "he+dp": [{"epsilon": 8.0}],
}
CASES = [
    pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
    for name in PROTECTIONS.names()
    for options in VARIANTS.get(name, [{}])
]
N_SITES, N_QUERIES, N_CLASSES = 5, 40, 3
SCORES_RULES = ("median", "dawid-skene")

# Two-sided tail of a standard normal at 1e-6.
Z_1E6 = 4.892


class Round:
    """One batch under one protection, with seeded scores of honest sites that have keys."""

    def __init__(
        self,
        protection: Protection,
        rule_name: str,
        n_queries: int = N_QUERIES,
        keys: KeyPair | None = None,
    ) -> None:
        self.protection = protection
        self.rule: EnsembleRule = RULES.get(rule_name)()
        self.n_queries = n_queries
        self.plan = ScorePlan.for_rule(self.rule, n_classes=N_CLASSES, n_sites_max=N_SITES)
        self.keys = protection.make_keys() if keys is None else keys
        rng = np.random.default_rng(7)
        scores = rng.dirichlet(np.ones(N_CLASSES), (N_SITES, n_queries))
        if rule_name in ("majority-vote", "dawid-skene"):
            scores = np.eye(N_CLASSES)[scores.argmax(axis=-1)]
        self.scores = scores
        self.identities = [Identity.generate() for _ in range(N_SITES)]
        seats = tuple(Seat(identity=i.public, commitment="0" * 64) for i in self.identities)
        self.cohort = Cohort(query_id="q-0", roster=Roster(seats), public_key=self.keys.public_key)

    def site(self, number: int = 0):
        return self.protection.site_side(
            self.plan,
            public_key=self.keys.public_key,
            cohort=self.cohort,
            identity=self.identities[number],
        )

    def coordinator(self):
        return self.protection.coordinator_side(
            self.plan,
            n_queries=self.n_queries,
            rule=self.rule,
            public_key=self.keys.public_key,
            cohort=self.cohort,
        )

    def querier(self):
        return self.protection.querier_side(self.plan, keys=self.keys, cohort=self.cohort)

    def payloads(self) -> list[bytes]:
        return [self.site(k).protect(scores) for k, scores in enumerate(self.scores)]

    def add(self, side, payload: bytes | memoryview, number: int) -> None:
        side.add(payload, sender=self.identities[number].key_id)

    def fill(self, payloads: list[bytes], order: list[int] | None = None):
        """Return a coordinator's side with the answers of these sites."""
        side = self.coordinator()
        for number in range(len(payloads)) if order is None else order:
            self.add(side, payloads[number], number)
        return side

    def total(self, side) -> bytes:
        """Return the total, after all that survivors do for it where answers are masked."""
        while isinstance(side, MaskedSum) and (requests := side.recovery_requests()):
            for site in self.identities:
                if site.key_id in requests:
                    reply = self.protection.recovery_reply(
                        requests[site.key_id],
                        cohort=self.cohort,
                        identity=site,
                        admit=lambda dropped: None,
                    )
                    side.add_recovery(reply, sender=site.key_id)
        return side.total()

    def opened(self, total: bytes, n_sites: int = N_SITES):
        return self.querier().open(total, n_queries=self.n_queries, n_sites=n_sites)


def rule_for(protection: Protection) -> str:
    for name in ("mean-probability", "majority-vote"):
        if not protection.check_rule(RULES.get(name)()):
            return name
    pytest.fail(f"{protection} works with neither probabilities nor votes")


def tolerance(protection: Protection) -> float | None:
    """Distance from the clear sum that the docs allow; None for noise."""
    if protection.name == "plain":
        return N_SITES * 2.0**-24  # each score is rounded to 24 bits
    if protection.name == "secagg":
        return N_SITES * 2.0**-17  # 16 fraction bits for so few sites, half a step each
    if protection.name == "he":
        # 16 fraction bits for so few sites, half a step of rounding each.
        bfv = N_SITES * 2.0**-17
        return bfv if protection.options()["scheme"] == "bfv" else ckks_tolerance(N_SITES)
    return None


@pytest.fixture
def protection(name: str, options: dict[str, object]) -> Protection:
    return make_protection(name, options)


@pytest.fixture
def batch(protection: Protection) -> Round:
    return Round(protection, rule_for(protection))


@pytest.fixture
def filled(batch: Round):
    return batch.fill(batch.payloads())


pytestmark = pytest.mark.parametrize(("name", "options"), CASES)


def test_exact_protection_opens_to_the_clear_sum(protection, batch, filled):
    limit = tolerance(protection)
    if limit is None:
        pytest.skip("noisy: see the statistical tests")

    opened = batch.opened(batch.total(filled))

    assert opened.shape == (N_QUERIES, N_CLASSES)
    assert opened.dtype == np.float64
    np.testing.assert_allclose(opened, batch.scores.sum(axis=0), rtol=0.0, atol=limit)


def test_noisy_protection_opens_to_the_clear_sum_on_average(protection):
    if tolerance(protection) is not None:
        pytest.skip("exact")
    batch = Round(protection, rule_for(protection), n_queries=4000)
    side = batch.fill(batch.payloads())

    error = batch.opened(batch.total(side)) - batch.scores.sum(axis=0)

    # Rows are independent, so a column's mean error has a normal distribution (4000 rows).
    z = error.mean(axis=0) / (error.std(axis=0) / math.sqrt(len(error)))
    assert error.std() > 0.01
    assert np.abs(z).max() < Z_1E6 + 0.3  # three columns: 0.3 more than covers them


def test_order_of_sites_does_not_matter(batch):
    payloads = batch.payloads()
    totals = []
    for order in ([0, 1, 2, 3, 4], [4, 2, 3, 1, 0]):
        side = batch.fill(payloads, order)
        totals.append(batch.opened(batch.total(side)))

    # 1e-12: float64 sums of five float32 numbers; everything else is exact.
    np.testing.assert_allclose(totals[0], totals[1], rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("missing", range(N_SITES))
def test_sum_without_one_site_opens_to_the_clear_sum(protection, missing):
    batch = Round(protection, rule_for(protection), n_queries=4)
    payloads = batch.payloads()
    others = [number for number in range(N_SITES) if number != missing]

    opened = batch.opened(batch.total(batch.fill(payloads, others)), n_sites=N_SITES - 1)

    assert opened.shape == (4, N_CLASSES)
    limit = tolerance(protection)
    if limit is not None:
        expected = batch.scores[others].sum(axis=0)
        np.testing.assert_allclose(opened, expected, rtol=0.0, atol=limit)


def test_scores_rule_is_combined_by_the_rule(protection):
    if protection.reveals < Disclosure.SCORES:
        pytest.skip("reveals the sum only")
    rules = [n for n in SCORES_RULES if not protection.check_rule(RULES.get(n)())]
    assert rules
    batch = Round(protection, rules[0])
    side = batch.fill(batch.payloads())

    opened = batch.opened(batch.total(side))

    assert opened.shape == (N_QUERIES, N_CLASSES)
    assert np.isfinite(opened).all()
    if tolerance(protection) is not None:
        expected = batch.rule.combine(batch.scores)
        np.testing.assert_allclose(opened, expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("n_queries", [1, 2, 700, 1400])
def test_payload_is_no_longer_than_promised(protection, n_queries):
    batch = Round(protection, rule_for(protection), n_queries=n_queries)

    payload = batch.site().protect(batch.scores[0])

    assert type(payload) is bytes
    assert 0 < len(payload) <= protection.payload_bytes(batch.plan, n_queries)


def bad_payloads(good: bytes, other_shape: bytes) -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(11)
    yield "empty", b""
    yield "one byte", b"\0"
    yield "truncated", good[:-1]
    yield "halved", good[: len(good) // 2]
    yield "extended", good + b"\0"
    yield "doubled", good + good
    yield "random", rng.bytes(len(good))
    # As floats, integers and labels alike: more than any honest site sends.
    yield "huge", b"\x7f" * len(good)
    yield "oversized", rng.bytes(3 * len(good) + 100_000)
    yield "another batch", other_shape


def test_bad_payload_is_refused_and_leaves_the_sum_unchanged(protection, batch):
    payloads = batch.payloads()
    side = batch.fill(payloads[:-1])
    other = Round(protection, rule_for(protection), n_queries=N_QUERIES + 1, keys=batch.keys)
    for label, bad in bad_payloads(payloads[-1], other.payloads()[0]):
        for form in (bad, memoryview(bad)):
            with pytest.raises(ProtocolError):
                batch.add(side, form, N_SITES - 1)
        assert side.n_sites == N_SITES - 1, label

    batch.add(side, memoryview(payloads[-1]), N_SITES - 1)

    assert side.n_sites == N_SITES
    # Bit for bit the total of the same payloads without the bad ones among them.
    total = batch.total(side)
    assert total == batch.total(batch.fill(payloads))
    assert batch.opened(total).shape == (N_QUERIES, N_CLASSES)


def test_bad_payload_leaves_the_sum_of_the_others_unchanged(protection, batch):
    payloads = batch.payloads()
    side = batch.fill(payloads[:-1])
    for _, bad in bad_payloads(payloads[-1], b""):
        with pytest.raises(ProtocolError):
            batch.add(side, bad, N_SITES - 1)
    assert batch.total(side) == batch.total(batch.fill(payloads[:-1]))


def test_bad_total_is_refused(batch, filled):
    good = batch.total(filled)
    for _, bad in bad_payloads(good, good[: len(good) // 3]):
        with pytest.raises(ProtocolError):
            batch.opened(bad)


def test_scores_that_no_rule_sends_are_refused_at_the_site(batch):
    site = batch.site()
    for value in (np.nan, np.inf, -np.inf, 1.0001 * batch.plan.bound, 1e300):
        scores = batch.scores[0].copy()
        scores[3, 1] = value
        with pytest.raises(InvalidScoresError) as caught:
            site.protect(scores)
        assert "1.0001" not in str(caught.value)
    for shape in ((0, N_CLASSES), (N_QUERIES, N_CLASSES + 1), (N_CLASSES,), (1, 1, N_CLASSES)):
        with pytest.raises(ShapeError):
            site.protect(np.zeros(shape))


def test_a_score_at_the_bound_is_accepted(batch):
    scores = np.zeros((N_QUERIES, N_CLASSES))
    scores[:, 0] = batch.plan.bound
    assert batch.site().protect(scores)


def test_one_site_too_many_is_refused(batch):
    payloads = batch.payloads()
    side = batch.fill(payloads)
    with pytest.raises(CapacityError):
        batch.add(side, payloads[0], 0)
    assert side.n_sites == N_SITES
    assert batch.total(side) == batch.total(batch.fill(payloads))


def test_too_small_a_cohort_is_not_released(protection, batch):
    payloads = batch.payloads()
    least = protection.least_sites(N_SITES)
    assert protection.min_cohort <= least <= N_SITES
    for n_sites in range(N_SITES + 1):
        side = batch.fill(payloads[:n_sites])
        if n_sites < least:
            with pytest.raises(QuorumNotMetError):
                batch.total(side)
            with pytest.raises(QuorumNotMetError):
                side.total()
        else:
            assert batch.total(side)


def test_impossible_number_of_sites_does_not_open(protection, batch, filled):
    total = batch.total(filled)
    for n_sites in (-1, 0, protection.least_sites(N_SITES) - 1, N_SITES + 1):
        with pytest.raises(EnvelopeError):
            batch.opened(total, n_sites=n_sites)


def test_same_options_make_the_same_protection(protection, name):
    again = make_protection(name, protection.options())
    assert again == protection
    assert again.name == name


# -- secrets ----------------------------------------------------------------------------


def secret_windows(keys: KeyPair) -> list[bytes]:
    """Cut the secret key into windows, without those that are public anyway."""
    secret, size = keys.secret_key, 32
    cut = (secret[i : i + size] for i in range(0, max(len(secret) - size, 1), size))
    return [window for window in cut if window and window not in keys.public_key]


def reachable(root: object) -> Iterator[object]:
    """Walk everything that an object holds, but not its classes and modules."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        yield item
        if isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            stack += item
        stack += list(getattr(item, "__dict__", {}).values())


def test_secret_key_never_leaves_the_querier(protection, batch, filled):
    windows = secret_windows(batch.keys)
    assert bool(windows) == bool(batch.keys.secret_key)
    assert bool(windows) >= protection.needs_key
    public = [batch.keys.public_key, batch.total(filled), *batch.payloads()]

    for blob in public:
        assert not any(window in blob for window in windows)


def test_coordinator_and_site_hold_no_secret(batch, filled):
    windows = secret_windows(batch.keys)
    for side in (filled, batch.site()):
        for item in reachable(side):
            assert not isinstance(item, KeyPair)
            if side is filled:  # nor the secret keys of a site
                assert not isinstance(item, Identity)
            if isinstance(item, bytes):
                assert not any(window in item for window in windows)
            if hasattr(item, "is_private"):
                assert not item.is_private()


def test_repr_shows_no_secret_and_no_scores(protection, batch, filled):
    querier = batch.querier()
    secret = batch.keys.secret_key
    for item in (protection, batch.keys, batch.site(), filled, querier):
        text = repr(item)
        assert len(text) < 300 or not secret or item is batch.keys
        for window in secret_windows(batch.keys):
            assert window.hex() not in text
            assert repr(window)[2:-1] not in text
        assert "array(" not in text
