"""Sockets that mean harm: two requests in one, connections without end."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time

import pytest

from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.http_app import create_app

BODY = b'{"model": "wine", "inputs": [[1.0, 2.0]]}'
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
SMUGGLED = b"GET /v1/status HTTP/1.1\r\nHost: gw\r\n\r\n"


def exchanged(port: int, data: bytes, *, wait_s: float = 10.0) -> bytes:
    """Send bytes; return all that comes until the other side closes."""
    parts = []
    with contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=wait_s)) as sock:
        sock.sendall(data)
        with contextlib.suppress(ConnectionError):
            while part := sock.recv(65536):
                parts.append(part)
    return b"".join(parts)


def post(key: str, *framing: bytes, version: bytes = b"1.1") -> bytes:
    lines = (
        b"POST /v1/query HTTP/" + version,
        b"Host: gw",
        b"Authorization: Bearer " + key.encode(),
        b"Content-Type: application/json",
        *framing,
    )
    return b"\r\n".join(lines) + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("framing", "version"),
    [
        ((b"Content-Length: 5", b"Transfer-Encoding: chunked"), b"1.1"),
        ((b"Transfer-Encoding: chunked", b"Content-Length: %d" % len(CHUNKED)), b"1.1"),
        ((b"Transfer-Encoding: chunked",), b"1.0"),
        ((b"Transfer-Encoding: xchunked",), b"1.1"),
        ((b"Transfer-Encoding: gzip, chunked",), b"1.1"),
        ((b"Transfer-Encoding : chunked",), b"1.1"),
        ((b"Content-Length: 5", b"Content-Length: %d" % len(BODY)), b"1.1"),
        ((b"Content-Length: +5",), b"1.1"),
        ((b"Content-Length: 0x5",), b"1.1"),
    ],
    ids=["cl-te", "te-cl", "te-1.0", "te-odd", "te-two", "te-space", "cl-cl", "cl-plus", "cl-hex"],
)
def test_body_that_two_readers_would_end_differently_is_refused(
    app, config, serving, board, key, framing, version
):
    with serving(app, config) as server:
        data = post(key, *framing, version=version) + CHUNKED + SMUGGLED
        replies = exchanged(server.port, data)
    assert replies.startswith(b"HTTP/1.1 400"), replies[:80]
    assert replies.count(b"HTTP/1.1 ") == 1
    assert not board.requests


def test_chunked_body_alone_is_read(app, config, serving, key):
    with serving(app, config) as server:
        replies = exchanged(
            server.port, post(key, b"Transfer-Encoding: chunked", b"Connection: close") + CHUNKED
        )
    assert replies.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "path",
    [
        "//v1/status",
        "/health/../v1/status",
        "/%2e%2e/v1/status",
        "/V1/status",
        "/v1/status/",
        "/v1;/status",
        "http://gw/v1/status",
        "http://gw/metrics",
        "/metrics/",
        "/v1%2fstatus",
        "/%76%31/status",
        "/%6detrics",
        "/v1/status%00",
        "*",
    ],
)
def test_no_way_of_writing_a_path_goes_around_the_key(app, config, serving, path):
    with serving(app, config) as server:
        asked = f"GET {path} HTTP/1.1\r\nHost: gw\r\nConnection: close\r\n\r\n"
        status = exchanged(server.port, asked.encode()).split(b" ", 2)[1]
    assert status in (b"400", b"401", b"404")


def test_one_key_cannot_hold_every_connection(board, keys, key, serving, tmp_path):
    """Whoever waits for sixty seconds on every connection leaves some for the others."""
    limits = {"connections": 8}
    config = GatewayConfig.from_mapping(
        {"gateway": {"port": 0}, "models": {"wine": {}}, "limits": limits}, folder=tmp_path
    )
    other, board.answering = keys.create("other", scopes=["query"]), False
    with serving(create_app(board, config, keys=keys), config) as server:

        def asked(secret: str, wait_s: int) -> http.client.HTTPConnection:
            line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
            line.request("POST", f"/v1/query?wait_s={wait_s}", body=BODY, headers=headers)
            return line

        held = [asked(key, 30) for _ in range(4)]
        end = time.monotonic() + 20.0
        while len(board.requests) < 4 and time.monotonic() < end:
            time.sleep(0.01)
        refused, let_in = asked(key, 0), asked(other, 0)
        reply = refused.getresponse()
        said = json.loads(reply.read())
        assert (reply.status, said["error"]["code"]) == (429, "FI415")
        assert let_in.getresponse().status == 202
        for job_id in list(board.jobs):
            board.finish(job_id)
        assert [line.getresponse().status for line in held] == [200] * 4
        again = asked(key, 0)
        assert again.getresponse().status == 202
        for line in (*held, refused, let_in, again):
            line.close()


def test_handshakes_that_stall_do_not_take_every_descriptor(
    board, keys, serving, tmp_path, make_certificate
):
    make_certificate(30)
    own = {"port": 0, "certificate": "cert.pem", "key": "key.pem"}
    limits = {"connections": 4, "header_timeout_s": 1.5}
    config = GatewayConfig.from_mapping(
        {"gateway": own, "models": {"wine": {}}, "limits": limits}, folder=tmp_path
    )
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with serving(create_app(board, config, keys=keys), config) as server:
        stalled = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(24)]
        closed = 0
        for sock in stalled:
            sock.settimeout(0.5)
            with contextlib.suppress(TimeoutError, ConnectionError):
                closed += sock.recv(1) == b""
        assert closed >= 16  # at once, and not after their time
        end, status = time.monotonic() + 20.0, 0
        while status != 200 and time.monotonic() < end:
            with contextlib.suppress(OSError):
                line = http.client.HTTPSConnection(
                    "127.0.0.1", server.port, timeout=5, context=context
                )
                line.request("GET", "/health")
                status = line.getresponse().status
                line.close()
        assert status == 200
        for sock in stalled:
            sock.close()


def test_events_of_a_reader_that_left_are_let_go(board, keys, key, serving, tmp_path):
    limits = {"connections": 16, "header_timeout_s": 1.0}
    config = GatewayConfig.from_mapping(
        {"gateway": {"port": 0}, "models": {"wine": {}}, "limits": limits}, folder=tmp_path
    )
    board.answering = False
    with serving(create_app(board, config, keys=keys), config) as server:
        exchanged(
            server.port,
            post(key, b"Content-Length: %d" % len(BODY), b"Connection: close").replace(
                b"/v1/query", b"/v1/query?wait_s=0"
            )
            + BODY,
        )
        job_id = next(iter(board.jobs))
        ask = f"GET /v1/queries/{job_id}/events HTTP/1.1\r\nHost: gw\r\nAuthorization: Bearer {key}"

        def come_and_go() -> None:
            with contextlib.closing(socket.create_connection(("127.0.0.1", server.port))) as sock:
                sock.sendall(f"{ask}\r\n\r\n".encode())
                sock.recv(1024)

        for _ in range(6):
            threads = [threading.Thread(target=come_and_go) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        end = time.monotonic() + 20.0
        while board.n_listeners() and time.monotonic() < end:
            time.sleep(0.05)
        assert board.n_listeners() == 0
        board.finish(job_id)


def test_refusal_arrives_though_a_short_body_comes_after_it(app, config, serving):
    """A connection that is closed on arriving data is reset, and the refusal lost with it."""
    with serving(app, config) as server:
        address = ("127.0.0.1", server.port)
        with contextlib.closing(socket.create_connection(address, timeout=10)) as sock:
            sock.sendall(post("nonsense", b"Content-Length: %d" % len(BODY)))
            first = sock.recv(65536)
            sock.sendall(BODY)
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: gw\r\nConnection: close\r\n\r\n")
            while part := sock.recv(65536):
                first += part
    assert first.startswith(b"HTTP/1.1 401")
    assert b"HTTP/1.1 200 OK" in first
