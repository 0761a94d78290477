"""Models stay resident: a bounded cache for the whole process.

It lives at module level because Flower's simulation engine rebuilds the ClientApp, and
with it every mod, for each message; a Ray actor serves any partition, so the key has
run and partition in it and the bound keeps ten partitions from filling the memory. A site's
own worker serves one app, which no run can change: there a model stays for all runs
(`keep_across_runs`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Final

from fedinfer_flower.clients.site_model import SiteModel

__all__ = [
    "ANY_RUN",
    "DEFAULT_CAPACITY",
    "clear",
    "forget_other_runs",
    "get_or_load",
    "keep_across_runs",
    "shared_key",
]

DEFAULT_CAPACITY: Final = 8
"""Models held per process; more are dropped, least recently used first."""

_Key = tuple[int, str, str]
_models: OrderedDict[_Key, SiteModel] = OrderedDict()
_locks: dict[_Key, threading.Lock] = {}
_guard = threading.Lock()
ANY_RUN: Final = 0
"""Stands for the run of what stays for all runs; no run of Flower has it."""
_across_runs = threading.Event()


def keep_across_runs() -> None:
    """Keep one model for all runs of this process, from now on.

    For a process whose app is the site's own. What loads the model must not depend on the
    run: it is given the Context of the first one.
    """
    _across_runs.set()


def forget_other_runs(run_ids: Collection[int]) -> None:
    """Drop the models of runs that are not among `run_ids`; those of all runs stay."""
    with _guard:
        for key in [key for key in _models if key[0] not in {ANY_RUN, *run_ids}]:
            del _models[key]
            _locks.pop(key, None)


def shared_key(key: _Key) -> _Key:
    """Return a key of (run, partition, loader); without its run, if models stay for all runs."""
    return (ANY_RUN, *key[1:]) if _across_runs.is_set() else key


def get_or_load(key: _Key, load: Callable[[], SiteModel], *, capacity: int) -> SiteModel:
    """Return the model of (run, partition, loader), loading it at most once at a time.

    A load that raises leaves nothing behind: the next query tries again.
    """
    key = shared_key(key)
    with _guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        with _guard:
            if key in _models:
                _models.move_to_end(key)
                return _models[key]
        model = load()
        with _guard:
            _models[key] = model
            while len(_models) > capacity:
                oldest, _ = _models.popitem(last=False)
                _locks.pop(oldest, None)
        return model


def clear() -> None:
    """Forget all models of this process, and that they stay across runs."""
    _across_runs.clear()
    with _guard:
        _models.clear()
        _locks.clear()
