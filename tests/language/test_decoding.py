"""How a continuation is chosen, and where it ends."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.language.confidence import EVIDENCE, evidence
from fedinfer_flower.language.decoding import Decoding

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 5.0, 0.0]])


def draws(settings, n=2000):
    sampler = settings.sampler()
    return torch.cat([sampler.choose(LOGITS) for _ in range(n)], 1)


def test_default_is_greedy():
    settings = Decoding()
    assert settings.greedy
    assert settings.sampler().choose(LOGITS).tolist() == [[0], [2]]


def test_sampling_follows_the_probabilities():
    taken = draws(Decoding(temperature=1.0, seed=1))
    share = torch.stack([(taken == i).float().mean(1) for i in range(4)], 1)
    # 2,000 draws: a share is off by at most 0.045 but once in 20,000 draws of the seed.
    assert (share - LOGITS.softmax(-1)).abs().max() < 0.045


def test_temperature_divides_the_logits():
    taken = draws(Decoding(temperature=2.0, seed=1))
    share = torch.stack([(taken == i).float().mean(1) for i in range(4)], 1)
    assert (share - (LOGITS / 2).softmax(-1)).abs().max() < 0.045


def test_top_k_and_top_p_cut_the_tail():
    assert set(draws(Decoding(temperature=1.0, top_k=2))[0].tolist()) == {0, 1}
    # Probabilities 0.64, 0.24, 0.09, 0.03: the first two make 0.88.
    assert set(draws(Decoding(temperature=1.0, top_p=0.8))[0].tolist()) == {0, 1}
    assert set(draws(Decoding(temperature=1.0, top_p=0.5))[0].tolist()) == {0}
    assert set(draws(Decoding(temperature=1.0, top_k=99))[0].tolist()) == {0, 1, 2, 3}


def test_same_seed_same_draws_and_no_trace_in_the_global_generator():
    before = torch.get_rng_state()
    a, b = (draws(Decoding(temperature=1.0, seed=7), 50) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, draws(Decoding(temperature=1.0, seed=8), 50))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 10**6},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1e-30},  # logits divided by it are infinite
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"stop": "."},
        {"stop": ("",)},
        {"stop": ["."]},  # a list would leave the settings without a hash
        {"seed": -1},
        {"seed": 1 << 64},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(InvalidValueError):
        Decoding(**options)


def test_coldest_temperature_still_gives_numbers():
    taken = Decoding(temperature=1e-3).sampler().choose(1e4 * LOGITS)
    assert taken.tolist() == [[0], [2]]


def test_earliest_stop_counts():
    settings = Decoding(stop=(" .", ".", "end"))
    assert settings.ends_in("at the end . no") == 7
    assert settings.ends_in("a.end") == 1
    assert settings.ends_in("a .") == 1
    assert settings.ends_in("nothing") == -1
    assert Decoding().ends_in("anything . at all") == -1


# -- evidence ----------------------------------------------------------------------------


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=20))
def test_evidence_is_within_its_bounds(row):
    p, entropy, margin, abstains = evidence(torch.tensor([row]), [0])[0].tolist()
    slack = 1e-5  # float32
    assert 1 / len(row) - slack <= p <= 1 + slack
    assert -slack <= entropy <= math.log(len(row)) + slack
    assert -slack <= margin <= p + slack
    assert -slack <= abstains <= p + slack


def test_evidence_of_known_logits():
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log()
    shown = evidence(logits, [1, 2, 2])[0]
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    expected = torch.tensor([0.7, entropy, 0.5, 0.3])
    assert len(EVIDENCE) == len(shown)
    torch.testing.assert_close(shown, expected, atol=1e-6, rtol=0)


def test_evidence_without_abstentions_and_in_half_precision():
    shown = evidence(torch.tensor([[3.0, 1.0]], dtype=torch.bfloat16), [])
    assert shown.dtype == torch.float32
    assert shown[0, 3] == 0.0
