"""Which app answers, the status file, the key, and the arguments."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
from flwr.clientapp import ClientApp

from fedinfer_flower.clients import model_cache
from fedinfer_flower.clients.app_source import Bundle, ListedFabs, OwnApp
from fedinfer_flower.clients.warm_supernode import check_arguments
from fedinfer_flower.clients.worker_key import read_or_make_key
from fedinfer_flower.clients.worker_status import Status, StatusFile, read_status
from fedinfer_flower.errors import DeploymentError, InvalidValueError, PolicyRefusedError

HASHES = [hashlib.sha256(name).hexdigest() for name in (b"one", b"two", b"three")]


def bundle(number: int) -> Bundle:
    return Bundle(fab_id="a/b", fab_version="1", fab_hash=HASHES[number], content=b"zip")


class Loads:
    def __init__(self) -> None:
        self.bundles: list[str] = []

    def __call__(self, found: Bundle) -> ClientApp:
        self.bundles.append(found.fab_hash)
        return ClientApp()


# -- apps --------------------------------------------------------------------------------


def test_own_app_answers_runs_of_any_bundle():
    app = ClientApp()
    source = OwnApp(app)
    assert source.get(1, bundle(0)) is source.get(2, bundle(1)) is app
    assert not source.wants_bundle
    assert source.lists("anything")


def test_listed_bundle_is_loaded_once():
    loads = Loads()
    source = ListedFabs(HASHES[:1], load=loads)
    assert source.get(1, bundle(0)) is source.get(2, bundle(0))
    assert loads.bundles == HASHES[:1]
    assert source.pinned == HASHES[0]


@pytest.mark.parametrize("listed", [[], HASHES[1:]], ids=["none", "others"])
def test_bundle_that_is_not_listed_is_refused_before_it_is_loaded(listed):
    loads = Loads()
    with pytest.raises(PolicyRefusedError):
        ListedFabs(listed, load=loads).get(1, bundle(0))
    assert loads.bundles == []


def test_second_listed_bundle_is_not_loaded_in_the_same_process():
    loads = Loads()
    source = ListedFabs(HASHES, load=loads)
    source.get(1, bundle(0))
    with pytest.raises(PolicyRefusedError, match="started anew"):
        source.get(2, bundle(1))
    assert loads.bundles == HASHES[:1]


def test_bundle_whose_load_failed_stays_the_only_one():
    def fails(found):
        raise ImportError("half of it is imported")

    source = ListedFabs(HASHES, load=fails)
    with pytest.raises(ImportError):
        source.get(1, bundle(0))
    assert source.pinned == HASHES[0]


@pytest.mark.parametrize("value", ["", "abc", "A" * 64, "g" * 64, "0" * 63])
def test_listed_hash_that_is_none_is_refused(value):
    with pytest.raises(InvalidValueError, match="fab_hashes"):
        ListedFabs([value])


def test_bytes_that_are_not_of_the_hash_are_not_installed():
    from fedinfer_flower.flower_internals.fab_app import app_of_fab

    with pytest.raises(DeploymentError, match="not the one that its hash names"):
        app_of_fab(b"other", fab_id="a/b", fab_version="1", fab_hash=HASHES[0])


# -- models across runs --------------------------------------------------------------------


def test_models_stay_across_runs_once_told(monkeypatch):
    model_cache.clear()
    made = []

    def load():
        made.append(object())
        return made[-1]

    try:
        model_cache.get_or_load((1, "0", "m"), load, capacity=2)
        model_cache.get_or_load((2, "0", "m"), load, capacity=2)
        assert len(made) == 2
        model_cache.keep_across_runs()
        first = model_cache.get_or_load((3, "0", "m"), load, capacity=2)
        assert model_cache.get_or_load((4, "0", "m"), load, capacity=2) is first
        model_cache.forget_other_runs([2])
        assert model_cache.get_or_load((5, "0", "m"), load, capacity=2) is first
        assert len(made) == 3
    finally:
        model_cache.clear()


def test_models_of_other_runs_are_forgotten():
    model_cache.clear()
    made = []
    try:
        for run_id in (1, 2):
            model_cache.get_or_load((run_id, "0", "m"), lambda: made.append(1), capacity=4)
        model_cache.forget_other_runs([2])
        for run_id in (1, 2):
            model_cache.get_or_load((run_id, "0", "m"), lambda: made.append(1), capacity=4)
        assert len(made) == 3
    finally:
        model_cache.clear()


# -- the status file -----------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def file_of(tmp_path, clock) -> StatusFile:
    return StatusFile(
        tmp_path / "run" / "s.json", role="worker", starting_s=60.0, clock=clock, monotonic=clock
    )


def test_status_is_read_as_it_was_written(tmp_path):
    clock = Clock()
    file = file_of(tmp_path, clock)
    file.start()
    file.busy(10.0)
    clock.now = 105.0
    file.write()
    expected = Status(
        pid=os.getpid(),
        role="worker",
        beat_at=105.0,
        state="busy",
        busy_since=100.0,
        tasks_done=0,
        last_error="",
    )
    assert read_status(tmp_path / "run" / "s.json") == expected
    file.done("TypeError")
    file.done()
    found = file.status()
    assert found is not None
    assert (found.state, found.tasks_done, found.last_error) == ("idle", 2, "TypeError")
    file.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["s.json"]


@pytest.mark.parametrize(
    ("step", "well_s"),
    [
        (lambda file: None, 60.0),
        (lambda file: file.idle(5.0), 5.0),
        (lambda file: file.alive(7.0), 7.0),
        (lambda file: file.busy(9.0), 9.0),
    ],
    ids=["starting", "idle", "alive", "busy"],
)
def test_beat_stops_when_a_step_takes_longer_than_it_may(tmp_path, step, well_s):
    clock = Clock()
    file = file_of(tmp_path, clock)
    step(file)
    clock.now += well_s
    assert file.status() is not None
    clock.now += 0.1
    assert file.status() is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"pid": 1}', "x" * 5000],
    ids=["empty", "cut-off", "list", "no-fields", "one-field", "long"],
)
def test_status_that_cannot_be_read_is_none(tmp_path, text):
    path = tmp_path / "s.json"
    path.write_text(text)
    assert read_status(path) is None


def test_status_of_an_unknown_state_is_none(tmp_path):
    file = file_of(tmp_path, Clock())
    file.start()
    path = tmp_path / "run" / "s.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"state": "odd"}))
    assert read_status(path) is None
    file.close()


# -- key and arguments ---------------------------------------------------------------------


def test_key_is_made_once_and_private(tmp_path):
    path = tmp_path / "run" / "worker.key"
    key = read_or_make_key(path)
    assert read_or_make_key(path) == key
    assert path.stat().st_mode & 0o777 == 0o600
    assert [found.name for found in path.parent.iterdir()] == ["worker.key"]


def test_key_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "worker.key"
    read_or_make_key(path)
    path.chmod(0o644)
    with pytest.raises(DeploymentError, match="read by others"):
        read_or_make_key(path)


@pytest.mark.parametrize("text", ["", "short", "x" * 99])
def test_file_without_a_key_is_refused(tmp_path, text):
    path = tmp_path / "worker.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(DeploymentError, match="holds no key"):
        read_or_make_key(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs a worker"),
        (["--isolation", "subprocess"], "needs a worker"),
        (["--isolation=process", "--superexec-auth-secret-file", "f"], "SuperExec"),
        (["--isolation=process", "--host", "0.0.0.0"], "beyond this machine"),  # noqa: S104
    ],
    ids=["none", "subprocess", "secret", "host"],
)
def test_arguments_that_do_not_fit_a_worker_are_refused(arguments, words):
    with pytest.raises(DeploymentError, match=words):
        check_arguments(arguments)


@pytest.mark.parametrize(
    "arguments",
    [["--isolation", "process"], ["--isolation=process", "--host=127.0.0.1", "--insecure"]],
    ids=["apart", "together"],
)
def test_arguments_that_fit_a_worker_are_accepted(arguments):
    check_arguments(arguments)
