"""`fedinfer doctor --deployment`: each known gap is found, and a sound set-up has none."""

import datetime
import http.server
import ipaddress
import ssl
import threading
import time
from typing import ClassVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedinfer_flower.cli import doctor_network
from fedinfer_flower.cli.doctor_deployment import examine_deployment
from fedinfer_flower.cli.doctor_network import examine_gateway, examine_superlink

POLICY = """
[site]
name = "north"
home = "home"
[model]
loader = "ward.models:load_model"
[answers]
protections = ["{protection}"]
{answers}
[queriers]
registry = "{key}"
[limits]
queries-per-minute = 60
rows-per-day = 10000
"""


def write_certificate(folder, *, days=90, names=("127.0.0.1",)):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=days))
    )
    if names:
        found = [x509.IPAddress(ipaddress.ip_address(name)) for name in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(found), critical=False)
    certificate = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (folder / "server.pem").write_bytes(certificate)
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (folder / "server.key").write_bytes(secret)
    (folder / "server.key").chmod(0o600)


def examine(tmp_path, **options):
    """Examine without this machine's own services and processes, unless they are given."""
    given = {"units": tmp_path / "no-units", "processes": tmp_path / "no-processes"} | options
    return examine_deployment(**given)


def gaps(findings):
    return [f"{f.subject}: {f.status}" for f in findings if not f.ok]


def test_every_gap_has_a_word_on_how_to_mend_it(tmp_path):
    write_site(tmp_path, protection="plain", answers="require-seal = false")
    findings = examine(tmp_path, policy=tmp_path / "site.toml", superlink="127.0.0.1:1")
    assert gaps(findings)
    assert all(finding.mend for finding in findings if not finding.ok)


# -- a site ------------------------------------------------------------------------------


def write_site(folder, *, protection="secagg", answers=""):
    path = folder / "site.toml"
    path.write_text(POLICY.format(protection=protection, answers=answers, key="ab" * 32))
    path.chmod(0o600)
    (folder / "home").mkdir(mode=0o700, exist_ok=True)
    return path


def test_policy_that_shows_plain_answers_in_clear_is_found(tmp_path):
    path = write_site(tmp_path, protection="plain", answers="require-seal = false")
    text = "\n".join(gaps(examine(tmp_path, policy=path)))
    assert "plain" in text
    assert "reads queries" in text


def test_policy_that_others_can_write_is_found(tmp_path):
    path = write_site(tmp_path)
    path.chmod(0o666)
    assert any("others can write it" in gap for gap in gaps(examine(tmp_path, policy=path)))


def test_policy_that_cannot_be_read_is_a_finding_and_no_crash(tmp_path):
    (tmp_path / "site.toml").write_text("[sit]\n")
    (finding,) = examine(tmp_path, policy=tmp_path / "site.toml")
    assert not finding.ok


def test_home_that_others_enter_is_found_with_what_they_can_read(tmp_path):
    path = write_site(tmp_path)
    identity = tmp_path / "home/identity.json"
    identity.write_text("{}")
    identity.chmod(0o644)
    assert not any("identity.json" in gap for gap in gaps(examine(tmp_path, policy=path)))
    (tmp_path / "home").chmod(0o755)
    text = "\n".join(gaps(examine(tmp_path, policy=path)))
    assert "others can enter the folder" in text
    assert "identity.json: others can read it" in text


# -- a gateway ---------------------------------------------------------------------------


def write_gateway(folder, more=""):
    path = folder / "gateway.toml"
    path.write_text(
        f'[gateway]\nstate = "state"\ncertificate = "server.pem"\nkey = "server.key"\n{more}\n'
        "[models.triage]\n"
    )
    path.chmod(0o600)
    (folder / "state").mkdir(mode=0o700, exist_ok=True)
    return path


def test_sound_gateway_has_no_gap(tmp_path):
    from fedinfer_flower.serving.key_store import KeyStore

    write_certificate(tmp_path)
    path = write_gateway(tmp_path)
    store = KeyStore(tmp_path / "state/keys.db")
    store.create("ward", scopes=("query",), expires_at=time.time() + 60 * 86_400)
    store.close()
    assert gaps(examine(tmp_path, config=path)) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"days": 20}, "ends in 19 days"),
        ({"days": 0.5}, "ended"),
        ({"names": ()}, "no subjectAltName"),
    ],
    ids=["soon", "ended", "names"],
)
def test_certificate_that_will_fail_is_found(tmp_path, options, words):
    write_certificate(tmp_path, **options)
    found = gaps(examine(tmp_path, config=write_gateway(tmp_path)))
    assert any(words in gap for gap in found)


def test_key_file_public_metrics_and_open_state_are_found(tmp_path):
    write_certificate(tmp_path)
    path = write_gateway(tmp_path, "public-metrics = true")
    (tmp_path / "server.key").chmod(0o644)
    (tmp_path / "state").chmod(0o755)
    text = "\n".join(gaps(examine(tmp_path, config=path)))
    for words in ("gateway TLS key", "metrics are public", "others can enter the folder"):
        assert words in text


def test_api_key_without_an_end_is_found_and_a_revoked_one_is_not(tmp_path):
    from fedinfer_flower.serving.key_store import KeyStore

    write_certificate(tmp_path)
    path = write_gateway(tmp_path)
    store = KeyStore(tmp_path / "state/keys.db")
    store.create("for-ever", scopes=("query",))
    store.create("gone", scopes=("query",))
    gone = next(key for key in store.list() if key.name == "gone")
    store.revoke(gone.key_id)
    store.close()
    found = gaps(examine(tmp_path, config=path))
    assert len(found) == 1
    assert "never ends" in found[0]
    assert gone.key_id not in found[0]


# -- this machine ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("flower-superlink --host 127.0.0.1 --enable-supernode-auth --insecure", ["--insecure"]),
        ("flower-superlink --host 127.0.0.1", ["takes any SuperNode"]),
        (
            "flower-superlink --host 0.0.0.0 --enable-supernode-auth",
            ["bound to every address"],
        ),
        ("fedinfer site up --stock --any-code --policy x", ["whatever code"]),
        ("flower-superlink --host 127.0.0.1 --enable-supernode-auth", []),
        ("nginx --insecure", []),
    ],
    ids=["insecure", "no-auth", "everywhere", "any-code", "sound", "another-program"],
)
@pytest.mark.parametrize("where", ["unit", "process"])
def test_unsafe_command_line_is_found_in_units_and_processes(tmp_path, command, words, where):
    if where == "unit":
        folder = tmp_path / "units"
        folder.mkdir()
        first, rest = command.split(" ", 1)
        (folder / "a.service").write_text(f"[Service]\nExecStart=/usr/bin/{first} \\\n  {rest}\n")
        found = gaps(examine(tmp_path, units=folder))
    else:
        folder = tmp_path / "processes"
        (folder / "42").mkdir(parents=True)
        argv = ["/usr/bin/python3", *f"/usr/bin/{command}".split()]
        (folder / "42/cmdline").write_bytes("\0".join([*argv, ""]).encode())
        found = gaps(examine(tmp_path, processes=folder))
    assert len(found) == len(words)
    for word in words:
        assert word in found[0]


@pytest.mark.parametrize("option", ["--node-key", "--auth-supernode-private-key", "--ssl-keyfile"])
def test_key_of_a_command_line_that_others_can_read_is_found(tmp_path, option):
    key = tmp_path / "a.key"
    key.write_text("x")
    (tmp_path / "42").mkdir()
    argv = ["/usr/bin/python3", "/usr/bin/flower-supernode", option, str(key)]
    (tmp_path / "42/cmdline").write_bytes("\0".join([*argv, ""]).encode())
    for mode, n_gaps in ((0o644, 1), (0o600, 0)):
        key.chmod(mode)
        assert len(gaps(examine(tmp_path, processes=tmp_path))) == n_gaps


# -- over the network --------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    statuses: ClassVar = {}
    date = None

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.statuses.get(self.path, 404))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = answer

    def date_time_string(self, timestamp=None):
        return self.date or super().date_time_string(timestamp)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(statuses, *, tls=False, date=None):
        handler = type("Answers", (Handler,), {"statuses": statuses, "date": date})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.handle_error = lambda *_: None  # a client that tries TLS, or goes away
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


OPEN = {"/health": 200, "/v1/control/list-runs": 200, "/v1/runtime/acquire-task": 415}


def test_open_control_and_runtime_routes_are_found_off_loopback(serve, monkeypatch):
    address = serve(OPEN)
    assert gaps(examine_superlink(address)) == []  # on loopback everybody is on the machine
    monkeypatch.setattr(doctor_network, "is_loopback", lambda host: False)
    text = "\n".join(gaps(examine_superlink(address)))
    for words in (
        "plain HTTP",
        "control routes: reachable without credentials (200)",
        "runtime routes: reachable without credentials (415)",
    ):
        assert words in text


def test_fleet_routes_behind_a_proxy_have_no_gap(serve, monkeypatch, tmp_path):
    write_certificate(tmp_path)
    monkeypatch.setattr(doctor_network, "is_loopback", lambda host: False)
    assert gaps(examine_superlink(serve({}, tls=True))) == []


def test_certificate_of_the_wire_is_looked_at(serve, tmp_path):
    write_certificate(tmp_path, days=10, names=())
    text = "\n".join(gaps(examine_superlink(serve({}, tls=True))))
    assert "ends in 9 days" in text
    assert "no subjectAltName" in text


def test_clock_that_is_off_is_found(serve):
    address = serve(OPEN, date="Thu, 01 Jan 2026 00:00:00 GMT")
    (gap,) = gaps(examine_superlink(address))
    assert "clock" in gap


def test_superlink_that_is_silent_is_found():
    (gap,) = gaps(examine_superlink("127.0.0.1:1"))
    assert "does not answer" in gap


def test_gateway_that_tells_without_a_key_is_found(serve):
    url = f"http://{serve({'/health': 200, '/ready': 503, '/v1/status': 200, '/metrics': 401})}"
    text = "\n".join(gaps(examine_gateway(url)))
    assert "not ready (503)" in text
    assert "/v1/status: answers 200 without a key" in text
    assert "/metrics: a" not in text
