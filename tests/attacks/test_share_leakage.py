"""Real shares with Gaussian noise leak, shares in a ring do not; nor do our payloads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.attacks.federation import digits
from fedinfer_flower.attacks.share_leakage import (
    ObservedShares,
    ShareLeakage,
    gaussian_shares,
    ring_shares,
)
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy.dp import DP
from fedinfer_flower.privacy.he import HomomorphicEncryption
from fedinfer_flower.privacy.plain import Plain
from fedinfer_flower.privacy.secagg import SecAgg


@given(
    values=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
    n_shares=st.integers(2, 5),
    bits=st.sampled_from([32, 64]),
)
def test_ring_shares_add_up(values, n_shares: int, bits: int) -> None:
    shares = ring_shares(np.array(values), n_shares=n_shares, bits=bits)

    total = [sum(int(s) for s in column) % 2**bits for column in shares.T]
    assert total == [value % 2**bits for value in values]


def test_one_gaussian_share_of_an_image_tells_its_class() -> None:
    inputs, labels = digits()
    # Two shares of pixels in [0, 1] with noise of one half: what a system on reals might do.
    share = gaussian_shares(inputs, n_shares=2, std=0.5, seed=0)[0]

    result = ShareLeakage().run(ObservedShares(shares=share, labels=labels))

    # 899 images to tell: chance 0.10, threshold 0.14, a standard error of 0.017.
    assert result.value > 0.3
    assert result.claim == "broken"


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("which", [0, 2])
def test_one_share_of_a_ring_tells_nothing(bits: int, which: int) -> None:
    inputs, labels = digits()
    whole = np.rint(inputs * 2**12).astype(np.int64)
    share = ring_shares(whole, n_shares=3, bits=bits)[which]

    result = ShareLeakage().run(ObservedShares(shares=share, labels=labels, ring_bits=bits))

    # Fails by chance once in 10,000 runs, by the threshold's own error rate.
    assert result.claim == "kept"


def test_the_same_attack_reads_values_of_a_ring_that_are_not_shared() -> None:
    inputs, labels = digits()
    whole = np.rint((inputs - 0.5) * 2**30).astype(np.int64) % 2**32

    result = ShareLeakage().run(ObservedShares(shares=whole, labels=labels, ring_bits=32))

    assert result.value > 0.8


def test_payloads_in_clear_tell_the_label(federation) -> None:
    (evidence,) = ShareLeakage().evidence(federation, Plain()).values()

    result = ShareLeakage().run(evidence)

    assert result.value > 0.95
    assert result.claim == "none"


@pytest.mark.parametrize("protection", [SecAgg(), HomomorphicEncryption()])
def test_masked_and_encrypted_payloads_do_not(federation, protection) -> None:
    attack = ShareLeakage(n_secrets=200)
    (evidence,) = attack.evidence(federation, protection).values()

    # Fails by chance once in 10,000 runs: masks and ciphertexts have no seed.
    assert attack.run(evidence).claim == "kept"


def test_noise_in_the_clear_is_no_share(federation) -> None:
    assert ShareLeakage().evidence(federation, DP()) == {}


@pytest.mark.parametrize(("n_shares", "bits"), [(1, 32), (2, 33)])
def test_impossible_shares_are_refused(n_shares: int, bits: int) -> None:
    with pytest.raises(InvalidValueError):
        ring_shares(np.zeros(2, dtype=np.int64), n_shares=n_shares, bits=bits)
