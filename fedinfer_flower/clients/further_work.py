"""Actions beside the plain query: which function answers which.

Each is imported when it is first asked for: most sites never are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Final

from fedinfer_flower.clients.site_call import SiteCall
from fedinfer_flower.errors import EnvelopeError
from fedinfer_flower.wire.actions import CALIBRATE, ENCRYPTED
from fedinfer_flower.wire.envelope import Envelope, Kind

__all__ = ["HANDLERS", "further_handler"]

HANDLERS: Final[dict[tuple[str, Kind], tuple[str, str]]] = {
    (ENCRYPTED, Kind.QUERY): ("encrypted_answering", "answer_encrypted_call"),
    (CALIBRATE, Kind.QUERY): ("calibrating", "answer_calibration"),
}
"""(action, envelope's kind) to (module of `clients`, function)."""


def further_handler(action: str, kind: Kind) -> Callable[[SiteCall], Envelope]:
    """Return the function that answers an action.

    Raises
    ------
    EnvelopeError
        If none takes such an envelope.
    """
    named = HANDLERS.get((action, kind))
    if named is None:
        raise EnvelopeError(f"action {action!r} does not take a {kind.value} envelope")
    module = importlib.import_module(f"fedinfer_flower.clients.{named[0]}")
    handler: Callable[[SiteCall], Envelope] = getattr(module, named[1])
    return handler
