"""Hostile clients on real sockets: slow, large, many, malformed."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import ssl
import threading
import time
from contextlib import closing, contextmanager

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinfer_flower.errors import DeploymentError, FedInferError
from fedinfer_flower.observability.json_logs import JsonFormatter
from fedinfer_flower.serving.body_limits import BodyRoom, parse_json
from fedinfer_flower.serving.config import GatewayConfig
from fedinfer_flower.serving.http_app import create_app
from fedinfer_flower.serving.tls_server import Certificate, HttpServer

QUERY = b'{"model": "wine", "inputs": [[1.0, 2.0]]}'


@contextmanager
def serving(app, config):
    server = HttpServer(app, config)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def connected(server):
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=20)) as sock:
        yield sock


def head(key, *, length="", more=""):
    size = f"Content-Length: {length}\r\n" if length != "" else ""
    return (
        f"POST /v1/query HTTP/1.1\r\nHost: gw\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\n{size}{more}\r\n"
    ).encode()


def read_all(sock):
    parts = []
    try:
        while data := sock.recv(65536):
            parts.append(data)
    except ConnectionError:
        pass
    return b"".join(parts)


def status_of(data):
    return int(data.split(b" ", 2)[1]) if data else 0


@pytest.fixture
def server(app, config):
    with serving(app, config) as found:
        yield found


def test_query_over_a_socket(server, key):
    with connected(server) as sock:
        sock.sendall(head(key, length=len(QUERY), more="Connection: close\r\n") + QUERY)
        data = read_all(sock)
    assert status_of(data) == 200
    assert b"server:" not in data.lower().split(b"\r\n\r\n")[0]


def test_headers_that_dribble_are_cut_off(server):
    with connected(server) as sock:
        sock.settimeout(0.05)
        began, data, byte = (
            time.monotonic(),
            None,
            iter(b"GET /health HTTP/1.1\r\nX: " + b"a" * 10**6),
        )
        while data is None and time.monotonic() - began < 20.0:
            try:
                sock.sendall(bytes([next(byte)]))
                data = sock.recv(100)
            except TimeoutError:
                continue
            except ConnectionError:
                data = b""
    assert data == b""


def test_connection_that_says_nothing_is_cut_off(server):
    with connected(server) as sock:
        assert read_all(sock) == b""


def test_idle_connection_between_requests_is_cut_off(server):
    with connected(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: gw\r\n\r\n")
        assert status_of(read_all(sock)) == 200


def test_body_that_dribbles_gets_a_timeout(server, key):
    with connected(server) as sock:
        sock.sendall(head(key, length=1000) + b"{")
        data = read_all(sock)
    assert status_of(data) == 408
    assert b"connection: close" in data.lower()


def test_rest_of_a_body_that_is_refused_is_not_waited_for(server):
    with connected(server) as sock:
        sock.sendall(head("nonsense", length=1000) + b"{")
        assert status_of(read_all(sock)) == 401


def test_declared_length_beyond_the_limit_is_refused_at_once(server, key):
    with connected(server) as sock:
        sock.sendall(head(key, length=(1 << 20) + 1))
        assert status_of(read_all(sock)) == 413


@pytest.mark.parametrize("length", ["-1", "1e3", "9" * 30, "1, 2"])
def test_odd_lengths_are_refused(server, key, length):
    with connected(server) as sock:
        sock.sendall(head(key, length=length))
        assert status_of(read_all(sock)) in (400, 413)


def test_chunks_beyond_the_limit_are_refused(server, key):
    with connected(server) as sock:
        sock.sendall(head(key, more="Transfer-Encoding: chunked\r\n"))
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        try:
            for _ in range(40):
                sock.sendall(chunk)
        except ConnectionError:
            pass
        data = read_all(sock)
    assert status_of(data) in (0, 413)


@pytest.mark.parametrize(
    "text",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"\x16\x03\x01\x02\x00" * 9 + b"\r\n\r\n",
    ],
    ids=["nonsense", "header", "tls-hello"],
)
def test_what_is_not_http_gets_an_error_in_the_usual_shape(server, text):
    with connected(server) as sock:
        sock.sendall(text)
        data = read_all(sock)
    assert status_of(data) == 400
    assert json.loads(data.split(b"\r\n\r\n")[1])["error"]["code"] == "FI300"


def test_headers_beyond_their_limit_are_refused(server):
    with connected(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n")
        assert status_of(read_all(sock)) in (0, 400)


def test_connections_are_capped(app, config):
    values = {"limits": {"connections": 3, "header_timeout_s": 30.0}, "models": {"wine": {}}}
    capped = GatewayConfig.from_mapping(values | {"gateway": {"port": 0}})
    with serving(app, capped) as server:
        socks = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        for sock in socks:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: gw\r\n\r\n")
            assert status_of(sock.recv(65536)) == 200
        with connected(server) as sock:
            data = read_all(sock)
        assert (status_of(data), b"FI417" in data) == (503, True)
        for sock in socks:
            sock.close()
        for _ in range(100):
            with connected(server) as sock:
                sock.sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\nHost: gw\r\n\r\n")
                if status_of(read_all(sock)) == 200:
                    return
            time.sleep(0.05)
        pytest.fail("closed connections still count")


def test_events_stop_when_the_client_leaves(server, key, board, app):
    board.answering = False
    base = f"http://127.0.0.1:{server.port}"
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=base, headers=headers) as client:
        body = {"model": "wine", "inputs": [[1.0]], "wait_s": 0}
        job_id = client.post("/v1/query", json=body).json()["id"]
        with client.stream("GET", f"/v1/queries/{job_id}/events") as reply:
            lines = reply.iter_lines()  # kept: httpx closes the response with it
            assert next(lines) == "event: progress"
            assert board.n_listeners() == 1
    for _ in range(200):
        if not board.n_listeners():
            return
        time.sleep(0.02)
    pytest.fail("the listener is still there")


def test_reader_that_stops_is_cut_off_and_keeps_nothing_growing(server, board, key):
    board.answering = False
    headers = {"Authorization": f"Bearer {key}"}
    body = {"model": "wine", "inputs": [[1.0]], "wait_s": 0}
    asked = httpx.post(f"http://127.0.0.1:{server.port}/v1/query", json=body, headers=headers)
    job_id = asked.json()["id"]
    with connected(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lines = f"GET /v1/queries/{job_id}/events HTTP/1.1\r\nAuthorization: Bearer {key}\r\n"
        sock.sendall(f"{lines}Host: gw\r\n\r\n".encode())
        end = time.monotonic() + 60.0
        while not board.n_listeners() and time.monotonic() < end:
            time.sleep(0.01)
        assert board.n_listeners() == 1
        noise, i = {"degraded": "x" * 100_000}, 0
        while board.n_listeners() and time.monotonic() < end:
            i += 1
            board.change(job_id, provenance=noise | {"i": i})
            time.sleep(0.01)
        assert board.n_listeners() == 0


def test_many_ask_at_once(server, key):
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    url = f"http://127.0.0.1:{server.port}/v1/query"

    async def ask():
        async with httpx.AsyncClient(headers=headers) as client:
            asked = (client.post(url, content=QUERY) for _ in range(60))
            return [reply.status_code for reply in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == [200] * 60


# -- TLS ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_certificate():
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def make(folder, name):
        key = ec.generate_private_key(ec.SECP256R1())
        who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        built = (
            x509.CertificateBuilder()
            .subject_name(who)
            .issuer_name(who)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .sign(key, hashes.SHA256())
        )
        plain = serialization.NoEncryption()
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        for file, data in (
            (folder / "cert.pem", built.public_bytes(pem)),
            (folder / "key.pem", key.private_bytes(pem, form, plain)),
        ):
            file.with_suffix(".new").write_bytes(data)
            os.replace(file.with_suffix(".new"), file)
        return built.public_bytes(serialization.Encoding.DER)

    return make


def seen_certificate(server, version=None):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if version is not None:
        context.minimum_version = context.maximum_version = version
    with connected(server) as sock, context.wrap_socket(sock) as secured:
        secured.sendall(b"GET /health HTTP/1.1\r\nHost: gw\r\nConnection: close\r\n\r\n")
        data = read_all(secured)
        assert status_of(data) == 200
        assert b"strict-transport-security" in data.lower()
        return secured.getpeercert(binary_form=True)


@pytest.fixture
def secure(tmp_path, make_certificate):
    certificate = make_certificate(tmp_path, "first")
    own = {"port": 0, "certificate": "cert.pem", "key": "key.pem"}
    values = {"gateway": own, "models": {"wine": {}}, "limits": {"header_timeout_s": 0.6}}
    return GatewayConfig.from_mapping(values, folder=tmp_path), certificate


def test_renewed_certificate_is_taken_up_and_a_bad_one_is_not(
    board, keys, secure, tmp_path, make_certificate
):
    config, first = secure
    with serving(create_app(board, config, keys=keys), config) as server:
        assert seen_certificate(server, ssl.TLSVersion.TLSv1_2) == first
        second = make_certificate(tmp_path, "second")
        end = time.monotonic() + 20.0
        while seen_certificate(server) != second and time.monotonic() < end:
            time.sleep(0.1)
        assert seen_certificate(server) == second
        (tmp_path / "key.pem").write_text("broken")
        assert server.certificate.renew() in (True, False)
        time.sleep(1.5)
        assert seen_certificate(server) == second


def test_old_tls_is_refused(secure):
    config, _ = secure
    context = Certificate(config.certificate, config.key).context
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_handshake_that_does_not_come_is_cut_off(board, keys, secure):
    config, _ = secure
    with serving(create_app(board, config, keys=keys), config) as server, connected(server) as sock:
        assert read_all(sock) == b""


def test_certificate_of_another_key_is_refused(secure, tmp_path, make_certificate):
    config, _ = secure
    key = config.key.read_bytes()
    make_certificate(tmp_path, "other")
    config.key.write_bytes(key)
    with pytest.raises(DeploymentError, match="cannot be used"):
        Certificate(config.certificate, config.key)


def test_port_in_use_is_a_typed_error(server, config, app):
    taken = GatewayConfig.from_mapping({"gateway": {"port": server.port}, "models": {"wine": {}}})
    with pytest.raises(DeploymentError, match="cannot listen"):
        HttpServer(app, taken).start()


# -- JSON, canaries, fuzz ----------------------------------------------------------------


def test_large_json_is_refused_before_it_is_made():
    for data in (b"[" + b"[]," * 2_000_000 + b"[]]", b"[" + b"{}," * 30_000 + b"{}]"):
        with pytest.raises(FedInferError, match="values"):
            parse_json(data)


def test_room_for_bodies_is_bounded():
    room = BodyRoom(10)
    room.take(8)
    with pytest.raises(FedInferError, match="too many queries"):
        room.take(3)
    room.give_back(8)
    room.take(10)


CANARY = "canary7f3a"


def test_nothing_of_a_request_is_in_answers_or_logs(app, key, bearer, client_of):
    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(JsonFormatter().format(record) + record.getMessage() + str(record.args))

    handler = Keep()
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    odd = {"Idempotency-Key": f"{CANARY} x", "X-Other": CANARY, "traceparent": CANARY}
    bodies = [
        CANARY,
        f'"{CANARY}"',
        f'{{"{CANARY}": 1}}',
        f'{{"inputs": [["{CANARY}"]], "model": "wine"}}',
        f'{{"inputs": [[1]], "model": "{CANARY}"}}',
        f'{{"inputs": [[1]], "model": "wine", "dtype": "{CANARY}"}}',
        f'{{"model": "{CANARY}", "messages": [{{"role": "{CANARY}", "content": 3}}]}}',
    ]

    async def ask():
        replies = []
        async with client_of(app) as client:
            for path in (
                f"/{CANARY}",
                f"/v1/{CANARY}",
                f"/v1/queries/{CANARY}",
                f"/v1/models/{CANARY}",
                f"/v1/query?model={CANARY}",
                f"/v1/query?wait_s={CANARY}",
                "/v1/query",
                "/v1/chat/completions",
                "/v1/responses",
            ):
                for method in ("GET", "POST", "DELETE", CANARY.upper()):
                    replies.append(await client.request(method, path, headers=odd | bearer(key)))
                    replies.append(
                        await client.request(method, path, headers={"Authorization": CANARY})
                    )
                # OpenAI's clients are told by name which of their fields is not read.
                is_openai = path in ("/v1/chat/completions", "/v1/responses")
                for body in bodies[3:] if is_openai else bodies:
                    for kind in (
                        "application/json",
                        "application/octet-stream",
                        CANARY,
                        "application/vnd.fedinfer.sealed-job",
                    ):
                        headers = bearer(key) | {"Content-Type": kind}
                        replies.append(await client.post(path, content=body, headers=headers))
        return replies

    try:
        replies = asyncio.run(ask())
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    assert len(replies) > 250
    own = [line for line in lines if '"logger": "httpx"' not in line and "httpcore" not in line]
    assert own
    for text in own:
        assert CANARY not in text.lower()
        assert key.split("_", 2)[2] not in text
    for reply in replies:
        assert reply.status_code not in (200, 500, 502), reply.text
        assert CANARY not in (reply.text + str(reply.headers)).lower()


def test_fault_of_the_gateway_says_nothing_of_it(app, board, client, caplog):
    board.error = RuntimeError(CANARY)
    body = json.loads(QUERY)
    with caplog.at_level(logging.INFO):
        reply = asyncio.run(client.post("/v1/query", json=body))
    assert reply.status_code == 500
    assert set(reply.json()["error"]) == {"code", "type", "message", "hint"}
    assert CANARY not in reply.text
    assert any(r.name == "fedinfer_flower.access" for r in caplog.records)
    assert CANARY not in "".join(map(JsonFormatter().format, caplog.records))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
BODIES = (
    st.binary(max_size=300)
    | JSON_VALUES.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries({"model": st.just("wine"), "inputs": JSON_VALUES}).map(
        lambda value: json.dumps(value).encode()
    )
    | st.binary(max_size=80).map(lambda data: b"\x93NUMPY\x01\x00" + data)
)
KINDS = st.sampled_from(
    ["application/json", "application/octet-stream", "application/vnd.fedinfer.sealed-job"]
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    from fedinfer_flower.serving.key_store import KeyStore

    class NoBoard:
        def submit(self, request):
            raise FedInferError("reached the board")

    folder = tmp_path_factory.mktemp("fuzz")
    keys = KeyStore(folder / "keys.db")
    config = GatewayConfig.from_mapping({"models": {"wine": {}}}, folder=folder)
    yield create_app(NoBoard(), config, keys=keys), keys.create("lab", scopes=["query", "sealed"])
    keys.close()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(body=BODIES, kind=KINDS)
def test_no_body_makes_the_gateway_fail(fuzzed, body, kind):
    app, key = fuzzed

    async def ask():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
        headers = {"Authorization": f"Bearer {key}", "Content-Type": kind}
        async with httpx.AsyncClient(transport=transport, base_url="http://gw") as client:
            return await client.post("/v1/query?model=wine", content=body, headers=headers)

    reply = asyncio.run(ask())
    assert reply.status_code in (400, 403, 409, 410, 413, 422, 502), reply.text
    assert reply.json()["error"]["code"].startswith("FI")


def test_servers_leave_no_thread_behind():
    assert not [t for t in threading.enumerate() if t.name == "fedinfer-http" and t.is_alive()]
