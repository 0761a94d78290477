from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import CapacityError, InvalidScoresError, InvalidValueError
from fedinfer_flower.privacy.fixed_point import FixedPoint

RING, BFV_MODULUS = 2**32, 67104769


@pytest.mark.parametrize(
    ("clip", "modulus", "largest"),
    [
        (16.0, BFV_MODULUS, 511),
        (16.0, RING, 32_767),
        (1.0, BFV_MODULUS, 8_191),
        (1.0, RING, 524_287),
    ],
)
def test_capacity_edge(clip: float, modulus: int, largest: int) -> None:
    codec = FixedPoint(clip=clip, frac_bits=12, n_sites_max=largest, modulus=modulus)
    assert codec.largest_cohort == largest
    for sign in (1.0, -1.0):
        total = largest * codec.encode(np.array([sign * clip]))
        assert codec.decode(total % modulus)[0] == sign * largest * clip

    with pytest.raises(CapacityError, match=f"at most {largest} sites"):
        FixedPoint(clip=clip, frac_bits=12, n_sites_max=largest + 1, modulus=modulus)


def test_sum_past_capacity_would_have_wrapped() -> None:
    codec = FixedPoint(clip=1.0, frac_bits=12, n_sites_max=8191, modulus=BFV_MODULUS)
    assert codec.decode(8193 * codec.encode(np.array([1.0])))[0] < 0.0


def test_noise_takes_room() -> None:
    FixedPoint(clip=1.0, frac_bits=12, n_sites_max=1, modulus=RING, noise_std_int=2.0e8)
    with pytest.raises(CapacityError, match="not even one site"):
        FixedPoint(clip=1.0, frac_bits=12, n_sites_max=1, modulus=RING, noise_std_int=2.2e8)


@pytest.mark.parametrize(
    ("clip", "n_sites", "bits"),
    [(1.0, 1, 16), (1.0, 511, 16), (1.0, 512, 15), (1.0, 8191, 12), (16.0, 8191, 8)],
)
def test_fitted_takes_the_finest_grid_that_holds(clip: float, n_sites: int, bits: int) -> None:
    codec = FixedPoint.fitted(clip=clip, n_sites_max=n_sites, modulus=BFV_MODULUS)
    assert codec.frac_bits == bits


def test_fitted_refuses_less_than_8_bits() -> None:
    with pytest.raises(CapacityError, match="at most 8191 sites"):
        FixedPoint.fitted(clip=16.0, n_sites_max=8192, modulus=BFV_MODULUS)


def test_encode_refuses_what_is_no_score() -> None:
    codec = FixedPoint(clip=1.0, frac_bits=12, n_sites_max=1, modulus=RING)
    assert codec.encode(np.array([1.0 + 9e-7, -1.0 - 9e-7])).tolist() == [4096, -4096]
    for value in (np.nan, np.inf, -np.inf, 1.000002, -1.1):
        with pytest.raises(InvalidScoresError):
            codec.encode(np.array([0.0, value]))


@given(
    values=st.lists(st.floats(-5.0, 5.0), min_size=1, max_size=20),
    bits=st.integers(8, 16),
    modulus=st.sampled_from([RING, BFV_MODULUS]),
)
def test_sum_decodes_within_half_a_step_an_entry(
    values: list[float], bits: int, modulus: int
) -> None:
    codec = FixedPoint(clip=5.0, frac_bits=bits, n_sites_max=len(values), modulus=modulus)
    residues = sum(int(codec.encode(np.array([v]))[0]) % modulus for v in values) % modulus

    # Half a step each; 1e-12 for adding floats in the reference.
    slack = len(values) * codec.step / 2.0 + 1e-12
    assert abs(float(codec.decode([residues])[0]) - sum(values)) <= slack


@pytest.mark.parametrize(
    "changed",
    [
        {"clip": 0.0},
        {"clip": float("nan")},
        {"clip": float("inf")},
        {"frac_bits": -1},
        {"frac_bits": 31},
        {"n_sites_max": 0},
        {"modulus": 1},
        {"modulus": 2**63},
        {"noise_std_int": -1.0},
        {"noise_std_int": float("inf")},
    ],
)
def test_nonsense_is_refused(changed: dict[str, float]) -> None:
    sound = {"clip": 1.0, "frac_bits": 12, "n_sites_max": 1, "modulus": RING}
    with pytest.raises(InvalidValueError):
        FixedPoint(**(sound | changed))
