"""Another user of the site's machine: at the loopback port, in folders, in the process list."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time

import httpx
import pytest
import uvicorn
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.supercore.constant import TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from fedinfer_flower.cli.site import run_site
from fedinfer_flower.cli.site_children import Link, RuntimeAddress, site_children
from fedinfer_flower.clients.policy import SitePolicy
from fedinfer_flower.clients.warm_supernode import check_arguments
from fedinfer_flower.clients.worker import _source_of
from fedinfer_flower.clients.worker_key import read_or_make_key
from fedinfer_flower.errors import ConfigError, DeploymentError, UnavailableError
from fedinfer_flower.flower_internals import task_desk
from fedinfer_flower.flower_internals.local_wire import take_identity
from fedinfer_flower.flower_internals.node_desk import NodeDesk
from fedinfer_flower.flower_internals.node_key import worker_proof
from fedinfer_flower.flower_internals.node_routes import TaskRoutes
from fedinfer_flower.flower_internals.task_desk import OpenTask, TaskDesk
from fedinfer_flower.flower_internals.task_frames import (
    GIVE,
    KEY_HEADER,
    TAKE,
    WORKER_HEADER,
    frames_to_bytes,
)
from fedinfer_flower.supervision.binding import bound_command
from fedinfer_flower.supervision.run_folder import RunFolder

KEY = "k" * 43
POSIX_ROOT = os.name == "posix" and os.geteuid() == 0


class Imposter:
    """Listens where a SuperNode should, keeps what it is sent, and answers what it likes."""

    def __init__(self, status: int = 204, headers: dict[str, str] | None = None, body: bytes = b""):
        self.heard: list[bytes] = []
        lines = [f"HTTP/1.1 {status} X", "connection: close"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        lines += [] if status == 204 else [f"content-length: {len(body)}"]
        self._answer = "\r\n".join([*lines, "", ""]).encode() + body
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                self.heard.append(connection.recv(1 << 16))
                connection.sendall(self._answer)

    def __enter__(self) -> Imposter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@contextlib.contextmanager
def real_node(key: str, port: int = 0):
    """A warm SuperNode's routes at a port, with nothing to do."""
    take_identity(run_id=7)
    states = NodeStateFactory(ObjectStoreFactory())
    states.state().set_node_id(1000)
    desk = NodeDesk()
    app = TaskRoutes(create_app(states), desk, states, key=key)
    listening = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
    finally:
        desk.close()
        server.should_exit = True
        thread.join()
        listening.close()


def ask(desk: TaskDesk):
    return desk.take(pinned="", with_fab=False, wait_s=0.0)


# -- the port ------------------------------------------------------------------------------


TASK = frames_to_bytes([AcquireTaskResponse().SerializeToString(), b"", b""])
LIES = {
    "no task": (204, {}, b""),
    "a task": (200, {}, TASK),
    "another bundle": (409, {}, b"0" * 64),
    "no such route": (404, {}, b""),
    "a challenge": (403, {"fedinfer-challenge": "00" * 16}, b""),
    "a proof": (204, {"fedinfer-node-proof": "00" * 32}, b""),
}


@pytest.mark.parametrize("lie", LIES)
def test_who_takes_the_port_learns_no_key_and_is_not_served(lie):
    with Imposter(*LIES[lie]) as imposter:
        desk = TaskDesk(imposter.address, key=KEY)
        with pytest.raises((UnavailableError, DeploymentError)):
            ask(desk)
        desk.close()
    assert imposter.heard
    assert KEY.encode() not in b"".join(imposter.heard)


def test_what_a_worker_showed_at_one_port_is_of_no_use_at_another():
    with real_node(KEY) as address:
        url = f"http://{address}{TAKE}"
        challenge = httpx.post(url, headers={WORKER_HEADER: "x"}).headers["fedinfer-challenge"]
        with Imposter(403, {"fedinfer-challenge": challenge}) as imposter:
            desk = TaskDesk(imposter.address, key=KEY)
            with pytest.raises((UnavailableError, DeploymentError)):
                ask(desk)
            desk.close()
        lines = imposter.heard[-1].decode("latin-1").split("\r\n")[1:]
        shown = dict(line.split(": ", 1) for line in lines if ": " in line)
        assert "fedinfer-worker-key" in shown  # it did answer the challenge
        for name in ("host", "content-length"):
            shown.pop(name, None)
        assert httpx.post(url, headers=shown).status_code == 403


def test_what_a_worker_showed_is_of_no_use_after_a_restart():
    with real_node(KEY) as address:
        port = int(address.rpartition(":")[2])
        desk = TaskDesk(address, key=KEY)
        assert ask(desk) is None
        proof = worker_proof(KEY, port=port, challenge=desk._node._challenge)
        shown = {WORKER_HEADER: "x", KEY_HEADER: proof}
        assert httpx.post(f"http://{address}{TAKE}", headers=shown).status_code == 204
    with real_node(KEY, port) as address:
        assert httpx.post(f"http://{address}{TAKE}", headers=shown).status_code == 403
        # The worker itself is taken up again, without a word.
        assert ask(desk) is None
        desk.close()


@pytest.mark.parametrize("path", [TAKE, GIVE], ids=["take", "give"])
def test_without_the_key_nothing_is_handed_out_and_no_body_is_read(path):
    with real_node(KEY) as address:
        reply = httpx.post(
            f"http://{address}{path}", headers={WORKER_HEADER: "x"}, content=b"0" * (1 << 20)
        )
        assert (reply.status_code, reply.content) == (403, b"")
        # Flower's own way to a task is closed as well.
        wanted = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        flowers = httpx.post(
            f"http://{address}/v1/runtime/acquire-task",
            content=wanted.SerializeToString(),
            headers={"content-type": "application/x-protobuf"},
        )
        assert flowers.status_code >= 400 or not AcquireTaskResponse.FromString(flowers.content)


@pytest.mark.parametrize("inline", [True, False], ids=["small", "large"])
def test_who_takes_the_port_in_between_is_not_sent_the_reply(inline, monkeypatch):
    if not inline:
        monkeypatch.setattr(task_desk, "MAX_INLINE_BYTES", 1)
    take_identity(run_id=7)
    message = Message(RecordDict(), 1000, "query.any", ttl=60.0)
    message.metadata.__dict__["_message_id"] = message.object_id
    content = RecordDict({"record": ConfigRecord({"body": b"SCORES"})})
    reply = task_desk.pack_reply(Message(content, reply_to=message))
    task = OpenTask(
        message=message,
        context=Context(7, 1000, {}, RecordDict(), {}),
        fab_id="a/b",
        fab_version="1",
        fab_hash="0" * 64,
        fab_bytes=b"",
        token="token-of-the-task",  # noqa: S106
    )
    with Imposter(200) as imposter:
        desk = TaskDesk(imposter.address, key=KEY)
        with pytest.raises(UnavailableError):
            desk.give(task, reply)
        desk.close()
    assert imposter.heard
    assert b"SCORES" not in b"".join(imposter.heard)


# -- the working folder, the process list, the home ----------------------------------------


def policy_of(tmp_path, **tables) -> SitePolicy:
    given = {
        "site": {"name": "north", "home": "state"},
        "model": {"loader": "json:loads"},
        "answers": {"protections": ["plain"]},
        "queriers": {"registry": "ab" * 32},
    }
    return SitePolicy.from_mapping(given | tables, folder=tmp_path)


def children_of(tmp_path):
    policy = policy_of(tmp_path)
    return site_children(
        policy,
        policy_path=tmp_path / "site.toml",
        home=policy.open_home(),
        link=Link(address="127.0.0.1:9", insecure=True),
        runtime=RuntimeAddress(),
    )


@pytest.mark.parametrize("place", [0, 1], ids=["supernode", "worker"])
def test_modules_in_the_working_folder_are_not_imported(tmp_path, place):
    evil = tmp_path / "shared"
    evil.mkdir()
    for name in ("fedinfer_flower", "ctypes", "signal", "httpx", "argparse"):
        (evil / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    spec = children_of(tmp_path)[place]
    command = [*bound_command(list(spec.command())[:3]), "--help"]
    done = subprocess.run(
        command,
        cwd=evil,
        env=os.environ | dict(spec.environment),
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert not (tmp_path / "ran").exists()
    assert done.returncode == 0, done.stderr[-500:]


def test_process_list_names_files_and_no_secrets(tmp_path):
    children = children_of(tmp_path)
    key = read_or_make_key(tmp_path / "state" / "run" / "worker.key")
    for spec in children:
        words = " ".join(spec.command())
        assert key not in words
        assert "worker.key" in words


@pytest.mark.skipif(not POSIX_ROOT, reason="only root can use another user's folder")
def test_home_of_another_user_is_refused(tmp_path):
    (tmp_path / "state").mkdir(mode=0o700)
    os.chown(tmp_path / "state", 12345, 12345)
    with pytest.raises(DeploymentError, match="another user"):
        policy_of(tmp_path).open_home()


@pytest.mark.skipif(not POSIX_ROOT, reason="only root can use another user's folder")
def test_link_to_the_home_of_another_user_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    os.chown(tmp_path / "elsewhere", 12345, 12345)
    (tmp_path / "state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeploymentError, match="another user"):
        policy_of(tmp_path).open_home()


def test_second_supervisor_of_a_home_is_refused_and_a_third_after_the_first_is_not(tmp_path):
    first = RunFolder(tmp_path / "run")
    first.take()
    with pytest.raises(DeploymentError, match="already"):
        RunFolder(tmp_path / "run").take()
    first.release()
    third = RunFolder(tmp_path / "run")
    third.take()
    third.release()


# -- a careless operator -------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--isolation", "process", "--isolation", "subprocess"],
        ["--isolation=process", "--isolation=subprocess"],
        ["--isolation", "process", "--isol", "subprocess"],
        ["--isolation", "process", "--hos", "10.0.0.1"],
        ["--isolation", "process", "--host=10.0.0.1"],
        ["--isolation", "process", "--host", "127.0.0.1", "--host", "10.0.0.1"],
        ["--isolation", "process", "--superexec-auth-secret", "file"],
    ],
    ids=" ".join,
)
def test_arguments_that_undo_others_are_refused(arguments):
    # argparse takes the last of several, and what a word begins with for the word.
    with pytest.raises(DeploymentError):
        check_arguments(arguments)


def test_policy_that_others_can_replace_is_refused(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    path = folder / "site.toml"
    path.write_text("[site]\n")
    path.chmod(0o600)
    link = Link(address="127.0.0.1:9", insecure=True)
    folder.chmod(0o777)
    with pytest.raises(DeploymentError, match="rename files"):
        run_site(path, link=link)
    folder.chmod(0o1777)  # as /tmp is: now it is read
    with pytest.raises(ConfigError, match="lacks 'name'"):
        run_site(path, link=link)
    path.chmod(0o620)
    with pytest.raises(DeploymentError, match="others may write"):
        run_site(path, link=link)


@pytest.mark.skipif(not POSIX_ROOT, reason="only root can give a file away")
def test_policy_of_another_user_is_refused(tmp_path):
    path = tmp_path / "site.toml"
    path.write_text("[site]\n")
    path.chmod(0o600)
    os.chown(path, 12345, 12345)
    with pytest.raises(DeploymentError, match="another user owns"):
        run_site(path, link=Link(address="127.0.0.1:9", insecure=True))


def test_preload_that_is_not_installed_says_so(tmp_path):
    path = tmp_path / "site.toml"
    path.write_text(
        f'[site]\nname = "n"\nhome = "{tmp_path}/state"\n'
        '[model]\nloader = "json:loads"\n'
        '[answers]\nprotections = ["plain"]\nanyone = true\n'
        '[code]\npreload = ["no_such_module"]\n'
    )
    with pytest.raises(ConfigError, match=r"\[code\] preload: 'no_such_module'"):
        _source_of(path)
