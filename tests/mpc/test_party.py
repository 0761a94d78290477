"""Three real processes over mutual TLS: the answer, and what happens when one is gone."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedinfer_flower.errors import (
    EnvelopeError,
    InvalidValueError,
    MissingExtraError,
    PartyFailedError,
)
from fedinfer_flower.mpc import frames, party, tls
from fedinfer_flower.mpc.party_process import Credentials, PartyProcess
from fedinfer_flower.mpc.shares import decode_reals, held_from_bytes, join
from fedinfer_flower.wire.envelope import Envelope, Kind, encode
from fedinfer_flower.wire.identity import Identity

from .conftest import NEEDS_SPU, Trio, in_parallel, make_trio

INPUTS = np.random.default_rng(0).normal(size=(4, 2, 6, 6)).astype(np.float32)
OPEN_S = 60.0
"""Generous: three processes import SPU and JAX on a machine that does other things."""


def expected(trio: Trio) -> np.ndarray:
    from fedinfer_flower.mpc.forward import joint_function

    session = trio.session
    function = joint_function(session.specs, session.rule, session.disclosed)
    return np.asarray(function(INPUTS, *(w for each in trio.weights for w in each)))


@NEEDS_SPU
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_three_processes_compute_the_ensemble(trio: Trio) -> None:
    weights = [trio.held_weights(rank) for rank in range(3)]
    query = [trio.held_query(rank, INPUTS) for rank in range(3)]

    def one(rank: int) -> list[bytes]:
        ends_at = time.monotonic() + OPEN_S
        with trio.process(rank) as process:
            process.open(weights[rank], ends_at=ends_at)
            return [process.query(query[rank], ends_at=ends_at) for _ in range(2)]

    results = in_parallel(one)

    for batch in range(2):
        held = [held_from_bytes(r[batch], trio.session.computation.output_shape) for r in results]
        # As in test_spu.py: fixed-point steps through two layers.
        np.testing.assert_allclose(decode_reals(join(held)), expected(trio), atol=5e-4)


@NEEDS_SPU
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_party_lost_while_others_compute_ends_the_job_everywhere(trio: Trio, how: int) -> None:
    weights = [trio.held_weights(rank) for rank in range(3)]
    query = [trio.held_query(rank, INPUTS) for rank in range(3)]
    all_computed = threading.Barrier(3)
    ended: dict[int, float] = {}

    def one(rank: int) -> None:
        ends_at = time.monotonic() + OPEN_S
        with trio.process(rank) as process:
            process.open(weights[rank], ends_at=ends_at)
            process.query(query[rank], ends_at=ends_at)
            all_computed.wait()
            if rank == 2:
                os.kill(process.pid, how)
            started = time.monotonic()
            try:
                process.query(query[rank], ends_at=started + 14.0)
            finally:
                ended[rank] = time.monotonic() - started

    failures = in_parallel(one)

    assert [type(failure) for failure in failures] == [PartyFailedError] * 3
    assert all(failure.code == "FI408" for failure in failures)
    # 14 s until the deadline, 10 s of silence; then a busy machine takes a moment to clean up.
    assert max(ended.values()) < 18.0


@NEEDS_SPU
def test_party_that_never_comes_ends_the_job_by_its_deadline(trio: Trio) -> None:
    weights = [trio.held_weights(rank) for rank in range(2)]
    started = time.monotonic()

    def one(rank: int) -> None:
        with trio.process(rank) as process:
            process.open(weights[rank], ends_at=started + 4.0)

    failures = in_parallel(one, count=2)

    assert [type(failure) for failure in failures] == [PartyFailedError] * 2
    assert time.monotonic() - started < 8.0


@NEEDS_SPU
def test_impostor_with_another_certificate_cannot_join(
    trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native_log = tmp_path / "native.log"
    monkeypatch.setenv("FEDINFER_MPC_LOG", str(native_log))
    weights = [trio.held_weights(rank) for rank in range(3)]
    processes = [trio.process(0), trio.process(1), _impostor(trio, Identity.generate())]

    def one(rank: int) -> None:
        if rank == 3:
            _wait_for(
                lambda: "certificate verify failed" in native_log.read_text("utf-8", "replace")
            )
            for process in processes:
                os.kill(process.pid, signal.SIGKILL)
            return
        with processes[rank] as process:
            process.open(weights[rank], ends_at=time.monotonic() + OPEN_S)

    *failures, watched = in_parallel(one, count=4)

    assert [type(failure) for failure in failures] == [PartyFailedError] * 3
    assert watched is None


def _wait_for(condition: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + OPEN_S
    while not condition():
        assert time.monotonic() < ends_at
        time.sleep(0.1)


def _impostor(trio: Trio, impostor: Identity) -> PartyProcess:
    own = trio.credentials(2)
    salt = bytes(32)
    return PartyProcess(
        computation=trio.session.computation,
        link_id="of this test",
        rank=2,
        addresses=tuple(place.address for place in trio.session.party_places),
        credentials=Credentials(
            certificate=tls.pem_of(tls.certificate(impostor, salt)),
            key=tls.secret_pem(impostor, salt),
            trusted=own.trusted,
        ),
    )


@NEEDS_SPU
def test_listener_refuses_whoever_has_no_certificate_of_a_party(trio: Trio, tmp_path: Path) -> None:
    weights = trio.held_weights(0)
    host, port = trio.session.party_places[0].address.split(":")
    salt = bytes(32)
    stranger = Identity.generate()
    (tmp_path / "cert.pem").write_bytes(tls.pem_of(tls.certificate(stranger, salt)))
    (tmp_path / "key.pem").write_bytes(tls.secret_pem(stranger, salt))

    def talk(context: ssl.SSLContext) -> bytes:
        raw = socket.create_connection((host, int(port)), timeout=5.0)
        with context.wrap_socket(raw) as stream:
            stream.sendall(b"GET /status HTTP/1.0\r\n\r\n")
            return stream.recv(100)

    anonymous, named = (ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) for _ in range(2))
    for context in (anonymous, named):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    named.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    process = trio.process(0)

    def serve(_: int) -> None:
        with process:
            process.open(weights, ends_at=time.monotonic() + OPEN_S)

    def knock(_: int) -> list[object]:
        try:
            return [_until_listening(lambda c=c: talk(c)) for c in (anonymous, named)]
        finally:
            os.kill(process.pid, signal.SIGKILL)

    served, heard = in_parallel(lambda i: (serve, knock)[i](i), count=2)

    assert isinstance(served, PartyFailedError)  # the other two never came
    for answer in heard:
        assert answer == b"" or isinstance(answer, ssl.SSLError | ConnectionError), answer


@NEEDS_SPU
def test_party_without_the_links_secret_name_cannot_take_part(trio: Trio) -> None:
    # The listener takes connections without TLS: the name is what keeps their messages out.
    # Here even a party with a certificate gets nowhere without it.
    weights = [trio.held_weights(rank) for rank in range(3)]

    def one(rank: int) -> None:
        name = "of this test" if rank < 2 else "guessed"
        with trio.process(rank, link_id=name) as process:
            process.open(weights[rank], ends_at=time.monotonic() + 40.0)

    failures = in_parallel(one)

    assert [type(failure) for failure in failures] == [PartyFailedError] * 3


def _until_listening(talk: Callable[[], bytes]) -> object:
    ends_at = time.monotonic() + OPEN_S
    while time.monotonic() < ends_at:
        try:
            return talk()
        except ConnectionRefusedError:
            time.sleep(0.1)
        except OSError as exc:  # SSL errors are OSErrors
            return exc
    return "never listened"


@NEEDS_SPU
def test_secrets_are_in_neither_arguments_nor_readable_files(trio: Trio) -> None:
    process = trio.process(0)
    try:
        command_line = Path(f"/proc/{process.pid}/cmdline")
        _wait_for(lambda: command_line.read_bytes() != b"")  # empty until the process is there
        arguments = command_line.read_bytes()
        assert arguments.split(b"\0")[1:] == [b"-m", b"fedinfer_flower.mpc.party", b""]
        folder = Path(process._link["folder"])
        assert folder.stat().st_mode & 0o077 == 0
        assert sorted(p.name for p in folder.iterdir()) == ["own.key", "own.pem", "trusted.pem"]
        assert all(p.stat().st_mode & 0o077 == 0 for p in folder.iterdir())
    finally:
        process.close()
    assert not folder.exists()
    process.close()


@NEEDS_SPU
def test_silence_limit_that_is_too_short_is_refused(trio: Trio) -> None:
    with pytest.raises(InvalidValueError, match="stall_s"):
        PartyProcess(
            computation=trio.session.computation,
            link_id="x",
            rank=0,
            addresses=("a:1", "b:2", "c:3"),
            credentials=trio.credentials(0),
            stall_s=1.0,
        )


@NEEDS_SPU
def test_process_ends_with_its_parent(trio: Trio) -> None:
    process = trio.process(0)
    process._process.stdin.close()  # what the end of the parent does
    assert process._process.wait(timeout=30.0) == 0
    process.close()


def test_site_without_spu_says_which_extra(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"fedinfer-flower\[mpc\]"):
        trio.process(0)


# -- the process's own loop, without native code -----------------------------------------


class Pipe:
    def __init__(self, data: bytes = b"") -> None:
        import io

        self.stream = io.BytesIO(data)


def test_frame_that_breaks_off_is_refused() -> None:
    data = encode(Envelope(kind=Kind.PING))
    whole = len(data).to_bytes(8, "big") + data
    for cut in (3, 8, len(whole) - 1):
        with pytest.raises(EnvelopeError):
            frames.read_frame(Pipe(whole[:cut]).stream)


def test_failure_of_native_code_leaves_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(link: object) -> None:
        raise RuntimeError("CANARY")

    trio = make_trio()
    monkeypatch.setattr(party, "compile_joint", lambda computation: None)
    monkeypatch.setattr(party, "connect", broken)
    monkeypatch.setattr(party, "_end_by", lambda seconds: None)
    request, replies = Pipe().stream, Pipe().stream
    meta = {
        "seconds-left": 5.0,
        "link": {
            "folder": "/nowhere",
            "id": "s",
            "rank": 0,
            "addresses": [],
            "connect-s": 1.0,
            "stall-s": 1.0,
        },
        "computation": party.computation_meta(trio.session.computation),
    }
    frames.write_frame(request, Envelope(kind=Kind.JOB, meta=meta, sections=(("weights", b""),)))
    request.seek(0)

    assert party.serve(request, replies) == 1

    replies.seek(0)
    reply = frames.read_frame(replies)
    assert reply is not None
    assert reply.kind is Kind.ERROR
    assert reply.meta["phase"] == "connecting"
    assert "CANARY" not in str(reply.meta)


def test_end_of_requests_ends_the_loop() -> None:
    assert party.serve(Pipe().stream, Pipe().stream) == 0


def test_computation_survives_its_frame(trio: Trio) -> None:
    for computation in (trio.session.computation, replace(trio.session.computation, n_queries=1)):
        assert party.computation_from(party.computation_meta(computation)) == computation
