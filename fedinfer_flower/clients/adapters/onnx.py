"""A classifier in an ONNX file, run by ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.clients.adapters.model_files import read_model_file
from fedinfer_flower.clients.adapters.registry import MODELS, ModelKind
from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import InvalidValueError, ModelError, ShapeError
from fedinfer_flower.privacy.base import optional_module

__all__ = ["OnnxFile", "OnnxNetwork"]

_MAX_BYTES: Final = 2 << 30
"""Of an ONNX file with its weights inside: the format's own limit."""

_DTYPES: Final = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}


@MODELS.register("onnx")
@dataclass(frozen=True, kw_only=True)
class OnnxFile(ModelKind):
    """Options of a model in an ONNX file.

    Parameters
    ----------
    path : Path
        One file with the weights inside: others beside it are not read, as the digest would
        miss them.
    outputs : {"logits", "probabilities"}, optional
        What the graph returns; default the file's metadata ``outputs``. One of the two must
        say it: the wrong one gives answers that look fine.
    classes : tuple of str
        Class of each output column; default the file's metadata ``classes``, a JSON list.
    input, output : str
        Names in the graph; default its only input, and its first output.
    batch_rows : int
        Rows in one run.
    threads : int
        Of one run; 0 for as many as ONNX Runtime likes.

    Privacy
    -------
    A graph cannot run code of its own; operators of other libraries are not loaded.
    """

    path: Path
    outputs: str = ""
    classes: tuple[str, ...] = ()
    input: str = ""
    output: str = ""
    batch_rows: int = 256
    threads: int = 1

    def make(self) -> LocalModel:
        """Load the file, and check that graph and options fit together.

        Raises
        ------
        ModelError, InvalidValueError, MissingExtraError
        """
        if self.batch_rows < 1 or self.threads < 0 or self.outputs not in ("", *_OUTPUTS):
            raise InvalidValueError(
                "batch-rows is at least 1, threads at least 0, outputs 'logits' or 'probabilities'"
            )
        data, digest = read_model_file(self.path, max_bytes=_MAX_BYTES)
        session = _session(data, threads=self.threads)
        facts = session.get_modelmeta().custom_metadata_map
        outputs = self.outputs or facts.get("outputs", "")
        if outputs not in _OUTPUTS:
            raise ModelError(
                "nothing says whether the ONNX graph returns logits or probabilities",
                hint='outputs = "logits" or "probabilities" in [model]',
            )
        network = OnnxNetwork(session, options=self)
        classes = self.classes or _classes_of(facts)
        if not classes or len(set(classes)) != len(classes):
            raise ModelError(
                "the ONNX graph does not name its classes, or names one twice",
                hint="classes = [...] in [model], in the order of the output's columns",
            )
        if network.width not in (None, len(classes)):
            raise ModelError(
                f"the ONNX graph has {network.width} output columns, {len(classes)} classes are"
                " named",
                hint="one logit or probability for each class; a graph with a single column for"
                " two classes must be exported with both",
            )
        card = {"kind": "onnx", "input": f"{network.dtype} {network.shape}"[:64]}
        return LocalModel(
            model=network, classes=classes, outputs=outputs, digest=digest, model_card=card
        )


_OUTPUTS: Final = ("logits", "probabilities")


class OnnxNetwork:
    """A callable from rows to the graph's output.

    Parameters
    ----------
    session : onnxruntime.InferenceSession
    options : OnnxFile

    Attributes
    ----------
    dtype : numpy dtype
        Of the graph's input.
    shape : tuple of int or None
        Of one row; None where any size goes.
    width : int or None
        Columns of the output, if the graph fixes them.
    """

    def __init__(self, session: Any, *, options: OnnxFile) -> None:
        self._session, self._batch_rows = session, options.batch_rows
        entry = _chosen(session.get_inputs(), options.input, what="input", only=True)
        end = _chosen(session.get_outputs(), options.output, what="output", only=False)
        if entry.type not in _DTYPES or end.type not in _DTYPES:
            raise ModelError(
                "the ONNX graph takes or returns something else than a tensor of numbers",
                hint="skl2onnx: export with zipmap=False, and name the output of probabilities",
            )
        self._input, self._output = entry.name, end.name
        self.dtype = np.dtype(_DTYPES[entry.type])
        batch, *shape = [n if isinstance(n, int) else None for n in entry.shape] or [None]
        if batch not in (None, 1) or len(end.shape) != 2:
            raise ModelError(
                "the ONNX graph takes a fixed number of rows, or does not return a row of"
                " numbers for each",
                hint="export it with a dynamic first axis and an output of shape (rows, classes)",
            )
        # A graph that takes one row is run row by row.
        self._batch_rows = 1 if batch == 1 else options.batch_rows
        self.shape = tuple(shape)
        columns = end.shape[1]
        self.width: int | None = columns if isinstance(columns, int) else None

    def __call__(self, inputs: npt.NDArray[np.generic]) -> Array:
        """Return the output for rows, shape (n_queries, columns).

        Raises
        ------
        ShapeError
            If the rows are not of the graph's shape or kind of number.
        """
        rows = self._rows(inputs)
        size = self._batch_rows
        parts = [
            self._session.run([self._output], {self._input: rows[start : start + size]})[0]
            for start in range(0, len(rows), size)
        ]
        return np.asarray(np.concatenate(parts), dtype=float)

    def _rows(self, inputs: npt.NDArray[np.generic]) -> npt.NDArray[Any]:
        given, wanted = inputs.shape[1:], self.shape
        fits = len(given) == len(wanted) and all(
            n is None or n == m for n, m in zip(wanted, given, strict=True)
        )
        if not fits:
            raise ShapeError(f"rows of shape {given}, the ONNX graph takes {wanted}")
        # Not from fractions to whole numbers: that would answer another question.
        if not np.can_cast(inputs.dtype, self.dtype, casting="same_kind"):
            raise ShapeError(f"rows of {inputs.dtype}, the ONNX graph takes {self.dtype}")
        return np.ascontiguousarray(inputs, dtype=self.dtype)


def _session(data: bytes, *, threads: int) -> Any:
    runtime: Any = optional_module("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 4  # its messages quote names and shapes
    with tempfile.TemporaryDirectory() as nothing:
        # Weights in other files would be looked for in the working folder.
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", nothing
        )
        try:
            return runtime.InferenceSession(
                data, sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as exc:
            raise ModelError(
                f"ONNX Runtime cannot load the model file ({type(exc).__name__})",
                hint="one file with the weights inside, no operators of other libraries;"
                " see onnx.checker.check_model",
            ) from None


def _chosen(nodes: list[Any], name: str, *, what: str, only: bool) -> Any:
    named = [node for node in nodes if node.name == name] if name else nodes
    if not named or (only and len(nodes) != 1):
        raise ModelError(
            f"the ONNX graph has no {what} of that name, or more than one {what}",
            hint=f"{what}s: {', '.join(node.name for node in nodes)[:200]}",
        )
    return named[0]


def _classes_of(facts: dict[str, str]) -> tuple[str, ...]:
    try:
        found = json.loads(facts.get("classes", "[]"))
    except (ValueError, RecursionError):
        return ()
    if isinstance(found, list) and all(isinstance(each, str | int) for each in found):
        return tuple(str(each) for each in found)
    return ()
