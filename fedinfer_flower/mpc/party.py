"""One party's own process: ``python -m fedinfer_flower.mpc.party``, started by `PartyProcess`.

Native code that talks to other institutions runs here and nowhere else: if it crashes or
hangs, this process ends and its parent reports a typed error. It never holds an identity's
keys. Jobs come as frames on standard input, results leave as frames on standard output:
nothing is in the arguments, and only the link's certificates are in files.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

from fedinfer_flower.errors import FedInferError, PartyFailedError
from fedinfer_flower.mpc.forward import Disclosed, MpcRule
from fedinfer_flower.mpc.frames import read_frame, write_frame
from fedinfer_flower.mpc.network import NetworkSpec
from fedinfer_flower.mpc.runtime import Computation, Link, Machine, compile_joint, connect
from fedinfer_flower.mpc.sealed_shares import split_bytes
from fedinfer_flower.wire.envelope import Envelope, Kind

__all__ = ["computation_from", "computation_meta", "serve"]

_GRACE_S: Final = 1.0
"""The parent ends this process at the deadline; the alarm is for a parent that is gone."""


def computation_meta(computation: Computation) -> dict[str, Any]:
    """Return the JSON form of a computation for a frame."""
    return {
        "specs": [spec.to_json() for spec in computation.specs],
        "rule": computation.rule.value,
        "disclosed": computation.disclosed.value,
        "rows": computation.n_queries,
    }


def computation_from(meta: dict[str, Any]) -> Computation:
    """Read what `computation_meta` wrote."""
    return Computation(
        specs=tuple(NetworkSpec.from_json(spec) for spec in meta["specs"]),
        rule=MpcRule(meta["rule"]),
        disclosed=Disclosed(meta["disclosed"]),
        n_queries=meta["rows"],
    )


def serve(requests: IO[bytes], replies: IO[bytes]) -> int:
    """Open the session that the first frame describes, then answer queries until the end.

    Returns
    -------
    status : int
        0 after the parent closed the session, 1 after a failure that was reported.
    """
    phase = "starting"
    try:
        opened = read_frame(requests)
        if opened is None:
            return 0
        _end_by(opened.meta["seconds-left"])
        phase = "compiling"
        computation = computation_from(dict(opened.meta["computation"]))
        compiled = compile_joint(computation)
        phase = "connecting"
        context = connect(_link(dict(opened.meta["link"])))
        phase = "loading the weights"
        machine = Machine(computation, compiled, context)
        machine.load_weights(split_bytes(opened.section("weights"), computation.weight_shapes))
        write_frame(replies, Envelope(kind=Kind.ANSWER, meta={"phase": "ready"}))
        phase = "computing"
        _answer(requests, replies, machine)
        context.stop_link()
    except FedInferError as exc:
        return _report(replies, phase, exc.message)
    except Exception:
        # Texts of native code name addresses and stacks: they stay on this side.
        return _report(replies, phase, "")
    return 0


def _answer(requests: IO[bytes], replies: IO[bytes], machine: Machine) -> None:
    shape = machine.input_shape
    while (frame := read_frame(requests)) is not None:
        _end_by(frame.meta["seconds-left"])
        (held,) = split_bytes(frame.section("query"), [shape])
        result = machine.run(held)
        write_frame(replies, Envelope(kind=Kind.ANSWER, sections=(("result", result),)))
        # Between queries the parent may wait as long as it likes.
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _link(meta: dict[str, Any]) -> Link:
    folder = Path(meta["folder"])
    return Link(
        link_id=meta["id"],
        rank=meta["rank"],
        addresses=tuple(meta["addresses"]),
        certificate=folder / "own.pem",
        key=folder / "own.key",
        trusted=folder / "trusted.pem",
        connect_s=meta["connect-s"],
        stall_s=meta["stall-s"],
    )


def _end_by(seconds: float) -> None:
    # The kernel's default action needs neither the interpreter nor its lock: it works in the
    # middle of native code.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001) + _GRACE_S)


def _report(replies: IO[bytes], phase: str, detail: str) -> int:
    error = PartyFailedError(f"a party failed while {phase}{': ' if detail else ''}{detail}")
    write_frame(replies, Envelope(kind=Kind.ERROR, meta={"phase": phase, "message": error.message}))
    return 1


def _private_stdout() -> IO[bytes]:
    # Native code writes its log to descriptor 1: from here on that is standard error.
    own = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(own, "wb")


def main(run: Callable[[IO[bytes], IO[bytes]], int] = serve) -> None:
    """Serve standard input, and leave without waiting for threads of native code."""
    replies = _private_stdout()
    status = run(sys.stdin.buffer, replies)
    replies.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
