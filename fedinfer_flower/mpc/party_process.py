"""The site's side of a party process: start it, feed it, end it by the deadline."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final

from fedinfer_flower.errors import (
    EnvelopeError,
    InvalidValueError,
    MissingExtraError,
    PartyFailedError,
)
from fedinfer_flower.mpc.frames import read_frame, write_frame
from fedinfer_flower.mpc.party import computation_meta
from fedinfer_flower.mpc.runtime import Computation
from fedinfer_flower.wire.envelope import Envelope, Json, Kind

__all__ = ["MIN_STALL_S", "STALL_S", "Credentials", "PartyProcess", "require_spu"]

log = logging.getLogger("fedinfer_flower.site")

STALL_S: Final = 15.0

MIN_STALL_S: Final = 8.0
"""While connecting, the link library looks for a peer that was not there every 3 s only, and
counts that as silence of the others."""

_HINT: Final = "the job is over at every party: find out which site failed, and ask again"


def require_spu() -> None:
    """Require that SPU and JAX are installed at this site.

    Raises
    ------
    MissingExtraError
    """
    for module in ("spu", "jax"):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(
                f"{module} is not installed, which a computing party needs",
                hint="pip install 'fedinfer-flower[mpc]', on Python 3.11",
            )


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """The link's certificates in PEM.

    Parameters
    ----------
    certificate, key : bytes
        This party's own.
    trusted : bytes
        The other parties' certificates, one after another: exactly these are believed.
    """

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    trusted: bytes = field(repr=False)


class PartyProcess:
    """One party of a joint computation, in a process of its own.

    Use as a context manager: however the block is left, the process ends.

    Parameters
    ----------
    computation : Computation
    link_id : str
        Secret name of the links; see `sealed_shares.link_id`.
    rank : int
    addresses : tuple of str
        ``host:port`` of the three parties; at the own rank, what this one listens on.
    credentials : Credentials
    stall_s : float
        Longest silence of another party, at least `MIN_STALL_S`.

    Raises
    ------
    MissingExtraError
        If SPU is not installed.
    InvalidValueError
        If `stall_s` is too short.

    Privacy
    -------
    The process gets this party's shares and the link's key, and no identity's keys. Shares
    pass through pipes; files hold certificates only, readable by this user alone.
    """

    def __init__(
        self,
        *,
        computation: Computation,
        link_id: str,
        rank: int,
        addresses: tuple[str, ...],
        credentials: Credentials,
        stall_s: float = STALL_S,
    ) -> None:
        require_spu()
        if stall_s < MIN_STALL_S:
            raise InvalidValueError(f"stall_s is at least {MIN_STALL_S:g}, got {stall_s!r}")
        self._computation = computation
        self._link: dict[str, Json] = {
            "id": link_id,
            "rank": rank,
            "addresses": list(addresses),
            "stall-s": stall_s,
        }
        self._folder = Path(tempfile.mkdtemp(prefix="fedinfer-mpc-"))
        self._link["folder"] = str(self._folder)
        try:
            self._write(credentials)
            self._process = self._spawn()
        except OSError:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def _write(self, credentials: Credentials) -> None:
        for name, data in (
            ("own.pem", credentials.certificate),
            ("own.key", credentials.key),
            ("trusted.pem", credentials.trusted),
        ):
            handle = os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(data)

    @staticmethod
    def _spawn() -> subprocess.Popen[bytes]:
        # Native logs tell addresses and stacks; whoever looks for a fault can keep them.
        with open(os.environ.get("FEDINFER_MPC_LOG") or os.devnull, "ab") as native_log:
            return subprocess.Popen(
                [sys.executable, "-m", "fedinfer_flower.mpc.party"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=native_log,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def open(self, weights: bytes, *, ends_at: float) -> None:
        """Connect to the other parties, compile, and load this party's shares of the weights.

        Parameters
        ----------
        weights : bytes
            This party's shares of all owners' weights, in order.
        ends_at : float
            On the monotonic clock. At this time the process is killed.

        Raises
        ------
        PartyFailedError
            If this party or another one failed, or time was up.
        """
        left = ends_at - time.monotonic()
        self._exchange(
            Envelope(
                kind=Kind.JOB,
                meta={
                    "seconds-left": left,
                    "link": {**self._link, "connect-s": max(left, 0.1)},
                    "computation": computation_meta(self._computation),
                },
                sections=(("weights", weights),),
            ),
            ends_at=ends_at,
        )

    def query(self, held: bytes, *, ends_at: float) -> bytes:
        """Run one batch; return this party's shares of the result.

        Raises
        ------
        PartyFailedError
        """
        frame = Envelope(
            kind=Kind.QUERY,
            meta={"seconds-left": ends_at - time.monotonic()},
            sections=(("query", held),),
        )
        return bytes(self._exchange(frame, ends_at=ends_at).section("result"))

    def close(self) -> None:
        """End the process and remove its files. Safe to call twice."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    log.debug("the party process had closed its pipe")
        try:
            self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> PartyProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._process.kill()
        self.close()

    def _exchange(self, frame: Envelope, *, ends_at: float) -> Envelope:
        # The timer kills the process, which ends every blocked read and write on its pipes.
        timer = threading.Timer(max(0.0, ends_at - time.monotonic()), self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            stdin, stdout = self._process.stdin, self._process.stdout
            if stdin is None or stdout is None:
                raise PartyFailedError("the party process has no pipes")
            write_frame(stdin, frame)
            reply = read_frame(stdout)
        except (OSError, ValueError, EnvelopeError):
            reply = None
        finally:
            timer.cancel()
        if reply is not None and reply.kind is Kind.ANSWER:
            return reply
        if reply is not None:
            raise PartyFailedError(str(reply.meta.get("message", "a party failed")), hint=_HINT)
        if time.monotonic() >= ends_at:
            raise PartyFailedError("the joint computation did not end in time", hint=_HINT)
        raise PartyFailedError("this site's party process died", hint=_HINT)
