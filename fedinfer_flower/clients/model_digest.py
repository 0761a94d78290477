"""A digest that names a fitted model by what it has learned."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import numpy as np

__all__ = ["model_digest"]

_MAX_DEPTH: Final = 12
_MAX_PARTS: Final = 200_000


def model_digest(model: object) -> str:
    """Return a SHA-256 in hex of a torch module's weights or an estimator's attributes.

    Empty for anything else: the digest of a function says nothing of what it computes.
    Two models with the same digest have the same weights; one model may change its digest
    between versions of its library.

    Examples
    --------
    >>> model_digest(lambda rows: rows)
    ''
    """
    digest = hashlib.sha256()
    state_dict = getattr(model, "state_dict", None)
    if callable(state_dict):
        for name, tensor in state_dict().items():
            _feed(digest, name)
            if hasattr(tensor, "detach"):
                _feed_tensor(digest, tensor.detach().to("cpu").contiguous())
        return digest.hexdigest()
    if hasattr(model, "get_params") and hasattr(model, "__dict__"):
        _walk(digest, model, 0, [_MAX_PARTS])
        return digest.hexdigest()
    return ""


def _walk(digest: Any, part: object, depth: int, room: list[int]) -> None:
    room[0] -= 1
    if depth > _MAX_DEPTH or room[0] < 0:
        _feed(digest, "too deep")
    elif isinstance(part, dict):
        for key in sorted(part, key=str):
            _feed(digest, str(key))
            _walk(digest, part[key], depth + 1, room)
    elif isinstance(part, list | tuple):
        for item in part:
            _walk(digest, item, depth + 1, room)
    elif isinstance(part, np.ndarray) and part.dtype == object:
        _walk(digest, part.tolist(), depth, room)
    elif isinstance(part, np.ndarray | np.generic | str | bytes | int | float | bool | None):
        _feed(digest, part)
    elif hasattr(part, "__dict__") and not isinstance(part, type) and not callable(part):
        _feed(digest, type(part).__qualname__)
        _walk(digest, vars(part), depth + 1, room)
    else:  # Cython classes such as scikit-learn's trees say what they hold this way
        _feed(digest, type(part).__qualname__)
        state = getattr(part, "__getstate__", lambda: None)()
        # A tuple holds slots beside the dictionary.
        if isinstance(state, dict | tuple):
            _walk(digest, state, depth + 1, room)


def _feed_tensor(digest: Any, tensor: Any) -> None:
    try:
        _feed(digest, tensor.numpy(force=True))
    except TypeError:  # bfloat16 and other types that NumPy does not have
        import torch

        _feed(digest, f"{tensor.dtype}|{tuple(tensor.shape)}")
        _feed(digest, tensor.reshape(-1).view(torch.uint8).numpy(force=True))


def _feed(digest: Any, value: object) -> None:
    if isinstance(value, np.ndarray):
        digest.update(f"array|{value.dtype.str}|{value.shape}|".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        text = repr(value).encode()
        digest.update(f"{type(value).__name__}|{len(text)}|".encode() + text)
