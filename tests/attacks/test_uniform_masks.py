"""Masked words are uniform; biased, short and reused masks are found."""

from __future__ import annotations

import numpy as np
import pytest

from fedinfer_flower.attacks.uniform_masks import MaskedWords, UniformMasks, uniformity_p_value
from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.privacy import noise
from fedinfer_flower.privacy.he import HomomorphicEncryption
from fedinfer_flower.privacy.plain import Plain
from fedinfer_flower.privacy.secagg import SecAgg
from fedinfer_flower.privacy.secagg_dp import SecAggDP


def words(shape: tuple[int, int], bits: int = 32) -> np.ndarray:
    drawn = noise.random_words(shape[0] * shape[1]).reshape(shape)
    return drawn & np.uint64(2**bits - 1)


@pytest.mark.parametrize(
    "protection", [SecAgg(), SecAgg(self_mask=True), SecAggDP()], ids=lambda p: p.name
)
def test_masked_payloads_are_uniform(federation, protection) -> None:
    attack = UniformMasks()
    (evidence,) = attack.evidence(federation, protection).values()

    # Fails by chance once in 10,000 runs.
    assert attack.run(evidence).claim == "kept"
    assert evidence.words.size == 40 * 50 * 10


def test_clear_payloads_are_not(federation) -> None:
    attack = UniformMasks()
    (evidence,) = attack.evidence(federation, Plain()).values()

    assert attack.run(evidence).succeeded


@pytest.mark.parametrize("bits", [32, 64])
def test_uniform_words_pass(bits: int) -> None:
    assert uniformity_p_value(words((20, 1000), bits), ring_bits=bits) > 1e-6


def test_a_mask_that_is_used_twice_is_found() -> None:
    # Each payload alone is uniform; from one to the next only small scores change.
    scores = np.random.default_rng(0).integers(0, 2**12, (20, 1000)).astype(np.uint64)
    twice = (words((1, 1000)) + scores) & np.uint64(2**32 - 1)

    assert UniformMasks().run(MaskedWords(words=twice)).claim == "broken"


def test_a_mask_that_is_too_short_for_the_ring_is_found() -> None:
    short = words((20, 1000), bits=31)

    assert UniformMasks().run(MaskedWords(words=short)).claim == "broken"


def test_a_generator_that_leaves_out_values_is_found() -> None:
    even = words((20, 1000)) & ~np.uint64(1)

    assert UniformMasks().run(MaskedWords(words=even)).claim == "broken"


def test_ciphertexts_are_not_words(federation) -> None:
    assert UniformMasks().evidence(federation, HomomorphicEncryption()) == {}


def test_too_few_words_are_refused() -> None:
    with pytest.raises(InvalidValueError):
        uniformity_p_value(words((2, 10)), ring_bits=32)
