"""Files between a coordinator and a querier elsewhere: directory out, job in, answer out.

================  ==========================  ==========================================
file              written by                  holds
================  ==========================  ==========================================
``directory.fi``  coordinator                 the sites' signed cards: public
``job.fi``        querier                     the sealed job
``answer.fi``     coordinator                 the combined answer: opens for the querier
``receipt.json``  coordinator                 what the sites signed: public
================  ==========================  ==========================================

Every file appears whole: it is written under another name and then renamed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from fedinfer_flower.errors import EnvelopeError, QueryError
from fedinfer_flower.strategies.result import InferenceResult
from fedinfer_flower.wire.directory import Directory
from fedinfer_flower.wire.documents import QueryJob
from fedinfer_flower.wire.envelope import Kind, decode
from fedinfer_flower.wire.sealed_job import SealedJob

__all__ = ["Handover", "read_job", "write_whole"]

_POLL_S: Final = 0.1


def read_job(data: bytes) -> QueryJob | SealedJob:
    """Read a job, sealed or in clear.

    Raises
    ------
    ProtocolError
        If the bytes are neither.
    """
    kind = decode(data).kind
    if kind is Kind.SEALED_JOB:
        return SealedJob.from_bytes(data)
    if kind is Kind.JOB:
        return QueryJob.from_bytes(data)
    raise EnvelopeError(f"expected a job, got a {kind.value} envelope")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that nobody ever reads half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(data)
    draft.replace(path)


class Handover:
    """A folder that coordinator and querier both reach.

    Parameters
    ----------
    folder : Path

    Privacy
    -------
    Whoever reads the folder sees what the coordinator sees: no query of a sealed job, no
    answer that the protection hides. Whoever writes to it can put a directory of its own
    there, which is what a pin file is against.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def publish(self, directory: Directory) -> None:
        """Write the directory; a job and an answer of an earlier run go first."""
        for name in ("job.fi", "answer.fi", "receipt.json"):
            (self.folder / name).unlink(missing_ok=True)
        write_whole(self.folder / "directory.fi", directory.to_bytes())

    def wait_for_job(self, *, timeout_s: float) -> QueryJob | SealedJob:
        """Return the job once it is there.

        Raises
        ------
        QueryError
            If none comes in time.
        """
        path = self.folder / "job.fi"
        end = time.monotonic() + timeout_s
        while not path.exists():
            if time.monotonic() > end:
                raise QueryError(
                    f"no job within {timeout_s:g} s",
                    hint=f"the querier writes it: fedinfer querier ask --job {path.name} ...",
                )
            time.sleep(_POLL_S)
        return read_job(path.read_bytes())

    def deliver(self, result: InferenceResult) -> None:
        """Write receipt and answer, the answer last."""
        if result.receipt is not None:
            write_whole(self.folder / "receipt.json", result.receipt.to_bytes())
        write_whole(self.folder / "answer.fi", result.combined.to_bytes())
