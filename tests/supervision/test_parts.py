"""Parts of a supervisor, without processes."""

import datetime
import http.server
import ipaddress
import json
import random
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from fedinfer_flower.errors import DeploymentError, GatewayError, InvalidValueError
from fedinfer_flower.supervision.backoff import Backoff
from fedinfer_flower.supervision.certificates import read_certificates, require_valid
from fedinfer_flower.supervision.output import OutputFile
from fedinfer_flower.supervision.probes import BeatProbe, HttpProbe, fetch_status
from fedinfer_flower.supervision.run_folder import (
    RunFolder,
    private_folder,
    require_private_file,
)
from fedinfer_flower.supervision.service import Ended, ServiceKeeper
from fedinfer_flower.supervision.supervisor import StopFlag

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def make_certificate(folder, *, days=90, names=("localhost", "127.0.0.1"), start=None):
    """Write a certificate and its key; return their paths."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    start = start or datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
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
        general = [
            x509.IPAddress(ipaddress.ip_address(n)) if n[0].isdigit() else x509.DNSName(n)
            for n in names
        ]
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    (folder / "server.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "server.pem", folder / "server.key"


# -- waits -------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 59), min_size=1, max_size=40), st.integers(0, 2**32))
def test_waits_are_within_their_bounds_whatever_happens(runs, seed):
    backoff = Backoff(first_s=0.5, cap_s=30.0, rng=random.Random(seed))  # noqa: S311
    for number, ran_s in enumerate(runs):
        most = min(30.0, 0.5 * 2**number)
        assert most / 2 <= backoff.next_s(ran_s=ran_s) <= most


def test_healthy_time_takes_the_wait_back_to_the_start():
    backoff = Backoff(first_s=0.5, healthy_s=60.0)
    for _ in range(10):
        backoff.next_s(ran_s=0.0)
    assert backoff.next_s(ran_s=60.0) <= 0.5


@pytest.mark.parametrize("options", [{"first_s": 0.0}, {"first_s": 9.0, "cap_s": 1.0}], ids=str)
def test_waits_without_sense_are_refused(options):
    with pytest.raises(InvalidValueError):
        Backoff(**options)


# -- heartbeats --------------------------------------------------------------------------


def write_beat(path, beat):
    path.write_text(json.dumps({"beat_at": beat}))


def test_beat_that_changes_is_life_whatever_the_clock_says(tmp_path):
    path = tmp_path / "status.json"
    probe = BeatProbe(path, stale_s=10.0)
    probe.start(now_s=0.0)
    for now_s, beat in ((5.0, 1e9), (14.0, 5e8), (23.0, 2e9)):  # steps of the machine's clock
        write_beat(path, beat)
        assert probe.check(now_s=now_s) == ""
    assert probe.check(now_s=32.0) == ""
    assert probe.check(now_s=33.5) == "its heartbeat has stopped"


def test_beat_of_the_process_before_does_not_count(tmp_path):
    path = tmp_path / "status.json"
    write_beat(path, 1.0)
    probe = BeatProbe(path, first_s=10.0)
    probe.start(now_s=0.0)
    assert not path.exists()
    assert probe.check(now_s=9.0) == ""
    assert probe.check(now_s=11.0) == "no sign of life since its start"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"beat_at": "x"}', '{"beat": 1}', "[" * 9000], ids=len
)
def test_status_file_with_something_else_is_no_beat(tmp_path, text):
    path = tmp_path / "status.json"
    probe = BeatProbe(path, first_s=1.0)
    probe.start(now_s=0.0)
    path.write_text(text)
    assert probe.check(now_s=2.0) == "no sign of life since its start"


def test_excuse_counts_afresh(tmp_path):
    path = tmp_path / "status.json"
    probe = BeatProbe(path, stale_s=10.0)
    probe.start(now_s=0.0)
    write_beat(path, 1.0)
    assert probe.check(now_s=1.0) == ""
    probe.excuse(now_s=100.0)
    assert probe.check(now_s=109.0) == ""


# -- health over HTTP --------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(*, tls=None):
        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*map(str, tls))
            server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # a client that goes away in the handshake
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return server.server_address[1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_plain_url_answers(serve):
    assert fetch_status(f"http://127.0.0.1:{serve()}/health") == 200


def test_url_without_a_server_gives_zero(serve):
    port = serve()
    assert fetch_status(f"http://127.0.0.1:{port}/", timeout_s=2.0) == 200
    assert fetch_status("http://127.0.0.1:1/", timeout_s=2.0) == 0


def test_tls_wants_the_authority_or_the_very_certificate(serve, tmp_path):
    (tmp_path / "other").mkdir()
    ours = make_certificate(tmp_path, names=("gateway.example",))
    other = make_certificate(tmp_path / "other", names=("gateway.example",))
    url = f"https://127.0.0.1:{serve(tls=ours)}/health"
    assert fetch_status(url, pinned=ours[0]) == 200
    assert fetch_status(url, pinned=other[0]) == 0
    assert fetch_status(url) == 0
    assert fetch_status(url, authorities=ours[0]) == 0  # another name
    named = make_certificate(tmp_path)
    assert fetch_status(f"https://127.0.0.1:{serve(tls=named)}/", authorities=named[0]) == 200


def test_http_probe_allows_silence_for_a_while(monkeypatch):
    from fedinfer_flower.supervision import probes

    answers = {"now": 200}
    monkeypatch.setattr(probes, "fetch_status", lambda *_, **__: answers["now"])
    probe = HttpProbe("http://127.0.0.1:1/health", down_s=15.0, first_s=60.0, every_s=1.0)
    probe.start(now_s=0.0)
    answers["now"] = 0
    assert (probe.check(now_s=59.0), probe.answered) == ("", False)
    answers["now"] = 200
    assert (probe.check(now_s=60.5), probe.answered) == ("", True)
    answers["now"] = 503
    assert probe.check(now_s=75.0) == ""
    assert probe.check(now_s=76.0) == "it does not answer"


def test_url_of_another_kind_is_refused():
    with pytest.raises(InvalidValueError):
        HttpProbe("file:///etc/passwd")


# -- output ------------------------------------------------------------------------------


def test_log_is_put_aside_when_full_and_old_ones_go(tmp_path):
    file = OutputFile(tmp_path / "a.log", max_bytes=10, keep=2)
    for number in range(5):
        file.write(b"%d" % number * 10)
    file.write(b"end")
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert kept == {"a.log": b"end", "a.log.1": b"4" * 10, "a.log.2": b"3" * 10}
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


def test_log_that_cannot_be_written_loses_lines_only(tmp_path):
    file = OutputFile(tmp_path / "gone" / "a.log")
    file.write(b"lost")
    assert file.lost_bytes == 4


# -- folders and files -------------------------------------------------------------------


def test_folder_is_private_and_one_that_others_write_is_refused(tmp_path):
    folder = private_folder(tmp_path / "home")
    assert folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o770)
    with pytest.raises(DeploymentError, match="others may write"):
        private_folder(folder)


def test_key_that_others_can_read_is_refused(tmp_path):
    key = tmp_path / "node.key"
    key.write_text("secret")
    key.chmod(0o600)
    require_private_file(key, "the node key")
    key.chmod(0o640)
    with pytest.raises(DeploymentError, match="can be read by others") as caught:
        require_private_file(key, "the node key")
    assert "secret" not in str(caught.value)
    with pytest.raises(DeploymentError, match="cannot be read"):
        require_private_file(tmp_path / "none", "the node key")


def test_second_supervisor_of_a_folder_is_refused(tmp_path):
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    assert not RunFolder.is_taken(first.path)
    first.take()
    assert RunFolder.is_taken(first.path)
    with pytest.raises(DeploymentError, match="another process"):
        second.take()
    first.release()
    second.take()
    second.release()


# -- certificates ------------------------------------------------------------------------


def test_certificate_says_its_names_and_days(tmp_path):
    path, _ = make_certificate(tmp_path, days=90, start=NOW)
    (facts,) = read_certificates(path, now=NOW + datetime.timedelta(days=80))
    assert facts.names == ("localhost", "127.0.0.1")
    assert facts.days_left == pytest.approx(10.0)
    assert not facts.is_authority


def test_certificate_near_its_end_warns_and_after_it_is_refused(tmp_path):
    path, _ = make_certificate(tmp_path, days=90, start=NOW)
    day = datetime.timedelta(days=1)
    assert require_valid(path, now=NOW + day) == ""
    assert "ends in 10 days" in require_valid(path, now=NOW + 80 * day)
    with pytest.raises(DeploymentError, match="ended 10 days ago"):
        require_valid(path, now=NOW + 100 * day)
    with pytest.raises(DeploymentError, match="not valid yet"):
        require_valid(path, now=NOW - day)


@pytest.mark.parametrize("text", ["", "-----BEGIN PRIVATE KEY-----\n"], ids=["empty", "key"])
def test_file_without_a_certificate_is_refused(tmp_path, text):
    path = tmp_path / "x.pem"
    path.write_text(text)
    with pytest.raises(DeploymentError, match="holds no certificate"):
        read_certificates(path)


# -- something that runs elsewhere -------------------------------------------------------


class FakeService:
    """Runs that end when the test says so."""

    def __init__(self, *, fail_starts=0):
        self.calls = []
        self.fail_starts = fail_starts
        self.over = {}

    def start(self):
        if self.fail_starts:
            self.fail_starts -= 1
            raise GatewayError("the SuperLink does not answer")
        name = f"run {sum(c[0] == 'start' for c in self.calls) + 1}"
        self.calls.append(("start", name))
        return name

    def ended(self, name):
        return self.over.get(name)

    def drain(self, name):
        self.calls.append(("drain", name))
        self.over[name] = Ended("ended", well=True)
        return True

    def stop(self, name):
        self.calls.append(("stop", name))


class FakeProbe(HttpProbe):
    """Answers from a list; the last one for ever."""

    def __init__(self, answers, **options):
        super().__init__("http://127.0.0.1:1/health", every_s=0.0, **options)
        self.answers = list(answers)

    def check(self, *, now_s):
        up = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if up:
            self._answered, self._well_at = True, now_s
        limit = self.down_s if self._answered else self.first_s
        return "it does not answer" if now_s - self._well_at > limit else ""


def keeper(service, probe, **options):
    return ServiceKeeper(
        service, probe, backoff=Backoff(first_s=0.01, cap_s=0.02), poll_s=0.01, **options
    )


def run_until(one, condition):
    stop = StopFlag()
    thread = threading.Thread(target=one.run, args=(stop,))
    thread.start()
    for _ in range(3000):
        if condition():
            break
        thread.join(timeout=0.01)
    stop.set()
    thread.join(timeout=60)
    assert condition()
    assert not thread.is_alive()


def test_service_is_drained_before_it_is_stopped():
    service = FakeService()
    run_until(keeper(service, FakeProbe([True])), lambda: service.calls)
    assert service.calls == [("start", "run 1"), ("drain", "run 1"), ("stop", "run 1")]


def test_service_that_is_silent_is_stopped_and_started_again():
    service = FakeService()
    probe = FakeProbe([True, False], down_s=0.1, first_s=0.2)
    one = keeper(service, probe)
    run_until(one, lambda: one.starts >= 2)
    assert service.calls[:3] == [("start", "run 1"), ("stop", "run 1"), ("start", "run 2")]


def test_service_that_cannot_be_started_is_tried_again():
    service = FakeService(fail_starts=3)
    one = keeper(service, FakeProbe([True]))
    run_until(one, lambda: one.starts == 1)
    assert service.fail_starts == 0


def test_once_gives_up_at_the_first_failure():
    assert keeper(FakeService(fail_starts=1), FakeProbe([False])).run(StopFlag(), once=True) == 1


def test_service_that_runs_already_is_watched_and_not_started():
    service, probe = FakeService(), FakeProbe([True])
    run_until(keeper(service, probe, found="run 9"), lambda: probe.answered)
    assert service.calls == [("drain", "run 9"), ("stop", "run 9")]
