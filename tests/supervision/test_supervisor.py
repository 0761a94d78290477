"""Real processes: crash loops, wedges, order of ends, a supervisor that is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fedinfer_flower.errors import InvalidValueError
from fedinfer_flower.supervision.backoff import Backoff
from fedinfer_flower.supervision.child import ChildSpec
from fedinfer_flower.supervision.probes import BeatProbe
from fedinfer_flower.supervision.run_folder import RunFolder
from fedinfer_flower.supervision.supervisor import StopFlag, Supervisor

MOST_S = 60.0
"""A bound that is only met when something hangs."""

BEATING = """
import json, os, pathlib, sys, time
path = pathlib.Path(sys.argv[1])
while True:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps({"pid": os.getpid(), "beat_at": time.time()}))
    draft.replace(path)
    time.sleep(0.05)
"""

SLEEPING = "import time; time.sleep(600)"


def wait_for(condition, what):
    end = time.monotonic() + MOST_S
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # a zombie is dead
        return file.read().rpartition(")")[2].split()[0] != "Z"


def spec(folder, name, code, *arguments, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return ChildSpec(
        name=name,
        command=lambda: command,
        log=folder / f"{name}.log",
        **({"grace_s": 5.0} | options),
    )


class Running:
    """A supervisor in this process, whose children are looked at from the test's thread."""

    def __init__(self, specs, folder, **options):
        self.folder = RunFolder(folder / "run")
        self.stop = StopFlag()
        self.supervisor = Supervisor(
            specs,
            folder=self.folder,
            poll_s=0.05,
            backoff=lambda: Backoff(first_s=0.1, cap_s=0.2),
            **options,
        )
        self.status = None
        # Not the main thread, but one that stays for as long as the children.
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        self.status = self.supervisor.run(self.stop)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join(timeout=MOST_S)
        assert not self.thread.is_alive()

    def child(self, name):
        return next(c for c in self.supervisor.children if c.spec.name == name)

    def pid(self, name):
        wait_for(lambda: self.child(name).pid, f"{name} to run")
        return self.child(name).pid


def test_child_that_crashes_is_started_again_and_again(tmp_path):
    with Running([spec(tmp_path, "loop", "raise SystemExit(3)")], tmp_path) as running:
        wait_for(lambda: running.child("loop").starts >= 3, "three starts")
    assert running.child("loop").why == "ended with status 3"
    assert running.status == 0


def test_child_that_is_killed_is_started_again_and_its_neighbour_is_left_alone(tmp_path):
    specs = [spec(tmp_path, "node", SLEEPING), spec(tmp_path, "worker", SLEEPING)]
    with Running(specs, tmp_path) as running:
        neighbour, victim = running.pid("node"), running.pid("worker")
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: running.child("worker").starts == 2, "a second start")
        assert running.pid("node") == neighbour
        assert running.child("worker").why == "was ended by SIGKILL"
        assert running.pid("worker") != victim
    assert not is_alive(neighbour)


def test_frozen_child_is_killed_and_started_again(tmp_path):
    beat = tmp_path / "beat.json"
    one = spec(
        tmp_path, "worker", BEATING, beat, probe=BeatProbe(beat, stale_s=1.5), wedged_grace_s=0.2
    )
    with Running([one], tmp_path) as running:
        wait_for(beat.exists, "a heartbeat")
        frozen = running.pid("worker")
        os.kill(frozen, signal.SIGSTOP)
        wait_for(lambda: running.child("worker").starts == 2, "a second start")
        assert not is_alive(frozen)
        assert running.child("worker").why == "its heartbeat has stopped"
        wait_for(beat.exists, "a heartbeat of the new one")


def test_child_without_any_heartbeat_is_started_again(tmp_path):
    probe = BeatProbe(tmp_path / "never.json", first_s=0.5)
    with Running([spec(tmp_path, "mute", SLEEPING, probe=probe)], tmp_path) as running:
        wait_for(lambda: running.child("mute").starts == 2, "a second start")
    assert running.child("mute").why == "no sign of life since its start"


def test_children_end_in_the_opposite_order_and_the_last_one_may_finish(tmp_path):
    code = """
import os, signal, sys, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
print("up", flush=True)
while not told:
    time.sleep(0.01)
time.sleep(0.3)  # the task in hand
with open(sys.argv[1], "a") as file:
    file.write(sys.argv[2] + "\\n")
"""
    order = tmp_path / "order"
    specs = [spec(tmp_path, name, code, order, name) for name in ("node", "worker")]
    with Running(specs, tmp_path):
        for name in ("node", "worker"):
            log = tmp_path / f"{name}.log"
            wait_for(lambda log=log: log.exists() and b"up" in log.read_bytes(), name)
    assert order.read_text().split() == ["worker", "node"]


def test_child_that_does_not_end_is_killed_with_what_it_started(tmp_path):
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", {SLEEPING!r}])
print(child.pid, flush=True)
time.sleep(600)
"""
    with Running([spec(tmp_path, "deaf", code, grace_s=0.2)], tmp_path) as running:
        log = tmp_path / "deaf.log"
        wait_for(lambda: log.exists() and log.read_text().strip(), "the grandchild")
        pids = running.pid("deaf"), int(log.read_text())
    wait_for(lambda: not any(map(is_alive, pids)), "both to be gone")


def test_exit_status_that_asks_for_it_is_started_without_a_wait(tmp_path):
    one = spec(tmp_path, "worker", "raise SystemExit(77)", at_once=frozenset({77}))
    with Running([one], tmp_path) as running:
        wait_for(lambda: running.child("worker").starts >= 2, "a second start")
    assert running.child("worker").backoff.failures == 0


def test_child_whose_command_changes_is_started_with_the_new_one(tmp_path):
    where = ["one"]
    code = "import sys, time; print(sys.argv[1], flush=True); time.sleep(600)"
    one = ChildSpec(
        name="worker",
        command=lambda: [sys.executable, "-c", code, where[0]],
        log=tmp_path / "worker.log",
    )
    with Running([one], tmp_path) as running:
        wait_for(lambda: one.log.exists() and "one" in one.log.read_text(), "the first")
        where[0] = "two"
        wait_for(lambda: "two" in one.log.read_text(), "the second")
    assert running.child("worker").starts == 2


def test_once_ends_everything_with_the_first_child(tmp_path):
    specs = [spec(tmp_path, "node", SLEEPING), spec(tmp_path, "worker", "raise SystemExit(0)")]
    supervisor = Supervisor(specs, poll_s=0.05)
    assert supervisor.run(StopFlag(), once=True) == 1
    assert not any(child.runs for child in supervisor.children)


def test_state_file_says_what_runs_and_how_the_last_one_ended(tmp_path):
    with Running([spec(tmp_path, "loop", "raise SystemExit(3)")], tmp_path) as running:
        wait_for(lambda: running.child("loop").starts >= 2, "two starts")
        wait_for(
            lambda: (RunFolder.read(running.folder.path) or {"children": [{"restarts": 0}]})[
                "children"
            ][0]["restarts"],
            "the state",
        )
    state = RunFolder.read(running.folder.path)
    (child,) = state["children"]
    assert state["pid"] == os.getpid()
    assert (child["name"], child["last_end"], child["pid"]) == ("loop", "ended with status 3", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_no_child_is_left_when_the_supervisor_is_killed(tmp_path):
    code = """
import sys
from pathlib import Path
from fedinfer_flower.supervision.child import ChildSpec
from fedinfer_flower.supervision.run_folder import RunFolder
from fedinfer_flower.supervision.supervisor import StopFlag, Supervisor
folder = Path(sys.argv[1])
command = [sys.executable, "-c",
           "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
           "print('up', flush=True); time.sleep(600)"]
specs = [ChildSpec(name=n, command=lambda: command, log=folder / n) for n in ("a", "b")]
Supervisor(specs, folder=RunFolder(folder / "run"), poll_s=0.05).run(StopFlag())
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    try:
        for name in ("a", "b"):
            log = tmp_path / name
            wait_for(lambda log=log: log.exists() and b"up" in log.read_bytes(), name)
        wait_for(lambda: RunFolder.read(tmp_path / "run") is not None, "the state")
        children = RunFolder.read(tmp_path / "run")["children"]
        pids = [child["pid"] for child in children]
        assert all(map(is_alive, pids))
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(is_alive, pids)), "the children to be gone")
    finally:
        process.kill()
        process.wait()


def test_launcher_runs_nothing_for_a_parent_that_is_gone(tmp_path):
    from fedinfer_flower.supervision.binding import bound_command

    canary = tmp_path / "canary"
    done = subprocess.run(bound_command(["touch", str(canary)], parent=2**22 + 1))
    assert done.returncode == 113
    assert not canary.exists()


def test_launcher_explains_a_wrong_command_line():
    command = [sys.executable, "-m", "fedinfer_flower.supervision.launch", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 64
    assert "usage" in done.stderr


def test_children_with_one_name_are_refused(tmp_path):
    with pytest.raises(InvalidValueError, match="names"):
        Supervisor([spec(tmp_path, "a", SLEEPING), spec(tmp_path, "a", SLEEPING)])


def test_environment_of_a_child_is_not_in_its_command_line(tmp_path):
    code = "import os, json; print(json.dumps(os.environ['FI_CANARY']), flush=True)"
    one = spec(
        tmp_path, "a", code + "; import time; time.sleep(600)", environment={"FI_CANARY": "x9"}
    )
    with Running([one], tmp_path) as running:
        log = tmp_path / "a.log"
        wait_for(lambda: log.exists() and log.read_text().strip(), "output")
        assert json.loads(log.read_text()) == "x9"
        assert "x9" not in " ".join(running.child("a").command)
    assert "x9" not in repr(one)
    assert log.stat().st_mode & 0o077 == 0
