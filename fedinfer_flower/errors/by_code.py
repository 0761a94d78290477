"""From a code that travelled to the class that it names."""

from __future__ import annotations

from fedinfer_flower.errors.base import FedInferError
from fedinfer_flower.errors.protocol import ProtocolError

__all__ = ["error_class"]


def _walk(cls: type[FedInferError]) -> dict[str, type[FedInferError]]:
    found = {cls.code: cls}
    for child in cls.__subclasses__():
        found.update(_walk(child))
    return found


def error_class(code: str) -> type[FedInferError]:
    """Return the class with this code; `ProtocolError` for a code nobody knows.

    Examples
    --------
    >>> error_class("FI304").__name__
    'ShapeError'
    >>> error_class("nonsense").__name__
    'ProtocolError'
    """
    return _walk(FedInferError).get(code, ProtocolError)
