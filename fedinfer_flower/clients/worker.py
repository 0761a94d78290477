"""The resident worker of a site: takes tasks from its SuperNode and keeps the models loaded.

``python -m fedinfer_flower.clients.worker --runtime-api-address 127.0.0.1:9094 --policy site.toml
--status worker.json`` beside ``flower-supernode --isolation process``, warm or stock. Without
it, Flower starts a process for every message.

What is given up for the speed: one process answers all messages of all runs, so an app that
leaks state leaks it between runs. A site's own app answers by default, and code of a run never
loads; see `clients.app_source`.

Exit codes: 0 after SIGTERM or SIGINT, with the task in hand finished; 76 (`EXIT_OTHER_FAB`) to be
started anew at once, for another listed app bundle; 78 (`EXIT_CONFIG`) for what a restart does
not mend.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedinfer_flower.clients import language_state, model_cache
from fedinfer_flower.clients.app_source import AppSource, Bundle, ListedFabs, OwnApp
from fedinfer_flower.clients.worker_key import read_or_make_key
from fedinfer_flower.clients.worker_reply import safe_reply
from fedinfer_flower.clients.worker_status import StatusFile
from fedinfer_flower.errors import ConfigError, FedInferError, UnavailableError
from fedinfer_flower.flower_internals import require_flower, shorten_pull_backoff
from fedinfer_flower.flower_internals.polling import Polling, bounded_s
from fedinfer_flower.flower_internals.task_frames import OtherFab
from fedinfer_flower.observability.json_logs import configure_json_logs
from fedinfer_flower.observability.tracing import configure_tracing

if TYPE_CHECKING:
    from fedinfer_flower.flower_internals.task_desk import OpenTask, TaskDesk

__all__ = ["EXIT_CONFIG", "EXIT_OTHER_FAB", "main", "run_worker", "serve_tasks"]

log = logging.getLogger("fedinfer_flower.site")

EXIT_OTHER_FAB: Final = 76
EXIT_CONFIG: Final = 78

_WAIT_S: Final = 1.0
_BEAT_S: Final = 1.0
_AFTER_S: Final = 10.0
"""After a message's time is up, its reply is of no use; so long the task may still go on."""
_MOST_S: Final = 3600.0
_RUN_KEPT_S: Final = 900.0


def serve_tasks(
    desk: TaskDesk,
    apps: AppSource,
    *,
    status: StatusFile,
    stop: threading.Event,
) -> int:
    """Take tasks and reply to them until `stop` is set.

    Parameters
    ----------
    desk : TaskDesk
    apps : AppSource
    status : StatusFile
        Started.
    stop : threading.Event
        The task in hand is finished first.

    Returns
    -------
    int
        The exit code of the process.

    Raises
    ------
    DeploymentError
        If the SuperNode does not accept this worker.
    """
    polling, runs = Polling(), _Runs()
    pinned = apps.pinned
    with _Beats(desk) as beats:
        while not stop.is_set():
            status.idle()
            try:
                found = desk.take(pinned=pinned, with_fab=apps.wants_bundle, wait_s=_WAIT_S)
            except UnavailableError as exc:
                log.warning("%s", exc.message)
                stop.wait(1.0)
                continue
            pinned = apps.pinned
            if found is None:
                if not desk.is_warm:
                    stop.wait(polling.pause_s())
                continue
            if isinstance(found, OtherFab):
                if apps.lists(found.fab_hash):
                    return EXIT_OTHER_FAB
                pinned = ""  # to take the task and refuse it
                continue
            polling.traffic()
            _serve(desk, found, apps, status=status, beats=beats)
            runs.seen(found.context.run_id)
            pinned = apps.pinned
    return 0


def _serve(
    desk: TaskDesk, task: OpenTask, apps: AppSource, *, status: StatusFile, beats: _Beats
) -> None:
    status.busy(bounded_s(task.message.metadata.ttl, most_s=_MOST_S) + _AFTER_S)
    bundle = Bundle(
        fab_id=task.fab_id,
        fab_version=task.fab_version,
        fab_hash=task.fab_hash,
        content=task.fab_bytes,
    )
    beats.begin(task)
    failed = ""
    try:
        safe = safe_reply(task.message, task.context, lambda: apps.get(task.context.run_id, bundle))
        failed = safe.failed
        if not desk.give(task, safe.reply, failed=failed):
            failed = failed or "LateReply"
            log.warning("a reply came too late; the SuperNode no longer waits for it")
    except Exception as exc:
        # The SuperNode notices by itself: this worker asks again without having replied.
        failed = type(exc).__name__
        log.error("a reply could not be given (%s)", failed)
    finally:
        beats.end()
        status.done(failed)


class _Beats:
    """Says every second that a long task is still being worked on, from a thread of its own."""

    def __init__(self, desk: TaskDesk) -> None:
        self._desk = desk
        self._task: OpenTask | None = None
        self._since = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beats", daemon=True)

    def begin(self, task: OpenTask) -> None:
        self._since = time.monotonic()
        self._task = task

    def end(self) -> None:
        self._task = None

    def _run(self) -> None:
        while not self._ended.wait(_BEAT_S):
            task = self._task
            if task is None or time.monotonic() - self._since < _BEAT_S:
                continue
            try:
                if not self._desk.beat(task) and self._task is task:
                    log.warning("the SuperNode no longer waits for the task in hand")
            except FedInferError as exc:
                log.warning("%s", exc.message)

    def __enter__(self) -> _Beats:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=5.0)


class _Runs:
    """Drops models of runs from which nothing has come for a while."""

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}

    def seen(self, run_id: int) -> None:
        now = time.monotonic()
        is_new = run_id not in self._seen
        self._seen[run_id] = now
        if is_new:
            self._seen = {r: at for r, at in self._seen.items() if now - at < _RUN_KEPT_S}
            model_cache.forget_other_runs(self._seen)
            language_state.forget_other_runs(self._seen)


def run_worker(
    source: Callable[[], AppSource],
    *,
    address: str,
    status_file: Path,
    key_file: Path | None = None,
) -> int:
    """Serve a SuperNode's tasks in this process until SIGTERM or SIGINT; return the exit code.

    Parameters
    ----------
    source : callable
        Makes the source of apps; called once, while the status says "starting".
    address : str
        ``HOST:PORT`` of the SuperNode's Runtime API, on this machine.
    status_file : Path
    key_file : Path, optional
        See `clients.worker_key`.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    status = StatusFile(status_file, role="worker")
    status.start()
    try:
        require_flower()
        shorten_pull_backoff()
        from fedinfer_flower.flower_internals.task_desk import TaskDesk

        apps = source()
        key = read_or_make_key(key_file) if key_file is not None else ""
        return serve_tasks(TaskDesk(address, key=key), apps, status=status, stop=stop)
    except FedInferError as exc:
        log.error("%s", exc)
        return EXIT_CONFIG if isinstance(exc, ConfigError) else 1
    finally:
        status.close()


def _source_of(policy_file: Path) -> AppSource:
    """Return where the apps of a site come from, with what its policy names imported."""
    from fedinfer_flower.clients.policy import SitePolicy

    policy = SitePolicy.read(policy_file)
    for name in policy.code.preload:
        try:
            importlib.import_module(name)
        except Exception as exc:
            raise ConfigError(
                f"[code] preload: {name!r} cannot be imported ({type(exc).__name__})",
                hint="install it in the environment of the site",
            ) from None
    if policy.code.app == "fab":
        return ListedFabs(policy.code.fab_hashes)
    from fedinfer_flower.clients.site_app import site_app

    # The site's own app is the same for every run: its models stay.
    model_cache.keep_across_runs()
    return OwnApp(site_app(policy))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker of a site until it is told to end, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fedinfer_flower.clients.worker")
    parser.add_argument("--runtime-api-address", required=True, metavar="HOST:PORT")
    parser.add_argument("--policy", required=True, type=Path, metavar="site.toml")
    parser.add_argument("--status", required=True, type=Path, metavar="FILE")
    parser.add_argument("--worker-key", type=Path, metavar="FILE", help="made if it is not there")
    options = parser.parse_args(arguments)
    return run_worker(
        lambda: _source_of(options.policy),
        address=options.runtime_api_address,
        status_file=options.status,
        key_file=options.worker_key,
    )


if __name__ == "__main__":
    configure_json_logs()
    configure_tracing(service="fedinfer-site")
    sys.exit(main())
