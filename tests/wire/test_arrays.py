from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedinfer_flower.errors import InvalidValueError, ShapeError
from fedinfer_flower.wire.arrays import DTYPES, array_from_bytes, array_to_bytes

ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda name: hnp.arrays(
        np.dtype(name),
        hnp.array_shapes(min_dims=1, max_dims=4, max_side=4),
        elements={"allow_nan": False, "allow_infinity": False} if name[0] == "f" else None,
    )
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(ARRAYS)
def test_array_after_a_round_trip_is_bit_equal(array):
    name, data = array_to_bytes(array)
    back = array_from_bytes(data, dtype=name, shape=array.shape)

    assert back.dtype.name == array.dtype.name
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()
    assert not back.flags.writeable


def test_array_of_any_memory_layout_travels_in_row_order():
    array = np.arange(6.0).reshape(2, 3)
    for same in (np.asfortranarray(array), array[:, ::-1][:, ::-1], array.astype(">f8")):
        name, data = array_to_bytes(same)
        np.testing.assert_array_equal(array_from_bytes(data, dtype=name, shape=(2, 3)), array)


@pytest.mark.parametrize(
    "array",
    [
        np.array([["x"]]),
        np.array([[object()]]),
        np.array([[1j]]),
        np.array([["2020-01-01"]], dtype="datetime64[D]"),
        np.zeros(1, dtype=[("a", "f4")]),
        np.zeros((1, 1), dtype=np.longdouble),
    ],
    ids=lambda array: str(array.dtype),
)
def test_array_of_other_dtype_is_refused(array):
    with pytest.raises(InvalidValueError, match="dtype"):
        array_to_bytes(array)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_array_with_value_that_is_not_finite_is_refused(dtype, value):
    with pytest.raises(InvalidValueError, match="NaN or infinite"):
        array_to_bytes(np.array([[0.0, value]], dtype=dtype))


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("object", (1,)),
        ("O", (1,)),
        ("<f4", (2,)),
        ("str", (2,)),
        ("V8", (1,)),
        ("", (2,)),
        ("float32", (3,)),
        ("float32", (1,)),
        ("float32", ()),
        ("float64", (2,)),
        ("float32", (2**63, 2)),
        ("float32", (2**62, 2**62)),
    ],
)
def test_array_bytes_that_do_not_fit_raise_shape_error(dtype, shape):
    with pytest.raises(ShapeError):
        array_from_bytes(bytes(8), dtype=dtype, shape=shape)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 2**64 - 1), (2**64 - 1, 0)])
def test_array_with_an_empty_dimension_raises_shape_error(shape):
    with pytest.raises(ShapeError):
        array_from_bytes(b"", dtype="float32", shape=shape)
