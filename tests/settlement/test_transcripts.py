"""What each role holds at the end, and what of it says nothing of a single answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedinfer_flower.errors import SettlementError
from fedinfer_flower.incentives import make_scheme
from fedinfer_flower.settlement import BlindedRows, EvidenceBook, EvidenceForm
from fedinfer_flower.settlement.ckks_rows import blinded_row_sum, signed_constant
from fedinfer_flower.settlement.epoch import Epoch
from fedinfer_flower.settlement.ring import ONE, centred, encode_rows, stream
from fedinfer_flower.settlement.shares import (
    SEALED_HALF_BYTES,
    CoordinatorHalf,
    open_half,
    split_rows,
)
from fedinfer_flower.wire.identity import Identity

SEED = 7


def chi_square(octets: np.ndarray) -> float:
    counts = np.bincount(octets, minlength=256)
    expected = len(octets) / 256
    return float(((counts - expected) ** 2 / expected).sum())


# Quantile at 1 - 1e-6 of chi-square with 255 degrees of freedom.
CHI_SQUARE_255 = 375.0


def halves_of(rows_bc):
    site, querier = Identity.generate(), Identity.generate()
    half = split_rows(rows_bc, querier=querier.public, identity=site, query_id="q-0")
    seed = open_half(half.sealed, identity=querier, query_id="q-0", site=site.public)
    return half.share_bc, stream(seed, rows_bc.size).reshape(rows_bc.shape)


# -- shares --------------------------------------------------------------------------------


def test_a_share_alone_is_uniform_and_independent_of_the_evidence():
    # The same extreme row over and over: any trace of it would stand out.
    rows = encode_rows(np.tile([1.0, 0.0, 0.0, 0.0], (4000, 1)))

    share, mask = halves_of(rows)

    for ring in (share, mask):
        octets = ring.astype("<u8").view(np.uint8).reshape(-1, 8)
        for place in range(8):
            assert chi_square(octets[:, place]) < CHI_SQUARE_255
    # Correlation of 16,000 independent pairs: five deviations are 0.04.
    assert abs(np.corrcoef(centred(share).ravel(), centred(rows).ravel())[0, 1]) < 0.04
    assert (share + mask == rows).all()


def test_float_shares_would_not_be_uniform():
    # What the ring is there for: x plus a wide Gaussian still shows x on average.
    rows = np.tile([1.0, 0.0, 0.0, 0.0], (4000, 1))
    rng = np.random.default_rng(SEED)
    share = rows - rng.normal(scale=1.0, size=rows.shape)

    assert abs(np.corrcoef(share.ravel(), rows.ravel())[0, 1]) > 0.3


def test_coordinator_with_other_weights_gets_a_uniform_number(make_world):
    found = []
    for _ in range(60):
        # The same answers and audits each time; fresh masks.
        world = make_world(EvidenceForm.SHARES, n_sites=3)
        reply = world.querier_desk(world.desk().request()).settle(world.audits)
        # One answer alone, by a weight matrix with a single entry.
        payload = world.payloads["job-0", world.sites[0].key_id]
        half = CoordinatorHalf.from_bytes(payload, shape=(world.asked["job-0"], 3))
        found.append((int(half.share_bc[0, 0]) + int(reply.halves_k[0])) % 2**64)
    octets = np.array(found, dtype="<u8").view(np.uint8)
    # 480 octets in 16 bins of 30: chi-square of 15 degrees at 1e-6 is 56.5.
    counts = np.bincount(octets >> 4, minlength=16)
    assert ((counts - 30.0) ** 2 / 30.0).sum() < 56.5


def same_totals_other_answers(world, size):
    """Return a change of two sites' evidence that leaves every total as it is."""
    changes = {site.key_id: np.zeros(size, dtype=np.int64) for site in world.sites}
    changes[world.sites[0].key_id][:, 0] = 12_345
    changes[world.sites[0].key_id][:, 1] = -12_345
    changes[world.sites[1].key_id] -= changes[world.sites[0].key_id]
    return changes


def test_querier_transcript_is_the_same_for_other_answers_with_the_same_totals(make_world):
    world = make_world(EvidenceForm.SHARES)
    other = EvidenceBook(EvidenceForm.SHARES)
    for query_id, n_queries in world.asked.items():
        changes = same_totals_other_answers(world, (n_queries, 3))
        for site in world.sites:
            payload = world.payloads[query_id, site.key_id]
            half = CoordinatorHalf.from_bytes(payload, shape=(n_queries, 3))
            share = half.share_bc + changes[site.key_id].view(np.uint64)
            changed = replace(half, share_bc=share).to_bytes()
            other.add(query_id, site.key_id, changed, n_queries=n_queries, n_classes=3)
    desk, second = world.desk(), world.desk(book=other)
    one, two = desk.request(), second.request()

    # All that the querier ever receives: totals, sealed halves, names.
    assert bytes(one.totals) == bytes(two.totals)
    assert bytes(one.halves) == bytes(two.halves)
    assert (one.sites, one.queries) == (two.sites, two.queries)
    # It does not tell the answers apart: their scores differ.
    values = desk.finish(world.querier_desk(one).settle(world.audits)).values
    others = second.finish(world.querier_desk(two).settle(world.audits)).values
    site = world.sites[0].key_id
    assert abs(values[site] - others[site]) > 1e-6


def test_coordinator_transcript_fits_any_answers_with_the_same_sums(make_world):
    world = make_world(EvidenceForm.SHARES)
    desk = world.desk()
    querier = world.querier_desk(desk.request())
    reply = querier.settle(world.audits)
    epoch = Epoch.of(
        desk.request(),
        audits_t3=reply.audits_t3,
        totals_tc=reply.totals_tc,
        scheme=make_scheme("brier-shapley"),
    )
    weights = epoch.weights.grid_tc
    # Two rows traded against each other: the weighted sum stays, both answers change.
    change = np.zeros(weights.shape, dtype=np.int64)
    first, second = (int(weights[t, 0] - weights[t, 1]) for t in (0, 1))
    scale = np.gcd(first, second)
    change[0, :2] = np.array([1, -1]) * (second // scale)
    change[1, :2] = -np.array([1, -1]) * (first // scale)
    assert np.abs(change).max() > 0

    # The coordinator holds shares A, totals and halves b = <M, B>. Answers x + change, with
    # B + change in place of B, give the same A, and the same b; a second site with
    # B - change keeps the totals. B is uniform to the coordinator: both are as likely.
    rng = np.random.default_rng(SEED)
    masks = rng.integers(0, 2**64, size=weights.shape, dtype=np.uint64)
    for moved in (change, -change):
        other = masks + moved.view(np.uint64)
        assert epoch.weights.ring_sum(other) == epoch.weights.ring_sum(masks)


def test_coordinator_and_querier_who_pool_open_everything(make_world):
    # Declared: nothing of one site is safe from both together.
    world = make_world(EvidenceForm.SHARES)
    site, rows = world.sites[2], world.queries["job-0"]
    payload = world.payloads["job-0", site.key_id]
    half = CoordinatorHalf.from_bytes(payload, shape=(world.asked["job-0"], 3))
    seed = open_half(half.sealed, identity=world.querier, query_id="job-0", site=site.public)

    opened = (half.share_bc + stream(seed, half.share_bc.size).reshape(-1, 3)) / ONE

    # Half a grid step of the codec.
    assert np.abs(opened - world.probabilities_ktc[2, rows]).max() <= 0.5 / ONE
    assert len(payload) == SEALED_HALF_BYTES + 8 * half.share_bc.size


# -- what an exact sum of few answers tells -------------------------------------------------


def candidates(weights: np.ndarray, target: int, width: int) -> int:
    """Count the 0/1 vectors with a weighted sum within `width` of the target."""
    half = len(weights) // 2
    sums = []
    for part in (weights[:half], weights[half:]):
        found = np.zeros(1, dtype=np.int64)
        for weight in part:
            found = np.concatenate([found, found + weight])
        sums.append(np.sort(found))
    low = np.searchsorted(sums[1], target - width - sums[0], side="left")
    high = np.searchsorted(sums[1], target + width - sums[0], side="right")
    return int((high - low).sum())


def test_exact_row_sum_of_few_one_hot_answers_is_refused_because_it_can_be_solved(make_world):
    world = make_world(EvidenceForm.SHARES, n_audits=30, n_others=0, n_classes=2)
    desk = world.desk()
    querier = world.querier_desk(desk.request())

    with pytest.raises(SettlementError, match="could be solved"):
        querier.settle(world.audits)

    # Why: of 2**30 vectors of hard answers hardly any has the very sum.
    reply = world.querier_desk(desk.request(), noise_std=0.001).settle(world.audits)
    steps = (reply.weights_tc[:, 1] - reply.weights_tc[:, 0]).astype(np.int64)
    rng = np.random.default_rng(SEED)
    answers = rng.integers(0, 2, size=30)
    exact = candidates(steps, int(steps @ answers), width=0)
    assert 1 <= exact < 2**30 / 2**20
    # Noise of one answer's weight leaves more than a million of them within one deviation.
    noise = int(np.abs(steps).max())
    assert candidates(steps, int(steps @ answers), width=noise) > 2**20


# -- ckks ----------------------------------------------------------------------------------


def test_blinded_rows_decrypt_to_uniform_numbers(make_world, settlement_keys):
    from fedinfer_flower.privacy import he_context
    from fedinfer_flower.settlement.ckks_rows import CIPHERTEXT_BYTES, PRIME, ROWS

    world = make_world(EvidenceForm.CKKS, keys=settlement_keys)
    desk = world.desk()
    reply = world.querier_desk(desk.request()).settle(world.audits)
    blinded = desk.blind(reply)
    context = he_context.load_secret(settlement_keys.secret_key, settlement_keys.public_key, ROWS)
    slots = np.concatenate(
        [
            he_context.decrypt(
                he_context.read_vector(
                    context, ROWS, memoryview(blinded.rows)[at : at + CIPHERTEXT_BYTES], ROWS.slots
                )
            )
            for at in range(0, len(blinded.rows), CIPHERTEXT_BYTES)
        ]
    )

    # 2048 coefficients, uniform below the prime, make slots of this deviation in their real
    # parts; 4096 draws of it are within 7 % at 1e-6. Row sums are below 1024 in all.
    expected = PRIME / np.sqrt(12.0) * np.sqrt(ROWS.slots) / ROWS.scale
    assert 0.93 < np.std(slots) / expected < 1.07
    assert np.std(slots) > 1e7


def test_coordinator_that_weighs_otherwise_reads_an_answer_under_ckks(make_world, settlement_keys):
    # Declared: under `ckks` nobody but the coordinator itself holds it to the weights.
    world = make_world(EvidenceForm.CKKS, keys=settlement_keys)
    # A row in which the sites differ widely, so that reading it tells them apart.
    first = world.probabilities_ktc[:, world.queries["job-0"], 0]
    row = int(np.ptp(first, axis=0).argmax())
    probabilities = first[:, row]
    assert np.ptp(probabilities) > 0.8

    def stolen(noise_std):
        desk = world.desk()
        querier = world.querier_desk(desk.request(), noise_std=noise_std)
        reply = querier.settle(world.audits)
        epoch = Epoch.of(
            desk.request(),
            audits_t3=reply.audits_t3,
            totals_tc=reply.totals_tc,
            scheme=make_scheme("brier-shapley"),
        )
        one = np.zeros((world.asked["job-0"], 3))
        one[row, 0] = 1.0
        rows = [
            blinded_row_sum(
                settlement_keys.public_key, [(world.payloads["job-0", site.key_id], one)]
            )
            for site in world.sites
        ]
        forged = BlindedRows(
            epoch_id=reply.epoch_id, answers_to=reply.digest, rows=b"".join(r for r, _ in rows)
        )
        sums = querier.open_sums(forged).sums_k
        read = [signed_constant(int(s) - blind) for s, (_, blind) in zip(sums, rows, strict=True)]
        return np.array(read), epoch.weights

    runs = [stolen(0.0) for _ in range(6)]
    read, weights = np.mean([one for one, _ in runs], axis=0), runs[0][1]
    # The flooding's deviation is 16 * 7e-4 times the norm of 45 rows' weights, below 0.1; of
    # the mean of six epochs below 0.04, so that 0.3 is more than 7 deviations.
    assert np.abs(read - probabilities).max() < 0.3
    # Noise of three times what one answer can change hides it from this coordinator too.
    errors = [np.abs(stolen(3.0 * weights.sensitivity)[0] - probabilities).max() for _ in range(4)]
    assert max(errors) > 1.0
