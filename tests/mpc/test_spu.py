"""The computation itself: clear JAX against torch, and SPU on our shares against both.

SPU runs here in threads of one process, over links in memory; real processes are in
`test_party.py`.
"""

from __future__ import annotations

import threading
from collections import Counter

import numpy as np
import pytest

from fedinfer_flower.mpc import Disclosed, MpcRule, NetworkSpec, runtime
from fedinfer_flower.mpc.forward import joint_function, logits
from fedinfer_flower.mpc.runtime import Computation, Machine, compile_joint
from fedinfer_flower.mpc.shares import (
    decode_integers,
    decode_reals,
    encode_reals,
    held_from_bytes,
    join,
    split,
    zero_masks,
)

from .conftest import NEEDS_SPU, OTHER, SMALL, weights_of

pytestmark = [NEEDS_SPU, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SPECS = (SMALL, OTHER, SMALL)
WEIGHTS = [weights_of(spec, seed) for seed, spec in enumerate(SPECS)]
INPUTS = np.random.default_rng(7).normal(size=(5, 2, 6, 6)).astype(np.float32)


def clear(rule: MpcRule, disclosed: Disclosed) -> np.ndarray:
    function = joint_function(SPECS, rule, disclosed)
    return np.asarray(function(INPUTS, *(w for each in WEIGHTS for w in each)))


def on_shares(computation: Computation, inputs: np.ndarray, weights: list) -> list[bytes]:
    from spu import libspu

    held_inputs = split(encode_reals(inputs))
    held_weights = [split(encode_reals(w)) for w in weights]
    desc = libspu.link.Desc()
    for rank in range(3):
        desc.add_party(f"party-{rank}", f"thread-{rank}")
    results: list[bytes] = [b""] * 3
    compiled = compile_joint(computation)

    def party(rank: int) -> None:
        context = libspu.link.create_mem(desc, rank)
        machine = Machine(computation, compiled, context)
        machine.load_weights([held[rank] for held in held_weights])
        machine.run(held_inputs[rank])
        results[rank] = machine.run(held_inputs[rank])  # a second batch on the same machine
        context.stop_link()

    threads = [threading.Thread(target=party, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


# -- clear -------------------------------------------------------------------------------


def torch_networks() -> list:
    nn = pytest.importorskip("torch").nn
    return [
        (
            (3, 32, 32),
            nn.Sequential(
                nn.Conv2d(3, 6, 5),
                nn.ReLU(),
                nn.AvgPool2d(2),
                nn.Conv2d(6, 16, 5, stride=2, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(3, stride=2),
                nn.Flatten(),
                nn.Linear(64, 32, bias=False),
                nn.ReLU(),
                nn.Linear(32, 10),
            ),
        ),
        ((12,), nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4))),
        (
            (1, 7, 9),
            nn.Sequential(nn.Conv2d(1, 2, (3, 5), bias=False), nn.Flatten(), nn.Linear(50, 2)),
        ),
    ]


def test_clear_forward_agrees_with_torch() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    for shape, model in torch_networks():
        spec, weights = NetworkSpec.from_torch(model, shape)
        inputs = np.random.default_rng(1).normal(size=(3, *shape)).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.tensor(inputs)).numpy()
        # Both compute in float32, in another order of additions.
        np.testing.assert_allclose(logits(spec, inputs, weights), expected, atol=2e-6)


def test_rules_do_what_they_say_in_clear() -> None:
    each = np.stack([logits(s, INPUTS, w) for s, w in zip(SPECS, WEIGHTS, strict=True)])
    mean = clear(MpcRule.MEAN_LOGIT, Disclosed.TOTALS)
    np.testing.assert_allclose(mean, each.mean(axis=0), atol=1e-6)
    votes = clear(MpcRule.MAJORITY_VOTE, Disclosed.TOTALS)
    np.testing.assert_array_equal(votes, np.eye(3)[each.argmax(axis=2)].sum(axis=0))
    for rule, totals in ((MpcRule.MEAN_LOGIT, mean), (MpcRule.MAJORITY_VOTE, votes)):
        labels = clear(rule, Disclosed.LABEL)
        np.testing.assert_array_equal(labels, totals.argmax(axis=1))


# -- on shares ---------------------------------------------------------------------------


@pytest.mark.parametrize("disclosed", list(Disclosed))
@pytest.mark.parametrize("rule", list(MpcRule))
def test_spu_agrees_with_the_clear_computation(rule: MpcRule, disclosed: Disclosed) -> None:
    computation = Computation(specs=SPECS, rule=rule, disclosed=disclosed, n_queries=5)

    results = on_shares(computation, INPUTS, [w for each in WEIGHTS for w in each])

    words = join([held_from_bytes(r, computation.output_shape) for r in results])
    expected = clear(rule, disclosed)
    if rule is MpcRule.MEAN_LOGIT and disclosed is Disclosed.TOTALS:
        # 72 products of values near 1, each off by a few steps of 2^-18, through two layers.
        np.testing.assert_allclose(decode_reals(words), expected, atol=5e-4)
    else:
        got = decode_integers(words, low=0, high=3)
        np.testing.assert_array_equal(got, expected)


def test_every_result_gets_masks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    computation = Computation(
        specs=(OTHER,), rule=MpcRule.MEAN_LOGIT, disclosed=Disclosed.TOTALS, n_queries=5
    )
    used = []

    def recorded(seed: bytes, number: int, shape: tuple) -> tuple:
        used.append((seed, number))
        return zero_masks(seed, number, shape)

    monkeypatch.setattr(runtime, "zero_masks", recorded)
    on_shares(computation, INPUTS, WEIGHTS[1])
    on_shares(computation, INPUTS, WEIGHTS[1])

    # Two runs of two batches, each at three parties with the same seed and number.
    assert sorted(Counter(used).values()) == [3] * 4


def test_compiled_code_is_the_same_every_time() -> None:
    computation = Computation(
        specs=SPECS, rule=MpcRule.MAJORITY_VOTE, disclosed=Disclosed.LABEL, n_queries=2
    )
    assert compile_joint(computation)[1] == compile_joint(computation)[1]


def test_shares_of_another_shape_are_refused() -> None:
    from spu import libspu

    from fedinfer_flower.errors import ShapeError

    computation = Computation(
        specs=(OTHER,), rule=MpcRule.MEAN_LOGIT, disclosed=Disclosed.TOTALS, n_queries=5
    )
    desc = libspu.link.Desc()
    for rank in range(3):
        desc.add_party(f"party-{rank}", f"thread-{rank}")
    failures = []
    compiled = compile_joint(computation)

    def party(rank: int) -> None:
        machine = Machine(computation, compiled, libspu.link.create_mem(desc, rank))
        for bad in (
            lambda: machine.load_weights([split(encode_reals(np.zeros((2, 2))))[rank]]),
            lambda: machine.run(split(encode_reals(INPUTS[:2]))[rank]),
        ):
            try:
                bad()
            except ShapeError as exc:
                failures.append(exc)

    threads = [threading.Thread(target=party, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(failures) == 6


# -- interoperation with SPU's own sharing -----------------------------------------------


def spu_io():
    import spu

    from fedinfer_flower.mpc.runtime import _config

    return spu.Io(3, _config())


def content(share) -> bytes:
    from spu import libspu

    chunk = libspu.ValueChunk()
    chunk.ParseFromString(share.share_chunks[0])
    return chunk.content


def test_we_join_what_spu_splits() -> None:
    from spu import libspu

    values = np.array([[1.5, -2.25, 0.0], [3.0, -4.0, 1000.5]], dtype=np.float32)
    shares = spu_io().make_shares(values, libspu.Visibility.VIS_SECRET)
    held = [held_from_bytes(content(share), values.shape) for share in shares]
    np.testing.assert_array_equal(decode_reals(join(held)), values)


def test_spu_joins_what_we_split() -> None:
    from spu import libspu

    values = np.array([[1.5, -2.25], [3.0, -4.0]], dtype=np.float32)
    io = spu_io()
    shares = io.make_shares(np.zeros_like(values), libspu.Visibility.VIS_SECRET)
    for share, held in zip(shares, split(encode_reals(values)), strict=True):
        chunk = libspu.ValueChunk()
        data = held.astype("<u8").tobytes()
        chunk.total_bytes, chunk.chunk_offset, chunk.content = len(data), 0, data
        share.share_chunks = [chunk.SerializeToString()]
    np.testing.assert_array_equal(io.reconstruct(shares), values)
