import pytest

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.reporting import wilson_interval


# Wilson score intervals without continuity correction. 81/263 and 0/20, 1/29: Newcombe,
# Statistics in Medicine 17 (1998) 857-872, table I, method 3.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval_known_values(successes, n, low, high):
    # The table gives four decimals.
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5.1e-5)


def test_wilson_interval_is_inside_unit_and_holds_the_share():
    for n in range(1, 40):
        for successes in range(n + 1):
            low, high = wilson_interval(successes, n)
            assert 0 <= low <= successes / n <= high <= 1


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_wilson_interval_impossible_counts_are_refused(successes, n):
    with pytest.raises(InvalidValueError):
        wilson_interval(successes, n)
