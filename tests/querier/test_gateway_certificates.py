"""A gateway whose certificate is not to be trusted: said in words, and not asked again."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading

import pytest

from fedinfer_flower.errors import GatewayError
from fedinfer_flower.querier.gateway_client import Gateway
from fedinfer_flower.simulation.loopback import Authority


@pytest.mark.parametrize(
    ("days", "trusted", "words"),
    [
        (-1, True, "it has expired"),
        (9, False, "no authority that is trusted has signed it"),
    ],
    ids=["expired", "other-authority"],
)
def test_bad_certificate_is_said_and_not_tried_again(tmp_path, days, trusted, words):
    authority = Authority.make(tmp_path)
    (tmp_path / "other").mkdir()
    other = Authority.make(tmp_path / "other")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*authority.issue(tmp_path, "server", days=days))
    ca = (authority if trusted else other).certificate
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    seen.append(connection)
                    with contextlib.suppress(OSError):
                        tls.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        url = f"https://127.0.0.1:{listening.getsockname()[1]}"
        with (
            Gateway(url, api_key="fik_0a1b2c3d_secret", ca=ca) as gateway,
            pytest.raises(GatewayError, match=f"its certificate is refused: {words}"),
        ):
            gateway.models()
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(5.0)
    assert len(seen) == 1
