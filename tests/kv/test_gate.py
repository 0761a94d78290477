"""Gates by hand: who is taken, who is not, and why; and gates on disk."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import save

from fedinfer_flower.errors import FuserError, InvalidValueError, ShapeError, UnknownNameError
from fedinfer_flower.kv.gate import agreement, make_gate
from fedinfer_flower.kv.gate_file import load_gate, read_gate_card, save_gate
from fedinfer_flower.kv.gates.learned import GateNetwork, LearnedGate, LearnedGateSpec

SURE = [0.95, 0.2, 0.9, 0.02]
UNSURE = [0.4, 1.5, 0.1, 0.2]
ABSTAINS = [0.97, 0.1, 0.95, 0.97]


def chosen(gate, own, *sharers, available=None):
    theirs = torch.tensor([sharers])
    seen = torch.ones(1, len(sharers)) if available is None else torch.tensor([available])
    return gate.choose(torch.tensor([own]), theirs, seen)[0].tolist()


def linear(weights, **spec):
    """Return a gate whose score is a weighted sum of the network's inputs, by index."""
    gate = LearnedGate(LearnedGateSpec(width=2, **spec))
    first, second, last = (gate.network.layers[i] for i in (0, 2, 4))
    with torch.no_grad():
        for layer in (first, second, last):
            layer.weight.zero_()
            layer.bias.zero_()
        # gelu(x) - gelu(-x) = x: two units carry a signed number through.
        for index, weight in weights.items():
            first.weight[0, index] = weight
        first.weight[1] = -first.weight[0]
        second.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
        last.weight.copy_(torch.tensor([[1.0, -1.0]]))
    return gate


def favouring(**spec):
    """Return a gate that scores a sharer by its margin less the receiver's, times 10."""
    return linear({2: 10.0, 6: -10.0}, **spec)


def test_none_takes_everybody_who_is_there():
    assert chosen(make_gate("none"), SURE, UNSURE, ABSTAINS, SURE, available=[1, 1, 0]) == [1, 1, 0]


def test_top_k_takes_the_surest_that_answer():
    assert chosen(make_gate("top-k"), UNSURE, UNSURE, ABSTAINS, SURE) == [0, 0, 1]
    assert chosen(make_gate("top-k", k=2), UNSURE, UNSURE, ABSTAINS, SURE) == [1, 0, 1]
    assert chosen(make_gate("top-k", k=9), UNSURE, UNSURE, ABSTAINS, SURE) == [1, 0, 1]
    assert chosen(make_gate("top-k"), UNSURE, UNSURE, SURE, available=[1, 0]) == [1, 0]


def test_top_k_discounts_who_may_abstain():
    likely_to_abstain = [0.9, 0.4, 0.8, 0.45]
    assert chosen(make_gate("top-k"), UNSURE, likely_to_abstain, [0.6, 1.0, 0.3, 0.0]) == [0, 1]


def test_learned_takes_the_one_best_over_the_margin():
    better = [0.8, 0.5, 0.6, 0.05]
    assert chosen(favouring(margin=0.0), UNSURE, better, SURE, UNSURE) == [0, 1, 0]
    assert chosen(favouring(margin=0.0), SURE, better) == [0]
    # (0.9 - 0.1) * 10 = 8
    assert chosen(favouring(margin=7.9), UNSURE, SURE) == [1]
    assert chosen(favouring(margin=8.1), UNSURE, SURE) == [0]


def test_gate_without_a_margin_takes_nobody():
    assert chosen(favouring(), UNSURE, SURE) == [0]
    assert chosen(LearnedGate(), UNSURE, SURE) == [0]


def test_guard_takes_the_own_answer_at_once():
    guarded = favouring(margin=0.0, own_probability=0.6)
    receiver = [0.7, 1.0, 0.3, 0.05]
    assert chosen(favouring(margin=0.0), receiver, SURE) == [1]
    assert chosen(guarded, receiver, SURE) == [0]
    # Sure to abstain is not sure to know.
    assert chosen(guarded, [0.7, 1.0, 0.3, 0.3], SURE) == [1]
    assert guarded.own_suffices(torch.tensor([receiver, UNSURE])).tolist() == [True, False]


def test_guard_never_takes_who_abstains():
    gate = favouring(margin=0.0)
    assert chosen(gate, UNSURE, ABSTAINS) == [0]
    assert chosen(gate, ABSTAINS, ABSTAINS, ABSTAINS) == [0, 0]
    # The second best is taken where the best abstains.
    assert chosen(gate, UNSURE, ABSTAINS, [0.8, 0.5, 0.6, 0.05]) == [0, 1]


def test_network_scores_a_sharer_whoever_else_is_there():
    torch.manual_seed(0)
    network = GateNetwork(8)
    own, theirs = torch.rand(1, 4), torch.rand(1, 3, 4)
    alone = torch.cat([network(own, theirs[:, j : j + 1]) for j in range(3)], 1)
    # Equal up to the order of sums in a batch of another size.
    assert torch.allclose(network(own, theirs), alone, atol=1e-6)
    assert torch.allclose(network(own, theirs.flip(1)), alone.flip(1), atol=1e-6)
    assert len(set(alone[0].tolist())) == 3


def test_agreement_counts_the_others_that_are_there():
    said = [["Rome", " rome ", "Paris"], ["a", "b", "c"]]
    got = agreement(["ROME", "c"], said, torch.tensor([[1, 1, 1], [1, 0, 1]]))
    expected = torch.tensor([[2 / 3, 2 / 3, 0.0], [0.0, 0.0, 0.5]])
    assert torch.allclose(got, expected)


def test_gate_trained_without_agreement_ignores_it():
    torch.manual_seed(1)
    gate = LearnedGate(LearnedGateSpec(margin=0.0))
    own, theirs, seen = torch.rand(30, 4), torch.rand(30, 3, 4), torch.ones(30, 3)
    with_it = gate.choose(own, theirs, seen, torch.rand(30, 3))
    assert torch.equal(with_it, gate.choose(own, theirs, seen))
    with pytest.raises(ShapeError):
        gate.choose(own, theirs, seen, torch.rand(30, 2))


@pytest.mark.parametrize(
    "build",
    [
        lambda: make_gate("learned"),
        lambda: make_gate("top-k", k=0),
        lambda: make_gate("top-k", k=True),
        lambda: LearnedGateSpec(width=0),
        lambda: LearnedGateSpec(margin=-1.0),
        lambda: LearnedGateSpec(margin=float("nan")),
        lambda: LearnedGateSpec(own_probability=1.5),
        lambda: LearnedGateSpec(own_abstention=None),
        lambda: LearnedGateSpec(uses_agreement=1),
    ],
)
def test_wrong_options_fail_when_built(build):
    with pytest.raises(InvalidValueError):
        build()


def test_unknown_gate_names_the_known():
    with pytest.raises(UnknownNameError, match="top-k"):
        make_gate("top-kk")


# -- on disk -----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(2)
    gate = LearnedGate(LearnedGateSpec(margin=0.25, width=4))
    return save_gate(gate, tmp_path / "gate", {"seed": 2}, receiver="a" * 64)


def rewrite(folder, **changes):
    path = folder / "gate.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replace_weights(folder, tensors):
    data = tensors if isinstance(tensors, bytes) else save(tensors)
    (folder / "gate.safetensors").write_bytes(data)
    rewrite(folder, weights_sha256=hashlib.sha256(data).hexdigest())


def test_file_keeps_spec_card_and_receiver(saved):
    assert load_gate(saved, receiver="a" * 64).spec.margin == 0.25
    assert read_gate_card(saved) == {"seed": 2}
    with pytest.raises(FuserError, match="expected bbbb"):
        load_gate(saved, receiver="b" * 64)


def test_gate_replaces_the_one_in_its_folder(saved):
    save_gate(make_gate("none"), saved)
    assert load_gate(saved).name == "none"
    assert [p.name for p in saved.iterdir()] == ["gate.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": True},
        {"kind": "no-such"},
        {"kind": 7},
        {"kind": "top-k"},
        {"kind": "none"},
        {"options": {}},
        {"options": []},
        {"options": {"width": 4}},
        {"card": None},
        {"receiver": None},
        {"weights_sha256": "0" * 64},
        {"weights_sha256": ""},
        {"more": 1},
    ],
)
def test_json_that_is_not_as_written_is_refused(saved, change):
    rewrite(saved, **change)
    with pytest.raises(FuserError):
        load_gate(saved)


@pytest.mark.parametrize("value", [-1, "NaN", 1e400, [], True])
def test_margin_that_no_calibration_gives_is_refused(saved, value):
    options = json.loads((saved / "gate.json").read_text())["options"]
    rewrite(saved, options=options | {"margin": value})
    with pytest.raises(FuserError):
        load_gate(saved)


def test_weights_other_than_the_spec_implies_are_refused(saved):
    good = load_gate(saved).tensors()
    name = "layers.0.weight"
    broken = [
        {k: v for k, v in good.items() if k != name},
        good | {"more": torch.zeros(1)},
        good | {name: good[name].T.contiguous()},
        good | {name: good[name].double()},
        good | {name: good[name] * float("nan")},
        good | {"scale": torch.zeros(4)},
        b"",
        b"\xff" * 64,
        (1 << 40).to_bytes(8, "little") + b"{}",
    ]
    for tensors in broken:
        replace_weights(saved, tensors)
        with pytest.raises(FuserError):
            load_gate(saved)
    replace_weights(saved, good)
    assert load_gate(saved).spec.margin == 0.25


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"version": NaN}'])
def test_bytes_that_are_no_gate_json_are_refused(saved, data):
    (saved / "gate.json").write_bytes(data)
    with pytest.raises(FuserError):
        load_gate(saved)


def test_missing_and_oversized_files_are_refused(saved):
    (saved / "gate.safetensors").write_bytes(bytes((16 << 20) + 1))
    with pytest.raises(FuserError, match="larger"):
        load_gate(saved)
    (saved / "gate.safetensors").unlink()
    with pytest.raises(FuserError, match=r"no readable gate\.safetensors"):
        load_gate(saved)
    with pytest.raises(FuserError, match=r"no readable gate\.json"):
        load_gate(saved / "nowhere")


def test_card_that_is_not_json_is_refused(tmp_path):
    for card in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises(InvalidValueError):
            save_gate(make_gate("none"), tmp_path, card)
