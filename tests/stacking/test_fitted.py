"""Fitted aggregators: one encoding, one digest, nothing accepted that is not one."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.ensemble.fitted import (
    MAX_VALUE,
    FittedAggregator,
    recall,
    remember,
    require_digest,
)
from fedinfer_flower.ensemble.stack_shapes import KINDS, start_arrays
from fedinfer_flower.errors import EnvelopeError, InvalidValueError

from .conftest import made_up


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_give_back_the_same_aggregator(kind):
    fitted = made_up(kind)
    again = FittedAggregator.from_bytes(fitted.to_bytes())
    assert again.digest == fitted.digest
    assert again.card == fitted.card
    assert all(np.array_equal(again.arrays[n], a) for n, a in fitted.arrays.items())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_files_give_back_the_same_aggregator(kind, tmp_path):
    fitted = made_up(kind)
    fitted.save(tmp_path)
    assert FittedAggregator.load(tmp_path).digest == fitted.digest


def test_file_with_another_number_is_refused(tmp_path):
    made_up("linear-stack", seed=1).save(tmp_path / "a")
    made_up("linear-stack", seed=2).save(tmp_path / "b")
    arrays = (tmp_path / "b" / "aggregator.safetensors").read_bytes()
    (tmp_path / "a" / "aggregator.safetensors").write_bytes(arrays)
    with pytest.raises(EnvelopeError, match="not those that the card names"):
        FittedAggregator.load(tmp_path / "a")


@pytest.mark.parametrize("file", ["aggregator.safetensors", "card.json"])
def test_damaged_file_is_refused(file, tmp_path):
    made_up("linear-stack").save(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-7])
    with pytest.raises(EnvelopeError):
        FittedAggregator.load(tmp_path)


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused_or_another_digest(place, bit):
    fitted = made_up("gated-mixture")
    data = bytearray(fitted.to_bytes())
    data[place % len(data)] ^= 1 << bit
    try:
        other = FittedAggregator.from_bytes(bytes(data))
    except EnvelopeError:
        return
    assert other.digest != fitted.digest


@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused_with_a_typed_error(data):
    with pytest.raises(EnvelopeError):
        FittedAggregator.from_bytes(data)


def test_cut_off_bytes_are_refused():
    data = made_up("linear-stack").to_bytes()
    for end in (0, 5, 12, len(data) // 2, len(data) - 1):
        with pytest.raises(EnvelopeError):
            FittedAggregator.from_bytes(data[:end])
    with pytest.raises(EnvelopeError):
        FittedAggregator.from_bytes(data + b"\0")


def test_header_with_a_negative_shape_is_refused():
    fitted = made_up("gated-mixture")
    data = fitted.to_bytes().replace(b'["gate_bias_k",[4]]', b'["gate_bias_k",[-]]')
    with pytest.raises(EnvelopeError):
        FittedAggregator.from_bytes(data)


@pytest.mark.parametrize("value", [np.nan, np.inf, -2 * MAX_VALUE])
def test_value_out_of_range_is_refused(value):
    bad = np.zeros((4, 3))
    bad[1, 1] = value
    with pytest.raises(InvalidValueError, match="not finite or beyond"):
        made_up("gated-mixture", arrays={"gate_kc": bad})


@pytest.mark.parametrize("kind", KINDS)
def test_missing_array_and_wrong_shape_are_refused(kind):
    fitted = made_up(kind)
    for name in fitted.arrays:
        fewer = {n: a for n, a in fitted.arrays.items() if n != name}
        with pytest.raises(InvalidValueError, match="has the arrays"):
            FittedAggregator(kind=kind, arrays=fewer, card=fitted.card)
        longer = dict(fitted.arrays) | {name: np.zeros((9, 9, 9))}
        with pytest.raises(InvalidValueError, match="has shape"):
            FittedAggregator(kind=kind, arrays=longer, card=fitted.card)


def test_wide_embedding_is_refused():
    arrays = start_arrays("deep-set", n_sites=2, n_classes=2, hidden=4)
    wide = {
        "rho_out": np.zeros((4, 5)),
        "rho_out_bias": np.zeros(5),
        "mu_in": np.zeros((7, 4)),
    }
    card = dict(made_up("deep-set", n_sites=2, n_classes=2).card)
    with pytest.raises(InvalidValueError, match="at most 2 a class"):
        FittedAggregator(kind="deep-set", arrays=arrays | wide, card=card)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": []},
        {"classes": ["a", "a", "b"]},
        {"sites": ["not a key id"] * 1},
        {"rows": -1},
        {"rounds": True},
        {"extra": 1},
    ],
)
def test_malformed_card_is_refused(change):
    fitted = made_up("linear-stack")
    with pytest.raises(InvalidValueError):
        FittedAggregator(
            kind=fitted.kind, arrays=dict(fitted.arrays), card=dict(fitted.card) | change
        )


def test_card_file_names_no_rows_of_a_single_site(tmp_path):
    made_up("linear-stack").save(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["rows"] == 100
    assert set(card) == {"kind", "digest", "classes", "sites", "trainer", "rounds", "rows"}


def test_recall_knows_what_was_remembered_and_nothing_else():
    fitted = made_up("linear-stack", seed=77)
    assert recall(remember(fitted)) is fitted
    with pytest.raises(InvalidValueError, match="no fitted aggregator"):
        recall("0" * 64)


@pytest.mark.parametrize("text", ["", "0" * 63, "G" * 64, "../../etc", "A" * 64])
def test_digest_that_is_none_is_refused(text):
    with pytest.raises(InvalidValueError):
        require_digest(text)
