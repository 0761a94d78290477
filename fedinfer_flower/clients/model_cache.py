"""Models stay resident: a bounded cache for the whole process.

It lives at module level because Flower's simulation engine rebuilds the ClientApp, and
with it every mod, for each message; a Ray actor serves any partition, so the key has
run and partition in it and the bound keeps ten partitions from filling the memory.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from fedinfer_flower.clients.site_model import SiteModel

__all__ = ["DEFAULT_CAPACITY", "clear", "get_or_load"]

DEFAULT_CAPACITY: Final = 8
"""Models held per process; more are dropped, least recently used first."""

_Key = tuple[int, str, str]
_models: OrderedDict[_Key, SiteModel] = OrderedDict()
_locks: dict[_Key, threading.Lock] = {}
_guard = threading.Lock()


def get_or_load(key: _Key, load: Callable[[], SiteModel], *, capacity: int) -> SiteModel:
    """Return the model of (run, partition, loader), loading it at most once at a time.

    A load that raises leaves nothing behind: the next query tries again.
    """
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
    """Forget all models of this process."""
    with _guard:
        _models.clear()
        _locks.clear()
