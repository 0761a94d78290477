"""The boards, cores and servers of `tests/serving`, for those who attack them."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedinfer_flower.serving.tls_server import HttpServer

_SERVING = Path(__file__).resolve().parents[1] / "serving"


def _module(name: str):
    spec = importlib.util.spec_from_file_location(
        f"hostile_gateway_{name}", _SERVING / name / "conftest.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_HTTP, _CORE = _module("http"), _module("core")

board, config, keys, key = _HTTP.board, _HTTP.config, _HTTP.keys, _HTTP.key
bearer, app, client_of = _HTTP.bearer, _HTTP.app, _HTTP.client_of
bed, rows = _CORE.bed, _CORE.rows


@pytest.fixture
def serving():
    """Return a context manager that serves an app on a free port."""

    @contextmanager
    def serve(app, config):
        server = HttpServer(app, config)
        server.start()
        try:
            yield server
        finally:
            server.stop()

    return serve


@pytest.fixture
def make_certificate(tmp_path):
    """Return ``make(days)``: writes a certificate that ends in so many days, and its key."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def make(days: float) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway")])
        ends = datetime.now(UTC) + timedelta(days=days)
        built = (
            x509.CertificateBuilder()
            .subject_name(who)
            .issuer_name(who)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(ends - timedelta(days=365))
            .not_valid_after(ends)
            .sign(key, hashes.SHA256())
        )
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        certificate, secret = tmp_path / "cert.pem", tmp_path / "key.pem"
        certificate.write_bytes(built.public_bytes(pem))
        secret.write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
        secret.chmod(0o600)
        return certificate, secret

    return make
