"""A classifier of texts or images that transformers saved in a local folder."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedinfer_flower.clients.adapters.model_files import files_digest, model_folder
from fedinfer_flower.clients.adapters.registry import MODELS, ModelKind
from fedinfer_flower.clients.local_model import LocalModel
from fedinfer_flower.ensemble.base import Array
from fedinfer_flower.errors import InvalidValueError, ModelError, PromptTooLongError, ShapeError
from fedinfer_flower.privacy.base import optional_module
from fedinfer_flower.wire.text_rows import read_text_rows

__all__ = ["HfClassifier", "ImageNetwork", "TextNetwork"]

_AUTO: Final = {
    "text": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
}
_LOADING: Final = threading.Lock()
"""Two threads that load at once make transformers miss weights that are there."""


@MODELS.register("hf-classifier")
@dataclass(frozen=True, kw_only=True)
class HfClassifier(ModelKind):
    """Options of a classifier that `save_pretrained` wrote.

    Parameters
    ----------
    path : Path
        A local folder: ``config.json``, safetensors, and for texts ``tokenizer.json``.
        Nothing is downloaded, and no code in it is run.
    input : {"text", "image"}
        ``"text"``: rows as `wire.text_rows` writes them. ``"image"``: floating rows of shape
        (channels, height, width), already scaled as the model's processor would.
    classes : tuple of str
        Class of each logit; default the labels in ``config.json``.
    max_tokens : int
        Most tokens of a text; 0 for as many as the model reads.
    truncate : bool
        Cut a longer text instead of refusing it.
    batch_rows : int
        Rows in one pass.

    Privacy
    -------
    What leaves the site is what rule and protection make of the logits.
    """

    path: Path
    input: str = "text"
    classes: tuple[str, ...] = ()
    max_tokens: int = 0
    truncate: bool = False
    batch_rows: int = 32

    def make(self) -> LocalModel:
        """Load the folder.

        Raises
        ------
        ModelError, InvalidValueError, MissingExtraError
        """
        if self.input not in _AUTO or self.batch_rows < 1 or self.max_tokens < 0:
            raise InvalidValueError(
                "input is 'text' or 'image', batch-rows at least 1, max-tokens at least 0"
            )
        files = model_folder(self.path)
        with _LOADING:
            model = _loaded(self.path, _AUTO[self.input])
            words = _tokenizer(self.path) if self.input == "text" else None
        if getattr(model.config, "problem_type", None) not in (
            None,
            "single_label_classification",
        ):
            raise ModelError("the model is no classifier with one class for each row")
        classes = self.classes or _labels(model.config)
        if len(classes) != model.config.num_labels or len(set(classes)) < max(2, len(classes)):
            raise ModelError(
                f"the model has {model.config.num_labels} logits, {len(set(classes))} distinct"
                " classes are named",
                hint="classes = [...] in [model], in the order of the logits, at least two",
            )
        network = (
            ImageNetwork(model, batch_rows=self.batch_rows)
            if words is None
            else TextNetwork(model, words, options=self)
        )
        return LocalModel(
            model=network,
            classes=classes,
            outputs="logits",
            digest=files_digest(files),
            model_card={"kind": f"{self.input} classifier {model.config.model_type}"[:64]},
        )


class TextNetwork:
    """A callable from rows of text to logits.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerFast
    options : HfClassifier
    """

    def __init__(self, model: Any, tokenizer: Any, *, options: HfClassifier) -> None:
        import inspect

        self._model, self._tokenizer, self._options = model, tokenizer, options
        if tokenizer.pad_token_id is None:
            raise ModelError("the tokenizer has no token to pad with")
        reads = int(getattr(model.config, "max_position_embeddings", 0) or 0)
        # RoBERTa counts its positions from behind the padding's.
        if model.config.model_type in ("roberta", "xlm-roberta", "camembert"):
            reads -= int(model.config.pad_token_id or 0) + 1
        limits = [n for n in (reads, options.max_tokens, int(tokenizer.model_max_length)) if n > 0]
        self.max_tokens = min(limits)
        self._names = set(inspect.signature(model.forward).parameters)
        # A fast tokenizer keeps its padding in itself.
        self._lock = threading.Lock()

    def __call__(self, inputs: npt.NDArray[np.generic]) -> Array:
        """Return logits (n_queries, n_classes).

        Raises
        ------
        ShapeError
            If the rows hold no text.
        PromptTooLongError
            If a text does not fit, unless it may be cut.
        """
        texts = read_text_rows(inputs)
        size = self._options.batch_rows
        with self._lock:
            parts = [
                self._logits(texts[start : start + size]) for start in range(0, len(texts), size)
            ]
        return np.concatenate(parts)

    def _logits(self, texts: list[tuple[str, str]]) -> Array:
        second = [after for _, after in texts]
        pairs = {"text_pair": second} if any(second) else {}
        coded = self._tokenizer(
            [first for first, _ in texts],
            **pairs,
            padding=True,
            truncation=self._options.truncate,
            max_length=self.max_tokens if self._options.truncate else None,
            return_tensors="pt",
        )
        if coded["input_ids"].shape[1] > self.max_tokens:
            raise PromptTooLongError(
                f"a text of {coded['input_ids'].shape[1]} tokens; the model reads"
                f" {self.max_tokens}",
                hint="shorten it, or truncate = true at the site",
            )
        known = {name: value for name, value in coded.items() if name in self._names}
        return _run(self._model, known)


class ImageNetwork:
    """A callable from rows of pixels to logits.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    batch_rows : int
    """

    def __init__(self, model: Any, *, batch_rows: int) -> None:
        self._model, self._batch_rows = model, batch_rows

    def __call__(self, inputs: npt.NDArray[np.generic]) -> Array:
        """Return logits (n_queries, n_classes).

        Raises
        ------
        ShapeError
            If the rows are no images of floating numbers.
        """
        import torch

        if inputs.ndim != 4 or not np.issubdtype(inputs.dtype, np.floating):
            raise ShapeError(
                f"rows of {inputs.dtype} with {inputs.ndim - 1} axes; an image is floating"
                " numbers (channels, height, width)"
            )
        size = self._batch_rows
        parts = [
            _run(self._model, {"pixel_values": torch.from_numpy(batch)})
            for start in range(0, len(inputs), size)
            for batch in [np.array(inputs[start : start + size], dtype=np.float32)]
        ]
        return np.concatenate(parts)


def _run(model: Any, inputs: dict[str, Any]) -> Array:
    import torch

    with torch.inference_mode():
        logits = model(**inputs).logits
    return np.asarray(logits.to("cpu", torch.float64).numpy())


def _loaded(path: Path, auto: str) -> Any:
    library: Any = optional_module("transformers", extra="llm")
    from transformers.utils import logging as transformers_logging

    talk: Any = transformers_logging  # untyped upstream
    shown = talk.is_progress_bar_enabled()
    talk.disable_progress_bar()
    try:
        model, report = getattr(library, auto).from_pretrained(
            path,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as exc:
        # Readers of damaged files raise whatever they like, and quote the path or the file.
        raise ModelError(
            f"transformers could not read the model folder ({type(exc).__name__})",
            hint=f"try {auto}.from_pretrained on it by hand",
        ) from None
    finally:
        if shown:
            talk.enable_progress_bar()
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ModelError(
            "the folder lacks weights of the classifier, or has them in another shape",
            hint="transformers would go on with random ones; fine-tune it and save it again",
        )
    return model.eval().requires_grad_(False)


def _tokenizer(path: Path) -> Any:
    library: Any = optional_module("transformers", extra="llm")
    if not (path / "tokenizer.json").is_file():
        raise ModelError(
            f"the folder {path.name!r} has no tokenizer.json",
            hint="save the fast tokenizer beside the model",
        )
    try:
        return library.PreTrainedTokenizerFast.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as exc:
        raise ModelError(
            f"transformers could not read the tokenizer ({type(exc).__name__})"
        ) from None


def _labels(config: Any) -> tuple[str, ...]:
    labels = getattr(config, "id2label", None) or {}
    return tuple(str(labels.get(column, column)) for column in range(config.num_labels))
