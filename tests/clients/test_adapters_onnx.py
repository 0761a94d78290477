"""Models by kind and options; ONNX files among them."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fedinfer_flower.clients.adapters import MODELS, make_model
from fedinfer_flower.clients.policy import SitePolicy
from fedinfer_flower.clients.site_model import prepare
from fedinfer_flower.ensemble.base import PROBABILITY_FLOOR
from fedinfer_flower.errors import (
    InvalidValueError,
    MissingExtraError,
    ModelError,
    ShapeError,
    UnknownConfigKeyError,
    UnknownNameError,
)
from fedinfer_flower.query import CountsKind

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

RNG = np.random.default_rng(5)
WEIGHTS = RNG.standard_normal((4, 3)).astype(np.float32)
ROWS = RNG.standard_normal((7, 4))
CLASSES = ["ant", "bee", "cat"]


def graph_file(
    path: Path,
    *,
    rows: int | str = "n",
    kind: int = TensorProto.FLOAT,
    softmax: bool = False,
    facts: dict[str, str] | None = None,
    external: bool = False,
) -> Path:
    """Write a linear classifier of four numbers."""
    end = "p" if softmax else "y"
    nodes = [helper.make_node("MatMul", ["x" if kind == TensorProto.FLOAT else "f", "w"], ["y"])]
    if kind != TensorProto.FLOAT:
        nodes.insert(0, helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT))
    if softmax:
        nodes.append(helper.make_node("Softmax", ["y"], ["p"], axis=1))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", kind, [rows, 4])],
        [helper.make_tensor_value_info(end, TensorProto.FLOAT, [rows, 3])],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    helper.set_model_props(model, facts or {})
    extra = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0}
    onnx.save_model(model, str(path), **(extra if external else {}))
    return path


@pytest.fixture
def linear(tmp_path) -> Path:
    return graph_file(tmp_path / "linear.onnx")


def options(path: Path, **more) -> dict:
    return {"path": str(path), "outputs": "logits", "classes": CLASSES, **more}


# -- answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_rows", [1, 3, 256])
def test_logits_are_those_of_the_graph(linear, batch_rows):
    site = prepare(
        make_model("onnx", options(linear, **{"batch-rows": batch_rows})),
        name="north",
        share_counts=CountsKind.WITHHELD,
    )

    assert site.adapter.classes == tuple(CLASSES)
    np.testing.assert_allclose(site.adapter.logits(ROWS), ROWS @ WEIGHTS, rtol=1e-4, atol=1e-5)


def test_probabilities_become_log_probabilities(tmp_path):
    path = graph_file(tmp_path / "p.onnx", softmax=True)
    site = prepare(
        make_model("onnx", options(path, outputs="probabilities")),
        name="north",
        share_counts=CountsKind.WITHHELD,
    )

    found = np.exp(site.adapter.logits(ROWS))

    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-5)
    assert (found >= PROBABILITY_FLOOR * 0.999).all()


def test_the_digest_is_that_of_the_file(linear):
    local = make_model("onnx", options(linear))

    assert local.digest == hashlib.sha256(linear.read_bytes()).hexdigest()


def test_a_graph_may_say_its_classes_and_outputs_itself(tmp_path):
    facts = {"classes": json.dumps(CLASSES), "outputs": "logits"}
    local = make_model("onnx", {"path": graph_file(tmp_path / "a.onnx", facts=facts)})

    assert (local.classes, local.outputs) == (tuple(CLASSES), "logits")


def test_a_graph_of_one_row_is_run_row_by_row(tmp_path):
    local = make_model("onnx", options(graph_file(tmp_path / "one.onnx", rows=1)))

    np.testing.assert_allclose(local.model(ROWS), ROWS @ WEIGHTS, rtol=1e-4, atol=1e-5)


def test_whole_numbers_go_into_a_graph_of_floats_but_not_the_reverse(tmp_path, linear):
    whole = np.arange(8).reshape(2, 4)
    np.testing.assert_allclose(
        make_model("onnx", options(linear)).model(whole), whole @ WEIGHTS, rtol=1e-4, atol=1e-5
    )
    of_bytes = graph_file(tmp_path / "b.onnx", kind=TensorProto.UINT8)
    with pytest.raises(ShapeError, match="takes uint8"):
        make_model("onnx", options(of_bytes)).model(ROWS)


@pytest.mark.parametrize("shape", [(2, 5), (2,), (2, 4, 1)], ids=str)
def test_rows_of_another_shape_are_refused(linear, shape):
    with pytest.raises(ShapeError, match="the ONNX graph takes"):
        make_model("onnx", options(linear)).model(np.zeros(shape))


# -- files that are refused --------------------------------------------------------------


def test_outputs_must_be_said(linear):
    with pytest.raises(ModelError, match="logits or probabilities"):
        make_model("onnx", {"path": linear, "classes": CLASSES})


@pytest.mark.parametrize("classes", [[], ["a", "b"], ["a", "b", "b"]], ids=str)
def test_classes_must_fit_the_columns(linear, classes):
    with pytest.raises(ModelError, match=r"classes|names one twice"):
        make_model("onnx", options(linear, classes=classes))


def test_weights_in_another_file_are_not_read(tmp_path, monkeypatch):
    path = graph_file(tmp_path / "ext.onnx", external=True)
    assert (tmp_path / "w.bin").exists()
    # ONNX Runtime looks for them in the working folder, where the digest would miss them.
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ModelError, match="cannot load"):
        make_model("onnx", options(path))


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x80\x04K\x01."], ids=repr)
def test_a_file_that_is_no_graph_is_refused_without_its_content(tmp_path, content):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)

    with pytest.raises(ModelError, match=r"cannot load|no input"):
        make_model("onnx", options(path))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"input": "z"}, "no input of that name"),
        ({"output": "z"}, "no output of that name"),
    ],
    ids=["input", "output"],
)
def test_names_are_of_the_graph(linear, more, words):
    with pytest.raises(ModelError, match=words):
        make_model("onnx", options(linear, **more))


def test_a_fixed_number_of_rows_is_refused(tmp_path):
    with pytest.raises(ModelError, match="fixed number of rows"):
        make_model("onnx", options(graph_file(tmp_path / "two.onnx", rows=2)))


def test_a_missing_library_names_its_extra(linear, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    with pytest.raises(MissingExtraError) as caught:
        make_model("onnx", options(linear))
    assert "fedinfer-flower[onnx]" in caught.value.hint


# -- the registry ------------------------------------------------------------------------


def test_kinds_are_found_by_their_files():
    assert {"onnx", "hf-classifier", "hf-causal-lm", "openai"} <= set(MODELS.names())


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(UnknownNameError) as caught:
        make_model("onx", {})
    assert "onnx" in caught.value.hint


def test_an_unknown_option_names_the_nearest(linear):
    with pytest.raises(UnknownConfigKeyError) as caught:
        make_model("onnx", options(linear, **{"batch-row": 3}))
    assert "'batch-rows'" in caught.value.hint


@pytest.mark.parametrize(
    "more",
    [
        {"path": 3},
        {"classes": "abc"},
        {"classes": [1, 2]},
        {"batch_rows": True},
        {"batch_rows": "3"},
        {"batch_rows": 0},
        {"outputs": "votes"},
    ],
    ids=["path", "text-for-list", "list-of-numbers", "bool", "text", "range", "choice"],
)
def test_an_option_of_another_type_is_refused(linear, more):
    with pytest.raises(InvalidValueError):
        make_model("onnx", {**options(linear), **more})


def test_an_option_that_is_needed_is_named():
    with pytest.raises(InvalidValueError, match="needs the option 'path'"):
        make_model("onnx", {})


def test_policy_names_the_classes_of_a_graph_that_does_not(linear):
    from fedinfer_flower.clients.policy_loader import source_of

    given = {"path": linear.name, "outputs": "logits"}
    policy = SitePolicy.from_mapping(
        {
            "site": {"name": "north", "home": "home"},
            "model": {"kind": "onnx", "classes": ["a", "b", "c"], "options": given},
            "answers": {"protections": ["secagg"], "anyone": True},
        },
        folder=linear.parent,
    )
    model = policy.model

    load = source_of("model", loader="", kind="onnx", options=model.options, classes=model.classes)

    assert load(None).classes == ("a", "b", "c")
