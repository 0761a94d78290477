"""Every registered gate keeps the contract; a new gate is tested by existing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import FedInferError, InvalidScoresError, InvalidValueError, ShapeError
from fedinfer_flower.kv.gate import GATES, make_gate
from fedinfer_flower.kv.gate_file import load_gate, save_gate
from fedinfer_flower.kv.gates.learned import GateNetwork, LearnedGate, LearnedGateSpec

SEED = 20260302


def gate_of(name):
    if not GATES.get(name).trainable:
        return make_gate(name)
    # Random weights, and no margin: it takes whom it likes.
    torch.manual_seed(SEED)
    spec = LearnedGateSpec(margin=0.0, own_probability=0.95, uses_agreement=True)
    return LearnedGate(spec, GateNetwork(spec.width))


every_gate = pytest.mark.parametrize("name", GATES.names())
shares = st.floats(0.0, 1.0, width=32)


@st.composite
def questions(draw, most=5):
    rows, sharers = draw(st.integers(0, 4)), draw(st.integers(0, most))
    chance = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    own = torch.rand((rows, 4), generator=chance)
    theirs = torch.rand((rows, sharers, 4), generator=chance)
    available = (torch.rand((rows, sharers), generator=chance) < draw(shares)).long()
    agreement = torch.rand((rows, sharers), generator=chance)
    return own, theirs, available, draw(st.sampled_from([agreement, None]))


def test_the_three_kinds_are_there():
    assert {"learned", "none", "top-k"} <= set(GATES.names())


@every_gate
@given(case=questions())
def test_choice_is_zero_or_one_and_of_available_sharers(name, case):
    _, _, available, _ = case
    chosen = gate_of(name).choose(*case)
    assert chosen.shape == available.shape
    assert chosen.dtype == torch.float32
    assert bool(((chosen == 0) | (chosen == 1)).all())
    assert bool((chosen <= available).all())


@every_gate
@given(case=questions(), seed=st.integers(0, 1000))
def test_order_of_sharers_does_not_matter(name, case, seed):
    own, theirs, available, agreement = case
    order = torch.randperm(available.shape[1], generator=torch.Generator().manual_seed(seed))
    gate = gate_of(name)
    turned = None if agreement is None else agreement[:, order]
    other = gate.choose(own, theirs[:, order], available[:, order], turned)
    assert torch.equal(other, gate.choose(*case)[:, order])


@every_gate
@given(case=questions(), rubbish=st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 1e30]))
def test_what_an_absent_or_broken_sharer_says_changes_nothing_for_others(name, case, rubbish):
    own, theirs, available, agreement = case
    if not available.shape[1]:
        return
    gate = gate_of(name)
    absent = available.clone()
    absent[:, 0] = 0
    expected = gate.choose(own, theirs, absent, agreement)
    broken = theirs.clone()
    broken[:, 0] = rubbish
    assert torch.equal(gate.choose(own, broken, absent, agreement), expected)
    # Present, but with evidence that no model has: the same as absent.
    assert torch.equal(gate.choose(own, broken, available, agreement), expected)


@every_gate
def test_questions_do_not_influence_each_other(name):
    chance = torch.Generator().manual_seed(SEED)
    own, theirs = torch.rand((9, 4), generator=chance), torch.rand((9, 3, 4), generator=chance)
    available = torch.ones(9, 3)
    gate = gate_of(name)
    whole = gate.choose(own, theirs, available)
    rows = [gate.choose(own[i : i + 1], theirs[i : i + 1], available[i : i + 1]) for i in range(9)]
    assert torch.equal(whole, torch.cat(rows))


@pytest.mark.parametrize("name", [n for n in GATES.names() if n != "none"])
def test_sharers_that_abstain_are_not_taken(name):
    chance = torch.Generator().manual_seed(SEED)
    own, theirs = torch.rand((50, 4), generator=chance), torch.rand((50, 3, 4), generator=chance)
    theirs[..., 3] = 0.5 + 0.5 * theirs[..., 3]
    assert not bool(gate_of(name).choose(own, theirs, torch.ones(50, 3)).any())


@every_gate
def test_own_suffices_says_what_is_then_chosen(name):
    chance = torch.Generator().manual_seed(SEED)
    own, theirs = torch.rand((50, 4), generator=chance), torch.rand((50, 3, 4), generator=chance)
    own[:25] = torch.tensor([0.99, 0.05, 0.98, 0.0])
    gate = gate_of(name)
    enough = gate.own_suffices(own)
    assert enough.shape == (50,)
    assert enough.dtype == torch.bool
    assert not bool(gate.choose(own, theirs, torch.ones(50, 3))[enough].any())


@every_gate
def test_gate_read_back_chooses_the_same(name, tmp_path):
    chance = torch.Generator().manual_seed(SEED)
    case = (
        torch.rand((50, 4), generator=chance),
        torch.rand((50, 3, 4), generator=chance),
        torch.ones(50, 3),
        torch.rand((50, 3), generator=chance),
    )
    gate = gate_of(name)
    save_gate(gate, tmp_path)
    again = load_gate(tmp_path)
    assert type(again) is type(gate)
    assert again.options() == gate.options()
    assert torch.equal(again.choose(*case), gate.choose(*case))


@every_gate
@pytest.mark.parametrize(
    ("shapes", "error"),
    [
        (((2, 3), (2, 1, 4), (2, 1)), ShapeError),
        (((2, 4), (2, 4), (2, 1)), ShapeError),
        (((2, 4), (3, 1, 4), (3, 1)), ShapeError),
        (((2, 4), (2, 1, 4), (2, 2)), ShapeError),
        (((2, 4), (2, 1, 5), (2, 1)), ShapeError),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name, shapes, error):
    with pytest.raises(error):
        gate_of(name).choose(*(torch.zeros(shape) for shape in shapes))


@every_gate
def test_broken_receiver_is_an_error_that_shows_no_evidence(name):
    own = torch.tensor([[0.123456, math.nan, 0.5, 0.0]])
    with pytest.raises(InvalidScoresError) as caught:
        gate_of(name).choose(own, torch.zeros(1, 1, 4), torch.ones(1, 1))
    assert "0.123" not in str(caught.value)


@every_gate
def test_wrong_option_fails_when_built(name):
    with pytest.raises((InvalidValueError, FedInferError)):
        make_gate(name, no_such_option=1)
