"""Files of a model: that they are there, what is in them, and their digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fedinfer_flower.errors import ModelError

__all__ = ["file_digest", "files_digest", "model_folder", "read_model_file"]

_CHUNK_BYTES: Final = 1 << 20
_MAX_INDEX_BYTES: Final = 64 << 20


def read_model_file(path: Path, *, max_bytes: int) -> tuple[bytes, str]:
    """Return the bytes of a model file and their SHA-256 in hex.

    What is digested is what is run: the file is read once.

    Raises
    ------
    ModelError
        If it is not there, not readable, or larger than `max_bytes`.
    """
    if not path.is_file():
        raise ModelError(f"there is no model file {path.name!r}")
    try:
        if path.stat().st_size > max_bytes:
            raise ModelError(f"the model file {path.name!r} is larger than {max_bytes} bytes")
        data = path.read_bytes()
    except OSError as exc:
        raise ModelError(
            f"the model file {path.name!r} cannot be read: {type(exc).__name__}"
        ) from None
    return data, hashlib.sha256(data).hexdigest()


def model_folder(path: Path) -> list[Path]:
    """Return the files that hold a saved model's weights and words.

    Raises
    ------
    ModelError
        If the folder has no ``config.json`` and safetensors, or its weights are elsewhere.
    """
    weights = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").is_file() or not weights:
        raise ModelError(
            f"the folder {path.name!r} has no config.json with safetensors beside it",
            hint="give a local folder as save_pretrained writes it; pickled weights are not read",
        )
    _require_own_weights(path, {file.name for file in weights})
    words = [path / "tokenizer.json"] if (path / "tokenizer.json").is_file() else []
    return [path / "config.json", *words, *weights]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hex, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def files_digest(files: Sequence[Path]) -> str:
    """Return one SHA-256 in hex of the names and contents of files."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(file.name.encode() + b"\0" + bytes.fromhex(file_digest(file)))
    return whole.hexdigest()


def _require_own_weights(path: Path, weights: set[str]) -> None:
    # transformers follows the index wherever it leads, and an adapter to its base model.
    if (path / "adapter_config.json").exists():
        raise ModelError(
            "the folder holds an adapter, whose base model is elsewhere",
            hint="merge the adapter into its base model, and save that",
        )
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return
    try:
        with index.open("rb") as stream:
            data = stream.read(_MAX_INDEX_BYTES + 1)
        names = json.loads(data)["weight_map"].values() if len(data) <= _MAX_INDEX_BYTES else [""]
        own = all(isinstance(name, str) and name in weights for name in names)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        own = False
    if not own:
        raise ModelError(f"{index.name} names weights that are not in the same folder")
