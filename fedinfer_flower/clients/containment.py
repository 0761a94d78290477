"""Code of the site's own may raise anything: nothing of its text leaves the site.

Flower sends ``str(exception)`` of a handler to the server. A model's exception may quote
its input, and a site's own code may even raise one of our typed errors with data in it.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from fedinfer_flower.errors import FedInferError

__all__ = ["contained", "log_locally"]

log = logging.getLogger("fedinfer_flower.site")


@contextmanager
def contained(
    error: type[FedInferError], what: str, *, hint: str, pass_typed: bool = False
) -> Iterator[None]:
    """Turn any exception inside the block into `error` with fixed words.

    Parameters
    ----------
    error : type
    what : str
        What failed, for the coordinator to read.
    hint : str
    pass_typed : bool
        Let our own typed errors through: only around our own code.
    """
    try:
        yield
    except (Exception, SystemExit) as exc:
        if pass_typed and isinstance(exc, FedInferError):
            raise
        log_locally(exc)
        raise error(f"{what} ({_public_type(exc)})", hint=hint) from None


def log_locally(exc: BaseException) -> None:
    """Log where an exception arose, without its text, which may quote the query.

    With ``FEDINFER_SITE_TRACEBACKS=1`` the site's log gets the whole traceback.
    """
    frames = traceback.extract_tb(exc.__traceback__)[-3:]
    place = " < ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in reversed(frames))
    log.error("%s at %s", type(exc).__name__, place)
    if os.environ.get("FEDINFER_SITE_TRACEBACKS") == "1":
        log.error("traceback", exc_info=exc)


def _public_type(exc: BaseException) -> str:
    # Names of built-in errors are chosen by nobody; a name made at run time could carry data.
    return type(exc).__name__ if type(exc).__module__ == "builtins" else "error"
